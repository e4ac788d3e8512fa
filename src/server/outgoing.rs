//! Replies that wait to be encrypted, in the order in which they were ready.

use std::collections::VecDeque;
use std::io::IoSlice;

use super::command::Reply;

/// Parts encrypted at a time: many small replies share a TLS record.
const SLICES: usize = 64;

/// The replies of a session.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    replies: VecDeque<Reply>,
    /// What is gone of the first reply: whole parts, and bytes of the next one.
    parts_done: usize,
    bytes_done: usize,
    bytes: usize,
}

impl Outgoing {
    pub(super) fn push(&mut self, reply: Reply) {
        self.bytes += reply.parts.iter().map(Vec::len).sum::<usize>();
        self.replies.push_back(reply);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.replies.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.replies.len()
    }

    /// Bytes that wait.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Hands what waits to `take`, until that takes nothing. A reply's memory is given back when all of it is taken.
    pub(super) fn drain<E>(
        &mut self,
        mut take: impl FnMut(&[IoSlice<'_>]) -> Result<usize, E>,
    ) -> Result<(), E> {
        while !self.replies.is_empty() {
            let mut slices = Vec::with_capacity(SLICES);
            let parts = self.replies.iter().flat_map(|reply| &reply.parts);
            for part in parts.skip(self.parts_done).take(SLICES) {
                slices.push(IoSlice::new(part));
            }
            let mut unsliced = slices.as_mut_slice();
            IoSlice::advance_slices(&mut unsliced, self.bytes_done);
            let taken = take(unsliced)?;
            drop(slices);
            self.advance(taken);
            if taken == 0 {
                break;
            }
        }
        Ok(())
    }

    fn advance(&mut self, taken: usize) {
        self.bytes -= taken;
        self.bytes_done += taken;
        while let Some(first) = self.replies.front() {
            while let Some(part) = first.parts.get(self.parts_done) {
                if self.bytes_done < part.len() {
                    return;
                }
                self.bytes_done -= part.len();
                self.parts_done += 1;
            }
            self.parts_done = 0;
            self.replies.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn everything_comes_out_once_and_in_order(
            replies in prop::collection::vec(prop::collection::vec(prop::collection::vec(any::<u8>(), 0..9), 0..4), 0..80),
            steps in prop::collection::vec(0_usize..30, 1..40),
        ) {
            let expected: Vec<u8> = replies.iter().flatten().flatten().copied().collect();
            let mut outgoing = Outgoing::default();
            for parts in replies {
                outgoing.push(Reply { parts, _permit: None });
            }
            prop_assert_eq!(outgoing.bytes(), expected.len());
            let mut got = Vec::new();
            let mut steps = steps.into_iter().cycle();
            let mut refusals = 0;
            while !outgoing.is_empty() && refusals < 100 {
                let result: Result<(), ()> = outgoing.drain(|slices| {
                    let all: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
                    let taken = all.len().min(steps.next().unwrap_or(1));
                    got.extend_from_slice(&all[..taken]);
                    Ok(taken)
                });
                prop_assert!(result.is_ok());
                refusals += 1;
            }
            if outgoing.is_empty() {
                prop_assert_eq!(&got, &expected);
                prop_assert_eq!(outgoing.bytes(), 0);
            }
            prop_assert!(expected.starts_with(&got));
        }
    }
}
