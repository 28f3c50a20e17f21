//! A guest of a coherent file, spoken by hand: it loads by reading the home's descriptor and stores by writing the
//! arena's.

use crate::support::*;
use copage::config::{Config, Mode};
use copage_coherence::msg::*;
use copage_grants::{Access, PageIndex};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

pub const PAGE: u64 = 4096;

pub fn coherent(config: &mut Config) {
    config.exports[0].mode = Mode::Coherent;
    config.exports[0].writeback_ms = 60_000;
}

/// A session with one coherent file open.
pub struct Co {
    pub guest: Guest,
    pub file: FileToken,
    pub generation: Generation,
    pub home: File,
    pub lengths: Vec<u64>,
    /// Pages that it was asked for.
    pub asked: Vec<PageRange>,
    /// It was told of a new home.
    pub rebased: bool,
}

impl Co {
    pub fn open(host: &Host, guest: &str, name: &str, write: bool) -> Self {
        let mut guest = host.guest(guest);
        let root = guest.attach("data").unwrap();
        let (node, _) = guest.lookup(root, name.as_bytes()).unwrap();
        let came = guest.call(&Request::Open {
            node,
            how: OpenHow::Map,
            write,
        });
        let Reply::Opened {
            file,
            generation,
            flags,
            ..
        } = came.reply()
        else {
            panic!("{:?}", came.reply())
        };
        assert!(flags.coherent && flags.descriptor);
        Self {
            guest,
            file,
            generation,
            home: File::from(came.fd.unwrap()),
            lengths: Vec::new(),
            asked: Vec::new(),
            rebased: false,
        }
    }

    pub fn fault(&self, first: u64, count: u32, access: Access) -> Request<'static> {
        Request::Fault {
            file: self.file,
            generation: self.generation,
            range: PageRange {
                first: PageIndex(first),
                count,
            },
            hint: FaultHint::Random,
            access,
        }
    }

    pub fn post_fault(&mut self, page: u64, access: Access) -> u64 {
        let fault = self.fault(page, 1, access);
        self.guest.post(&fault)
    }

    /// Takes what has come: acks what it is asked, keeps lengths. The reply of this number, if it came.
    pub fn take(&mut self, number: u64) -> Option<Came> {
        self.guest.channel.set_nonblocking(true).unwrap();
        let mut found = None;
        while let Ok(came) = receive(&self.guest.channel) {
            match came.notice() {
                Some(Notice::Invalidate { recall, range, .. }) => {
                    self.asked.push(range);
                    self.guest.post(&Request::Ack { recall });
                }
                Some(Notice::Rebase {
                    recall, generation, ..
                }) => {
                    self.generation = generation;
                    self.home = File::from(came.fd.unwrap());
                    self.rebased = true;
                    self.guest.post(&Request::Ack { recall });
                }
                Some(Notice::Resized { bytes, .. }) => self.lengths.push(bytes),
                Some(_) => {}
                None if came.request() == number => found = Some(came),
                None => {}
            }
        }
        self.guest.channel.set_nonblocking(false).unwrap();
        found
    }

    pub fn call(&mut self, request: &Request<'_>) -> Came {
        let number = self.guest.post(request);
        wait_for(&mut [self], number)
    }

    pub fn arena(&mut self) -> File {
        let came = self.call(&Request::Arena {
            file: self.file,
            common: false,
        });
        assert!(matches!(came.reply(), Reply::Arena { serial: 0 }));
        File::from(came.fd.unwrap())
    }

    pub fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        let came = self.call(&Request::Read {
            file: self.file,
            offset,
            len,
        });
        match came.reply() {
            Reply::Bytes { data } => data.to_vec(),
            other => panic!("{other:?}"),
        }
    }
}

/// Waits for the first one's reply; all of them ack meanwhile.
pub fn wait_for(all: &mut [&mut Co], number: u64) -> Came {
    let start = Instant::now();
    loop {
        for (nth, co) in all.iter_mut().enumerate() {
            let wanted = if nth == 0 { number } else { 0 };
            if let Some(came) = co.take(wanted) {
                return came;
            }
        }
        assert!(start.elapsed() < Duration::from_secs(10), "no answer");
        all[0].guest.post(&Request::Renew);
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn granted(came: &Came) -> (u64, u32, Access, GrantedPlace) {
    match came.reply() {
        Reply::Granted {
            range,
            access,
            place,
            ..
        } => (range.first.0, range.count, access, place),
        other => panic!("{other:?}"),
    }
}

pub fn page_of(file: &File, page: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE as usize];
    file.read_exact_at(&mut bytes, page * PAGE).unwrap();
    bytes
}
