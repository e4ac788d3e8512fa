//! Replies where they will be sealed: one record behind the other, each with the room that encryption needs around it.
//!
//! So a READ is read from the file to where it is encrypted, and is sent from there. What is ready at once shares
//! records: a record is ended when it is full, or when all is to be sent.

use std::io::IoSliceMut;

use rustls::ContentType;

use super::buffer::Buffer;
use crate::tls::records::{CONTENT, HEAD, TAIL};

/// Records in the order in which they are sent: those that are sealed, those that are to be, and perhaps one that
/// takes more. Until a record is sealed, the first byte of its head says what its content is.
#[derive(Debug, Default)]
pub(in crate::server) struct Staged {
    records: Buffer,
    /// Bytes at the beginning that are sealed.
    sealed: usize,
    /// Content of the record that takes more.
    open: Option<usize>,
}

/// Room for a reply.
pub(in crate::server) struct Room<'a> {
    pub(in crate::server) header: &'a mut [u8],
    /// As many pieces as the data will have records.
    pub(in crate::server) data: Vec<IoSliceMut<'a>>,
}

impl Staged {
    /// What was sealed elsewhere and is to be sent before all else.
    pub(super) fn behind(sealed: Buffer) -> Self {
        Self {
            sealed: sealed.len(),
            records: sealed,
            open: None,
        }
    }

    pub(in crate::server) fn len(&self) -> usize {
        self.records.len()
    }

    pub(in crate::server) fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Room for a reply, which counts once it is [staged](Self::stage). Its header is in one piece.
    pub(in crate::server) fn room(&mut self, header: usize, data: usize) -> Room<'_> {
        if self.open.is_some_and(|have| CONTENT - have < header) {
            self.end();
        }
        let (head, fits) = self
            .open
            .map_or((HEAD, CONTENT), |have| (0, CONTENT - have));
        let first = data.min(fits - header);
        let more = (data - first).div_ceil(CONTENT);
        let needed = head + header + data + more * (TAIL + HEAD) + TAIL;
        let space = &mut self.records.reserve(needed)[head..];
        let (header, space) = space.split_at_mut(header);
        let (piece, mut space) = space.split_at_mut(first);
        let mut pieces = Vec::with_capacity(1 + more);
        if first > 0 {
            pieces.push(IoSliceMut::new(piece));
        }
        let mut left = data - first;
        while left > 0 {
            let (piece, behind) = space[TAIL + HEAD..].split_at_mut(left.min(CONTENT));
            left -= piece.len();
            pieces.push(IoSliceMut::new(piece));
            space = behind;
        }
        Room {
            header,
            data: pieces,
        }
    }

    /// Takes in what was put into the whole of the last [room](Self::room), `length` bytes with the header.
    pub(in crate::server) fn stage(&mut self, length: usize) {
        let mut left = length;
        while left > 0 {
            let have = self.begin();
            let taken = left.min(CONTENT - have);
            self.records.fill(taken);
            self.grown(have + taken);
            left -= taken;
        }
    }

    pub(in crate::server) fn append(&mut self, bytes: &[u8]) {
        let mut left = bytes;
        while !left.is_empty() {
            let have = self.begin();
            let (taken, behind) = left.split_at(left.len().min(CONTENT - have));
            self.records.reserve(taken.len() + TAIL)[..taken.len()].copy_from_slice(taken);
            self.records.fill(taken.len());
            self.grown(have + taken.len());
            left = behind;
        }
    }

    /// Appends a record of TLS' own.
    pub(super) fn control(&mut self, content: ContentType, message: &[u8]) {
        self.end();
        self.append(message);
        self.end_with(content);
    }

    /// The next record that is to be sealed, from head to tail, and what it is.
    pub(super) fn unsealed(&mut self) -> Option<(ContentType, &mut [u8])> {
        self.end();
        let length = self.next_length()?;
        let record = &mut self.records.filled_mut()[self.sealed..][..length];
        Some((ContentType::from(record[0]), record))
    }

    /// It is sealed.
    pub(super) fn seal(&mut self) {
        self.sealed += self.next_length().unwrap_or(0);
    }

    /// Bytes that are not sealed.
    pub(super) fn left(&self) -> usize {
        self.records.len() - self.sealed
    }

    pub(super) fn sealed(&self) -> &[u8] {
        &self.records.filled()[..self.sealed]
    }

    /// Lets go of sealed bytes.
    pub(super) fn sent(&mut self, length: usize) {
        self.sealed -= length;
        self.records.consume(length);
    }

    /// Gives the memory back, if nothing is in it.
    pub(in crate::server) fn shrink(&mut self) {
        self.records.shrink();
    }

    /// Takes out the content of all records that are not sealed, and has them sealed and sent.
    #[cfg(test)]
    pub(in crate::server) fn contents(&mut self) -> Vec<u8> {
        let mut contents = Vec::new();
        while let Some((content, record)) = self.unsealed() {
            assert_eq!(content, ContentType::ApplicationData);
            assert!((HEAD + 1 + TAIL..=HEAD + CONTENT + TAIL).contains(&record.len()));
            let tail = record.len() - TAIL;
            contents.extend_from_slice(&record[HEAD..tail]);
            // What sealing writes is none of the content.
            record[tail..].fill(0xff);
            self.seal();
        }
        self.sent(self.sealed);
        contents
    }

    /// How long the first record behind the sealed ones is.
    fn next_length(&self) -> Option<usize> {
        let &[_, _, _, high, low, ..] = &self.records.filled()[self.sealed..] else {
            return None;
        };
        Some(HEAD + usize::from(u16::from_be_bytes([high, low])))
    }

    /// Begins a record if none is open; its content so far. Moves nothing where there is room.
    fn begin(&mut self) -> usize {
        *self.open.get_or_insert_with(|| {
            self.records.reserve(HEAD);
            self.records.fill(HEAD);
            0
        })
    }

    fn grown(&mut self, content: usize) {
        self.open = Some(content);
        if content == CONTENT {
            self.end();
        }
    }

    fn end(&mut self) {
        self.end_with(ContentType::ApplicationData);
    }

    fn end_with(&mut self, content: ContentType) {
        let Some(have) = self.open.take() else {
            return;
        };
        self.records.reserve(TAIL);
        self.records.fill(TAIL);
        let record = HEAD + have + TAIL;
        let begin = self.records.len() - record;
        // Content has at most 16 KiB.
        let [high, low] = u16::try_from(have + TAIL).unwrap_or(u16::MAX).to_be_bytes();
        let head = [content.into(), 3, 3, high, low];
        self.records.filled_mut()[begin..][..HEAD].copy_from_slice(&head);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_staged_is_the_content_of_the_records(
            steps in prop::collection::vec(
                (0_usize..40, prop_oneof![0_usize..100, CONTENT - 40..CONTENT + 40, 0..5 * CONTENT], 0_usize..4),
                1..30,
            ),
        ) {
            let mut staged = Staged::default();
            let (mut expected, mut got) = (Vec::new(), Vec::new());
            let mut next = (0_u8..251).cycle();
            for (header, data, how) in steps {
                let bytes: Vec<u8> = next.by_ref().take(header + data).collect();
                if how == 0 {
                    staged.append(&bytes);
                } else {
                    let room = staged.room(header, data);
                    room.header.copy_from_slice(&bytes[..header]);
                    let mut left = &bytes[header..];
                    for mut piece in room.data {
                        let (part, behind) = left.split_at(piece.len());
                        piece.copy_from_slice(part);
                        left = behind;
                    }
                    prop_assert!(left.is_empty());
                    if how == 1 {
                        continue;
                    }
                    staged.stage(header + data);
                }
                expected.extend_from_slice(&bytes);
                if how == 3 {
                    got.extend(staged.contents());
                }
            }
            got.extend(staged.contents());
            prop_assert!(staged.is_empty());
            prop_assert!(got == expected);
        }
    }

    #[test]
    fn a_control_message_has_a_record_of_its_own() {
        let mut staged = Staged::default();
        staged.append(&[7; 10]);
        staged.control(ContentType::Alert, &[1, 0]);
        staged.append(&[8; 10]);
        let mut found = Vec::new();
        while let Some((content, record)) = staged.unsealed() {
            found.push((content, record[HEAD..record.len() - TAIL].to_vec()));
            staged.seal();
        }
        let data = ContentType::ApplicationData;
        let expected = [
            (data, vec![7; 10]),
            (ContentType::Alert, vec![1, 0]),
            (data, vec![8; 10]),
        ];
        assert_eq!(found, expected);
    }
}
