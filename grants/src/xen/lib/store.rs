//! The xenstore (xenstore.h).

use super::XenError;
use super::load::{Handle, Raw, library};
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_ulong, c_void};
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

library! {
    /// xenstore.h. `xs_transaction_t` is `uint32_t`.
    struct Calls = "libxenstore.so.4" {
        xs_open: unsafe extern "C" fn(c_ulong) -> Raw,
        xs_close: unsafe extern "C" fn(Raw),
        xs_directory:
            unsafe extern "C" fn(Raw, u32, *const c_char, *mut c_uint) -> *mut *mut c_char,
        xs_read: unsafe extern "C" fn(Raw, u32, *const c_char, *mut c_uint) -> Raw,
        xs_write: unsafe extern "C" fn(Raw, u32, *const c_char, *const c_void, c_uint) -> bool,
        xs_mkdir: unsafe extern "C" fn(Raw, u32, *const c_char) -> bool,
        xs_rm: unsafe extern "C" fn(Raw, u32, *const c_char) -> bool,
        xs_set_permissions:
            unsafe extern "C" fn(Raw, u32, *const c_char, *mut Permission, c_uint) -> bool,
        xs_watch: unsafe extern "C" fn(Raw, *const c_char, *const c_char) -> bool,
        xs_unwatch: unsafe extern "C" fn(Raw, *const c_char, *const c_char) -> bool,
        xs_fileno: unsafe extern "C" fn(Raw) -> c_int,
        xs_check_watch: unsafe extern "C" fn(Raw) -> *mut *mut c_char,
        xs_is_domain_introduced: unsafe extern "C" fn(Raw, c_uint) -> bool,
    }
}

/// `XBT_NULL` (xenstore.h): no transaction.
const XBT_NULL: u32 = 0;

/// `XS_UNWATCH_FILTER` (xenstore.h): after `xs_unwatch` no event of that watch comes any more. We
/// give every watch a token of its own, as that asks for.
const XS_UNWATCH_FILTER: c_ulong = 1 << 2;

/// The device through which a guest reaches its xenstored; in the control domain a socket serves.
const DEVICE: &str = "/dev/xen/xenbus";

/// `struct xs_permissions` (xenstore_lib.h).
#[repr(C)]
#[derive(Clone, Copy)]
struct Permission {
    id: c_uint,
    perms: c_uint,
}

const _: () = assert!(size_of::<Permission>() == 8);

/// What a domain may do with a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeAccess {
    /// Nothing (`XS_PERM_NONE`).
    None,
    /// `XS_PERM_READ`
    Read,
    /// `XS_PERM_WRITE`
    Write,
    /// Both.
    ReadWrite,
}

impl NodeAccess {
    const fn bits(self) -> c_uint {
        match self {
            Self::None => 0,
            Self::Read => 1,
            Self::Write => 2,
            Self::ReadWrite => 3,
        }
    }
}

/// A connection to xenstored. Calls wait for its answer.
pub struct Store {
    calls: &'static Calls,
    /// Locked, so that one call is made at a time.
    handle: Mutex<Handle>,
    watch_fd: c_int,
}

impl Store {
    /// A new connection.
    pub fn open() -> Result<Self, XenError> {
        let calls = Calls::load()?;
        // SAFETY: a valid flag.
        let handle = unsafe { (calls.xs_open)(XS_UNWATCH_FILTER) };
        let handle = NonNull::new(handle).ok_or_else(|| XenError::opening("xs_open", DEVICE))?;
        let mut store = Self {
            calls,
            handle: Mutex::new(Handle(handle)),
            watch_fd: -1,
        };
        // Before any watch, so that no event comes without being shown there.
        // SAFETY: the handle is open.
        store.watch_fd = unsafe { (calls.xs_fileno)(handle.as_ptr()) };
        if store.watch_fd < 0 {
            return Err(XenError::last("xs_fileno"));
        }
        Ok(store)
    }

    fn lock(&self) -> MutexGuard<'_, Handle> {
        self.handle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The value of a node (4,096 bytes at most); `None`: there is no such node.
    pub fn read(&self, path: &str) -> Result<Option<Vec<u8>>, XenError> {
        const CALL: &str = "xs_read";
        let path = c_string(CALL, path)?;
        let mut len: c_uint = 0;
        let handle = self.lock();
        // SAFETY: the handle is open, the path ends with a NUL, `len` is where the length goes.
        let value =
            unsafe { (self.calls.xs_read)(handle.raw(), XBT_NULL, path.as_ptr(), &raw mut len) };
        let Some(value) = NonNull::new(value) else {
            return absent(CALL).map(|()| None);
        };
        // SAFETY: the library gives `len` bytes, initialised, in memory that is ours now.
        let bytes = unsafe {
            std::slice::from_raw_parts(value.as_ptr().cast::<u8>().cast_const(), len as usize)
        }
        .to_vec();
        // SAFETY: allocated by malloc, for the caller to free, and used no more.
        unsafe { libc::free(value.as_ptr()) };
        Ok(Some(bytes))
    }

    /// Sets the value of a node; makes it, and those above it, if need be.
    pub fn write(&self, path: &str, value: &[u8]) -> Result<(), XenError> {
        const CALL: &str = "xs_write";
        let path = c_string(CALL, path)?;
        let len = c_uint::try_from(value.len()).map_err(|_| XenError::BadArgument {
            call: CALL,
            why: "the value is too long",
        })?;
        let handle = self.lock();
        // SAFETY: the handle is open, the path ends with a NUL, the value is as long as is said.
        let done = unsafe {
            (self.calls.xs_write)(
                handle.raw(),
                XBT_NULL,
                path.as_ptr(),
                value.as_ptr().cast(),
                len,
            )
        };
        done_or(CALL, done)
    }

    /// Makes an empty node, if there is none.
    pub fn mkdir(&self, path: &str) -> Result<(), XenError> {
        const CALL: &str = "xs_mkdir";
        let path = c_string(CALL, path)?;
        let handle = self.lock();
        // SAFETY: the handle is open, the path ends with a NUL.
        let done = unsafe { (self.calls.xs_mkdir)(handle.raw(), XBT_NULL, path.as_ptr()) };
        done_or(CALL, done)
    }

    /// Removes a node and all below it, if there is one.
    pub fn remove(&self, path: &str) -> Result<(), XenError> {
        const CALL: &str = "xs_rm";
        let path = c_string(CALL, path)?;
        let handle = self.lock();
        // SAFETY: the handle is open, the path ends with a NUL.
        if unsafe { (self.calls.xs_rm)(handle.raw(), XBT_NULL, path.as_ptr()) } {
            Ok(())
        } else {
            absent(CALL)
        }
    }

    /// The names of the nodes right below a node; none when there is no such node.
    pub fn list(&self, path: &str) -> Result<Vec<String>, XenError> {
        const CALL: &str = "xs_directory";
        let path = c_string(CALL, path)?;
        let mut count: c_uint = 0;
        let handle = self.lock();
        // SAFETY: the handle is open, the path ends with a NUL, `count` is where the count goes.
        let names = unsafe {
            (self.calls.xs_directory)(handle.raw(), XBT_NULL, path.as_ptr(), &raw mut count)
        };
        let Some(names) = NonNull::new(names) else {
            return absent(CALL).map(|()| Vec::new());
        };
        Ok(strings(names, count as usize))
    }

    /// Lets events come for changes of a node and all below it; one comes at once. The token should
    /// be of no other watch of this connection. Nodes that begin with `@` are the special ones
    /// (`@releaseDomain`).
    pub fn watch(&self, path: &str, token: &str) -> Result<(), XenError> {
        const CALL: &str = "xs_watch";
        let path = c_string(CALL, path)?;
        let token = c_string(CALL, token)?;
        let handle = self.lock();
        // SAFETY: the handle is open, both strings end with a NUL.
        let done = unsafe { (self.calls.xs_watch)(handle.raw(), path.as_ptr(), token.as_ptr()) };
        done_or(CALL, done)
    }

    /// Ends a watch.
    pub fn unwatch(&self, path: &str, token: &str) -> Result<(), XenError> {
        const CALL: &str = "xs_unwatch";
        let path = c_string(CALL, path)?;
        let token = c_string(CALL, token)?;
        let handle = self.lock();
        // SAFETY: the handle is open, both strings end with a NUL.
        let done = unsafe { (self.calls.xs_unwatch)(handle.raw(), path.as_ptr(), token.as_ptr()) };
        done_or(CALL, done)
    }

    /// The next event: which node changed (or one above it was removed), and the watch's token.
    /// Does not wait.
    pub fn next_watch(&self) -> Result<Option<(String, String)>, XenError> {
        let handle = self.lock();
        // SAFETY: the handle is open.
        let event = unsafe { (self.calls.xs_check_watch)(handle.raw()) };
        let Some(event) = NonNull::new(event) else {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock => Ok(None),
                _ => Err(XenError::Sys {
                    call: "xs_check_watch",
                    source: error,
                }),
            };
        };
        let mut parts = strings(event, 2).into_iter();
        Ok(parts.next().zip(parts.next()))
    }

    /// Readable when an event has come: then [`Self::next_watch`] is called until it gives `None`.
    pub fn watch_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the library keeps this pipe open as long as the handle, which outlives the
        // borrow.
        unsafe { BorrowedFd::borrow_raw(self.watch_fd) }
    }

    /// Makes `owner` the owner of a node, which may do all with it, `others` what everybody may do,
    /// and `named` what some domains may.
    pub fn set_permissions(
        &self,
        path: &str,
        owner: u16,
        others: NodeAccess,
        named: &[(u16, NodeAccess)],
    ) -> Result<(), XenError> {
        const CALL: &str = "xs_set_permissions";
        let path = c_string(CALL, path)?;
        let mut permissions: Vec<Permission> = std::iter::once(&(owner, others))
            .chain(named)
            .map(|&(domid, access)| Permission {
                id: domid.into(),
                perms: access.bits(),
            })
            .collect();
        let handle = self.lock();
        // SAFETY: the handle is open, the path ends with a NUL, there are as many permissions as is
        // said.
        let done = unsafe {
            (self.calls.xs_set_permissions)(
                handle.raw(),
                XBT_NULL,
                path.as_ptr(),
                permissions.as_mut_ptr(),
                permissions.len() as c_uint,
            )
        };
        done_or(CALL, done)
    }

    /// Does xenstored know the domain? It does from the domain's creation until its end.
    pub fn is_introduced(&self, domid: u16) -> Result<bool, XenError> {
        let handle = self.lock();
        // SAFETY: the handle is open.
        Ok(unsafe { (self.calls.xs_is_domain_introduced)(handle.raw(), domid.into()) })
    }
}

/// Copies strings that the library gave in one piece of memory, and frees that.
fn strings(array: NonNull<*mut c_char>, count: usize) -> Vec<String> {
    let copy = (0..count)
        .map(|n| {
            let place = array.as_ptr().wrapping_add(n);
            // SAFETY: the library gives at least `count` pointers.
            let text = unsafe { place.read() };
            // SAFETY: each is a string that ends with a NUL, in the same memory.
            let text = unsafe { CStr::from_ptr(text) };
            text.to_string_lossy().into_owned()
        })
        .collect();
    // SAFETY: allocated by malloc, for the caller to free all in one, and used no more.
    unsafe { libc::free(array.as_ptr().cast()) };
    copy
}

/// What a call that has just failed says: that there is no such node, or an error.
fn absent(call: &'static str) -> Result<(), XenError> {
    let error = XenError::last(call);
    if error.errno() == libc::ENOENT {
        Ok(())
    } else {
        Err(error)
    }
}

fn done_or(call: &'static str, done: bool) -> Result<(), XenError> {
    if done {
        Ok(())
    } else {
        Err(XenError::last(call))
    }
}

fn c_string(call: &'static str, text: &str) -> Result<CString, XenError> {
    CString::new(text).map_err(|_| XenError::BadArgument {
        call,
        why: "a NUL in a path or token",
    })
}

impl Drop for Store {
    fn drop(&mut self) {
        let handle = self
            .handle
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the handle is open and is used no more.
        unsafe { (self.calls.xs_close)(handle.raw()) };
    }
}
