//! A session's buffers: bytes that come in at the end and go out at the beginning.
//!
//! The memory is made once and used again, for this session alone, so no page is faulted in for each request, and
//! nothing of another session can be found in it.

/// Bytes in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Buffer {
    pub(super) fn len(&self) -> usize {
        self.end - self.start
    }

    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    pub(super) fn filled(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(super) fn filled_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.end]
    }

    /// Lets go of the first `length` bytes.
    pub(super) fn consume(&mut self, length: usize) {
        self.start += length;
        if self.is_empty() {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Room for more, where the whole is `length` bytes long: none when that many are filled.
    pub(super) fn space(&mut self, length: usize) -> &mut [u8] {
        self.grow(length);
        // Moving a little now and then costs less than many short reads.
        if self.bytes.len() - self.end < length / 2 {
            self.move_down();
        }
        &mut self.bytes[self.end..]
    }

    /// Room for `length` bytes more.
    pub(super) fn reserve(&mut self, length: usize) -> &mut [u8] {
        if self.bytes.len() - self.end < length {
            self.move_down();
            self.grow(self.end + length);
        }
        &mut self.bytes[self.end..self.end + length]
    }

    /// Takes in what was put at the beginning of the room.
    pub(super) fn fill(&mut self, length: usize) {
        debug_assert!(self.end + length <= self.bytes.len());
        self.end += length;
    }

    pub(super) fn append(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.reserve(bytes.len()).copy_from_slice(bytes);
            self.fill(bytes.len());
        }
    }

    /// Gives the memory back, if nothing is in it.
    pub(super) fn shrink(&mut self) {
        if self.is_empty() {
            *self = Self::default();
        }
    }

    fn move_down(&mut self) {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.len());
    }

    fn grow(&mut self, length: usize) {
        if length > self.bytes.len() {
            self.bytes.reserve_exact(length - self.bytes.len());
            self.bytes.resize(length, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_goes_in_comes_out_in_order(steps in prop::collection::vec((0_usize..70, 0_usize..70), 1..60)) {
            let mut buffer = Buffer::default();
            let (mut put, mut taken) = (0_u8, 0_u8);
            for (more, less) in steps {
                let bytes: Vec<u8> = (0..more).map(|_| { put = put.wrapping_add(1); put }).collect();
                if more % 2 == 0 {
                    buffer.append(&bytes);
                } else {
                    let length = buffer.len() + more;
                    let space = buffer.space(length.max(64));
                    prop_assert!(!space.is_empty());
                    let fits = more.min(space.len());
                    space[..fits].copy_from_slice(&bytes[..fits]);
                    buffer.fill(fits);
                    buffer.append(&bytes[fits..]);
                }
                let less = less.min(buffer.len());
                for byte in &buffer.filled()[..less] {
                    taken = taken.wrapping_add(1);
                    prop_assert_eq!(*byte, taken);
                }
                buffer.consume(less);
            }
            let left = buffer.filled().iter().fold(taken, |last, byte| {
                assert_eq!(*byte, last.wrapping_add(1));
                *byte
            });
            prop_assert_eq!(left, put);
        }
    }
}
