//! Memory that the allocator keeps for later.

/// Gives free memory back to the system. glibc keeps what threads freed, however long nobody needs it.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) takes no pointer, and locks what it looks at.
    unsafe {
        libc::malloc_trim(0);
    }
}
