//! What the allocator does with memory that a step gives back, and how the kernel maps it. glibc returns memory to the kernel and maps it afresh in
//! the next step, where every page costs a fault and its zeroing: more than the arithmetic on it. And a step walks through more pages of 4 KiB than
//! the processor keeps the places of.
#![allow(unsafe_code)]

use crate::Real;

/// Bytes from which a block is mapped on its own.
const MAPPED: usize = 32 << 20;

/// Lets the process keep freed memory for its next use, blocks of `MAPPED` bytes left out (flat buffers and the arena hold on to theirs). For the
/// whole process, once; without effect on other C libraries than glibc. Threads keep heaps of their own, although each may lead a step and keep what
/// that took: with one heap for all, small blocks of two threads lie on one cache line, which cores take from each other at every write.
pub fn keep_pages() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        static ONCE: std::sync::Once = std::sync::Once::new();
        // SAFETY: mallopt takes numbers alone; a value that it refuses leaves the allocator as it is.
        ONCE.call_once(|| unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED as i32);
            libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 30);
            libc::mallopt(libc::M_TOP_PAD, 16 << 20);
        });
    }
}

/// Asks the kernel for pages of 2 MiB for a buffer that nobody has written to yet, where it gives them to those who ask. Neighbours on the pages at its
/// ends, whosever they are, get them too.
pub fn large_pages<T>(buffer: *const T, len: usize) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 2 << 20;
        const LEAST: usize = 64 << 10;
        let bytes = len * size_of::<T>();
        let (start, end) = (buffer as usize / PAGE * PAGE, (buffer as usize + bytes).next_multiple_of(PAGE));
        if bytes >= LEAST {
            // SAFETY: advice changes how memory is mapped, not what is in it; about memory of others, or none, too.
            unsafe { libc::madvise(start as *mut _, end - start, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (buffer, len);
}

/// Zeros, on such pages. Many of them are mapped as zeros, a page when it is used; fewer are written at once, after the pages were asked for.
pub fn zeros<T: Real>(len: usize) -> Vec<T> {
    let mapped = len * size_of::<T>() >= MAPPED;
    let mut numbers = if mapped { vec![T::ZERO; len] } else { Vec::with_capacity(len) };
    large_pages(numbers.as_ptr(), len);
    numbers.resize(len, T::ZERO);
    numbers
}
