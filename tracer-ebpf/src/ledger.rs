//! The books: live blocks, and what every site allocated and freed.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{BPF_NOEXIST, pt_regs},
    helpers::generated::{
        bpf_get_current_pid_tgid, bpf_get_prandom_u32, bpf_get_smp_processor_id, bpf_ktime_get_ns,
        bpf_ringbuf_output,
    },
};
use tracer_common::{
    alloc_spec::{Family, HEAP},
    config::sampled_weight,
    event::{EventHeader, EventKind, MAX_FRAMES, STACK_EVENT_PREFIX_BYTES, StackEvent},
    histogram::{BIRTH_SLICES, LIFETIME_SLOTS, birth_slice, lifetime_slot},
    instance::Instance,
    ledger::{Block, BlockKey, Scope, family_of, instance_of, scope},
    missed::Missed,
    recording::Recording,
    site::{
        COPY_SENT, DOUBTFUL_SENT, FRAMES_SENT, Site, SiteKey, first_reserved, stripe, variances,
    },
};

use crate::{
    atomic::{add_u32, add_u64, fetch_add_u32},
    blocks::{self, no_block},
    maps::{EVENTS, FREE_SITES, RESERVED_SITES, SITE_COUNT, SITE_IDS, SITES, config},
    missed, recording,
    stack::{self, Stack},
};

const EEXIST: i32 = -17;

/// A value that the compiler knows nothing about, so that it keeps a bounds check after it, which
/// the verifier needs.
#[inline(always)]
fn opaque(value: usize) -> usize {
    // SAFETY: a local.
    unsafe { (&raw const value).read_volatile() }
}

/// Where a site counts what happens on this processor.
#[inline(always)]
fn counters(id: u32) -> Option<*mut Site> {
    let site = SITES.get_ptr_mut(id)?;
    // SAFETY: a field of a live map element.
    let striped = unsafe { (&raw const (*site).striped).read_volatile() };
    if striped == 0 {
        return Some(site);
    }
    let mask = config!(stripe_mask);
    // SAFETY: no argument.
    match unsafe { bpf_get_smp_processor_id() } & mask {
        0 => Some(site),
        processor => SITES.get_ptr_mut(stripe(config!(max_sites), mask, striped, processor)),
    }
}

/// Takes a block out of the ledger, if it is there. Gives whether it was. The counters stay as they are: a
/// failed `realloc` puts the block back.
#[inline(always)]
pub(crate) fn take(scope: Scope, address: u64, block: &mut Block) -> bool {
    blocks::take(&BlockKey { address, scope }, block)
}

/// Puts a block back that [`take`] gave.
///
/// If there is another one by now, its address was handed out meanwhile: then the older of them was freed by
/// what nobody saw to its end.
#[inline(never)]
pub(crate) fn put_back(state: &Instance, scope: Scope, address: u64, block: &Block) {
    let key = BlockKey { address, scope };
    let mut newer = *block;
    let mut other = no_block();
    if blocks::take(&key, &mut other) {
        if other.birth_ns > newer.birth_ns {
            (newer, other) = (other, newer);
        }
        if let Some(recording) = recording::current()
            && let Some(site) = counters(newer.site)
        {
            replace(state, recording, site, newer.site, &other);
        }
    }
    // If there is no room, that is counted.
    blocks::insert(&key, &newer, &mut other);
}

/// Books the end of a block that [`take`] gave.
#[inline(always)]
pub(crate) fn count_free(state: &Instance, recording: &Recording, block: &Block) {
    let Some(site) = counters(block.site) else {
        missed::count(Missed::MapErrors);
        return;
    };
    // SAFETY: no argument, and field addresses of a live map element.
    unsafe {
        if recording::is_old(recording, block.birth_ns)
            || recording::is_former(recording, block.birth_ns)
        {
            let old_frees = &raw mut (*site).old_frees;
            if !count_old(state, recording, site, block, old_frees) {
                // It may be another block's free, that got its address while nobody looked.
                end_of_life(state, site, block);
                return;
            }
        }
        let lifetime_ns = bpf_ktime_get_ns().wrapping_sub(block.birth_ns);
        let slot = opaque(lifetime_slot(lifetime_ns));
        if slot < LIFETIME_SLOTS {
            add_u64(&raw mut (*site).lifetimes[slot], u64::from(block.weight));
        }
        end_of_life(state, site, block);
    }
}

/// Counts the end of a block that is old, by this counter of its site unless it is former. Gives whether it
/// is not.
///
/// # Safety
///
/// `site` is a live map element, and `counter` a field of it.
#[inline(always)]
unsafe fn count_old(
    state: &Instance,
    recording: &Recording,
    site: *mut Site,
    block: &Block,
    counter: *mut u64,
) -> bool {
    let weight = u64::from(block.weight);
    // SAFETY: as the caller promises.
    unsafe {
        if !recording::is_former(recording, block.birth_ns) {
            add_u64(counter, weight);
            return true;
        }
        add_u64(&raw mut (*site).former_frees, weight);
        let bytes = block.size_bytes.wrapping_mul(weight);
        add_u64(&raw mut (*site).former_freed_bytes, bytes);
        let slice_of = |at_ns: u64| birth_slice(at_ns.wrapping_sub(state.armed_at_ns));
        if slice_of(block.birth_ns) == slice_of(recording::since_ns(recording)) {
            add_u32(&raw mut (*site).former_neighbour_frees, block.weight);
        }
    }
    false
}

/// # Safety
///
/// `site` is a live map element.
#[inline(always)]
unsafe fn end_of_life(state: &Instance, site: *mut Site, block: &Block) {
    // SAFETY: field addresses of a live map element.
    unsafe {
        let weight = u64::from(block.weight);
        add_u64(&raw mut (*site).frees, weight);
        add_u64(
            &raw mut (*site).freed_bytes,
            block.size_bytes.wrapping_mul(weight),
        );
        if let Some(births) = births_of(state, site, block.birth_ns) {
            add_u32(births, block.weight.wrapping_neg());
        }
        if block.weight > 1 {
            let (blocks, bytes) = variances(block.size_bytes, block.weight);
            add_u64(&raw mut (*site).live_variance, blocks.wrapping_neg());
            add_u64(&raw mut (*site).live_bytes_variance, bytes.wrapping_neg());
        }
        if config!(max_live_of_instance) != 0 {
            add_u64((&raw const state.live_blocks).cast_mut(), u64::MAX);
        }
    }
}

/// How many blocks a new one stands for, of those that are left where the instance has too many; None if others
/// stand for it.
#[inline(always)]
fn weight_of_many(state: &Instance) -> Option<u32> {
    let most = config!(max_live_of_instance);
    if most == 0 {
        return Some(1);
    }
    // SAFETY: a field of a live map element; the helper takes no argument.
    unsafe {
        let live_blocks = (&raw const state.live_blocks).read_volatile();
        let weight = sampled_weight(live_blocks, u64::from(most));
        // A power of two.
        if weight > 1 && bpf_get_prandom_u32() & (weight - 1) != 0 {
            add_u64((&raw const state.sampled_out).cast_mut(), 1);
            return None;
        }
        Some(weight)
    }
}

/// # Safety
///
/// `site` is a live map element.
#[inline(always)]
unsafe fn births_of(state: &Instance, site: *mut Site, birth_ns: u64) -> Option<*mut u32> {
    let slice = opaque(birth_slice(birth_ns.wrapping_sub(state.armed_at_ns)));
    if slice >= BIRTH_SLICES {
        return None;
    }
    // SAFETY: as the caller promises, and the index was checked.
    unsafe { Some(&raw mut (*site).births[slice]) }
}

/// Books a new block: finds out who allocated it and records it.
#[inline(always)]
pub(crate) fn record(
    regs: *const pt_regs,
    state: &Instance,
    recording: &Recording,
    scope: Scope,
    address: u64,
    size_bytes: u64,
    weight: u32,
) {
    let Some(weight_of_many) = weight_of_many(state) else {
        return;
    };
    let weight = weight.wrapping_mul(weight_of_many);
    let site_id = site_of(regs, state, scope);
    let Some(site) = counters(site_id) else {
        missed::count(Missed::MapErrors);
        return;
    };
    // SAFETY: no argument.
    let birth_ns = unsafe { bpf_ktime_get_ns() };
    let block = Block {
        size_bytes,
        birth_ns,
        site: site_id,
        weight,
    };
    let key = BlockKey { address, scope };
    let mut before = no_block();
    let inserted = blocks::insert(&key, &block, &mut before);
    if inserted.has_replaced {
        replace(state, recording, site, site_id, &before);
    }
    if !inserted.is_there {
        return;
    }
    // SAFETY: field addresses of a live map element.
    unsafe {
        add_u64(&raw mut (*site).allocs, u64::from(weight));
        let bytes = size_bytes.wrapping_mul(u64::from(weight));
        add_u64(&raw mut (*site).alloc_bytes, bytes);
        if let Some(births) = births_of(state, site, birth_ns) {
            add_u32(births, weight);
        }
        if weight > 1 {
            let (blocks, bytes) = variances(size_bytes, weight);
            add_u64(&raw mut (*site).alloc_variance, blocks);
            add_u64(&raw mut (*site).alloc_bytes_variance, bytes);
            add_u64(&raw mut (*site).live_variance, blocks);
            add_u64(&raw mut (*site).live_bytes_variance, bytes);
        }
        if config!(max_live_of_instance) != 0 {
            add_u64((&raw const state.live_blocks).cast_mut(), 1);
        }
    }
}

/// The allocator handed out an address while no new blocks are recorded: what the ledger has there was freed.
#[inline(always)]
pub(crate) fn notice_reuse(state: &Instance, recording: &Recording, scope: Scope, address: u64) {
    let mut before = no_block();
    if take(scope, address, &mut before)
        && let Some(site) = counters(before.site)
    {
        replace(state, recording, site, before.site, &before);
    }
}

/// The allocator handed out an address that the ledger believed to be live, so a free was not seen. The block
/// before is booked as freed, without a lifetime. If it was not born while probes were away, this is
/// the lie detector, and both sites are marked.
#[inline(always)]
fn replace(state: &Instance, recording: &Recording, site: *mut Site, site_id: u32, before: &Block) {
    if recording::is_old(recording, before.birth_ns) {
        if let Some(site_before) = counters(before.site) {
            // SAFETY: live map element.
            unsafe {
                let reused = &raw mut (*site_before).reused;
                count_old(state, recording, site_before, before, reused);
                end_of_life(state, site_before, before);
            }
        }
        return;
    }
    missed::count(Missed::MissedFrees);
    // SAFETY: field address of a live map element.
    unsafe { add_u64(&raw mut (*site).missed_frees, 1) };
    if let Some(site_before) = counters(before.site) {
        // SAFETY: live map element.
        unsafe {
            if before.site != site_id {
                add_u64(&raw mut (*site_before).missed_frees, 1);
            }
            end_of_life(state, site_before, before);
        }
    }
}

/// Id of the site that the thread is at.
#[inline(always)]
pub(crate) fn site_of(regs: *const pt_regs, state: &Instance, scope: Scope) -> u32 {
    let Some(mut stack) = Stack::begin(regs, state) else {
        missed::count(Missed::ScratchBusy);
        return overflow_site(state, scope);
    };
    if let Some(id) = stack.recall(scope, state) {
        stack.release();
        return id;
    }
    stack.walk(state);
    let instance = instance_of(scope);
    stack.report_unknown_code(state, instance);
    let key = SiteKey {
        stack_hash: stack.hash(),
        scope,
    };
    let id = match SITE_IDS.get_ptr(key) {
        // SAFETY: a live map element that is never changed.
        Some(id) => Some(unsafe { *id }),
        None => new_site(key, state),
    };
    let id = match id {
        Some(id) => {
            if hand_over(&stack, regs, state, instance, id) {
                stack.remember(scope, state, id);
            }
            id
        }
        None => {
            missed::count(Missed::SitesFull);
            overflow_site(state, scope)
        }
    };
    stack.release();
    id
}

/// The site that takes blocks without a stack.
#[inline(always)]
fn overflow_site(state: &Instance, scope: Scope) -> u32 {
    if family_of(scope) == HEAP {
        return state.overflow_site;
    }
    let key = SiteKey {
        stack_hash: 0,
        scope,
    };
    match SITE_IDS.get_ptr(key) {
        // SAFETY: a live map element that is never changed.
        Some(id) => unsafe { *id },
        // The instance was opened on this side.
        None => reserve_site(instance_of(scope), family_of(scope)).unwrap_or(state.overflow_site),
    }
}

/// Sees to it that the user side has the stack of a site. If two processors send it, the user side
/// takes the first. Gives whether it has.
#[inline(always)]
fn hand_over(
    stack: &Stack,
    regs: *const pt_regs,
    state: &Instance,
    instance: u32,
    id: u32,
) -> bool {
    const ALL: u16 = FRAMES_SENT | COPY_SENT;
    let Some(site) = SITES.get_ptr_mut(id) else {
        return false;
    };
    // SAFETY: field of a live map element.
    let sent = unsafe { &mut (*site).stack_sent };
    if *sent & ALL == ALL {
        return true;
    }
    let is_doubtful = stack.is_doubtful();
    if is_doubtful && *sent & DOUBTFUL_SENT != 0 {
        return false;
    }
    if *sent & FRAMES_SENT == 0 {
        if !send(stack, instance, id) {
            missed::count(Missed::StacksDelayed);
            return false;
        }
        if is_doubtful {
            // Not the last word.
            *sent |= DOUBTFUL_SENT;
            stack::copy(regs, header(EventKind::StackCopy, instance, id));
            return false;
        }
        *sent |= FRAMES_SENT;
    }
    if !stack.wants_copy()
        || (stack::may_copy(state) && stack::copy(regs, header(EventKind::StackCopy, instance, id)))
    {
        *sent |= COPY_SENT;
    }
    *sent & ALL == ALL
}

#[inline(always)]
fn header(kind: EventKind, instance: u32, detail: u32) -> EventHeader {
    EventHeader {
        kind: kind as u32,
        // SAFETY: no argument.
        tgid: (unsafe { bpf_get_current_pid_tgid() } >> 32) as u32,
        instance,
        detail,
    }
}

/// Id of a site that nobody has, but for the reserved ones.
#[inline(always)]
fn free_site() -> Option<u32> {
    let most = first_reserved(config!(max_sites));
    let count = SITE_COUNT.get_ptr_mut(0)?;
    // Looked at first, so that a full table does not make the counter wrap.
    // SAFETY: an aligned live map element.
    if unsafe { count.read_volatile() } < most {
        // SAFETY: as above.
        let id = unsafe { fetch_add_u32(count, 1) };
        if id < most {
            return Some(id);
        }
    }
    FREE_SITES.pop().ok()?
}

/// Sets a site aside that takes the blocks of an instance's family whose stacks find no site.
#[inline(always)]
pub(crate) fn reserve_site(instance: u32, family: Family) -> Option<u32> {
    let id = match RESERVED_SITES.pop() {
        Ok(Some(id)) => id,
        _ => free_site()?,
    };
    let site = SITES.get_ptr_mut(id)?;
    // SAFETY: nobody else has this id yet.
    unsafe {
        (*site).instance = instance;
        (*site).family = u32::from(family);
        (*site).stack_sent = FRAMES_SENT | COPY_SENT;
    }
    if family != HEAP {
        let key = SiteKey {
            stack_hash: 0,
            scope: scope(instance, family),
        };
        SITE_IDS.insert(key, id, 0).ok()?;
    }
    Some(id)
}

/// Gives a site back that was set aside for the heap and never used.
#[inline(always)]
pub(crate) fn give_back_site(id: u32) {
    let Some(site) = SITES.get_ptr_mut(id) else {
        return;
    };
    // SAFETY: nobody else has this id.
    unsafe {
        (*site).instance = 0;
        (*site).stack_sent = 0;
    }
    let given = if id < first_reserved(config!(max_sites)) {
        FREE_SITES.push(id, 0)
    } else {
        RESERVED_SITES.push(id, 0)
    };
    if given.is_err() {
        missed::count(Missed::MapErrors);
    }
}

/// Gives a new stack its site. Two processors that see the same stack first agree on the one that
/// got into the map; the other's id stays unused.
#[inline(always)]
fn new_site(key: SiteKey, state: &Instance) -> Option<u32> {
    let sites = (&raw const state.sites).cast_mut();
    // SAFETY: an aligned field of a live map element. Processors that ask at the same moment may get
    // one each beyond the limit.
    unsafe {
        if sites.read_volatile() >= config!(max_sites_of_instance) {
            return None;
        }
    }
    let id = free_site()?;
    // SAFETY: as above.
    unsafe { add_u32(sites, 1) };
    let site = SITES.get_ptr_mut(id)?;
    // SAFETY: nobody else has this id yet.
    unsafe {
        (*site).stack_hash = key.stack_hash;
        (*site).instance = instance_of(key.scope);
        (*site).family = u32::from(family_of(key.scope));
    }
    match SITE_IDS.insert(key, id, u64::from(BPF_NOEXIST)) {
        Ok(()) => Some(id),
        // SAFETY: a live map element that is never changed.
        Err(EEXIST) => SITE_IDS.get_ptr(key).map(|id| unsafe { *id }),
        Err(_) => None,
    }
}

/// Hands a new site's frames to the user side. False if the ring buffer is full.
#[inline(always)]
fn send(stack: &Stack, instance: u32, site: u32) -> bool {
    let scratch = stack.scratch();
    // SAFETY: the buffer is claimed by this walk; the length is bounded by the buffer's.
    unsafe {
        (*scratch).event.header = header(EventKind::Stack, instance, site);
        (*scratch).event.hash = stack.hash();
        let depth = (*scratch).event.depth as usize;
        let depth = if depth > MAX_FRAMES {
            MAX_FRAMES
        } else {
            depth
        };
        bpf_ringbuf_output(
            (&raw const EVENTS).cast_mut().cast::<c_void>(),
            (&raw mut (*scratch).event)
                .cast::<StackEvent>()
                .cast::<c_void>(),
            (STACK_EVENT_PREFIX_BYTES + depth * 8) as u64,
            0,
        ) == 0
    }
}
