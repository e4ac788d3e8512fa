//! Replies that wait to be encrypted, in the order in which they were ready.
//!
//! What is ready at once is put together in one buffer, from which full records are made: many small replies share a
//! record, and a READ is read from the file straight into its place. Long replies of the workers are encrypted from
//! where they are.

use std::collections::VecDeque;

use super::buffer::Buffer;
use super::command::Reply;

/// A reply up to this size is copied.
const SHORT: usize = 4 << 10;

/// The replies of a session.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    /// Whole replies, but for what is gone of the first.
    staged: Buffer,
    replies: VecDeque<Reply>,
    /// What is gone of the first of them.
    gone: usize,
    /// Bytes in `replies`.
    waiting: usize,
}

impl Outgoing {
    pub(super) fn push(&mut self, reply: Reply) {
        if reply.bytes.len() <= SHORT {
            self.staged.append(&reply.bytes);
        } else {
            self.waiting += reply.bytes.len();
            self.replies.push_back(reply);
        }
    }

    /// Room for a reply of `length` bytes, which counts once it is [staged](Self::stage).
    pub(super) fn room(&mut self, length: usize) -> &mut [u8] {
        self.staged.reserve(length)
    }

    pub(super) fn stage(&mut self, length: usize) {
        self.staged.fill(length);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.staged.is_empty() && self.replies.is_empty()
    }

    /// Replies that hold memory of their own.
    pub(super) fn len(&self) -> usize {
        self.replies.len()
    }

    /// Bytes of replies that were put together.
    pub(super) fn staged(&self) -> usize {
        self.staged.len()
    }

    /// Bytes that wait.
    pub(super) fn bytes(&self) -> usize {
        self.staged.len() + self.waiting
    }

    /// What comes next; nothing only where nothing waits.
    pub(super) fn next(&self) -> &[u8] {
        match self.replies.front() {
            Some(first) if self.gone > 0 || self.staged.is_empty() => &first.bytes[self.gone..],
            _ => self.staged.filled(),
        }
    }

    /// Lets go of a part of [`Self::next`]. A reply's memory is given back when all of it is gone.
    pub(super) fn advance(&mut self, length: usize) {
        if self.gone == 0 && !self.staged.is_empty() {
            return self.staged.consume(length);
        }
        self.gone += length;
        self.waiting -= length;
        if self
            .replies
            .front()
            .is_some_and(|first| self.gone >= first.bytes.len())
        {
            self.gone = 0;
            self.replies.pop_front();
        }
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
                if index % 3 == 0 {
                    outgoing.room(*length).copy_from_slice(&bytes);
                    outgoing.stage(*length);
                } else {
                    outgoing.push(Reply { bytes, _permit: None });
                }
                let next = outgoing.next();
                let taken = next.len().min(steps.next().unwrap_or(1));
                got.extend_from_slice(&next[..taken]);
                outgoing.advance(taken);
            }
            while !outgoing.is_empty() {
                let taken = outgoing.next().len();
                prop_assert!(taken > 0);
                got.extend_from_slice(outgoing.next());
                outgoing.advance(taken);
            }
            prop_assert_eq!(outgoing.bytes(), 0);
            let pieces: Vec<&[u8]> = got.chunk_by(|one, other| one == other).collect();
            prop_assert_eq!(pieces.len(), lengths.len());
            let all: BTreeSet<(u8, usize)> = pieces.iter().map(|piece| (piece[0], piece.len())).collect();
            prop_assert_eq!(all, lengths.into_iter().collect());
        }
    }
}
