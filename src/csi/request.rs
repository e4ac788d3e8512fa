//! What every request has to keep to: required fields, size limits, ranges.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use tonic::Status;

use super::status::{invalid, out_of_range};
use crate::proto::csi::CapacityRange;

/// Bytes of a string, where its field sets no other limit (spec "Size Limits").
const STRING_LIMIT: usize = 128;

/// Bytes of a node id, in whose description the specification sets this limit.
pub(super) const NODE_ID_LIMIT: usize = 256;

/// Bytes of a map, keys and values together (spec "Size Limits").
const MAP_LIMIT: usize = 4 << 10;

/// Bytes of a map of secrets. The specification's 4 KiB hold no RSA-4096 chain with its authority, no orchestrator
/// enforces them, and refusing here would only take away what works.
const SECRETS_LIMIT: usize = 64 << 10;

/// Bytes of a path: PATH_MAX, as the fields of paths override the general limit.
const PATH_LIMIT: usize = 4096;

/// A required string within `limit` bytes.
fn within<'a>(field: &str, text: &'a str, limit: usize) -> Result<&'a str, Status> {
    match text.len() {
        0 => Err(invalid(format!("{field} is missing"))),
        length if length > limit => Err(invalid(format!(
            "{field} has {length} bytes, the limit is {limit}"
        ))),
        _ => Ok(text),
    }
}

/// A required string.
pub(super) fn required<'a>(field: &str, text: &'a str) -> Result<&'a str, Status> {
    within(field, text, STRING_LIMIT)
}

/// A required node id.
pub(super) fn node_id(text: &str) -> Result<&str, Status> {
    within("node_id", text, NODE_ID_LIMIT)
}

/// A volume's name: any Unicode but control characters that are not whitespace (spec `CreateVolumeRequest.name`).
pub(super) fn name(text: &str) -> Result<&str, Status> {
    let banned = |c: char| matches!(c, '\0'..='\u{8}' | '\u{b}' | '\u{c}' | '\u{e}'..='\u{1f}' | '\u{7f}'..='\u{9f}');
    let text = required("name", text)?;
    match text.chars().find(|&c| banned(c)) {
        Some(c) => Err(invalid(format!(
            "name contains the control character U+{:04X}",
            u32::from(c)
        ))),
        None => Ok(text),
    }
}

/// A required path: absolute, and without `..`, which would mean another place once something is mounted.
pub(super) fn path(field: &str, text: &str) -> Result<PathBuf, Status> {
    let text = within(field, text, PATH_LIMIT)?;
    let path = Path::new(text);
    if !path.is_absolute() || text.contains('\0') {
        return Err(invalid(format!("{field} {text:?} is not an absolute path")));
    }
    if path.components().any(|c| c == Component::ParentDir) {
        return Err(invalid(format!("{field} {text:?} contains \"..\"")));
    }
    // Collected from its components: without doubled or trailing slashes, as mountinfo has it.
    let clean: PathBuf = path.components().collect();
    if clean == Path::new("/") {
        return Err(invalid(format!("{field} is the root directory")));
    }
    Ok(clean)
}

/// A required path of which any text will do: one where no volume is means that nothing is found.
pub(super) fn required_path<'a>(field: &str, text: &'a str) -> Result<&'a str, Status> {
    within(field, text, PATH_LIMIT)
}

/// A map of strings within its limit.
pub(super) fn map(field: &str, map: &HashMap<String, String>) -> Result<(), Status> {
    map_within(field, map, MAP_LIMIT)
}

fn map_within(field: &str, map: &HashMap<String, String>, limit: usize) -> Result<(), Status> {
    let size: usize = map.iter().map(|(key, value)| key.len() + value.len()).sum();
    if size > limit {
        return Err(invalid(format!(
            "{field} has {size} bytes, the limit is {limit}"
        )));
    }
    Ok(())
}

/// A map of secrets: its size, and the alphabet of its keys. No value is looked at, no value is ever named.
pub(super) fn secrets(map: &HashMap<String, String>) -> Result<(), Status> {
    map_within("secrets", map, SECRETS_LIMIT)?;
    let proper = |key: &str| {
        !key.is_empty()
            && key
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    };
    if map.keys().all(|key| proper(key)) {
        return Ok(());
    }
    Err(invalid(
        "secrets has a key that is empty or has other characters than letters, digits, '-', '_' and '.'",
    ))
}

/// A wanted size: bytes at least and, where there is a limit, at most. A range that is absent asks for nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    /// 0 where only a limit was set.
    pub(super) required: u64,
    pub(super) limit: Option<u64>,
}

impl Size {
    pub(super) fn parse(range: CapacityRange) -> Result<Self, Status> {
        let CapacityRange {
            required_bytes,
            limit_bytes,
        } = range;
        let (Ok(required), Ok(limit)) = (u64::try_from(required_bytes), u64::try_from(limit_bytes))
        else {
            return Err(invalid(format!(
                "capacity_range is negative: required_bytes {required_bytes}, limit_bytes {limit_bytes}"
            )));
        };
        if (required, limit) == (0, 0) {
            return Err(invalid(
                "capacity_range sets neither required_bytes nor limit_bytes",
            ));
        }
        if limit != 0 && limit < required {
            return Err(out_of_range(format!(
                "capacity_range has limit_bytes {limit} below required_bytes {required}"
            )));
        }
        Ok(Self {
            required,
            limit: (limit != 0).then_some(limit),
        })
    }

    /// This wish, not below `minimum` bytes; refused where the limit forbids it.
    pub(super) fn at_least(self, minimum: u64) -> Result<Self, Status> {
        match self.limit {
            Some(limit) if limit < minimum => Err(out_of_range(format!(
                "limit_bytes {limit} is below the least size of such a volume, {minimum} bytes"
            ))),
            limit => Ok(Self {
                required: self.required.max(minimum),
                limit,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    fn code<T>(result: Result<T, Status>) -> Option<Code> {
        result.err().map(|status| status.code())
    }

    #[test]
    fn names_are_1_to_128_bytes_of_what_csi_allows() {
        for good in [
            "a",
            &"x".repeat(128),
            "ä/ö\\\"' \t\n\r$(rm)..",
            "\u{a0}\u{2028}🦀",
        ] {
            assert!(name(good).is_ok(), "{good:?}");
        }
        for bad in ["", &"x".repeat(129), &"é".repeat(65)] {
            assert_eq!(code(name(bad)), Some(Code::InvalidArgument), "{bad:?}");
        }
        let banned = (0..=8)
            .chain([0xb, 0xc])
            .chain(0xe..=0x1f)
            .chain(0x7f..=0x9f);
        for number in banned {
            let text = format!("a{}", char::from_u32(number).unwrap());
            assert_eq!(code(name(&text)), Some(Code::InvalidArgument), "{number:x}");
        }
    }

    #[test]
    fn paths_are_absolute_and_without_detours() {
        assert_eq!(path("p", "/a//b/./c/").unwrap(), Path::new("/a/b/c"));
        for bad in [
            "",
            "a/b",
            "/a/../b",
            "/",
            "//",
            "/a\0b",
            &format!("/{}", "a".repeat(4096)),
        ] {
            assert_eq!(code(path("p", bad)), Some(Code::InvalidArgument), "{bad:?}");
        }
    }

    #[test]
    fn maps_and_secrets_have_limits() {
        let with = |key: &str, length: usize| HashMap::from([(key.to_owned(), "v".repeat(length))]);
        assert!(map("m", &with("k", 4095)).is_ok());
        assert_eq!(
            code(map("m", &with("k", 4096))),
            Some(Code::InvalidArgument)
        );
        assert!(secrets(&with("tls.crt", 60 << 10)).is_ok());
        assert_eq!(
            code(secrets(&with("k", 64 << 10))),
            Some(Code::InvalidArgument)
        );
        let refused = secrets(&with("a key", 5)).unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(!refused.message().contains("vvvvv"));
    }

    #[test]
    fn sizes() {
        let parse = |required_bytes, limit_bytes| {
            Size::parse(CapacityRange {
                required_bytes,
                limit_bytes,
            })
        };
        assert_eq!(
            parse(1, 0).unwrap(),
            Size {
                required: 1,
                limit: None
            }
        );
        assert_eq!(
            parse(0, 9).unwrap(),
            Size {
                required: 0,
                limit: Some(9)
            }
        );
        assert_eq!(parse(i64::MAX, 0).unwrap().required, i64::MAX as u64);
        for (required, limit, expected) in [
            (0, 0, Code::InvalidArgument),
            (-1, 0, Code::InvalidArgument),
            (1, -1, Code::InvalidArgument),
            (i64::MIN, i64::MIN, Code::InvalidArgument),
            (2, 1, Code::OutOfRange),
        ] {
            assert_eq!(
                code(parse(required, limit)),
                Some(expected),
                "{required} {limit}"
            );
        }
        let small = parse(1, 0).unwrap().at_least(4096).unwrap();
        assert_eq!(small.required, 4096);
        assert_eq!(
            code(parse(1, 9).unwrap().at_least(10)),
            Some(Code::OutOfRange)
        );
    }
}
