//! Telling whoever started the daemon that it is ready, or stops.

use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sendto, socket_with,
};
use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;

/// Sends `state` by the protocol of sd_notify(3), when `$NOTIFY_SOCKET` says where to. Nobody
/// listening is no error: the daemon works without.
pub(super) fn notify(state: &str) {
    if let Some(to) = std::env::var_os("NOTIFY_SOCKET")
        && let Err(error) = send_to(&to, state)
    {
        tracing::warn!(%error, "NOTIFY_SOCKET could not be told");
    }
}

fn send_to(to: &OsStr, state: &str) -> io::Result<()> {
    let address = match to.as_bytes() {
        [b'@', name @ ..] => SocketAddrUnix::new_abstract_name(name)?,
        [b'/', ..] => SocketAddrUnix::new(to)?,
        _ => return Err(io::ErrorKind::Unsupported.into()),
    };
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    sendto(&socket, state.as_bytes(), SendFlags::NOSIGNAL, &address)?;
    Ok(())
}

/// Writes `READY` and a newline to a descriptor that the daemon was started with, and closes it: whoever
/// reads the other end to its end has to wait no longer. Standard output and error stay open.
///
/// # Errors
/// When there is no such descriptor, or it cannot be written.
pub(super) fn write_ready(fd: u32) -> io::Result<()> {
    let mut to = if fd <= 2 {
        std::fs::File::options()
            .write(true)
            .open(format!("/proc/self/fd/{fd}"))?
    } else {
        copage_grants::sys::take_inherited(fd)?.into()
    };
    to.write_all(b"READY\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::IntoRawFd;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn notify_sockets_by_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        send_to(path.as_os_str(), "READY=1").unwrap();
        let mut buf = [0; 16];
        let len = socket.recv(&mut buf).unwrap();
        assert_eq!(&buf[..len], b"READY=1");
        assert!(send_to(OsStr::new("relative"), "x").is_err());
    }

    #[test]
    fn ready_goes_down_a_pipe_and_the_pipe_ends() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        rustix::io::fcntl_setfd(&writer, rustix::io::FdFlags::empty()).unwrap();
        // As after an execve: nobody here owns it.
        write_ready(writer.into_raw_fd().cast_unsigned()).unwrap();
        let mut text = String::new();
        std::io::Read::read_to_string(&mut reader, &mut text).unwrap();
        assert_eq!(text, "READY\n");
    }
}
