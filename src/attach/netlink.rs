//! Messages of the kernel's `nbd` generic netlink family (`include/uapi/linux/nbd-netlink.h`), and the two of the
//! controller that name it. Bytes in, bytes out; `kernel` sends them.
//!
//! Netlink numbers have the machine's own byte order, and everything is padded to four bytes.

use std::os::fd::RawFd;

/// The message types and flags of netlink itself that are needed here.
const NLMSG_ERROR: u16 = 2;
const NLMSG_MIN_TYPE: u16 = 0x10;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NESTED: u16 = 0x8000;
const BYTE_ORDER: u16 = 0x4000;

/// The controller's own family, and what it is asked.
const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const CTRL_ATTR_MCAST_GROUPS: u16 = 7;
const CTRL_ATTR_MCAST_GRP_NAME: u16 = 1;
const CTRL_ATTR_MCAST_GRP_ID: u16 = 2;

const FAMILY_NAME: &str = "nbd";
const GROUP_NAME: &str = "nbd_mc_group";
const VERSION: u8 = 1;

const COMMAND_CONNECT: u8 = 1;
const COMMAND_DISCONNECT: u8 = 2;
const COMMAND_RECONFIGURE: u8 = 3;
const COMMAND_LINK_DEAD: u8 = 4;

const INDEX: u16 = 1;
const SIZE_BYTES: u16 = 2;
const BLOCK_SIZE_BYTES: u16 = 3;
const TIMEOUT: u16 = 4;
const SERVER_FLAGS: u16 = 5;
const SOCKETS: u16 = 7;
const SOCK_ITEM: u16 = 1;
const SOCK_FD: u16 = 1;
const DEAD_CONN_TIMEOUT: u16 = 8;
const BACKEND_IDENTIFIER: u16 = 10;

/// Both headers: netlink's 16 bytes, generic netlink's 4.
const HEADER: usize = 16;
const GENERIC_HEADER: usize = 4;

/// The numbers that the running kernel gave the family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Family {
    pub(super) id: u16,
    /// The multicast group of LINK_DEAD.
    pub(super) group: u32,
}

/// What CONNECT is told about a new device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Connect<'a> {
    pub(super) size_bytes: u64,
    pub(super) block_size_bytes: u64,
    pub(super) timeout_seconds: u64,
    pub(super) dead_timeout_seconds: u64,
    /// Transmission flags, as the server sent them (K26).
    pub(super) server_flags: u16,
    pub(super) backend: &'a str,
}

/// What the kernel answers, or announces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Message<'a> {
    /// The request of this sequence number was carried out (0), or not (an errno).
    Done { sequence: u32, errno: i32 },
    Generic {
        sequence: u32,
        family: u16,
        command: u8,
        attributes: Attributes<'a>,
    },
}

/// Bytes that are not the messages they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the kernel sent a netlink message that is cut short")]
pub(super) struct Malformed;

/// Asks the controller for the `nbd` family.
pub(super) fn find_family(sequence: u32) -> Vec<u8> {
    Request::new(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, sequence)
        .text(CTRL_ATTR_FAMILY_NAME, FAMILY_NAME)
        .finish()
}

impl Family {
    /// Reads the controller's answer.
    pub(super) fn parse(attributes: Attributes<'_>) -> Result<Option<Self>, Malformed> {
        let mut id = None;
        let mut group = None;
        for attribute in attributes {
            let (kind, value) = attribute?;
            match kind {
                CTRL_ATTR_FAMILY_ID => id = value.try_into().ok().map(u16::from_ne_bytes),
                CTRL_ATTR_MCAST_GROUPS => group = find_group(Attributes(value))?,
                _ => {}
            }
        }
        Ok(id.zip(group).map(|(id, group)| Self { id, group }))
    }

    pub(super) fn connect(self, sequence: u32, device: &Connect<'_>, sockets: &[RawFd]) -> Vec<u8> {
        Request::new(self.id, COMMAND_CONNECT, sequence)
            .number(SIZE_BYTES, device.size_bytes)
            .number(BLOCK_SIZE_BYTES, device.block_size_bytes)
            .number(TIMEOUT, device.timeout_seconds)
            .number(DEAD_CONN_TIMEOUT, device.dead_timeout_seconds)
            .number(SERVER_FLAGS, u64::from(device.server_flags))
            .sockets(sockets)
            .text(BACKEND_IDENTIFIER, device.backend)
            .finish()
    }

    pub(super) fn disconnect(self, sequence: u32, index: u32) -> Vec<u8> {
        Request::new(self.id, COMMAND_DISCONNECT, sequence)
            .index(index)
            .finish()
    }

    /// Changes nothing: it succeeds exactly where a device is connected and has this backend identifier.
    pub(super) fn check(self, sequence: u32, index: u32, backend: &str) -> Vec<u8> {
        self.reconfigure(sequence, index, backend).finish()
    }

    pub(super) fn resize(
        self,
        sequence: u32,
        index: u32,
        backend: &str,
        size_bytes: u64,
    ) -> Vec<u8> {
        self.reconfigure(sequence, index, backend)
            .number(SIZE_BYTES, size_bytes)
            .finish()
    }

    /// Offers one socket: the kernel takes it if one of the device's is dead, and drops it without a word
    /// otherwise (K5). Of several it would drop all after the first surplus one.
    pub(super) fn offer(self, sequence: u32, index: u32, backend: &str, socket: RawFd) -> Vec<u8> {
        self.reconfigure(sequence, index, backend)
            .sockets(&[socket])
            .finish()
    }

    fn reconfigure(self, sequence: u32, index: u32, backend: &str) -> Request {
        Request::new(self.id, COMMAND_RECONFIGURE, sequence)
            .index(index)
            .text(BACKEND_IDENTIFIER, backend)
    }
}

/// The index in CONNECT's answer.
pub(super) fn connected_index(message: &Message<'_>) -> Option<u32> {
    index_in(message, COMMAND_CONNECT)
}

/// The index of a device of which some socket died.
pub(super) fn dead_link(message: &Message<'_>) -> Option<u32> {
    index_in(message, COMMAND_LINK_DEAD)
}

fn index_in(message: &Message<'_>, wanted: u8) -> Option<u32> {
    let Message::Generic {
        command,
        attributes,
        ..
    } = *message
    else {
        return None;
    };
    if command != wanted {
        return None;
    }
    attributes
        .filter_map(Result::ok)
        .find(|(kind, _)| *kind == INDEX)
        .and_then(|(_, value)| Some(u32::from_ne_bytes(value.try_into().ok()?)))
}

fn find_group(groups: Attributes<'_>) -> Result<Option<u32>, Malformed> {
    for group in groups {
        let (_, group) = group?;
        let mut id = None;
        let mut named = false;
        for attribute in Attributes(group) {
            match attribute? {
                (CTRL_ATTR_MCAST_GRP_NAME, name) => {
                    named = name.strip_suffix(b"\0") == Some(GROUP_NAME.as_bytes());
                }
                (CTRL_ATTR_MCAST_GRP_ID, value) => {
                    id = value.try_into().ok().map(u32::from_ne_bytes);
                }
                _ => {}
            }
        }
        if named {
            return Ok(id);
        }
    }
    Ok(None)
}

/// The messages of one datagram.
#[derive(Debug)]
pub(super) struct Messages<'a>(pub(super) &'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Result<Message<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if self.0.is_empty() {
                return None;
            }
            match self.message() {
                Ok(Some(message)) => return Some(Ok(message)),
                Ok(None) => {}
                Err(error) => {
                    self.0 = &[];
                    return Some(Err(error));
                }
            }
        }
    }
}

impl<'a> Messages<'a> {
    /// `None`: a message of netlink's own that says nothing here.
    fn message(&mut self) -> Result<Option<Message<'a>>, Malformed> {
        let length = number(self.0)? as usize;
        let whole = self.0.get(..length).ok_or(Malformed)?;
        let kind: [u8; 2] = whole
            .get(4..6)
            .ok_or(Malformed)?
            .try_into()
            .or(Err(Malformed))?;
        let kind = u16::from_ne_bytes(kind);
        let sequence = number(whole.get(8..).ok_or(Malformed)?)?;
        let payload = whole.get(HEADER..).ok_or(Malformed)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        if kind == NLMSG_ERROR {
            let errno = number(payload)?.cast_signed().wrapping_neg();
            return Ok(Some(Message::Done { sequence, errno }));
        }
        if kind < NLMSG_MIN_TYPE {
            return Ok(None);
        }
        Ok(Some(Message::Generic {
            sequence,
            family: kind,
            command: *payload.first().ok_or(Malformed)?,
            attributes: Attributes(payload.get(GENERIC_HEADER..).ok_or(Malformed)?),
        }))
    }
}

/// A run of attributes: the number of each, and its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = Result<(u16, &'a [u8]), Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        let (&[a, b, c, d], _) = self.0.split_first_chunk::<4>().or_else(|| {
            // Fewer than four bytes are padding, or nothing.
            self.0 = &[];
            None
        })?;
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let kind = u16::from_ne_bytes([c, d]) & !(NESTED | BYTE_ORDER);
        let Some(value) = self.0.get(4..length) else {
            self.0 = &[];
            return Some(Err(Malformed));
        };
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Ok((kind, value)))
    }
}

fn number(bytes: &[u8]) -> Result<u32, Malformed> {
    bytes
        .first_chunk()
        .map(|bytes| u32::from_ne_bytes(*bytes))
        .ok_or(Malformed)
}

/// A message being written; its length goes in last.
struct Request(Vec<u8>);

impl Request {
    fn new(family: u16, command: u8, sequence: u32) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend(family.to_ne_bytes());
        bytes.extend((NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend([command, VERSION, 0, 0]);
        Self(bytes)
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        append(&mut self.0, kind, value);
        self
    }

    fn index(self, index: u32) -> Self {
        self.attribute(INDEX, &index.to_ne_bytes())
    }

    fn number(self, kind: u16, number: u64) -> Self {
        self.attribute(kind, &number.to_ne_bytes())
    }

    fn text(self, kind: u16, text: &str) -> Self {
        let mut value = text.as_bytes().to_vec();
        value.push(0);
        self.attribute(kind, &value)
    }

    fn sockets(self, sockets: &[RawFd]) -> Self {
        let mut items = Vec::new();
        for socket in sockets {
            let mut item = Vec::new();
            append(&mut item, SOCK_FD, &socket.to_ne_bytes());
            append(&mut items, SOCK_ITEM | NESTED, &item);
        }
        self.attribute(SOCKETS | NESTED, &items)
    }

    fn finish(mut self) -> Vec<u8> {
        // A message of ours is some hundred bytes long.
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }
}

fn append(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    // The longest value is a list of sockets: 12 bytes for each of at most 255.
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests;
