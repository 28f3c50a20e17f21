//! Locks that a signal handler cannot get caught in.
//!
//! A handler may touch a mapped page and so wait for the pager. If it interrupts a thread that
//! holds a lock the pager waits for, both wait forever. So a thread that holds one of this crate's
//! locks has its signals blocked, and the library's own threads have them blocked always.

use parking_lot::{Mutex, MutexGuard};
use std::cell::Cell;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};

thread_local! {
    /// This thread is the library's own, or holds a guard: its signals are blocked already.
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Signals are blocked in this thread as long as it lives.
pub(crate) struct Quiet {
    /// What to put back; `None`: they were blocked already.
    before: Option<libc::sigset_t>,
    /// Belongs to its thread.
    thread: PhantomData<*const ()>,
}

impl Quiet {
    pub(crate) fn new() -> Self {
        if QUIET.replace(true) {
            return Self {
                before: None,
                thread: PhantomData,
            };
        }
        let mut all = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigfillset(3) initialises the set it is given.
        unsafe { libc::sigfillset(all.as_mut_ptr()) };
        let mut before = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: `all` was initialised above; `before` has room for the old mask.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) };
        // SAFETY: pthread_sigmask(3) fails for an unknown `how` only, so it wrote the old mask.
        let before = unsafe { before.assume_init() };
        Self {
            before: Some(before),
            thread: PhantomData,
        }
    }

    /// Blocks signals for the rest of this thread's life, and of threads it starts.
    pub(crate) fn forever() {
        std::mem::forget(Self::new());
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            QUIET.set(false);
            // SAFETY: `before` is the mask that the kernel gave; no old mask is asked for.
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before, std::ptr::null_mut()) };
        }
    }
}

/// A mutex that is held with signals blocked.
#[derive(Default)]
pub(crate) struct Leaf<T>(Mutex<T>);

/// Holds a [`Leaf`].
pub(crate) struct LeafGuard<'a, T> {
    // Dropped in this order: signals come back when the lock is free.
    guard: MutexGuard<'a, T>,
    _quiet: Quiet,
}

impl<T> Leaf<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> LeafGuard<'_, T> {
        let quiet = Quiet::new();
        LeafGuard {
            guard: self.0.lock(),
            _quiet: quiet,
        }
    }

    pub(crate) fn try_lock(&self) -> Option<LeafGuard<'_, T>> {
        let quiet = Quiet::new();
        let guard = self.0.try_lock()?;
        Some(LeafGuard {
            guard,
            _quiet: quiet,
        })
    }
}

impl<T> Deref for LeafGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for LeafGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usr1_is_blocked() -> bool {
        let mut now = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: no new mask is given; `now` has room for the present one.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), now.as_mut_ptr()) };
        // SAFETY: `now` was written by the call above.
        (unsafe { libc::sigismember(now.as_ptr(), libc::SIGUSR1) }) == 1
    }

    #[test]
    fn signals_are_blocked_while_a_lock_is_held() {
        let (a, b) = (Leaf::new(1), Leaf::new(2));
        assert!(!usr1_is_blocked());
        {
            let outer = a.lock();
            {
                let inner = b.lock();
                assert_eq!(*outer + *inner, 3);
                assert!(a.try_lock().is_none());
            }
            assert!(usr1_is_blocked());
        }
        assert!(!usr1_is_blocked());
    }
}
