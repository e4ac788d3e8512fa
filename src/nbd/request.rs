//! Requests in transmission: raw from the wire, then checked once against the export, then only carried out.

use super::codec::{Malformed, Put, Reader};
use super::{Command, CommandFlags, Cookie, Errno, MAX_PAYLOAD, magic};

/// A request as it was sent; nothing in it is believed yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawRequest {
    pub flags: CommandFlags,
    pub command: Command,
    pub cookie: Cookie,
    pub offset: u64,
    pub length: u32,
}

impl RawRequest {
    /// Bytes on the wire: magic, flags, command, cookie, offset, length.
    pub const LENGTH: usize = 28;

    /// Reads a header; a wrong magic means that the two sides are out of step (C45).
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new("request", bytes);
        if reader.u32()? != magic::REQUEST {
            return Err(Malformed::new("request", "wrong magic"));
        }
        let raw = Self {
            flags: CommandFlags(reader.u16()?),
            command: Command(reader.u16()?),
            cookie: Cookie(reader.u64()?),
            offset: reader.u64()?,
            length: reader.u32()?,
        };
        reader.finish()?;
        Ok(raw)
    }

    #[must_use]
    pub fn encode(&self) -> [u8; Self::LENGTH] {
        let mut bytes = Vec::with_capacity(Self::LENGTH);
        bytes.put_u32(magic::REQUEST);
        bytes.put_u16(self.flags.0);
        bytes.put_u16(self.command.0);
        bytes.put_u64(self.cookie.0);
        bytes.put_u64(self.offset);
        bytes.put_u32(self.length);
        let mut out = [0; Self::LENGTH];
        out.copy_from_slice(&bytes);
        out
    }

    /// Bytes of payload that follow the header: they are consumed even when the request is refused (C52).
    #[must_use]
    pub fn payload(&self) -> u32 {
        if self.command == Command::WRITE {
            self.length
        } else {
            0
        }
    }

    /// Whether the payload is more than a server need read: the connection ends instead (C50).
    #[must_use]
    pub fn is_unbearable(&self) -> bool {
        self.payload() > MAX_PAYLOAD
    }

    /// Makes every check there is, against the export as it is now.
    pub fn check(&self, rules: &Rules) -> Result<Request, Errno> {
        let Self {
            flags,
            command,
            offset,
            length,
            ..
        } = *self;
        let has = |flag| flags.contains(flag);
        let allowed = match command {
            Command::WRITE_ZEROES => CommandFlags::NO_HOLE.with(CommandFlags::FAST_ZERO),
            Command::READ if rules.structured => CommandFlags::DF,
            Command::BLOCK_STATUS => CommandFlags::REQ_ONE,
            _ => CommandFlags(0),
        };
        if flags.without(allowed.with(CommandFlags::FUA)) != CommandFlags(0) {
            return Err(Errno::EINVAL);
        }
        let writes = matches!(
            command,
            Command::WRITE | Command::TRIM | Command::WRITE_ZEROES
        );
        if writes && rules.read_only {
            return Err(Errno::EPERM);
        }
        let range = |beyond| {
            let end = offset.checked_add(u64::from(length)).ok_or(beyond)?;
            if end > rules.size {
                return Err(beyond);
            }
            if !offset.is_multiple_of(u64::from(rules.minimum_block))
                || !length.is_multiple_of(rules.minimum_block)
            {
                return Err(Errno::EINVAL);
            }
            Ok(Range { offset, length })
        };
        let fua = has(CommandFlags::FUA);
        match command {
            Command::READ if length > rules.maximum_payload => Err(Errno::EINVAL),
            Command::READ => Ok(Request::Read {
                range: range(Errno::EINVAL)?,
                whole: has(CommandFlags::DF),
            }),
            Command::WRITE if length > rules.maximum_payload => Err(Errno::EINVAL),
            Command::WRITE => Ok(Request::Write {
                range: range(Errno::ENOSPC)?,
                fua,
            }),
            Command::DISC => Ok(Request::Disconnect),
            Command::FLUSH if offset != 0 || length != 0 => Err(Errno::EINVAL),
            Command::FLUSH => Ok(Request::Flush),
            Command::TRIM => Ok(Request::Trim {
                range: range(Errno::EINVAL)?,
                fua,
            }),
            Command::CACHE => Ok(Request::Cache {
                range: range(Errno::EINVAL)?,
            }),
            Command::WRITE_ZEROES => Ok(Request::WriteZeroes {
                range: range(Errno::ENOSPC)?,
                fua,
                no_hole: has(CommandFlags::NO_HOLE),
                fast: has(CommandFlags::FAST_ZERO),
            }),
            Command::BLOCK_STATUS if !rules.contexts || length == 0 => Err(Errno::EINVAL),
            Command::BLOCK_STATUS => Ok(Request::BlockStatus {
                range: range(Errno::EINVAL)?,
                one: has(CommandFlags::REQ_ONE),
            }),
            _ => Err(Errno::EINVAL),
        }
    }
}

/// What a request is checked against.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Bytes, now: an export may have grown since the session began.
    pub size: u64,
    pub read_only: bool,
    /// Whether structured replies were negotiated.
    pub structured: bool,
    /// Whether any meta context is valid for this session.
    pub contexts: bool,
    /// Bytes; a power of two.
    pub minimum_block: u32,
    /// Bytes of one READ or WRITE.
    pub maximum_payload: u32,
}

/// A part of the export that is known to lie inside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    pub offset: u64,
    pub length: u32,
}

impl Range {
    /// One past the last byte.
    #[must_use]
    pub fn end(self) -> u64 {
        self.offset + u64::from(self.length)
    }
}

/// A request that passed every check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// `whole`: the client set DF, so the answer is one chunk.
    Read {
        range: Range,
        whole: bool,
    },
    Write {
        range: Range,
        fua: bool,
    },
    Disconnect,
    Flush,
    Trim {
        range: Range,
        fua: bool,
    },
    Cache {
        range: Range,
    },
    /// `no_hole`: stays allocated. `fast`: ENOTSUP rather than writing zeroes byte by byte.
    WriteZeroes {
        range: Range,
        fua: bool,
        no_hole: bool,
        fast: bool,
    },
    /// `one`: a single extent, no longer than the request.
    BlockStatus {
        range: Range,
        one: bool,
    },
}

impl Request {
    /// Whether it may change what the export contains.
    pub(crate) fn changes(&self) -> bool {
        matches!(
            self,
            Self::Write { .. } | Self::Trim { .. } | Self::WriteZeroes { .. }
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 1 << 20;

    fn rules() -> Rules {
        Rules {
            size: SIZE,
            read_only: false,
            structured: true,
            contexts: true,
            minimum_block: 1,
            maximum_payload: MAX_PAYLOAD,
        }
    }

    fn raw(command: Command, flags: CommandFlags, offset: u64, length: u32) -> RawRequest {
        RawRequest {
            flags,
            command,
            cookie: Cookie(7),
            offset,
            length,
        }
    }

    fn plain(command: Command, offset: u64, length: u32) -> RawRequest {
        raw(command, CommandFlags(0), offset, length)
    }

    #[test]
    fn c45_headers_survive_the_wire_and_a_wrong_magic_is_refused() {
        let request = raw(Command::WRITE, CommandFlags::FUA, 1 << 40, 4096);
        let bytes = request.encode();
        assert_eq!(RawRequest::parse(&bytes), Ok(request));
        for end in 0..bytes.len() {
            assert!(RawRequest::parse(&bytes[..end]).is_err());
        }
        let mut wrong = bytes;
        wrong[3] ^= 0x80;
        assert!(RawRequest::parse(&wrong).is_err());
    }

    #[test]
    fn c48_beyond_the_end_each_command_has_its_own_error() {
        for (command, errno) in [
            (Command::READ, Errno::EINVAL),
            (Command::WRITE, Errno::ENOSPC),
            (Command::WRITE_ZEROES, Errno::ENOSPC),
            (Command::TRIM, Errno::EINVAL),
            (Command::CACHE, Errno::EINVAL),
            (Command::BLOCK_STATUS, Errno::EINVAL),
        ] {
            for (offset, length) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 512)] {
                let request = plain(command, offset, length);
                assert_eq!(
                    request.check(&rules()),
                    Err(errno),
                    "{command:?} {offset} {length}"
                );
            }
            assert!(
                plain(command, SIZE - 1, 1).check(&rules()).is_ok(),
                "{command:?}"
            );
        }
    }

    #[test]
    fn c49_unaligned_requests_are_refused() {
        let rules = Rules {
            minimum_block: 512,
            ..rules()
        };
        for command in [
            Command::READ,
            Command::WRITE,
            Command::TRIM,
            Command::WRITE_ZEROES,
        ] {
            assert_eq!(plain(command, 1, 512).check(&rules), Err(Errno::EINVAL));
            assert_eq!(plain(command, 512, 511).check(&rules), Err(Errno::EINVAL));
            assert!(plain(command, 512, 512).check(&rules).is_ok());
        }
    }

    #[test]
    fn c50_payloads_have_a_limit_but_zeroes_do_not() {
        let rules = Rules {
            size: u64::MAX,
            maximum_payload: 1 << 20,
            ..rules()
        };
        let long = (1 << 20) + 1;
        assert_eq!(
            plain(Command::READ, 0, long).check(&rules),
            Err(Errno::EINVAL)
        );
        assert_eq!(
            plain(Command::WRITE, 0, long).check(&rules),
            Err(Errno::EINVAL)
        );
        assert!(!plain(Command::WRITE, 0, MAX_PAYLOAD).is_unbearable());
        assert!(plain(Command::WRITE, 0, MAX_PAYLOAD + 1).is_unbearable());
        // K25: the kernel sends these with nearly 4 GiB.
        assert!(plain(Command::TRIM, 0, u32::MAX).check(&rules).is_ok());
        assert!(
            plain(Command::WRITE_ZEROES, 0, u32::MAX)
                .check(&rules)
                .is_ok()
        );
    }

    #[test]
    fn c51_nothing_at_all_is_no_fault() {
        for command in [
            Command::READ,
            Command::WRITE,
            Command::TRIM,
            Command::WRITE_ZEROES,
        ] {
            assert!(
                plain(command, SIZE, 0).check(&rules()).is_ok(),
                "{command:?}"
            );
        }
        assert_eq!(
            plain(Command::BLOCK_STATUS, 0, 0).check(&rules()),
            Err(Errno::EINVAL)
        );
    }

    #[test]
    fn c52_c53_c56_flags_and_commands_not_negotiated_are_refused() {
        let check = |command, flags| raw(command, flags, 0, 0).check(&rules()).map(|_| ());
        for command in (0..=7).map(Command) {
            let fua = check(command, CommandFlags::FUA);
            assert_eq!(
                fua.is_ok(),
                command != Command::BLOCK_STATUS,
                "FUA on {command:?}"
            );
            assert_eq!(
                check(command, CommandFlags::PAYLOAD_LEN),
                Err(Errno::EINVAL)
            );
            assert_eq!(check(command, CommandFlags(1 << 15)), Err(Errno::EINVAL));
        }
        assert_eq!(check(Command(8), CommandFlags(0)), Err(Errno::EINVAL));
        assert_eq!(
            check(Command(u16::MAX), CommandFlags(0)),
            Err(Errno::EINVAL)
        );
        assert_eq!(
            check(Command::WRITE, CommandFlags::NO_HOLE),
            Err(Errno::EINVAL)
        );
        assert_eq!(
            check(Command::CACHE, CommandFlags::REQ_ONE),
            Err(Errno::EINVAL)
        );
        let simple = Rules {
            structured: false,
            contexts: false,
            ..rules()
        };
        let df = raw(Command::READ, CommandFlags::DF, 0, 1);
        assert_eq!(
            df.check(&simple),
            Err(Errno::EINVAL),
            "DF without structured replies"
        );
        assert!(df.check(&rules()).is_ok());
        let status = plain(Command::BLOCK_STATUS, 0, 1);
        assert_eq!(
            status.check(&simple),
            Err(Errno::EINVAL),
            "no context was negotiated"
        );
        assert_eq!(
            plain(Command::FLUSH, 1, 0).check(&rules()),
            Err(Errno::EINVAL)
        );
    }

    #[test]
    fn c54_a_read_only_export_refuses_every_write() {
        let rules = Rules {
            read_only: true,
            ..rules()
        };
        for command in [Command::WRITE, Command::TRIM, Command::WRITE_ZEROES] {
            assert_eq!(plain(command, 0, 1).check(&rules), Err(Errno::EPERM));
        }
        assert!(plain(Command::FLUSH, 0, 0).check(&rules).is_ok());
    }

    proptest! {
        /// Whatever is sent, a request that passes lies inside the export.
        #[test]
        fn what_passes_lies_inside(bytes in prop::array::uniform28(any::<u8>()), size in 0..=u64::MAX) {
            let mut bytes = bytes;
            bytes[..4].copy_from_slice(&magic::REQUEST.to_be_bytes());
            bytes[4] = 0;
            bytes[6] = 0;
            bytes[7] %= 10;
            let raw = RawRequest::parse(&bytes).unwrap();
            prop_assert_eq!(raw.encode(), bytes);
            let rules = Rules { size, ..rules() };
            match raw.check(&rules) {
                Ok(Request::Read { range, .. } | Request::Write { range, .. }) => {
                    prop_assert!(range.length <= MAX_PAYLOAD && range.end() <= size);
                }
                Ok(
                    Request::Trim { range, .. }
                    | Request::Cache { range }
                    | Request::WriteZeroes { range, .. }
                    | Request::BlockStatus { range, .. },
                ) => prop_assert!(range.offset.checked_add(u64::from(range.length)).unwrap() <= size),
                Ok(Request::Flush | Request::Disconnect) | Err(_) => {}
            }
        }
    }
}
