//! The hypervisor's parameters, read and set at run time (xenhypfs.h).

use super::XenError;
use super::load::{Handle, NO_LOGGER, Raw, library};
use std::ffi::{CStr, CString, c_char, c_int, c_uint};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

library! {
    /// xenhypfs.h
    struct Calls = "libxenhypfs.so.1" {
        xenhypfs_open: unsafe extern "C" fn(Raw, c_uint) -> Raw,
        xenhypfs_close: unsafe extern "C" fn(Raw) -> c_int,
        xenhypfs_read: unsafe extern "C" fn(Raw, *const c_char) -> *mut c_char,
        xenhypfs_write: unsafe extern "C" fn(Raw, *const c_char, *const c_char) -> c_int,
    }
}

/// The devices that hypercalls are made through, the newer first.
const DEVICES: [&str; 2] = ["/dev/xen/hypercall", "/dev/xen/privcmd"];

/// A handle of the hypervisor's file system of parameters (Xen 4.14 or later, where it is built in).
pub struct Hypfs {
    calls: &'static Calls,
    /// Locked: the library keeps buffers in it.
    handle: Mutex<Handle>,
}

impl Hypfs {
    /// A new handle. ENOSYS or EOPNOTSUPP: this hypervisor has no such thing.
    pub fn open() -> Result<Self, XenError> {
        let calls = Calls::load()?;
        if !DEVICES.iter().any(|device| Path::new(device).exists()) {
            return Err(XenError::Missing {
                what: DEVICES[1],
                why: "there is no such file".to_owned(),
            });
        }
        // SAFETY: no logger and no flags are valid arguments.
        let handle = unsafe { (calls.xenhypfs_open)(NO_LOGGER, 0) };
        let handle =
            NonNull::new(handle).ok_or_else(|| XenError::opening("xenhypfs_open", DEVICES[1]))?;
        Ok(Self {
            calls,
            handle: Mutex::new(Handle(handle)),
        })
    }

    /// The text of an entry, `/params/gnttab_max_frames` for one.
    pub fn read(&self, path: &str) -> Result<String, XenError> {
        const CALL: &str = "xenhypfs_read";
        let path = c_string(CALL, path)?;
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the handle is open and used by nobody else meanwhile; the path ends with a NUL.
        let text = unsafe { (self.calls.xenhypfs_read)(handle.raw(), path.as_ptr()) };
        let text = NonNull::new(text).ok_or_else(|| XenError::last(CALL))?;
        // SAFETY: the library gives a string that ends with a NUL, in memory that is ours now.
        let copy = unsafe { CStr::from_ptr(text.as_ptr()) }
            .to_string_lossy()
            .into_owned();
        // SAFETY: allocated by malloc, for the caller to free, and used no more.
        unsafe { libc::free(text.as_ptr().cast()) };
        Ok(copy)
    }

    /// Sets an entry. EACCES: it is for reading only.
    pub fn write(&self, path: &str, value: &str) -> Result<(), XenError> {
        const CALL: &str = "xenhypfs_write";
        let path = c_string(CALL, path)?;
        let value = c_string(CALL, value)?;
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the handle is open and used by nobody else meanwhile; both strings end with a
        // NUL.
        let result =
            unsafe { (self.calls.xenhypfs_write)(handle.raw(), path.as_ptr(), value.as_ptr()) };
        if result == 0 {
            Ok(())
        } else {
            Err(XenError::last(CALL))
        }
    }
}

fn c_string(call: &'static str, text: &str) -> Result<CString, XenError> {
    CString::new(text).map_err(|_| XenError::BadArgument {
        call,
        why: "a NUL in a path or value",
    })
}

impl Drop for Hypfs {
    fn drop(&mut self) {
        let handle = self
            .handle
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the handle is open and is used no more.
        unsafe { (self.calls.xenhypfs_close)(handle.raw()) };
    }
}
