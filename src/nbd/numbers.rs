//! The protocol's numbers, in the order of the specification. Unknown values are kept, compared and printed.

use std::fmt;

/// The magics that open each kind of message.
pub mod magic {
    /// "NBDMAGIC", the first eight bytes of every server.
    pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
    /// "IHAVEOPT", before the handshake flags and before each option.
    pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
    /// What an oldstyle server sends in the place of IHAVEOPT.
    pub const OLDSTYLE: u64 = 0x0000_4202_8186_1253;
    pub const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
    pub const REQUEST: u32 = 0x2560_9513;
    pub const SIMPLE_REPLY: u32 = 0x6744_6698;
    pub const STRUCTURED_REPLY: u32 = 0x668e_33ef;
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($repr:ty) { $($(#[$value_doc:meta])* $value:ident = $number:expr,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $repr);

        impl $name {
            $($(#[$value_doc])* pub const $value: Self = Self($number);)*
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match *self {
                    $(Self::$value => f.write_str(stringify!($value)),)*
                    Self(other) => write!(f, "{other:#x}"),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(self, f)
            }
        }
    };
}

macro_rules! flags {
    ($(#[$doc:meta])* $name:ident($repr:ty) { $($(#[$value_doc:meta])* $value:ident = $bit:expr,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct $name(pub $repr);

        impl $name {
            $($(#[$value_doc])* pub const $value: Self = Self(1 << $bit);)*

            #[must_use]
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            #[must_use]
            pub const fn with(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            #[must_use]
            pub const fn without(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut rest = *self;
                let mut separator = "";
                $(if rest.contains(Self::$value) {
                    write!(f, "{separator}{}", stringify!($value))?;
                    separator = "|";
                    rest = rest.without(Self::$value);
                })*
                if rest.0 != 0 || separator.is_empty() {
                    write!(f, "{separator}{:#x}", rest.0)?;
                }
                Ok(())
            }
        }
    };
}

flags! {
    /// Handshake flags: the server's 16 bits and the client's answer have the same ones.
    HandshakeFlags(u32) {
        FIXED_NEWSTYLE = 0,
        NO_ZEROES = 1,
    }
}

flags! {
    /// What an export can do, sent with its size.
    TransmissionFlags(u16) {
        HAS_FLAGS = 0,
        READ_ONLY = 1,
        SEND_FLUSH = 2,
        SEND_FUA = 3,
        ROTATIONAL = 4,
        SEND_TRIM = 5,
        SEND_WRITE_ZEROES = 6,
        SEND_DF = 7,
        CAN_MULTI_CONN = 8,
        SEND_RESIZE = 9,
        SEND_CACHE = 10,
        SEND_FAST_ZERO = 11,
    }
}

number! {
    /// What a client asks during negotiation.
    OptionCode(u32) {
        EXPORT_NAME = 1,
        ABORT = 2,
        LIST = 3,
        /// Withdrawn from the specification.
        PEEK_EXPORT = 4,
        STARTTLS = 5,
        INFO = 6,
        GO = 7,
        STRUCTURED_REPLY = 8,
        LIST_META_CONTEXT = 9,
        SET_META_CONTEXT = 10,
        EXTENDED_HEADERS = 11,
    }
}

number! {
    /// How a server answers an option; errors have the highest bit set.
    ReplyCode(u32) {
        ACK = 1,
        SERVER = 2,
        INFO = 3,
        META_CONTEXT = 4,
        ERR_UNSUP = 0x8000_0001,
        ERR_POLICY = 0x8000_0002,
        ERR_INVALID = 0x8000_0003,
        ERR_PLATFORM = 0x8000_0004,
        ERR_TLS_REQD = 0x8000_0005,
        ERR_UNKNOWN = 0x8000_0006,
        ERR_SHUTDOWN = 0x8000_0007,
        ERR_BLOCK_SIZE_REQD = 0x8000_0008,
        ERR_TOO_BIG = 0x8000_0009,
        ERR_EXT_HEADER_REQD = 0x8000_000a,
    }
}

impl ReplyCode {
    #[must_use]
    pub const fn is_error(self) -> bool {
        self.0 & 0x8000_0000 != 0
    }
}

number! {
    /// The kinds of information that INFO and GO carry.
    InfoType(u16) {
        EXPORT = 0,
        NAME = 1,
        DESCRIPTION = 2,
        BLOCK_SIZE = 3,
    }
}

number! {
    /// What a client asks in transmission.
    Command(u16) {
        READ = 0,
        WRITE = 1,
        DISC = 2,
        FLUSH = 3,
        TRIM = 4,
        CACHE = 5,
        WRITE_ZEROES = 6,
        BLOCK_STATUS = 7,
        RESIZE = 8,
    }
}

flags! {
    CommandFlags(u16) {
        FUA = 0,
        NO_HOLE = 1,
        DF = 2,
        REQ_ONE = 3,
        FAST_ZERO = 4,
        PAYLOAD_LEN = 5,
    }
}

number! {
    /// Error values in replies; 0 is success. They are the protocol's own and do not follow the host's errno.
    Errno(u32) {
        OK = 0,
        EPERM = 1,
        EIO = 5,
        ENOMEM = 12,
        EINVAL = 22,
        ENOSPC = 28,
        EOVERFLOW = 75,
        ENOTSUP = 95,
        ESHUTDOWN = 108,
    }
}

number! {
    /// The kinds of structured reply chunks; errors have the highest bit set.
    ChunkType(u16) {
        NONE = 0,
        OFFSET_DATA = 1,
        OFFSET_HOLE = 2,
        BLOCK_STATUS = 5,
        ERROR = 0x8001,
        ERROR_OFFSET = 0x8002,
    }
}

impl ChunkType {
    #[must_use]
    pub const fn is_error(self) -> bool {
        self.0 & 0x8000 != 0
    }
}

/// A client's name for one request; opaque, and may repeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cookie(pub u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn magics_are_what_they_spell() {
        assert_eq!(magic::NBDMAGIC.to_be_bytes(), *b"NBDMAGIC");
        assert_eq!(magic::IHAVEOPT.to_be_bytes(), *b"IHAVEOPT");
    }

    #[test]
    fn known_numbers_print_by_name_and_unknown_ones_as_hex() {
        assert_eq!(format!("{:?}", OptionCode::STARTTLS), "STARTTLS");
        assert_eq!(format!("{}", ReplyCode(0x8000_00ff)), "0x800000ff");
        let flags = TransmissionFlags::HAS_FLAGS.with(TransmissionFlags::SEND_DF);
        assert_eq!(format!("{flags:?}"), "HAS_FLAGS|SEND_DF");
        assert_eq!(format!("{:?}", CommandFlags(0)), "0x0");
        assert!(ReplyCode::ERR_UNSUP.is_error() && !ReplyCode::ACK.is_error());
    }
}
