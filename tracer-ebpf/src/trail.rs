//! The trails of stack walks: which words of the stack each one went by.
//!
//! A walk depends on nothing but the registers that it begins with, the code's tables and the words that
//! it reads. So where the same call is made again, which is most of the time, it is enough to compare
//! these words with what they were: that takes a tenth of the time that the walk took, and the site is
//! known with it.
//!
//! Many calls come through a function that allocates for others (`operator new`, `xmalloc`), at the same
//! place of the stack again and again. Such a trail is found by its first words too: where these are is learned
//! from the walks ([`Hints`]), word by word, as each says where the next one is. A hint that is wrong
//! leads to no trail or to one whose words are not there, never to a wrong site.
//!
//! A preemptible kernel can put another task on the processor while a trail is written or compared. So a
//! trail has one writer at a time, and who compares it looks afterwards whether it is still the one
//! that it was (a sequence lock that nobody waits for). All of them are on one processor, where memory has an order;
//! the compiler keeps it where accesses are volatile.

use tracer_common::{instance::Instance, ledger::Scope};

use crate::{
    atomic::swap_u32,
    maps::{TRAILS, WINDOW_WORDS, read},
};

/// Trails that a processor keeps, a power of two.
pub(crate) const KEPT: u32 = 512;
/// Words by which a trail is found where walks that begin alike go on differently.
const LEVELS: usize = 12;
/// In a hint: they do.
const FORKED: u32 = 1 << 31;
/// Hints that a processor keeps, a power of two.
const HINTS: usize = 4096;
/// Words that a trail can have: walks that go by more are made anew each time.
const WORDS: usize = 48;

/// Trails reach no further above the stack pointer than can be read at once.
const WINDOW_BYTES: u64 = WINDOW_WORDS as u64 * 8;

/// A trail.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Trail {
    /// [`Instance::segments`] at that time; 0 if there is no trail, or one that is being written.
    segments: u64,
    scope: Scope,
    instruction_pointer: u64,
    stack_pointer: u64,
    frame_pointer: u64,
    /// [`Instance::generation`].
    generation: u32,
    /// What was found.
    site: u32,
    words: u32,
    /// From the stack pointer to the end of the last word.
    span_bytes: u32,
    /// Not 0 if the register mattered.
    uses_frame_pointer: u32,
    /// Not 0 if the walk went by something else too.
    is_given_up: u32,
    /// Not 0 while it belongs to a walk.
    is_taken: u32,
    /// Trails that were begun here, modulo 2³².
    version: u32,
    values: [u64; WORDS],
    /// Where the words are, in words above the stack pointer.
    places: [u16; WORDS],
}

/// The registers that a walk begins with, and where.
#[derive(Clone, Copy)]
pub(crate) struct Start {
    pub(crate) instruction_pointer: u64,
    pub(crate) stack_pointer: u64,
    pub(crate) frame_pointer: u64,
    pub(crate) segments: u64,
}

/// What was learned of walks' first words, by a hash of what is known before each: in the lower half where it is, in
/// words above the stack pointer, in the upper half how many words the whole walk reached over. 0 if nothing was.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Hints([u32; HINTS]);

impl Hints {
    #[inline(always)]
    fn get(&self, key: u64) -> u32 {
        self.0[Self::index(key)]
    }

    #[inline(always)]
    fn index(key: u64) -> usize {
        (key >> 40) as usize & (HINTS - 1)
    }

    /// Bytes of the stack that a walk will go by.
    #[inline(always)]
    pub(crate) fn span_bytes(&self, start: &Start) -> u32 {
        (self.get(start.key()) & !FORKED) >> 16 << 3
    }

    /// The trail of a walk that begins so, on a stack of which so many bytes were read.
    #[inline(always)]
    pub(crate) fn trail(
        &self,
        start: &Start,
        stack: &[u64; WINDOW_WORDS],
        read_bytes: u64,
    ) -> Option<*mut Trail> {
        let mut key = start.key();
        let levels = if self.get(key) & FORKED == 0 {
            0
        } else {
            LEVELS
        };
        for _ in 0..levels {
            let hint = self.get(key);
            if hint == 0 {
                break;
            }
            let place = u64::from(hint & 0xffff);
            let word = if place < read_bytes >> 3 {
                stack[place as usize & (WINDOW_WORDS - 1)]
            } else {
                0
            };
            key = mix(key, word);
        }
        TRAILS.get_ptr_mut((key >> 40) as u32 & (KEPT - 1))
    }

    /// Learns from a trail, and that there are others which begin alike.
    #[inline(always)]
    pub(crate) fn learn(&mut self, start: &Start, trail: &Trail, is_fork: bool) {
        let mut key = start.key();
        let forked = if is_fork {
            FORKED
        } else {
            self.get(key) & FORKED
        };
        for level in 0..LEVELS {
            if level >= trail.words as usize {
                break;
            }
            let span_words = trail.span_bytes >> 3;
            self.0[Self::index(key)] = u32::from(trail.places[level]) | span_words << 16 | forked;
            key = mix(key, trail.values[level]);
        }
    }
}

#[inline(always)]
fn mix(key: u64, word: u64) -> u64 {
    /// The golden ratio's (multiplicative hashing).
    const MULTIPLIER: u64 = 0x9E37_79B9_7F4A_7C15;
    let mixed = (key ^ word).wrapping_mul(MULTIPLIER);
    mixed ^ mixed >> 29
}

impl Start {
    #[inline(always)]
    fn key(&self) -> u64 {
        mix(self.instruction_pointer, self.stack_pointer << 20)
    }
}

impl Trail {
    /// Whether a walk that begins so may be the one that this is the trail of.
    #[inline(always)]
    pub(crate) fn begins(&self, start: &Start, scope: Scope, state: &Instance) -> bool {
        let segments = read(&self.segments);
        segments == start.segments
            && segments != 0
            && read(&self.instruction_pointer) == start.instruction_pointer
            && read(&self.stack_pointer) == start.stack_pointer
            && read(&self.scope) == scope
            && read(&self.generation) == state.generation
    }

    /// Bytes of the stack that its words lie in.
    #[inline(always)]
    pub(crate) fn span_bytes(&self) -> u32 {
        read(&self.span_bytes)
    }

    /// What a walk that [begins](Self::begins) so found, if it is the one that this is the trail of: its words are
    /// what the stack has, which was read from the stack pointer on. `version` is what [it](Self::version)
    /// was before anything else was looked at.
    #[inline(always)]
    pub(crate) fn site_if_in(
        &self,
        start: &Start,
        stack: &[u64; WINDOW_WORDS],
        version: u32,
    ) -> Option<u32> {
        let words = read(&self.words) as usize;
        let mut difference = if read(&self.uses_frame_pointer) == 0 {
            0
        } else {
            read(&self.frame_pointer) ^ start.frame_pointer
        };
        // No branch in it but the end, lest the verifier follow each way.
        for index in 0..WORDS {
            if index >= words {
                break;
            }
            let place = read(&self.places[index]) as usize & (WINDOW_WORDS - 1);
            difference |= stack[place] ^ read(&self.values[index]);
        }
        let site = read(&self.site);
        (difference == 0 && self.version() == version).then_some(site)
    }

    /// Changes before anything that is compared does.
    #[inline(always)]
    pub(crate) fn version(&self) -> u32 {
        read(&self.version)
    }

    /// Begins a new one, that belongs to the walk until it is [given back](Self::give_back). False if it
    /// belongs to another.
    #[inline(always)]
    pub(crate) fn begin(&mut self) -> bool {
        // SAFETY: an aligned field of a live map element.
        if unsafe { swap_u32(&raw mut self.is_taken, 1) } != 0 {
            return false;
        }
        // First of all: who sees the next version then sees no trail, until it is a whole one.
        write(&mut self.segments, 0);
        let version = self.version().wrapping_add(1);
        write(&mut self.version, version);
        write(&mut self.uses_frame_pointer, 0);
        write(&mut self.is_given_up, 0);
        write(&mut self.span_bytes, 0);
        write(&mut self.words, 0);
        true
    }

    /// The walk that [began](Self::begin) it is over.
    #[inline(always)]
    pub(crate) fn give_back(&mut self) {
        write(&mut self.is_taken, 0);
    }

    /// The walk went by a word.
    #[inline(always)]
    pub(crate) fn note(&mut self, above_stack_pointer: u64, value: u64) {
        let index = self.words as usize;
        if index >= WORDS || above_stack_pointer >= WINDOW_BYTES {
            self.give_up();
            return;
        }
        let end = above_stack_pointer as u32 + 8;
        self.places[index] = (end / 8 - 1) as u16;
        self.values[index] = value;
        self.words = index as u32 + 1;
        if end > self.span_bytes {
            self.span_bytes = end;
        }
    }

    /// The walk went by the frame pointer that it began with.
    #[inline(always)]
    pub(crate) fn note_frame_pointer(&mut self) {
        self.uses_frame_pointer = 1;
    }

    /// The walk went by something else.
    #[inline(always)]
    pub(crate) fn give_up(&mut self) {
        self.is_given_up = 1;
    }

    /// The walk is over, and found a site.
    #[inline(always)]
    pub(crate) fn end(&mut self, start: &Start, scope: Scope, state: &Instance, site: u32) {
        if self.is_given_up != 0 {
            return;
        }
        write(&mut self.scope, scope);
        write(&mut self.instruction_pointer, start.instruction_pointer);
        write(&mut self.stack_pointer, start.stack_pointer);
        write(&mut self.frame_pointer, start.frame_pointer);
        write(&mut self.generation, state.generation);
        write(&mut self.site, site);
        write(&mut self.segments, start.segments);
    }
}

/// Volatile, see the top of this file.
#[inline(always)]
fn write<T: Copy>(field: &mut T, value: T) {
    // SAFETY: a reference.
    unsafe { (&raw mut *field).write_volatile(value) }
}
