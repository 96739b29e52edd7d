//! What the allocator does with memory that a step gives back. glibc returns it to the kernel and maps it afresh in the next step, where every
//! page costs a fault and its zeroing: more than the arithmetic on it.
#![allow(unsafe_code)]

/// Lets the process keep freed memory for its next use, blocks above 32 MiB left out (flat buffers and the arena hold on to theirs), and share
/// it between threads started later: a step runs now on one thread of the pool, now on another. For the whole process, once; without effect on
/// other C libraries than glibc.
pub fn keep_pages() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        static ONCE: std::sync::Once = std::sync::Once::new();
        // SAFETY: mallopt takes numbers alone; a value that it refuses leaves the allocator as it is.
        ONCE.call_once(|| unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
            libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 30);
            libc::mallopt(libc::M_TOP_PAD, 16 << 20);
            libc::mallopt(libc::M_ARENA_MAX, 1);
        });
    }
}
