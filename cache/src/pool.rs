//! Bounded pools of threads.

use crate::error::CacheError;
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::sync::Arc;

struct State<J> {
    jobs: VecDeque<J>,
    stopped: bool,
}

/// A queue of jobs, first in, first out, with threads that run them.
pub(crate) struct Pool<J> {
    shared: Arc<(Mutex<State<J>>, Condvar)>,
    jobs_max: usize,
}

impl<J: Send + 'static> Pool<J> {
    /// A queue of at most `jobs_max` waiting jobs; no threads yet.
    pub(crate) fn new(jobs_max: usize) -> Self {
        let state = State {
            jobs: VecDeque::new(),
            stopped: false,
        };
        Self {
            shared: Arc::new((Mutex::new(state), Condvar::new())),
            jobs_max,
        }
    }

    /// Starts a thread that runs jobs until the pool stops or `run` returns `false`.
    pub(crate) fn spawn(
        &self,
        name: String,
        mut run: impl FnMut(J) -> bool + Send + 'static,
    ) -> Result<(), CacheError> {
        let shared = self.shared.clone();
        let body = move || {
            let (state, wake) = &*shared;
            loop {
                let job = {
                    let mut state = state.lock();
                    loop {
                        if state.stopped {
                            return;
                        }
                        if let Some(job) = state.jobs.pop_front() {
                            break job;
                        }
                        wake.wait(&mut state);
                    }
                };
                if !run(job) {
                    return;
                }
            }
        };
        std::thread::Builder::new()
            .name(name)
            .spawn(body)
            .map(drop)
            .map_err(|e| CacheError::Io {
                what: "start a thread",
                errno: e.raw_os_error().unwrap_or(libc::EAGAIN),
            })
    }

    /// Adds a job; gives it back when the pool has stopped or too many wait.
    pub(crate) fn push(&self, job: J) -> Result<(), J> {
        let (state, wake) = &*self.shared;
        let mut state = state.lock();
        if state.stopped || state.jobs.len() >= self.jobs_max {
            return Err(job);
        }
        state.jobs.push_back(job);
        wake.notify_one();
        Ok(())
    }

    /// Threads end when they are done with what they do; jobs that wait are dropped.
    pub(crate) fn stop(&self) {
        let (state, wake) = &*self.shared;
        let mut state = state.lock();
        state.stopped = true;
        state.jobs.clear();
        wake.notify_all();
    }
}
