//! How much more than it has a pool may promise.

use std::fmt;
use std::str::FromStr;

/// Sparse files take room as they are written, so a pool can promise more than it holds. 1 promises no more than
/// there is room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overcommit {
    thousandths: u32,
}

/// A text that is not a ratio of over-commitment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a ratio: expected a number from 0.001 to 1000, such as 1 or 2.5")]
pub struct InvalidRatio(String);

impl Overcommit {
    /// No byte is promised twice.
    pub const NONE: Self = Self { thousandths: 1000 };

    /// Bytes that may still be promised where `free` bytes are free, the volumes have taken `taken` bytes so far, and
    /// `promised` bytes in all were promised to them. Nothing is promised where nothing is free.
    pub(super) fn left(self, free: u64, taken: u64, promised: u64) -> u64 {
        self.whole(free, taken)
            .saturating_sub(promised)
            .min(self.of(free))
    }

    /// Bytes that may be promised altogether.
    pub(super) fn whole(self, free: u64, taken: u64) -> u64 {
        self.of(free.saturating_add(taken))
    }

    fn of(self, bytes: u64) -> u64 {
        let product = u128::from(bytes) * u128::from(self.thousandths) / 1000;
        u64::try_from(product).unwrap_or(u64::MAX)
    }
}

impl FromStr for Overcommit {
    type Err = InvalidRatio;

    fn from_str(text: &str) -> Result<Self, InvalidRatio> {
        let thousandths = || -> Option<u32> {
            let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
            let digits = |text: &str| {
                let plain =
                    (1..=4).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
                plain.then(|| text.parse::<u32>().ok()).flatten()
            };
            if fraction.is_empty() || fraction.len() > 3 {
                return None;
            }
            digits(whole)?
                .checked_mul(1000)?
                .checked_add(digits(&format!("{fraction:0<3}"))?)
        };
        thousandths()
            .filter(|thousandths| (1..=1_000_000).contains(thousandths))
            .map(|thousandths| Self { thousandths })
            .ok_or_else(|| InvalidRatio(text.chars().take(32).collect()))
    }
}

impl fmt::Display for Overcommit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, fraction) = (self.thousandths / 1000, self.thousandths % 1000);
        let decimal = format!("{whole}.{fraction:03}");
        f.write_str(decimal.trim_end_matches('0').trim_end_matches('.'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_decimal_numbers() {
        for (text, of_4000) in [
            ("1", 4000),
            ("2.5", 10_000),
            ("0.001", 4),
            ("1000", 4_000_000),
        ] {
            let ratio: Overcommit = text.parse().unwrap();
            assert_eq!(ratio.of(4000), of_4000);
            assert_eq!(ratio.to_string(), text);
        }
        for text in [
            "", "0", "-1", "+1", "1.", ".5", "1e3", "1000.001", "NaN", "1.2345", "99999",
        ] {
            assert!(text.parse::<Overcommit>().is_err(), "{text:?}");
        }
        assert_eq!("1000".parse::<Overcommit>().unwrap().of(u64::MAX), u64::MAX);
    }

    #[test]
    fn what_was_written_is_not_counted_twice() {
        let double = Overcommit { thousandths: 2000 };
        for (ratio, free, taken, promised, left) in [
            (Overcommit::NONE, 100, 0, 0, 100),
            (Overcommit::NONE, 100, 0, 60, 40),
            (Overcommit::NONE, 70, 30, 60, 40),
            (Overcommit::NONE, 30, 30, 100, 0),
            (double, 70, 30, 60, 140),
            (double, 10, 90, 100, 20),
            (double, 0, 100, 100, 0),
            (double, u64::MAX, u64::MAX, 0, u64::MAX),
        ] {
            assert_eq!(
                ratio.left(free, taken, promised),
                left,
                "{free} {taken} {promised}"
            );
        }
    }
}
