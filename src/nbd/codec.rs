//! Reading and writing the wire's big-endian integers: a slice that shrinks, and bytes that grow.

use super::MAX_STRING;

/// A message that is shorter than its parts, longer than them, or holds what it may not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed {what}: {problem}")]
pub struct Malformed {
    pub what: &'static str,
    pub problem: &'static str,
}

impl Malformed {
    #[must_use]
    pub const fn new(what: &'static str, problem: &'static str) -> Self {
        Self { what, problem }
    }
}

/// What is left of a message; every read is checked against it.
#[derive(Debug, Clone, Copy)]
pub struct Reader<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads `bytes`, which hold a `what`: the name that errors carry.
    #[must_use]
    pub fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, rest: bytes }
    }

    /// The next `length` bytes.
    pub fn take(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        let (head, rest) = self
            .rest
            .split_at_checked(length)
            .ok_or(Malformed::new(self.what, "too short"))?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or(Malformed::new(self.what, "too short"))?;
        self.rest = rest;
        Ok(*head)
    }

    pub fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    pub fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    /// A string behind its 32-bit length; refused above [`MAX_STRING`] before anything is copied.
    pub fn string(&mut self) -> Result<&'a str, Malformed> {
        let length = self.u32()? as usize;
        if length > MAX_STRING {
            return Err(Malformed::new(self.what, "a string longer than 4096 bytes"));
        }
        text(self.what, self.take(length)?)
    }

    /// Everything that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    #[must_use]
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// Refuses trailing bytes.
    pub fn finish(self) -> Result<(), Malformed> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(Malformed::new(self.what, "trailing bytes"))
    }
}

/// Bytes as the protocol's strings: UTF-8 without NUL.
pub fn text<'a>(what: &'static str, bytes: &'a [u8]) -> Result<&'a str, Malformed> {
    let text = std::str::from_utf8(bytes).map_err(|_| Malformed::new(what, "not UTF-8"))?;
    if text.contains('\0') {
        return Err(Malformed::new(what, "a NUL in a string"));
    }
    Ok(text)
}

/// Appends the wire's integers and strings to a buffer.
pub trait Put {
    fn put_u16(&mut self, value: u16);
    fn put_u32(&mut self, value: u32);
    fn put_u64(&mut self, value: u64);
    /// A string behind its 32-bit length.
    fn put_string(&mut self, text: &str);
}

impl Put for Vec<u8> {
    fn put_u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_be_bytes());
    }

    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_be_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_be_bytes());
    }

    fn put_string(&mut self, text: &str) {
        self.put_u32(wire_length(text.len()));
        self.extend_from_slice(text.as_bytes());
    }
}

/// A length of something we built ourselves, as the wire's 32 bits. What we build is bounded far below that.
#[must_use]
pub fn wire_length(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_prefix_of_a_message_is_too_short() {
        let mut message = Vec::new();
        message.put_u16(1);
        message.put_u32(2);
        message.put_u64(3);
        message.put_string("abc");
        let parse = |bytes: &[u8]| -> Result<(), Malformed> {
            let mut reader = Reader::new("message", bytes);
            assert_eq!(reader.u16()?, 1);
            assert_eq!(reader.u32()?, 2);
            assert_eq!(reader.u64()?, 3);
            assert_eq!(reader.string()?, "abc");
            reader.finish()
        };
        assert_eq!(parse(&message), Ok(()));
        for end in 0..message.len() {
            assert_eq!(
                parse(&message[..end]),
                Err(Malformed::new("message", "too short")),
                "{end}"
            );
        }
        message.push(0);
        assert_eq!(
            parse(&message),
            Err(Malformed::new("message", "trailing bytes"))
        );
    }

    #[test]
    fn strings_are_bounded_utf8_without_nul() {
        let parse = |bytes: &[u8]| Reader::new("name", bytes).string().map(str::to_owned);
        let mut long = Vec::new();
        long.put_string(&"x".repeat(MAX_STRING));
        assert_eq!(parse(&long).map(|name| name.len()), Ok(MAX_STRING));
        let mut longer = Vec::new();
        longer.put_string(&"x".repeat(MAX_STRING + 1));
        assert!(parse(&longer).is_err());
        assert!(
            parse(&[0xff; 4]).is_err(),
            "a length of 4 GiB is not believed"
        );
        assert!(parse(&[0, 0, 0, 1, 0]).is_err(), "NUL");
        assert!(parse(&[0, 0, 0, 1, 0xff]).is_err(), "not UTF-8");
    }
}
