//! Maps that the user side reads without a system call an element.

use std::{
    cell::OnceCell,
    io,
    marker::PhantomData,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    ptr::NonNull,
};

use aya::{Pod, maps::MapData};

use super::sys;

/// Elements that are mapped at once: whatever their size, a multiple of eight, these are whole pages.
const BLOCK_ELEMENTS: usize = 512;

/// An array map (`BPF_F_MMAPABLE`) in our own address space, in blocks that are mapped when they are needed: the
/// kernel counts all of what is mapped as memory of ours.
///
/// The kernel side writes at the same time, so elements are copied field by field, volatile, and
/// never borrowed.
#[derive(Debug)]
pub struct MappedArray<T> {
    map: OwnedFd,
    blocks: Box<[OnceCell<Block>]>,
    elements: usize,
    _elements: PhantomData<T>,
}

// SAFETY: the mappings belong to this value alone and are only read and written volatile.
unsafe impl<T: Pod + Send> Send for MappedArray<T> {}

impl<T: Pod> MappedArray<T> {
    /// Of the first `elements` elements.
    pub fn new(map: &MapData, elements: usize) -> io::Result<Self> {
        assert!(
            size_of::<T>().is_multiple_of(8),
            "the kernel pads elements to 8 bytes"
        );
        let mapped = Self {
            map: map.fd().as_fd().try_clone_to_owned()?,
            blocks: (0..elements.div_ceil(BLOCK_ELEMENTS))
                .map(|_| OnceCell::new())
                .collect(),
            elements,
            _elements: PhantomData,
        };
        // What cannot be mapped at all is told now.
        if let Some(first) = mapped.blocks.first() {
            let _ = first.set(mapped.map_block(0)?);
        }
        Ok(mapped)
    }

    /// How many elements there are.
    #[must_use]
    pub const fn elements(&self) -> usize {
        self.elements
    }

    fn map_block(&self, block: usize) -> io::Result<Block> {
        let first = block * BLOCK_ELEMENTS;
        let count = BLOCK_ELEMENTS.min(self.elements - first);
        let length_bytes = (count * size_of::<T>()).next_multiple_of(page_bytes());
        Block::new(self.map.as_fd(), first * size_of::<T>(), length_bytes)
    }

    fn element(&self, index: usize) -> *mut T {
        assert!(
            index < self.elements,
            "element {index} of {}",
            self.elements
        );
        let (block, within) = (index / BLOCK_ELEMENTS, index % BLOCK_ELEMENTS);
        let block = self.blocks[block].get_or_init(|| {
            // The kernel has mapped another part of it, so that only memory for page tables can lack.
            self.map_block(block)
                .unwrap_or_else(|error| panic!("failed to map a BPF map: {error}"))
        });
        // SAFETY: inside the mapping, which is page-aligned, and `T`'s size a multiple of 8.
        unsafe { block.base.as_ptr().cast::<T>().add(within) }
    }

    /// Copies an element, eight bytes at a time, so that no counter is read in halves.
    #[must_use]
    pub fn read(&self, index: usize) -> T {
        let from = self.element(index).cast::<u64>();
        let mut value = std::mem::MaybeUninit::<T>::uninit();
        let to = value.as_mut_ptr().cast::<u64>();
        for word in 0..size_of::<T>() / 8 {
            // SAFETY: both lie within one `T`, which is a whole number of aligned words.
            unsafe { to.add(word).write(from.add(word).read_volatile()) };
        }
        // SAFETY: every byte was written, and any bit pattern is a value (`Pod`).
        unsafe { value.assume_init() }
    }

    /// Address of an element, for volatile or atomic access to one field.
    #[must_use]
    pub fn pointer(&self, index: usize) -> *mut T {
        self.element(index)
    }
}

/// A part of a map in our own address space.
#[derive(Debug)]
struct Block {
    base: NonNull<u8>,
    length_bytes: usize,
}

impl Block {
    fn new(map: BorrowedFd<'_>, offset_bytes: usize, length_bytes: usize) -> io::Result<Self> {
        let offset = libc::off_t::try_from(offset_bytes).map_err(io::Error::other)?;
        // SAFETY: a new shared mapping of the map's memory; the result is checked.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                offset,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at null"))?;
        Ok(Self { base, length_bytes })
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.length_bytes) };
    }
}

fn page_bytes() -> usize {
    // SAFETY: no memory involved.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(bytes).unwrap_or(4096)
}

/// Takes an element out of a hash map, at once. None if it is not there.
pub fn take<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = std::mem::MaybeUninit::<V>::uninit();
    // SAFETY: a key of the map's size, and room for a value.
    match unsafe {
        sys::map_take(
            map,
            std::ptr::from_ref(key).cast(),
            value.as_mut_ptr().cast(),
        )
    } {
        // SAFETY: the kernel wrote it; any bit pattern is a value.
        Ok(()) => Ok(Some(unsafe { value.assume_init() })),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Calls `visit` for every element of a hash map, some thousand a system call.
///
/// While the map changes, elements can be seen twice or not at all.
pub fn for_each<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    mut visit: impl FnMut(K, V),
) -> io::Result<()> {
    const FIRST_BATCH: u32 = 4096;
    let mut batch = FIRST_BATCH;
    let mut cursor = None;
    loop {
        let mut keys = vec![0u8; batch as usize * size_of::<K>()];
        let mut values = vec![0u8; batch as usize * size_of::<V>()];
        let (read, ended) =
            match sys::map_lookup_batch(map, &mut cursor, &mut keys, &mut values, batch) {
                Ok(result) => result,
                // One bucket holds more than the batch.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && batch < 1 << 24 => {
                    batch *= 2;
                    continue;
                }
                Err(error) => return Err(error),
            };
        for index in 0..read {
            // SAFETY: the kernel wrote `read` elements of these sizes; any bit pattern is a value.
            let (key, value) = unsafe {
                (
                    keys.as_ptr()
                        .add(index * size_of::<K>())
                        .cast::<K>()
                        .read_unaligned(),
                    values
                        .as_ptr()
                        .add(index * size_of::<V>())
                        .cast::<V>()
                        .read_unaligned(),
                )
            };
            visit(key, value);
        }
        if ended {
            return Ok(());
        }
    }
}
