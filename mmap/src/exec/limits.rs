//! Every constant of exec: unit, reason, and the bound of the kernel it respects.

/// Libraries of one program. Large desktop programs load some 300.
pub(super) const LIBRARIES_MAX: usize = 1024;
/// Scripts that interpret scripts (`exec_binprm`, fs/exec.c, allows 5).
pub(super) const SCRIPT_DEPTH_MAX: usize = 4;
/// Bytes of a `#!` line (`BINPRM_BUF_SIZE`, linux/binfmts.h).
pub(super) const SCRIPT_LINE_BYTES_MAX: usize = 256;
/// How often a file that the host changes meanwhile is copied anew.
pub(super) const COPY_TRIES_MAX: u32 = 16;
