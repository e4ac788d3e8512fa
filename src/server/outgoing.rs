//! Replies that wait to be sent, in the order in which they were ready.
//!
//! What is ready at once is put together: many small replies share a record, and a READ is read from the file straight
//! into its place. Long replies of the workers wait where they are until there is room.

use std::collections::VecDeque;

use super::command::Reply;
use super::transport::{Room, Staged};

/// A reply up to this size is copied.
const SHORT: usize = 4 << 10;

/// The replies of a session.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    staged: Staged,
    replies: VecDeque<Reply>,
    /// What is staged of the first of them.
    gone: usize,
    /// Bytes in `replies`.
    waiting: usize,
}

impl Outgoing {
    /// What is staged already goes first.
    pub(super) fn behind(staged: Staged) -> Self {
        Self {
            staged,
            ..Self::default()
        }
    }

    pub(super) fn push(&mut self, reply: Reply) {
        if reply.bytes.len() <= SHORT && !self.is_amid_reply() {
            self.staged.append(&reply.bytes);
        } else {
            self.waiting += reply.bytes.len();
            self.replies.push_back(reply);
        }
    }

    /// Whether only a part of a reply is staged, behind which no other may be.
    pub(super) fn is_amid_reply(&self) -> bool {
        self.gone > 0
    }

    /// Room for a reply, which counts once it is [staged](Self::stage).
    pub(super) fn room(&mut self, header: usize, data: usize) -> Room<'_> {
        self.staged.room(header, data)
    }

    pub(super) fn stage(&mut self, length: usize) {
        self.staged.stage(length);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.staged.is_empty() && self.replies.is_empty()
    }

    /// Replies that hold memory of their own.
    pub(super) fn len(&self) -> usize {
        self.replies.len()
    }

    /// Bytes that were put together.
    pub(super) fn together(&self) -> usize {
        self.staged.len()
    }

    /// Bytes that wait.
    pub(super) fn bytes(&self) -> usize {
        self.staged.len() + self.waiting
    }

    /// What is sent next. Replies that wait are brought to it as long as it has less than `most` bytes. A reply's own
    /// memory is given back when all of it is there.
    pub(super) fn staged(&mut self, most: usize) -> &mut Staged {
        while self.staged.len() < most {
            let Some(first) = self.replies.front() else {
                break;
            };
            let left = &first.bytes[self.gone..];
            let taken = &left[..left.len().min(most)];
            self.staged.append(taken);
            self.waiting -= taken.len();
            self.gone += taken.len();
            if self.gone == first.bytes.len() {
                self.gone = 0;
                self.replies.pop_front();
            }
        }
        &mut self.staged
    }

    /// Gives back the memory that is not in use.
    pub(super) fn shrink(&mut self) {
        self.staged.shrink();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_reply_comes_out_once_and_in_one_piece(
            lengths in prop::collection::vec(prop_oneof![1_usize..40, SHORT - 2..SHORT + 40], 1..40),
            steps in prop::collection::vec(1_usize..9000, 1..40),
        ) {
            let mut outgoing = Outgoing::default();
            let mut got = Vec::new();
            let mut steps = steps.into_iter().cycle();
            // Which reply a byte is of can be seen.
            let lengths: Vec<(u8, usize)> = (0..).zip(lengths).collect();
            for (index, length) in &lengths {
                let bytes = vec![*index; *length];
                if index % 3 == 0 && !outgoing.is_amid_reply() {
                    let room = outgoing.room(1, length - 1);
                    room.header.fill(*index);
                    room.data.into_iter().for_each(|mut piece| piece.fill(*index));
                    outgoing.stage(*length);
                } else {
                    outgoing.push(Reply { bytes, _permit: None });
                }
                take(outgoing.staged(steps.next().unwrap_or(1)), &mut got);
            }
            while !outgoing.is_empty() {
                let before = got.len();
                take(outgoing.staged(steps.next().unwrap_or(1)), &mut got);
                prop_assert!(got.len() > before);
            }
            prop_assert_eq!(outgoing.bytes(), 0);
            let pieces: Vec<&[u8]> = got.chunk_by(|one, other| one == other).collect();
            prop_assert_eq!(pieces.len(), lengths.len());
            let all: BTreeSet<(u8, usize)> = pieces.iter().map(|piece| (piece[0], piece.len())).collect();
            prop_assert_eq!(all, lengths.into_iter().collect());
        }
    }

    /// Sends what is staged, without a cipher.
    fn take(staged: &mut Staged, got: &mut Vec<u8>) {
        got.extend(staged.contents());
    }
}
