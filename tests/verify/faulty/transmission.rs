//! Transmission, on a disk in memory.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};

use hawser::nbd::reply::{error, none, offset_data, simple};
use hawser::nbd::request::RawRequest;
use hawser::nbd::{Command, CommandFlags, Cookie, Errno};

use super::{BLOCK, Fault, Options, RUN, SIZE};

/// What one session remembers.
#[derive(Default)]
struct Memory {
    cookies: BTreeSet<u64>,
    written: bool,
    /// The first page, where it is read from a cache of the session's own.
    stale: Option<Vec<u8>>,
}

impl<S: Read + Write> Options<S> {
    pub(super) fn transmit(&mut self) -> io::Result<()> {
        let mut memory = Memory::default();
        loop {
            let mut bytes = [0; RawRequest::LENGTH];
            let read = self.stream.read_exact(&mut bytes);
            self.mourn(read)?;
            if self.has(Fault::RequestMagicIgnored) {
                bytes[0] = 0x25;
            }
            let mut request = RawRequest::parse(&bytes).map_err(io::Error::other)?;
            let known = request.flags.0 & 0x4000 == 0;
            let keeps = self.has(Fault::WriteFlagKeepsPayload) && !known
                || self.has(Fault::FailedWriteKeepsPayload) && request.offset >= SIZE;
            let mut payload = Vec::new();
            if request.command == Command::WRITE && !keeps {
                payload.resize(request.length as usize, 0);
                self.stream.read_exact(&mut payload)?;
            }
            if self.has(Fault::RepeatedCookieChanged) && !memory.cookies.insert(request.cookie.0) {
                request.cookie = Cookie(request.cookie.0 ^ 1);
            }
            if request.command == Command::DISC {
                if self.has(Fault::DiscAnswered) {
                    let answer = simple(request.cookie, Errno::OK);
                    self.stream.write_all(&answer)?;
                }
                return Ok(());
            }
            let closes = match request.command {
                Command::READ => request.length == 0 && self.has(Fault::EmptyReadCloses),
                Command(code) => code > 100 && self.has(Fault::UnknownCommandCloses),
            };
            if closes {
                return Ok(());
            }
            let answer = self.carry_out(&request, &payload, &mut memory);
            self.stream.write_all(&answer)?;
        }
    }

    pub(super) fn refuse(&self, request: &RawRequest, errno: Errno) -> Vec<u8> {
        let simply = self.has(Fault::StructuredErrorsSimple) && request.command == Command::READ;
        if self.state.structured && !simply {
            return error(request.cookie, errno, "no");
        }
        simple(request.cookie, errno).to_vec()
    }

    fn done(&self, request: &RawRequest) -> Vec<u8> {
        if self.state.structured {
            return none(request.cookie);
        }
        simple(request.cookie, Errno::OK).to_vec()
    }

    fn carry_out(&self, request: &RawRequest, payload: &[u8], memory: &mut Memory) -> Vec<u8> {
        match self.verdict(request) {
            Some(Errno::OK) => return self.done(request),
            Some(errno) => return self.refuse(request, errno),
            None => {}
        }
        let start = usize::try_from(request.offset).unwrap_or(usize::MAX);
        let length = request.length as usize;
        match request.command {
            Command::READ => self.read(request, memory),
            Command::BLOCK_STATUS => self.status(request),
            Command::WRITE => {
                memory.written = true;
                let fua = request.flags.contains(CommandFlags::FUA);
                if !(fua && self.has(Fault::FuaWritesLost)) {
                    self.disk(|disk| disk[start..start + length].copy_from_slice(payload));
                }
                self.done(request)
            }
            Command::WRITE_ZEROES => {
                let no_hole = request.flags.contains(CommandFlags::NO_HOLE);
                let fast = request.flags.contains(CommandFlags::FAST_ZERO);
                let length = match self.shared.fault {
                    Fault::NoHoleZeroesLess if no_hole => length - 1,
                    Fault::ZeroesMore if !no_hole && !fast => length + 1,
                    Fault::FastZeroHalf if fast => length / 2,
                    _ => length,
                };
                self.disk(|disk| disk[start..start + length].fill(0));
                if fast && self.has(Fault::FastZeroHalf) {
                    return self.refuse(request, Errno::ENOTSUP);
                }
                self.done(request)
            }
            Command::TRIM => {
                let length = length + usize::from(self.has(Fault::TrimsMore));
                self.disk(|disk| disk[start..start + length].fill(0));
                self.done(request)
            }
            Command::FLUSH if self.has(Fault::FlushFails) && !memory.written => {
                self.refuse(request, Errno::EIO)
            }
            Command::CACHE if self.has(Fault::CacheFails) => self.refuse(request, Errno::EIO),
            Command::FLUSH | Command::CACHE => self.done(request),
            _ if self.has(Fault::UnknownCommandAccepted) => self.done(request),
            _ => self.refuse(request, Errno::EINVAL),
        }
    }

    fn disk<T>(&self, with: impl FnOnce(&mut [u8]) -> T) -> T {
        with(&mut self.shared.disk.lock().unwrap())
    }

    /// What a request comes to before it is carried out: an error, or nothing to do.
    fn verdict(&self, request: &RawRequest) -> Option<Errno> {
        let command = request.command;
        let fault = self.shared.fault;
        let writes = matches!(
            command,
            Command::WRITE | Command::TRIM | Command::WRITE_ZEROES
        );
        let mut flags = CommandFlags::FUA.0;
        flags |= match command {
            Command::READ if self.state.structured => CommandFlags::DF.0,
            Command::WRITE_ZEROES => CommandFlags::NO_HOLE.0 | CommandFlags::FAST_ZERO.0,
            Command::BLOCK_STATUS => CommandFlags::REQ_ONE.0,
            _ => 0,
        };
        let lenient = match command {
            Command::READ => fault == Fault::UnknownFlagIgnored,
            Command::WRITE => fault == Fault::WriteFlagIgnored,
            Command::CACHE => fault == Fault::CacheFlagsIgnored,
            _ => false,
        };
        if request.flags.0 & !flags != 0 && !lenient {
            return Some(Errno::EINVAL);
        }
        let fua = request.flags.contains(CommandFlags::FUA);
        if command == Command::READ && fua && fault == Fault::FuaRefusedOnRead {
            return Some(Errno::EINVAL);
        }
        if writes {
            match fault {
                Fault::ReadOnly => return Some(Errno::EPERM),
                Fault::ReadOnlyWrongErrno => return Some(Errno::EIO),
                _ => {}
            }
        }
        let ranged = writes
            || matches!(
                command,
                Command::READ | Command::CACHE | Command::BLOCK_STATUS
            );
        let beyond = request
            .offset
            .checked_add(u64::from(request.length))
            .is_none_or(|end| end > SIZE);
        if ranged && beyond {
            return match (command, fault) {
                (Command::READ, Fault::ReadsBeyondEnd)
                | (Command::BLOCK_STATUS, Fault::StatusBeyondEnd) => None,
                (Command::READ, Fault::BeyondWrongErrno) => Some(Errno::EIO),
                (Command::WRITE | Command::WRITE_ZEROES, Fault::WritesBeyondEnd) => Some(Errno::OK),
                (Command::WRITE | Command::WRITE_ZEROES, Fault::WriteBeyondWrongErrno) => {
                    Some(Errno::EINVAL)
                }
                (Command::WRITE | Command::WRITE_ZEROES, _) => Some(Errno::ENOSPC),
                _ => Some(Errno::EINVAL),
            };
        }
        let aligned =
            request.offset.is_multiple_of(u64::from(BLOCK)) && request.length.is_multiple_of(BLOCK);
        if ranged && !aligned && fault != Fault::UnalignedServed {
            return Some(Errno::EINVAL);
        }
        let large = request.length > 1 << 20;
        match (command, fault) {
            (Command::READ, Fault::LargeReadRefused) if large => Some(Errno::EINVAL),
            (Command::WRITE, Fault::LargeWriteRefused) if large => Some(Errno::EINVAL),
            _ => None,
        }
    }

    fn read(&self, request: &RawRequest, memory: &mut Memory) -> Vec<u8> {
        let RawRequest {
            cookie,
            offset,
            length,
            ..
        } = *request;
        let data = self.content(request, memory);
        let structured = self.state.structured || self.has(Fault::ReadAlwaysStructured);
        if !structured || length == 0 {
            let mut out = if structured {
                none(cookie)
            } else {
                simple(cookie, Errno::OK).to_vec()
            };
            out.extend(data);
            return out;
        }
        let whole = request.flags.contains(CommandFlags::DF) && !self.has(Fault::DfIgnored);
        if whole || length <= 2 * BLOCK {
            let mut out = offset_data(cookie, true, offset, length).to_vec();
            out.extend(data);
            return out;
        }
        let cut = length / 2;
        let (from, cut) = match self.shared.fault {
            Fault::ChunksOverlap => (cut - 1, cut),
            Fault::ChunkMissing => (cut, cut - 1),
            _ => (cut, cut),
        };
        let mut out = offset_data(cookie, false, offset, cut).to_vec();
        out.extend(&data[..cut as usize]);
        let second = offset + u64::from(from);
        out.extend(offset_data(cookie, true, second, length - from));
        out.extend(&data[from as usize..]);
        out
    }

    fn content(&self, request: &RawRequest, memory: &mut Memory) -> Vec<u8> {
        let length = request.length as usize;
        if request.offset >= SIZE {
            return vec![0; length];
        }
        let start = usize::try_from(request.offset).unwrap();
        let page = usize::try_from(RUN).unwrap();
        if self.has(Fault::StaleReads) && !memory.written && start + length <= page {
            let stale = memory
                .stale
                .get_or_insert_with(|| self.disk(|disk| disk[..page].to_vec()));
            return stale[start..start + length].to_vec();
        }
        self.disk(|disk| disk[start..start + length].to_vec())
    }
}
