//! C64: option headers and payloads. What parses is bounded, and encodes to the bytes it came from.
#![no_main]

use hawser::nbd::MAX_STRING;
use hawser::nbd::option::{GoRequest, MetaContextQuery, OptionHeader};
use hawser::nbd::option_reply::{Information, MetaContextReply, OptionReplyHeader, parse_server};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = OptionHeader::parse(bytes);
    let _ = OptionReplyHeader::parse(bytes);
    let _ = parse_server(bytes);
    if let Ok(request) = GoRequest::parse(bytes) {
        assert!(request.export.as_str().len() <= MAX_STRING);
        assert_eq!(request.encode(), bytes);
    }
    if let Ok(query) = MetaContextQuery::parse(bytes) {
        assert!(query.queries.iter().all(|query| query.contains(':') && query.len() <= MAX_STRING));
        assert_eq!(query.encode(), bytes);
    }
    if let Ok(information) = Information::parse(bytes)
        && !matches!(information, Information::Unknown(_))
    {
        assert_eq!(information.encode(), bytes);
    }
    if let Ok(context) = MetaContextReply::parse(bytes) {
        assert_eq!(context.encode(), bytes);
    }
});
