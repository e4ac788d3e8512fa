//! C64: requests and replies. A request that passes its checks lies inside the export.
#![no_main]

use hawser::nbd::MAX_PAYLOAD;
use hawser::nbd::reply::{Chunk, ReplyHeader};
use hawser::nbd::request::{RawRequest, Request, Rules};
use hawser::nbd::{ChunkType, magic};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = ReplyHeader::parse(bytes);
    if let Some((kind, payload)) = bytes.split_first_chunk::<2>() {
        let _ = Chunk::parse(ChunkType(u16::from_be_bytes(*kind)), payload);
    }
    let Some((settings, rest)) = bytes.split_first_chunk::<10>() else { return };
    let Some(body) = rest.first_chunk::<24>() else { return };
    let mut header = [0; RawRequest::LENGTH];
    header[..4].copy_from_slice(&magic::REQUEST.to_be_bytes());
    header[4..].copy_from_slice(body);
    let raw = RawRequest::parse(&header).expect("a right magic and length always parse");
    assert_eq!(raw.encode(), header);
    let mut size = [0; 8];
    size.copy_from_slice(&settings[..8]);
    let rules = Rules {
        size: u64::from_be_bytes(size),
        read_only: settings[8] & 1 != 0,
        structured: settings[8] & 2 != 0,
        contexts: settings[8] & 4 != 0,
        minimum_block: 1 << (settings[9] & 15),
        maximum_payload: MAX_PAYLOAD,
    };
    let range = match raw.check(&rules) {
        Ok(Request::Write { range, .. }) => {
            assert!(!rules.read_only && range.length <= MAX_PAYLOAD);
            range
        }
        Ok(Request::Trim { range, .. } | Request::WriteZeroes { range, .. }) => {
            assert!(!rules.read_only);
            range
        }
        Ok(Request::Read { range, whole }) => {
            assert!(range.length <= MAX_PAYLOAD && (rules.structured || !whole));
            range
        }
        Ok(Request::BlockStatus { range, .. }) => {
            assert!(rules.contexts && range.length > 0);
            range
        }
        Ok(Request::Cache { range }) => range,
        Ok(Request::Flush | Request::Disconnect) | Err(_) => return,
    };
    assert!(range.offset.checked_add(range.length.into()).is_some_and(|end| end <= rules.size));
});
