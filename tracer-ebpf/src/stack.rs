//! Who called: the one place that knows how stacks are walked.
//!
//! From one frame to its caller by the unwind tables ([`crate::unwind`]), and where code has none by
//! the frame pointer, if that leads to known code. One frame is one iteration of `bpf_loop`, so that
//! the verifier follows one frame only.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::pt_regs,
    helpers::generated::{
        bpf_get_current_pid_tgid, bpf_ktime_get_ns, bpf_loop, bpf_probe_read_user,
    },
};
use tracer_common::{
    event::{EventHeader, EventKind, MAX_FRAMES, STACK_COPY_BYTES, StackCopyEvent, StackEnd},
    instance::Instance,
    ledger::Scope,
    unwind::{Rule, RuleKind, Segments, rule_cfa_offset, rule_frame_pointer_offset, rule_kind},
};

use crate::{
    atomic::swap_u32,
    call::{self, Called},
    kernel,
    maps::{COPIES, EVENTS, HINTS, SCRATCH, SCRATCH_SLOTS, Scratch, TRAILS, WINDOW_WORDS, config},
    pending,
    trail::{Start, Trail},
    unwind::{self, Code, SegmentList},
};

const PAGE_BYTES: u64 = 4096;
const WINDOW_BYTES: u32 = WINDOW_WORDS as u32 * 8;

/// Frames of code without tables are at most this large: a frame pointer further away is something else,
/// or of another stack.
const MAX_FRAME_BYTES: u64 = 1 << 20;

/// Between two reports of unknown code of one instance.
const UNKNOWN_CODE_INTERVAL_NS: u64 = 10_000_000;
/// Between two copies of stacks of one instance in the long run: at most 16 MiB a second go through the
/// ring buffer of copies.
const STACK_COPY_INTERVAL_NS: u64 = 2_000_000;
/// Copies that may come at once: as long as the tables of a new library are not there, nearly every
/// stack is a new one that needs help.
const STACK_COPY_BURST: u64 = 200;

/// A walk; gives its buffer back when told to.
pub(crate) struct Stack {
    scratch: *mut Scratch,
    start: Start,
    /// Its trail once it was [looked for](Self::recall), if it `may_have_trail`; else any.
    trail: *mut Trail,
    may_have_trail: bool,
    /// Another walk began alike.
    is_fork: bool,
}

impl Stack {
    /// Begins a walk of the thread whose registers these are, as seen at a return probe: the instruction
    /// pointer already is the return address into the allocator's caller.
    ///
    /// None if every buffer of this processor is in use.
    #[inline(always)]
    pub(crate) fn begin(regs: *const pt_regs, state: &Instance) -> Option<Self> {
        let scratch = claim()?;
        // SAFETY: claimed by this walk, the kernel hands every uprobe program a valid `pt_regs`, and
        // fields of a live map element; the segments in one read, as the user side replaces both halves
        // at once.
        unsafe {
            let start = Start {
                instruction_pointer: (*regs).rip,
                stack_pointer: (*regs).rsp,
                frame_pointer: (*regs).rbp,
                segments: (&raw const state.segments).read_volatile(),
            };
            (*scratch).walk.stack_start = start.stack_pointer;
            (*scratch).walk.window_bytes = 0;
            (*scratch).walk.has_trail = 0;
            // Which one is found out when it is asked for; an element in any case, of which the verifier knows.
            let Some(trail) = TRAILS.get_ptr_mut(0) else {
                give_back(scratch);
                return None;
            };
            Some(Self {
                scratch,
                start,
                trail,
                may_have_trail: !is_changing(state),
                is_fork: false,
            })
        }
    }

    /// The site that the walk would lead to, if it is known to be one that was made before.
    #[inline(always)]
    pub(crate) fn recall(&mut self, scope: Scope, state: &Instance) -> Option<u32> {
        if !self.may_have_trail {
            return None;
        }
        // SAFETY: live map elements, and claimed by this walk.
        unsafe {
            let (scratch, start) = (self.scratch, &self.start);
            let hints = HINTS.get_ptr(0)?;
            (*scratch).read_first((*hints).span_bytes(start));
            self.trail = (*hints).trail(start, &(*scratch).window, (*scratch).walk.window_bytes)?;
            let trail = &*self.trail;
            let version = trail.version();
            if !trail.begins(start, scope, state) {
                return None;
            }
            if u64::from(trail.span_bytes()) > (*scratch).walk.window_bytes {
                (*scratch).read_first(trail.span_bytes());
            }
            if (*scratch).walk.window_bytes >= u64::from(trail.span_bytes()) {
                let site = trail.site_if_in(start, &(*scratch).window, version);
                if site.is_some() {
                    return site;
                }
            }
            self.is_fork = trail.version() == version;
            None
        }
    }

    /// Walks.
    #[inline(always)]
    pub(crate) fn walk(&self, state: &Instance) {
        let Self {
            scratch,
            start,
            trail,
            ..
        } = *self;
        // SAFETY: claimed by this walk, and live map elements.
        unsafe {
            let walk = &mut (*scratch).walk;
            walk.address = start.instruction_pointer;
            walk.stack_pointer = start.stack_pointer;
            walk.frame_pointer = start.frame_pointer;
            walk.frame_pointer_place = IN_REGISTER;
            walk.unknown_code = unwind::zero();
            walk.is_passing = unwind::zero();
            walk.trampoline = if config!(families) == 0 {
                0
            } else {
                pending::trampoline_of((&raw const *state).cast_mut()).unwrap_or(0)
            };
            walk.code.forget();
            walk.segments = SegmentList {
                first: Segments(start.segments).first(),
                count: Segments(start.segments).count(),
            };
            (*scratch).event.hash = 0;
            (*scratch).event.depth = 0;
            (*scratch).event.end = StackEnd::DepthLimit as u32;
            if self.may_have_trail {
                (*scratch).walk.has_trail = u64::from((*trail).begin());
            }
        }
        let mut context = Context { scratch, trail };
        // SAFETY: the callback has the signature that the helper wants and the context outlives it.
        unsafe {
            bpf_loop(
                config!(max_depth),
                step as *const () as *mut c_void,
                (&raw mut context).cast::<c_void>(),
                0,
            );
            // What the walk relied on may have been of a library that is no more.
            if (*scratch).walk.is_passing != 0
                && (is_changing(state)
                    || (&raw const state.segments).read_volatile() != start.segments)
            {
                (*scratch).event.end = StackEnd::Changing as u32;
            }
        }
    }

    /// Has the walk [recalled](Self::recall) the next time. To be called only if nothing about it is
    /// left to be told. Not if it ended because memory could not be read: that may be there the next time,
    /// with the same words before it.
    #[inline(always)]
    pub(crate) fn remember(&self, scope: Scope, state: &Instance, site: u32) {
        // SAFETY: claimed by this walk, and a live map element.
        unsafe {
            if (*self.scratch).walk.has_trail != 0
                && (*self.scratch).walk.unknown_code == 0
                && (*self.scratch).event.end != StackEnd::Changing as u32
                && (*self.scratch).event.end != StackEnd::Unreadable as u32
            {
                (*self.trail).end(&self.start, scope, state, site);
                if let Some(hints) = HINTS.get_ptr_mut(0) {
                    (*hints).learn(&self.start, &*self.trail, self.is_fork);
                }
            }
        }
    }

    /// Hash of the frames; never 0, which stands for "no stack".
    #[inline(always)]
    pub(crate) fn hash(&self) -> u64 {
        // SAFETY: claimed by this walk.
        unsafe { (*self.scratch).event.hash | 1 << 63 }
    }

    /// Whether frames may be wrong.
    #[inline(always)]
    pub(crate) fn is_doubtful(&self) -> bool {
        // SAFETY: claimed by this walk.
        unsafe { (*self.scratch).event.end == StackEnd::Changing as u32 }
    }

    /// Whether the user side could do better with the stack's memory.
    #[inline(always)]
    pub(crate) fn wants_copy(&self) -> bool {
        // SAFETY: claimed by this walk.
        let end = unsafe { (*self.scratch).event.end };
        config!(copy_all_stacks) != 0
            || (end != StackEnd::Root as u32 && end != StackEnd::DepthLimit as u32)
    }

    /// Has the user side look at what is mapped, if the walk came upon code that is in no segment.
    #[inline(always)]
    pub(crate) fn report_unknown_code(&self, state: &Instance, instance: u32) {
        // SAFETY: claimed by this walk.
        let unknown_code = unsafe { (*self.scratch).walk.unknown_code };
        if unknown_code == 0 {
            return;
        }
        let at = (&raw const state.unknown_code_at_ns).cast_mut();
        // SAFETY: a field of a live map element.
        if !unsafe { is_due(at, UNKNOWN_CODE_INTERVAL_NS) } {
            return;
        }
        let event = EventHeader {
            kind: EventKind::UnknownCode as u32,
            // SAFETY: no argument.
            tgid: (unsafe { bpf_get_current_pid_tgid() } >> 32) as u32,
            instance,
            detail: 0,
        };
        // If there is no room, the next stack reports it.
        let _ = EVENTS.output::<EventHeader>(event, 0);
    }

    /// The buffer, with the frames.
    #[inline(always)]
    pub(crate) fn scratch(&self) -> *mut Scratch {
        self.scratch
    }

    /// Gives the buffer back.
    #[inline(always)]
    pub(crate) fn release(self) {
        // SAFETY: claimed by this walk, which is over, and a live map element.
        unsafe {
            if (*self.scratch).walk.has_trail != 0 {
                (*self.trail).give_back();
            }
            give_back(self.scratch);
        }
    }
}

/// Whether another stack of an instance may be copied now (a leaky bucket in the form of the generic
/// cell rate algorithm, ITU-T I.371).
#[inline(always)]
pub(crate) fn may_copy(state: &Instance) -> bool {
    if config!(copy_all_stacks) != 0 {
        return true;
    }
    let paid_until = (&raw const state.stack_copies_until_ns).cast_mut();
    // SAFETY: no argument, and a field of a live map element.
    unsafe {
        let now = bpf_ktime_get_ns();
        let mut until = paid_until.read_volatile();
        if until < now {
            until = now;
        }
        if until - now > (STACK_COPY_BURST - 1) * STACK_COPY_INTERVAL_NS {
            return false;
        }
        // Processors that ask at the same moment may pay for one copy only.
        paid_until.write_volatile(until + STACK_COPY_INTERVAL_NS);
    }
    true
}

/// Copies the memory of the stack for the user side. False if there is no room.
#[inline(always)]
pub(crate) fn copy(regs: *const pt_regs, header: EventHeader) -> bool {
    let Some(mut entry) = COPIES.reserve::<StackCopyEvent>(0) else {
        return false;
    };
    let event = entry.as_mut_ptr();
    // SAFETY: the kernel hands every uprobe program a valid `pt_regs`, and the entry is ours; every
    // field is written, but for memory beyond `bytes`, which the user side does not look at.
    unsafe {
        (*event).header = header;
        (*event).instruction_pointer = (*regs).rip;
        (*event).stack_pointer = (*regs).rsp;
        (*event).frame_pointer = (*regs).rbp;
        let start = (*regs).rsp & !(PAGE_BYTES - 1);
        let mut bytes = 0;
        for page in 0..STACK_COPY_BYTES / PAGE_BYTES as usize {
            let offset = page * PAGE_BYTES as usize;
            let to = (&raw mut (*event).memory).cast::<u8>().add(offset);
            let from = start.wrapping_add(offset as u64);
            if bpf_probe_read_user(to.cast(), PAGE_BYTES as u32, from as *const c_void) != 0 {
                break;
            }
            bytes = offset as u64 + PAGE_BYTES;
        }
        (*event).bytes = bytes;
    }
    entry.submit(0);
    true
}

/// Whether an interval has passed since the time at `at`, which becomes now if so. Processors that
/// ask at the same moment may both be told so.
///
/// # Safety
///
/// `at` is a field of a live map element.
#[inline(always)]
unsafe fn is_due(at: *mut u64, interval_ns: u64) -> bool {
    // SAFETY: no argument, and as the caller promises.
    unsafe {
        let now = bpf_ktime_get_ns();
        if now.wrapping_sub(at.read_volatile()) < interval_ns {
            return false;
        }
        at.write_volatile(now);
    }
    true
}

/// Whether libraries have changed since it was looked what is mapped.
#[inline(always)]
fn is_changing(state: &Instance) -> bool {
    // SAFETY: fields of a live map element.
    unsafe {
        (&raw const state.code_changes).read_volatile()
            != (&raw const state.code_seen).read_volatile()
    }
}

/// Takes a buffer of this processor that no other walk holds.
#[inline(always)]
pub(crate) fn claim() -> Option<*mut Scratch> {
    for slot in 0..SCRATCH_SLOTS {
        let scratch = SCRATCH.get_ptr_mut(slot)?;
        // SAFETY: an aligned field of a live map element.
        if unsafe { swap_u32(&raw mut (*scratch).claimed, 1) } == 0 {
            return Some(scratch);
        }
    }
    None
}

/// Gives a buffer back.
///
/// # Safety
///
/// It was claimed, and is used no more.
#[inline(always)]
pub(crate) unsafe fn give_back(scratch: *mut Scratch) {
    // SAFETY: an aligned field of a live map element.
    unsafe { swap_u32(&raw mut (*scratch).claimed, 0) };
}

/// What `bpf_loop` hands to [`step`]. All else is in the buffer, of whose content the verifier knows
/// nothing: what it knew would make it follow one path again and again.
#[repr(C)]
struct Context {
    scratch: *mut Scratch,
    trail: *mut Trail,
}

/// Values of [`Walk::frame_pointer_place`] that are no address of a word.
const IN_REGISTER: u64 = 0;
const NOTED: u64 = 1;

/// State of a walk.
#[repr(C)]
pub(crate) struct Walk {
    /// Return address into the frame that is next.
    address: u64,
    /// Its stack pointer.
    stack_pointer: u64,
    /// Its frame pointer register, whatever that is used for.
    frame_pointer: u64,
    /// Where that was read, [`IN_REGISTER`], or [`NOTED`].
    frame_pointer_place: u64,
    /// The stack pointer that the walk began with.
    stack_start: u64,
    /// Not 0 while a trail belongs to it.
    has_trail: u64,
    /// Address of the first word in the buffer's window.
    window_start: u64,
    /// Bytes of the window that are filled.
    window_bytes: u64,
    /// Address in no known code that the walk came upon, or 0.
    unknown_code: u64,
    /// Not 0 once the walk came through code that may be unloaded.
    is_passing: u64,
    /// What the kernel puts in place of the return addresses of calls that are counted; 0 where these
    /// have no others inside that are recorded.
    trampoline: u64,
    segments: SegmentList,
    /// The code looked at last.
    code: Code,
}

/// Takes one frame; returns 1 to end the walk.
extern "C" fn step(index: u32, context: *mut Context) -> i64 {
    // SAFETY: `bpf_loop` hands over the context that `walk` gave it, whose buffer is claimed.
    let (scratch, trail) = unsafe { (&mut *(*context).scratch, (*context).trail) };
    let position = index as usize;
    if position >= MAX_FRAMES {
        return 1;
    }
    let address = scratch.walk.address;
    scratch.event.frames[position] = address;
    scratch.event.hash = mix(scratch.event.hash, address);
    scratch.event.depth = index + 1;
    match scratch.step_out(trail) {
        Ok(()) => 0,
        Err(end) => {
            scratch.event.end = end as u32;
            1
        }
    }
}

impl Scratch {
    /// The walk went by a word, for its trail.
    #[inline(always)]
    fn note(&self, trail: *mut Trail, place: u64, value: u64) {
        if self.walk.has_trail != 0 {
            // SAFETY: a live map element that belongs to this walk.
            unsafe { (*trail).note(place.wrapping_sub(self.walk.stack_start), value) };
        }
    }

    /// The walk went by the frame pointer.
    #[inline(always)]
    fn note_frame_pointer(&mut self, trail: *mut Trail) {
        let place = self.walk.frame_pointer_place;
        if place == NOTED || self.walk.has_trail == 0 {
            return;
        }
        if place == IN_REGISTER {
            // SAFETY: as in `note`.
            unsafe { (*trail).note_frame_pointer() };
        } else {
            self.note(trail, place, self.walk.frame_pointer);
        }
        self.walk.frame_pointer_place = NOTED;
    }

    /// No trail is kept of a walk that goes by other things too.
    #[inline(always)]
    fn give_up(&self, trail: *mut Trail) {
        if self.walk.has_trail != 0 {
            // SAFETY: as in `note`.
            unsafe { (*trail).give_up() };
        }
    }

    /// Reads so many bytes of the stack, if they can be read.
    #[inline(always)]
    fn read_first(&mut self, bytes: u32) {
        let start = self.walk.stack_start;
        let bytes = unwind::unseen(u64::from(bytes)) as u32 & (2 * WINDOW_BYTES - 1);
        let window = &raw mut self.window;
        // A read that fails leaves zeros.
        self.walk.window_bytes = 0;
        if start & 7 == 0
            && bytes <= WINDOW_BYTES
            // SAFETY: the helper checks the source, and the destination has room for it.
            && unsafe { kernel::read_user_bytes(window.cast(), bytes, start) }.is_some()
        {
            self.walk.window_start = start;
            self.walk.window_bytes = u64::from(bytes);
        }
    }

    /// Steps from a frame to its caller's.
    #[inline(always)]
    fn step_out(&mut self, trail: *mut Trail) -> Result<(), StackEnd> {
        // The instruction of the call, not the one after it, which may be another function's.
        let address = self.walk.address.wrapping_sub(1);
        if !self.walk.code.contains(address) && !self.walk.code.find(self.walk.segments, address) {
            self.walk.unknown_code = address;
            return Err(StackEnd::UnknownCode);
        }
        if !self.walk.code.stays() {
            self.walk.is_passing = 1;
        }
        if self.walk.code.is_pending() {
            return Err(StackEnd::NoTable);
        }
        if !self.walk.code.has_table() {
            return self.by_frame_pointer(trail);
        }
        let rule = self.walk.code.rule(address);
        let kind = rule_kind(rule);
        let cfa_offset = i64::from(rule_cfa_offset(rule)) as u64;
        let frame_pointer_offset = rule_frame_pointer_offset(rule);
        let saved_at = i64::from(frame_pointer_offset) as u64;
        let mut is_saved = frame_pointer_offset != Rule::UNCHANGED;
        let cfa = if kind == RuleKind::StackPointer as u8 {
            self.walk.stack_pointer.wrapping_add(cfa_offset)
        } else if kind == RuleKind::FramePointer as u8 {
            self.note_frame_pointer(trail);
            self.walk.frame_pointer.wrapping_add(cfa_offset)
        } else if kind == RuleKind::Root as u8 {
            return Err(StackEnd::Root);
        } else if kind == RuleKind::None as u8 {
            // A return address that is the first of a function was left by no call: so coroutines
            // begin.
            if rule_kind(self.walk.code.rule(self.walk.address)) != RuleKind::None as u8 {
                return Err(StackEnd::Root);
            }
            return self.by_frame_pointer(trail);
        } else if kind == RuleKind::SignalFrame as u8 {
            self.give_up(trail);
            return self.by_signal_frame();
        } else if kind == RuleKind::Plt as u8 {
            let pushed = if address & 15 >= 11 { 8 } else { 0 };
            self.walk.stack_pointer.wrapping_add(8 + pushed)
        } else if kind == RuleKind::DereferencedFramePointer as u8 {
            self.note_frame_pointer(trail);
            let frame_pointer = self.walk.frame_pointer;
            let place = frame_pointer.wrapping_add(cfa_offset);
            let cfa = self.read(place)?;
            self.note(trail, place, cfa);
            if is_saved {
                let place = frame_pointer.wrapping_add(saved_at);
                self.walk.frame_pointer = self.read(place)?;
                self.walk.frame_pointer_place = place;
                is_saved = false;
            }
            cfa
        } else {
            return Err(StackEnd::Unsupported);
        };
        // Every caller's frame lies above.
        if cfa <= self.walk.stack_pointer {
            return Err(StackEnd::Astray);
        }
        // Before the return address, which lies above it: the window moves up only.
        if is_saved {
            let place = cfa.wrapping_add(saved_at);
            self.walk.frame_pointer = self.read(place)?;
            self.walk.frame_pointer_place = place;
        }
        let place = cfa.wrapping_sub(8);
        let address = self.read_return_address(place, trail)?;
        if address == 0 {
            return Err(StackEnd::Root);
        }
        self.walk.stack_pointer = cfa;
        self.walk.address = address;
        Ok(())
    }

    /// Through code without a table, as the prologue `push %rbp; mov %rsp,%rbp` leaves the stack.
    /// The register may hold anything, so what it leads to has to be known code.
    #[inline(always)]
    fn by_frame_pointer(&mut self, trail: *mut Trail) -> Result<(), StackEnd> {
        // It goes by the code of the caller too.
        self.give_up(trail);
        let frame_pointer = self.walk.frame_pointer;
        if frame_pointer < self.walk.stack_pointer
            || frame_pointer - self.walk.stack_pointer > MAX_FRAME_BYTES
            || frame_pointer & 7 != 0
        {
            return Err(StackEnd::NoTable);
        }
        let (Ok(callers), Ok(address)) = (
            self.read(frame_pointer),
            self.read_return_address(frame_pointer + 8, trail),
        ) else {
            return Err(StackEnd::NoTable);
        };
        if !self.may_be_called_from(address) {
            return Err(StackEnd::NoTable);
        }
        let call = address.wrapping_sub(1);
        if !self.walk.code.contains(call) && !self.walk.code.find(self.walk.segments, call) {
            self.walk.unknown_code = call;
            return Err(StackEnd::NoTable);
        }
        self.walk.stack_pointer = frame_pointer + 16;
        self.walk.frame_pointer = callers;
        self.walk.address = address;
        Ok(())
    }

    /// Whether the code that is to be left can be what the call before a return address called. If
    /// not, the register is the frame pointer of another function, or something else.
    #[inline(always)]
    fn may_be_called_from(&mut self, return_address: u64) -> bool {
        /// Functions that are longer are left out.
        const MAX_FUNCTION_BYTES: u64 = 64 << 10;
        let address = self.walk.address.wrapping_sub(1);
        let target = match call::before(return_address) {
            Called::Any => return true,
            Called::None => return false,
            Called::Function(target) => target,
        };
        let is_near = address.wrapping_sub(target) < MAX_FUNCTION_BYTES;
        if self.walk.code.lacks_table() {
            return is_near;
        }
        if !self.walk.code.contains(target) && !self.walk.code.find(self.walk.segments, target) {
            return is_near;
        }
        if !self.walk.code.has_table() {
            // Generated functions jump to each other.
            return is_near || !self.walk.code.lacks_table();
        }
        // As do hand-written ones; one that the table has is another.
        rule_kind(self.walk.code.rule(target)) == RuleKind::None as u8
    }

    /// From a signal handler's return to what it interrupted, perhaps on another stack.
    #[inline(always)]
    fn by_signal_frame(&mut self) -> Result<(), StackEnd> {
        // `struct rt_sigframe` after its return address: uc_mcontext of the ucontext.
        const FRAME_POINTER: u64 = 120;
        const STACK_POINTER: u64 = 160;
        const INSTRUCTION_POINTER: u64 = 168;
        let frame = self.walk.stack_pointer;
        self.walk.frame_pointer = self.read(frame.wrapping_add(FRAME_POINTER))?;
        self.walk.stack_pointer = self.read(frame.wrapping_add(STACK_POINTER))?;
        let interrupted = self.read(frame.wrapping_add(INSTRUCTION_POINTER))?;
        self.walk.address = interrupted.wrapping_add(1);
        Ok(())
    }

    /// Reads a return address; one that the kernel has replaced as it was.
    #[inline(always)]
    fn read_return_address(&mut self, place: u64, trail: *mut Trail) -> Result<u64, StackEnd> {
        let address = self.read(place)?;
        // The allocators' calls inside each other are not recorded, so without others none is met.
        if config!(families) == 0 || address != self.walk.trampoline {
            self.note(trail, place, address);
            return Ok(address);
        }
        self.give_up(trail);
        Ok(kernel::replaced_return_address(place).unwrap_or(address))
    }

    /// Reads a word of the stack through the window.
    #[inline(always)]
    fn read(&mut self, address: u64) -> Result<u64, StackEnd> {
        if address & 7 != 0 {
            return Err(StackEnd::Astray);
        }
        let mut offset = address.wrapping_sub(self.walk.window_start);
        if offset >= self.walk.window_bytes {
            // Up to the end of the page: a read that fails costs microseconds.
            let bytes = (PAGE_BYTES - (address & (PAGE_BYTES - 8))) as u32;
            let window = &raw mut self.window;
            // SAFETY: the helper checks the source, and the destination has room for a page.
            if unsafe { kernel::read_user_bytes(window.cast(), bytes, address) }.is_none() {
                self.walk.window_bytes = 0;
                return Err(StackEnd::Unreadable);
            }
            self.walk.window_start = address;
            self.walk.window_bytes = u64::from(bytes);
            offset = 0;
        }
        Ok(self.window[(offset >> 3) as usize & (WINDOW_WORDS - 1)])
    }
}

/// Adds a return address to a hash (multiply and shift; the constant is the golden ratio's).
#[inline(always)]
fn mix(hash: u64, address: u64) -> u64 {
    let hash = (hash ^ address).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    hash ^ hash >> 29
}
