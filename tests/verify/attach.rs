//! The sessions that an attach makes besides the battery, against servers that mean harm.

use std::time::{Duration, Instant};

use hawser::client::{ProbeSession, proxy_session};

use super::hostile;

#[test]
fn the_sessions_of_an_attach_end_in_bounded_time() {
    for hostility in hostile::ALL {
        let mut target = hostile::start(*hostility);
        target.timeout = Duration::from_millis(250);
        let started = Instant::now();
        // Negotiated like a session for the kernel, whose keys a server in userspace could not do without.
        let outcomes = [
            proxy_session(&target).map(drop),
            ProbeSession::connect(&target)
                .and_then(|session| session.go(&target.export))
                .map(drop),
        ];
        let took = started.elapsed();
        assert!(took < Duration::from_secs(3), "{hostility:?}: {took:?}");
        for error in outcomes.into_iter().filter_map(Result::err) {
            let text = error.to_string();
            assert!(text.len() < 500, "{hostility:?}: {text}");
            assert!(!text.contains(char::is_control), "{hostility:?}: {text:?}");
        }
    }
}
