//! What no honest client does: input cut off or without end, and sessions that say nothing.

use std::time::{Duration, Instant};

use super::prelude::*;
use crate::nbd::magic;
use crate::nbd::request::RawRequest;
use crate::verify::session::{go, greeting};

const HAGGLING: &str = "Handshake phase, Termination of the session during option haggling";
const TERMINATION: &str = "Terminating the transmission phase";

/// What a server is given to react to input that it need not wait for.
const REACTION: Duration = Duration::from_secs(3);

/// How long a session may be idle before it has begun.
const IDLE: Duration = Duration::from_secs(60);

/// Sessions that say nothing, at a time.
const SILENT: usize = 200;

/// Options of one session.
const OPTIONS: usize = 3000;

/// C64.
pub(super) const TRUNCATED: Check = Check {
    id: "truncated-input-survived",
    title: "Clients that go away in the middle of an option or a request leave the server as it was",
    group: Group::Robustness,
    section: TERMINATION,
    severity: Severity::Security,
    why: "Any client can end everybody's sessions.",
    rules: &[5, 64],
    question: truncated,
    ..Check::USUAL
};

/// C7. A recommendation: the specification has no limit.
pub(super) const HUGE: Check = Check {
    id: "huge-option-not-awaited",
    title: "An option that claims 4 GiB is refused, or ends the connection, before they were sent",
    group: Group::Robustness,
    section: HAGGLING,
    severity: Severity::Style,
    why: "The specification sets no limit; a server without one may set aside the memory that anybody claims.",
    rules: &[7, 64],
    question: huge,
    ..Check::USUAL
};

/// C8. A recommendation: the specification has no deadline.
pub(super) const IDLE_ENDS: Check = Check {
    id: "idle-handshake-ends",
    title: "A client that says nothing after the greeting is dropped within a minute",
    group: Group::Resources,
    section: HAGGLING,
    severity: Severity::Style,
    why: "The specification sets no deadline; without one, anybody can hold sessions open for ever.",
    needs: Needs::Intrusive,
    rules: &[8],
    scope: Scope::Newstyle,
    question: idle_ends,
    ..Check::USUAL
};

/// C8. A recommendation.
pub(super) const OPTIONS_BOUNDED: Check = Check {
    id: "options-have-a-number",
    title: "A session cannot send options without end",
    group: Group::Resources,
    section: HAGGLING,
    severity: Severity::Style,
    why: "The specification sets no limit; without one, a client that never begins keeps the server at work.",
    needs: Needs::Intrusive,
    rules: &[8],
    scope: Scope::Newstyle,
    question: options_bounded,
    ..Check::USUAL
};

/// C8.
pub(super) const SILENT_SESSIONS: Check = Check {
    id: "silent-sessions-lock-nobody-out",
    title: "With 200 sessions open that say nothing, another client is served",
    group: Group::Resources,
    section: HAGGLING,
    severity: Severity::Security,
    why: "Anyone who can reach the port can keep every client out; attached devices cannot reconnect.",
    needs: Needs::Intrusive,
    rules: &[8],
    question: silent_sessions,
    ..Check::USUAL
};

/// What did not work after `count` clients went away in the middle.
fn after(count: usize, stop: Stop) -> Stop {
    match stop {
        Stop::Session(failure) if count > 0 => Stop::Finding(format!(
            "after {count} clients went away in the middle: {failure}"
        )),
        stop => stop,
    }
}

fn truncated(subject: &Subject<'_>) -> Result<String, Stop> {
    let option = OptionHeader::encode(OptionCode::INFO, &go(subject.export(), &[]));
    let mut count = 0;
    // In the magic, the option, the length and the payload.
    for cut in [3, 10, 14, option.len() - 1] {
        let mut session = subject.session().map_err(|stop| after(count, stop))?;
        session
            .send_raw(OptionCode::INFO, &option[..cut])
            .map_err(broke)?;
        count += 1;
    }
    for cut in [2, 9, RawRequest::LENGTH - 1] {
        let mut session = subject.transmitting().map_err(|stop| after(count, stop))?;
        let request = session.next(Command::READ, CommandFlags(0), 0, 512);
        let failed = Failure::at::<Reason>(Step::Command(Command::READ));
        let bytes = &request.encode()[..cut];
        session.link().write_all(bytes).map_err(failed)?;
        count += 1;
    }
    let (session, _) = subject.admitted().map_err(|stop| after(count, stop))?;
    session.abort();
    Ok(format!("{count} clients went away in the middle"))
}

fn huge(subject: &Subject<'_>) -> Result<String, Stop> {
    let (mut session, _) = subject.admitted()?;
    let mut header = Vec::new();
    header.put_u64(magic::IHAVEOPT);
    header.put_u32(OptionCode::INFO.0);
    header.put_u32(u32::MAX);
    session.send_raw(OptionCode::INFO, &header).map_err(broke)?;
    let patience = REACTION.min(subject.left() / 2);
    let failed = Failure::at::<Reason>(Step::Option(OptionCode::INFO));
    let stirred = session.link().stirs(patience).map_err(failed)?;
    require(stirred, || {
        format!("for {patience:?} the server waited for the 4 GiB that an option claimed")
    })?;
    Ok("it was not waited for".into())
}

fn idle_ends(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut link = subject.link()?;
    greeting(&mut link)?;
    let started = Instant::now();
    let patience = IDLE.min(subject.left() / 2);
    let ended = link.stirs(patience).map_err(Failure::at(Step::Greeting))?;
    require(ended, || {
        format!("after {patience:?} the connection was still open")
    })?;
    Ok(format!("it ended after {:.0?}", started.elapsed()))
}

fn options_bounded(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut session = subject.plaintext()?;
    let option = OptionCode(0x7fff_fffd);
    for count in 0..OPTIONS {
        match session.ask(option, &[]) {
            Ok(_) => {}
            Err(failure) if failure.is_end() => {
                return Ok(format!("the connection ended after {count} options"));
            }
            Err(failure) => return Err(broke(failure)),
        }
        if subject.is_cancelled() {
            break;
        }
    }
    Err(Stop::Finding(format!("{OPTIONS} options were answered")))
}

fn silent_sessions(subject: &Subject<'_>) -> Result<String, Stop> {
    if !subject.concurrent {
        return Err(Stop::Inapplicable(
            "the server has one session at a time".into(),
        ));
    }
    // Those that are not let in any more do not count against it.
    let silent: Vec<_> = (0..SILENT).map_while(|_| subject.link().ok()).collect();
    let started = Instant::now();
    let patience = Duration::from_secs(20).min(subject.left() / 2);
    let result = subject.hurried(patience).session().and_then(|mut session| {
        subject.info(&mut session)?;
        session.abort();
        Ok(())
    });
    let count = silent.len();
    drop(silent);
    match result {
        Ok(()) => Ok(format!(
            "with {count} silent sessions, a client was served within {:.1?}",
            started.elapsed()
        )),
        Err(Stop::Session(failure)) => Err(Stop::Finding(format!(
            "with {count} silent sessions open, another client was not served: {failure}"
        ))),
        Err(stop) => Err(stop),
    }
}
