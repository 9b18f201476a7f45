//! Memory that a column's bytes are read into.

use std::io;
use std::mem::MaybeUninit;

use arrow::buffer::Buffer;
use bytes::Bytes;
use layerstore_core::linalg::{LARGE_PAGE as PAGE, ask_for_large_pages};
use memmap2::MmapMut;

/// Bytes of a cache line, at which what is read begins: kernels read whole ones.
const LINE: usize = 64;

/// From so many bytes on, large pages: what they save is more than reading 2 MiB into one takes, and kernels that go
/// through them look up fewer addresses. Of a last large page, at least as much is used.
const LARGE_FROM: usize = 3 << 19;

/// Memory for some bytes, which begin at a cache line.
pub enum AlignedBuffer {
    /// On the heap: the first byte lies behind the vector's end, and `bytes` of its spare capacity are used.
    Small { all: Vec<u8>, bytes: usize },
    /// A mapping of large pages, used from `start` on.
    Large { all: MmapMut, start: usize, bytes: usize },
}

impl AlignedBuffer {
    /// Returns memory of this many bytes, of any content.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn new(bytes: usize) -> io::Result<Self> {
        let too_long = || io::Error::from(io::ErrorKind::OutOfMemory);
        if bytes < LARGE_FROM {
            let mut all = Vec::<u8>::new();
            all.try_reserve_exact(bytes + LINE)?;
            // Padding in front of the first byte that is used.
            all.resize(all.as_ptr().align_offset(LINE), 0);
            return Ok(AlignedBuffer::Small { all, bytes });
        }
        // What is not touched of it takes no memory.
        let all = MmapMut::map_anon(bytes.checked_add(2 * PAGE).ok_or_else(too_long)?)?;
        let start = all.as_ptr().align_offset(PAGE);
        let whole = bytes / PAGE * PAGE;
        let large = if bytes - whole >= LARGE_FROM { whole + PAGE } else { whole };
        // SAFETY: the mapping is ours, and goes two pages beyond what is asked for.
        unsafe { ask_for_large_pages(all[start..].as_ptr(), large) };
        Ok(AlignedBuffer::Large { all, start, bytes })
    }

    /// Returns all of it, to be written to; it may be uninitialised.
    pub fn all(&mut self) -> &mut [MaybeUninit<u8>] {
        match self {
            AlignedBuffer::Small { all, bytes } => &mut all.spare_capacity_mut()[..*bytes],
            AlignedBuffer::Large { all, start, bytes } => {
                let bytes = &mut all[*start..*start + *bytes];
                // SAFETY: the same memory; less is said of it, and nobody but callers of this writes to it.
                unsafe { &mut *(std::ptr::from_mut(bytes) as *mut [MaybeUninit<u8>]) }
            }
        }
    }

    /// Returns the bytes as an Arrow buffer.
    ///
    /// # Safety
    /// Every byte of [`AlignedBuffer::all`] has been written.
    pub unsafe fn filled(self) -> Buffer {
        match self {
            AlignedBuffer::Small { mut all, bytes } => {
                let start = all.len();
                // SAFETY: the caller's promise, of the bytes behind the first ones.
                unsafe { all.set_len(start + bytes) };
                Buffer::from(all).slice(start)
            }
            AlignedBuffer::Large { all, start, bytes } => {
                Buffer::from(Bytes::from_owner(all).slice(start..start + bytes))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_is_written() {
        for bytes in [0, 1, 1000, LARGE_FROM - 1, LARGE_FROM, PAGE + 1, 2 * PAGE, 3 * PAGE - 7] {
            let mut buffer = AlignedBuffer::new(bytes).unwrap();
            assert_eq!(buffer.all().len(), bytes);
            buffer.all().iter_mut().enumerate().for_each(|(i, byte)| {
                byte.write((i % 251) as u8);
            });
            // SAFETY: just now.
            let filled = unsafe { buffer.filled() };
            assert_eq!(filled.as_ptr().align_offset(LINE), 0, "{bytes}");
            assert_eq!(filled.len(), bytes);
            assert!(filled.iter().enumerate().all(|(i, byte)| *byte == (i % 251) as u8));
        }
        assert!(AlignedBuffer::new(usize::MAX / 2).is_err());
    }
}
