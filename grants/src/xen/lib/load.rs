//! Loading libraries and finding their functions.

use super::error::XenError;
use std::path::Path;
use std::ptr::NonNull;

/// What a library calls a handle: a pointer to something of its own.
pub(super) type Raw = *mut core::ffi::c_void;

/// The `xentoollog_logger *` of all libraries: none, they then log to standard error.
pub(super) const NO_LOGGER: Raw = std::ptr::null_mut();

/// A handle that was opened.
pub(super) struct Handle(pub NonNull<core::ffi::c_void>);

// SAFETY: a handle is a pointer to memory of the library, which belongs to no thread.
unsafe impl Send for Handle {}
// SAFETY: the pointer itself is only copied. Whoever calls with it sees to it that the calls may be
// made at the same time.
unsafe impl Sync for Handle {}

impl Handle {
    pub(super) fn raw(&self) -> Raw {
        self.0.as_ptr()
    }
}

/// Loads a library.
pub(super) fn open(soname: &'static str) -> Result<libloading::Library, String> {
    // SAFETY: Xen's libraries have no initialisers that do more than set up their own data.
    unsafe { libloading::Library::new(soname) }.map_err(|e| e.to_string())
}

/// A function of a library.
///
/// # Safety
/// `T` must be the type of a pointer to that function, and not be called once the library is
/// unloaded.
pub(super) unsafe fn function<T: Copy>(
    library: &libloading::Library,
    name: &'static str,
) -> Result<T, String> {
    // SAFETY: the caller answers for the type.
    unsafe { library.get::<T>(name.as_bytes()) }
        .map(|symbol| *symbol)
        .map_err(|e| e.to_string())
}

/// A device's file is there. The libraries would try to open it and complain on standard error.
pub(super) fn device(path: &'static str) -> Result<(), XenError> {
    match Path::new(path).try_exists() {
        Ok(true) => Ok(()),
        Ok(false) => Err(XenError::Missing {
            what: path,
            why: "there is no such file".to_owned(),
        }),
        Err(e) => Err(XenError::Missing {
            what: path,
            why: e.to_string(),
        }),
    }
}

/// One library: a struct of its functions' addresses, and `load`, which loads it when it is first
/// asked for and never unloads it.
macro_rules! library {
    ($(#[$about:meta])* struct $Name:ident = $soname:literal {
        $($function:ident: $Type:ty,)*
    }) => {
        $(#[$about])*
        struct $Name {
            $($function: $Type,)*
            /// Keeps the functions where they are.
            _library: libloading::Library,
        }

        impl $Name {
            const SONAME: &'static str = $soname;

            fn find() -> Result<Self, String> {
                let library = super::load::open(Self::SONAME)?;
                Ok(Self {
                    $($function: {
                        // SAFETY: the type is that of the public header named above the struct; it
                        // is called only through the static below, which is never dropped.
                        unsafe {
                            super::load::function::<$Type>(&library, stringify!($function))
                        }?
                    },)*
                    _library: library,
                })
            }

            fn load() -> Result<&'static Self, super::XenError> {
                static LOADED: std::sync::OnceLock<Result<$Name, String>> =
                    std::sync::OnceLock::new();
                LOADED.get_or_init(Self::find).as_ref().map_err(|why| {
                    super::XenError::Missing {
                        what: Self::SONAME,
                        why: why.clone(),
                    }
                })
            }
        }
    };
}
pub(super) use library;
