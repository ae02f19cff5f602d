//! I/O buffers: lists of memory segments together with what keeps that memory alive.
//!
//! The memory behind an [`IoBuf`] is shared: with clones and slices of the buffer, with the kernel while an
//! operation is in flight, and, for guest memory, with a guest that may change it at any time. So no reference
//! (`&[u8]`) into it is ever made. Bytes go in and out by raw copies only, and whoever needs a stable view of
//! data that a guest owns takes one copy first and looks at the copy.

#![expect(
    unsafe_code,
    reason = "buffers are raw memory shared with the kernel and the guest"
)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::io;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::rc::Rc;

use crate::mem::MemGuard;

/// Alignment of buffers made by [`IoBuf::alloc`], in bytes. Enough for direct I/O on every device we know.
pub const BUF_ALIGN: usize = 4096;

/// Segments that a buffer holds without allocating; a 4 KiB request of a guest has one or two.
const INLINE: usize = 4;

/// A contiguous piece of a buffer's memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    ptr: *mut u8,
    len: usize,
}

impl Segment {
    const EMPTY: Segment = Segment {
        ptr: ptr::null_mut(),
        len: 0,
    };

    /// Where the piece starts in this process.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// Its length in bytes, never zero in a buffer's list.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the piece has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn new(ptr: *mut u8, len: usize) -> Segment {
        Segment { ptr, len }
    }

    fn sub(self, range: Range<usize>) -> Segment {
        debug_assert!(range.start <= range.end && range.end <= self.len);
        Segment {
            ptr: self.ptr.wrapping_add(range.start),
            len: range.end - range.start,
        }
    }
}

/// A list of memory segments that keeps its memory alive. Cloning and slicing are cheap and share the memory.
#[derive(Clone)]
pub struct IoBuf {
    len: usize,
    segments: Segments,
    owner: Owner,
}

#[derive(Clone)]
enum Segments {
    Inline(u8, [Segment; INLINE]),
    Many(Rc<[Segment]>),
}

#[derive(Clone)]
#[expect(dead_code, reason = "held for their Drop")]
enum Owner {
    Nothing,
    Memory(Rc<Memory>),
    Guest(MemGuard),
    Several(Rc<[IoBuf]>),
}

impl IoBuf {
    /// A buffer of no bytes.
    pub fn empty() -> IoBuf {
        IoBuf {
            len: 0,
            segments: Segments::Inline(0, [Segment::EMPTY; INLINE]),
            owner: Owner::Nothing,
        }
    }

    /// Zeroed memory of `len` bytes, aligned to [`BUF_ALIGN`]. Aborts where the allocator gives none, like `Vec`.
    pub fn alloc(len: usize) -> IoBuf {
        match Memory::zeroed(len) {
            Ok(memory) => IoBuf::from_memory(memory, len),
            Err(_) => handle_alloc_error(Layout::new::<[u8; BUF_ALIGN]>()),
        }
    }

    /// Like [`alloc`](IoBuf::alloc), with `OutOfMemory` instead of an abort.
    pub fn try_alloc(len: usize) -> io::Result<IoBuf> {
        Ok(IoBuf::from_memory(Memory::zeroed(len)?, len))
    }

    /// The bytes of `vec`, without copying them. Not aligned to anything.
    pub fn from_vec(vec: Vec<u8>) -> IoBuf {
        let len = vec.len();
        IoBuf::from_memory(Memory::from_vec(vec), len)
    }

    fn from_memory(memory: Memory, len: usize) -> IoBuf {
        if len == 0 {
            return IoBuf::empty();
        }
        let mut inline = [Segment::EMPTY; INLINE];
        inline[0] = Segment {
            ptr: memory.as_ptr(),
            len,
        };
        IoBuf {
            len,
            segments: Segments::Inline(1, inline),
            owner: Owner::Memory(Rc::new(memory)),
        }
    }

    /// A buffer over guest memory that `guard` keeps mapped. Every segment must lie inside that mapping.
    pub(crate) fn from_guest(guard: MemGuard, builder: SegmentList) -> IoBuf {
        IoBuf {
            len: builder.len,
            segments: builder.finish(),
            owner: Owner::Guest(guard),
        }
    }

    /// The bytes of several buffers, one behind the other, over the same memory. Panics where their lengths together
    /// do not fit `usize`.
    pub fn concat(parts: Vec<IoBuf>) -> IoBuf {
        let total = parts
            .iter()
            .try_fold(0usize, |sum, part| sum.checked_add(part.len));
        assert!(total.is_some(), "more bytes than memory can hold");
        let mut list = SegmentList::new();
        for part in &parts {
            part.segments().iter().for_each(|segment| list.push(*segment));
        }
        IoBuf {
            len: list.len,
            segments: list.finish(),
            owner: Owner::Several(parts.into()),
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces of the buffer, in order; none is empty.
    pub fn segments(&self) -> &[Segment] {
        match &self.segments {
            Segments::Inline(n, list) => &list[..usize::from(*n)],
            Segments::Many(list) => list,
        }
    }

    /// The bytes of `range` as a buffer over the same memory. Panics if the range is not inside the buffer.
    pub fn slice(&self, range: Range<usize>) -> IoBuf {
        let len = self.len;
        self.get(range.clone())
            .unwrap_or_else(|| panic!("range {range:?} is outside a buffer of {len} bytes"))
    }

    /// Like [`slice`](IoBuf::slice), with `None` for a range outside the buffer.
    pub fn get(&self, range: Range<usize>) -> Option<IoBuf> {
        if range.start > range.end || range.end > self.len {
            return None;
        }
        if range.start == 0 && range.end == self.len {
            return Some(self.clone());
        }
        let mut list = SegmentList::new();
        self.for_each(range, |segment| list.push(segment));
        let owner = if list.len == 0 {
            Owner::Nothing
        } else {
            self.owner.clone()
        };
        Some(IoBuf {
            len: list.len,
            segments: list.finish(),
            owner,
        })
    }

    /// Whether the address and length of every segment are multiples of `align` bytes (a power of two).
    pub fn is_aligned(&self, align: usize) -> bool {
        debug_assert!(align.is_power_of_two());
        self.segments()
            .iter()
            .all(|s| (s.ptr.addr() | s.len) & (align - 1) == 0)
    }

    /// Copies the first bytes of the buffer to `to`, as many as both have, and returns how many.
    pub fn copy_to(&self, to: &mut [u8]) -> usize {
        let mut done = 0;
        self.for_each(0..self.len.min(to.len()), |segment| {
            let part = &mut to[done..done + segment.len];
            // SAFETY: `owner` keeps the segment valid for `segment.len` bytes, `part` has that length, and a
            // `&mut` slice cannot overlap memory to which no reference is ever given out.
            unsafe { ptr::copy_nonoverlapping(segment.ptr, part.as_mut_ptr(), segment.len) };
            done += segment.len;
        });
        done
    }

    /// Copies the first bytes of `from` into the buffer, as many as both have, and returns how many.
    pub fn copy_from(&self, from: &[u8]) -> usize {
        let mut done = 0;
        self.for_each(0..self.len.min(from.len()), |segment| {
            let part = &from[done..done + segment.len];
            // SAFETY: as in `copy_to`, in the other direction; the memory is writable or the segment would not
            // have been made (guest memory mapped read-only gives no buffers to write to).
            unsafe { ptr::copy_nonoverlapping(part.as_ptr(), segment.ptr, segment.len) };
            done += segment.len;
        });
        done
    }

    /// Copies bytes from another buffer, as many as both have, and returns how many. They may share memory.
    pub fn copy_from_buf(&self, from: &IoBuf) -> usize {
        let total = self.len.min(from.len);
        let mut done = 0;
        let mut source = from.segments().iter().copied();
        let mut rest = Segment::EMPTY;
        self.for_each(0..total, |mut to| {
            while to.len > 0 {
                if rest.len == 0 {
                    rest = source.next().expect("`total` is within `from`");
                }
                let n = to.len.min(rest.len);
                // SAFETY: both segments are valid for `n` bytes while their owners live; `copy` allows overlap.
                unsafe { ptr::copy(rest.ptr, to.ptr, n) };
                to = to.sub(n..to.len);
                rest = rest.sub(n..rest.len);
                done += n;
            }
        });
        done
    }

    /// Sets every byte of `range` to `byte`. Panics if the range is not inside the buffer.
    pub fn fill(&self, range: Range<usize>, byte: u8) {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "{range:?} is outside {} bytes",
            self.len
        );
        self.for_each(range, |segment| {
            // SAFETY: `owner` keeps the segment valid for writes of `segment.len` bytes.
            unsafe { ptr::write_bytes(segment.ptr, byte, segment.len) };
        });
    }

    /// A copy of all bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut vec = vec![0; self.len];
        self.copy_to(&mut vec);
        vec
    }

    /// Calls `f` with the pieces of `range`, which lies inside the buffer.
    fn for_each(&self, range: Range<usize>, mut f: impl FnMut(Segment)) {
        let mut position = 0;
        for segment in self.segments() {
            if position >= range.end {
                break;
            }
            let start = range.start.saturating_sub(position).min(segment.len);
            let end = (range.end - position).min(segment.len);
            if start < end {
                f(segment.sub(start..end));
            }
            position += segment.len;
        }
    }

    /// The piece of the first segment that lies past `skip` bytes, where that is all there is to the buffer.
    pub(crate) fn single_from(&self, skip: usize) -> Option<Segment> {
        match self.segments() {
            [only] => Some(only.sub(skip..only.len)),
            _ => None,
        }
    }

    /// Hands the pieces past `skip` bytes, at most `max` of them, to `f`.
    pub(crate) fn pieces_from(&self, skip: usize, max: usize, mut f: impl FnMut(Segment)) {
        let mut skip = skip;
        let mut count = 0;
        for segment in self.segments() {
            if count == max {
                break;
            }
            if skip >= segment.len {
                skip -= segment.len;
                continue;
            }
            f(segment.sub(skip..segment.len));
            skip = 0;
            count += 1;
        }
    }
}

impl fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "IoBuf({} bytes in {} segments)",
            self.len,
            self.segments().len()
        )
    }
}

/// Collects segments, joining neighbours, and allocates only past the inline space.
pub(crate) struct SegmentList {
    len: usize,
    count: u8,
    inline: [Segment; INLINE],
    more: Vec<Segment>,
}

impl SegmentList {
    pub(crate) fn new() -> SegmentList {
        SegmentList {
            len: 0,
            count: 0,
            inline: [Segment::EMPTY; INLINE],
            more: Vec::new(),
        }
    }

    /// Total length so far, in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Appends a segment. The caller has checked that the total length does not overflow.
    pub(crate) fn push(&mut self, segment: Segment) {
        if segment.len == 0 {
            return;
        }
        self.len += segment.len;
        let count = usize::from(self.count);
        let spilled = !self.more.is_empty();
        let last = if spilled {
            self.more.last_mut()
        } else {
            self.inline[..count].last_mut()
        };
        if let Some(last) = last
            && last.ptr.wrapping_add(last.len) == segment.ptr
        {
            last.len += segment.len;
        } else if !spilled && count < INLINE {
            self.inline[count] = segment;
            self.count += 1;
        } else {
            if !spilled {
                self.more.extend_from_slice(&self.inline);
            }
            self.more.push(segment);
        }
    }

    fn finish(self) -> Segments {
        if self.more.is_empty() {
            Segments::Inline(self.count, self.inline)
        } else {
            Segments::Many(self.more.into())
        }
    }
}

/// Memory of our own.
enum Memory {
    Aligned(NonNull<u8>, Layout),
    /// Pointer, length and capacity of a vector; it is not kept as a `Vec`, which would claim its bytes for itself.
    Vec(NonNull<u8>, usize, usize),
}

impl Memory {
    fn zeroed(len: usize) -> io::Result<Memory> {
        let layout =
            Layout::from_size_align(len.max(1), BUF_ALIGN).map_err(|_| io::ErrorKind::OutOfMemory)?;
        // SAFETY: the layout's size is not zero.
        let memory = unsafe { alloc_zeroed(layout) };
        match NonNull::new(memory) {
            Some(memory) => Ok(Memory::Aligned(memory, layout)),
            None => Err(io::ErrorKind::OutOfMemory.into()),
        }
    }

    fn from_vec(vec: Vec<u8>) -> Memory {
        let mut vec = ManuallyDrop::new(vec);
        let memory = NonNull::new(vec.as_mut_ptr()).unwrap_or(NonNull::dangling());
        Memory::Vec(memory, vec.len(), vec.capacity())
    }

    fn as_ptr(&self) -> *mut u8 {
        match self {
            Memory::Aligned(memory, _) | Memory::Vec(memory, _, _) => memory.as_ptr(),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        match *self {
            // SAFETY: allocated by `zeroed` with this layout, and freed only here.
            Memory::Aligned(memory, layout) => unsafe { dealloc(memory.as_ptr(), layout) },
            // SAFETY: these are the parts of the vector that `from_vec` took over, and it is rebuilt only here.
            Memory::Vec(memory, len, capacity) => unsafe {
                drop(Vec::from_raw_parts(memory.as_ptr(), len, capacity));
            },
        }
    }
}
