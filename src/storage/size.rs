//! How large a volume becomes when somebody asks for bytes.

/// Sizes are multiples of this: the block size that is announced to clients.
pub const GRANULE: u64 = 4096;

/// The largest size: file offsets and the kernel's device sizes are signed 64-bit.
pub const MAXIMUM: u64 = i64::MAX as u64 / GRANULE * GRANULE;

/// A size that no volume can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    #[error("a volume cannot have {0} bytes: 1 is the least")]
    Zero(u64),
    #[error("a volume cannot have {0} bytes: {MAXIMUM} is the most")]
    TooLarge(u64),
    #[error("the limit of {limit} bytes is below the required {required} bytes")]
    Limit { required: u64, limit: u64 },
    #[error(
        "sizes are multiples of {GRANULE} bytes, and none lies between the required {required} and \
         the limit of {limit} bytes"
    )]
    Between { required: u64, limit: u64 },
}

/// The least size that satisfies both bounds.
pub fn settle(required: u64, limit: Option<u64>) -> Result<u64, SizeError> {
    if required == 0 {
        return Err(SizeError::Zero(required));
    }
    if let Some(limit) = limit.filter(|limit| *limit < required) {
        return Err(SizeError::Limit { required, limit });
    }
    let size = required
        .checked_next_multiple_of(GRANULE)
        .filter(|size| *size <= MAXIMUM)
        .ok_or(SizeError::TooLarge(required))?;
    match limit {
        Some(limit) if limit < size => Err(SizeError::Between { required, limit }),
        _ => Ok(size),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_rounded_up_within_their_bounds() {
        let signed = i64::MAX as u64;
        for (required, limit, expected) in [
            (1, None, Ok(4096)),
            (4096, Some(4096), Ok(4096)),
            (4097, None, Ok(8192)),
            (1, Some(u64::MAX), Ok(4096)),
            (MAXIMUM, None, Ok(MAXIMUM)),
            (0, None, Err(SizeError::Zero(0))),
            (0, Some(0), Err(SizeError::Zero(0))),
            (signed, None, Err(SizeError::TooLarge(signed))),
            (u64::MAX, None, Err(SizeError::TooLarge(u64::MAX))),
            (
                8192,
                Some(4096),
                Err(SizeError::Limit {
                    required: 8192,
                    limit: 4096,
                }),
            ),
            (
                1,
                Some(4095),
                Err(SizeError::Between {
                    required: 1,
                    limit: 4095,
                }),
            ),
        ] {
            assert_eq!(settle(required, limit), expected, "{required} {limit:?}");
        }
    }
}
