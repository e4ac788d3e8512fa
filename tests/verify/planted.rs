//! The whole battery: every fault, planted one at a time, is found by the checks that must, and by no other.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hawser::verify::{
    Address, CHECKS, Cancel, Mode, Needs, Outcome, Report, Selection, Server, run,
};

use super::faulty::{Fault, server};
use super::findings;

/// Every fault, and the checks that must find it.
pub(crate) const PLANTED: &[(Fault, &[&str])] = &[
    (Fault::NotFixed, &["greeting-newstyle"]),
    (Fault::UnknownServerFlag, &["greeting-flags-known"]),
    (Fault::UnknownClientFlag, &["client-flags-checked"]),
    (Fault::TlsWithoutFixed, &["no-tls-without-fixed-newstyle"]),
    (Fault::NoTls, &["export-needs-tls"]),
    (Fault::AlsoInPlaintext, &["export-needs-tls"]),
    (Fault::ListWantsTls, &["selective-options-answered"]),
    (Fault::ListsInPlaintext, &["plaintext-options-refused"]),
    (
        Fault::GoInPlaintext,
        &["plaintext-options-refused", "plaintext-refusals-alike"],
    ),
    (Fault::StructuredInPlaintext, &["plaintext-options-refused"]),
    (Fault::WrongCodeInPlaintext, &["plaintext-options-refused"]),
    (Fault::RefusesTwice, &["plaintext-options-refused"]),
    (Fault::ClosesAfterARefusal, &["plaintext-options-refused"]),
    (Fault::NoTlsAfterRefusals, &["plaintext-options-refused"]),
    (Fault::RefusalNamesExport, &["plaintext-refusals-alike"]),
    (
        Fault::RefusalTellsMissing,
        &["plaintext-options-refused", "plaintext-refusals-alike"],
    ),
    (Fault::ExportNameAnswered, &["plaintext-export-name-closes"]),
    (
        Fault::ExportNameRefusedAloud,
        &["plaintext-export-name-closes"],
    ),
    (Fault::ExportNameIgnored, &["plaintext-export-name-closes"]),
    (Fault::NoHandshake, &["starttls-accepted"]),
    (
        Fault::StartTlsPayloadAccepted,
        &["starttls-payload-refused"],
    ),
    (Fault::WantsStartTlsWhole, &["starttls-in-pieces"]),
    (
        Fault::BuffersInjected,
        &["starttls-injection-dead", "starttls-split-injection-dead"],
    ),
    (
        Fault::BuffersInjectedQuietly,
        &["starttls-injection-dead", "starttls-split-injection-dead"],
    ),
    (
        Fault::AnswersInjectedInPlaintext,
        &["starttls-injection-dead", "starttls-split-injection-dead"],
    ),
    (
        Fault::BuffersInjectedInPieces,
        &["starttls-split-injection-dead"],
    ),
    (Fault::TakesHelloForOption, &["early-client-hello-survived"]),
    (
        Fault::PlaintextInTheWayOfTls,
        &["plaintext-after-starttls-dead"],
    ),
    (Fault::StructuredSurvives, &["plaintext-state-dropped"]),
    (Fault::ContextsSurvive, &["plaintext-state-dropped"]),
    (Fault::SelectiveStateSurvives, &["plaintext-state-dropped"]),
    (Fault::OtherServer, &["server-certificate-valid"]),
    (Fault::AnonymousClients, &["anonymous-client-refused"]),
    (
        Fault::ForeignClients,
        &["foreign-client-refused", "expired-client-refused"],
    ),
    (
        Fault::EveryClient,
        &[
            "anonymous-client-refused",
            "foreign-client-refused",
            "expired-client-refused",
            "other-identity-refused",
        ],
    ),
    (Fault::ExpiredClients, &["expired-client-refused"]),
    (Fault::OtherIdentity, &["other-identity-refused"]),
    (Fault::OtherIdentityLists, &["other-identity-refused"]),
    (Fault::OldTls, &["old-tls-refused"]),
    (Fault::NoTls13, &["tls-1.3-spoken"]),
    (Fault::OptionMagicIgnored, &["option-magic-checked"]),
    (Fault::UnknownOptionAccepted, &["unknown-option-refused"]),
    (Fault::UnknownOptionCloses, &["unknown-option-refused"]),
    (Fault::PayloadIgnored, &["option-payload-refused"]),
    (Fault::AbortSilent, &["abort-acknowledged"]),
    (Fault::AbortDataRefused, &["abort-data-ignored"]),
    (Fault::LongNameCloses, &["longest-name-heard"]),
    (Fault::TooLongNameAccepted, &["too-long-name-refused"]),
    (Fault::NulAccepted, &["name-with-nul-refused"]),
    (Fault::LengthsUnchecked, &["option-lengths-checked"]),
    (
        Fault::StructuredTwiceCloses,
        &["structured-reply-twice-survived"],
    ),
    (Fault::ListWantsTlsInside, &["tls-required-has-no-place"]),
    (Fault::SecondStartTls, &["second-starttls-refused"]),
    (Fault::SecondStartTlsWrongCode, &["second-starttls-refused"]),
    (Fault::SecondStartTlsCloses, &["second-starttls-refused"]),
    (
        Fault::StatusWithoutContexts,
        &["block-status-needs-negotiation"],
    ),
    (Fault::StatusWrongErrno, &["block-status-needs-negotiation"]),
    (Fault::ReadAlwaysStructured, &["read-stays-simple"]),
    (Fault::GoWantsBlockSizes, &["export-opens"]),
    (Fault::NoExportInformation, &["export-opens"]),
    (Fault::UnknownExportWrongCode, &["unknown-export-refused"]),
    (Fault::UnknownExportCloses, &["unknown-export-refused"]),
    (Fault::ContextsOfUnknown, &["unknown-export-unknown-to-all"]),
    (Fault::GoUnlikeInfo, &["go-says-what-info-said"]),
    (Fault::ExportNameWithoutZeroes, &["export-name-answered"]),
    (Fault::ExportNameWrongSize, &["export-name-answered"]),
    (
        Fault::UnknownInformationRefused,
        &["unknown-information-ignored"],
    ),
    (Fault::BlockSizesWrong, &["block-sizes-keep-the-rules"]),
    (Fault::SmallPayloads, &["size-in-whole-blocks"]),
    (Fault::NoHasFlags, &["transmission-flags-fit"]),
    (Fault::DfWithoutStructured, &["transmission-flags-fit"]),
    (
        Fault::SelectsWithoutStructured,
        &["selection-needs-structured-replies"],
    ),
    (Fault::NotListed, &["listed-context-selectable"]),
    (Fault::NoWildcard, &["listed-context-selectable"]),
    (Fault::ListedIds, &["listed-ids-zero"]),
    (
        Fault::UnknownNamespaceRefused,
        &["unknown-namespace-ignored"],
    ),
    (
        Fault::NoColonSelects,
        &["query-without-namespace-selects-nothing"],
    ),
    (Fault::QueriesUncounted, &["query-lengths-checked"]),
    (Fault::UnknownKeepsSelection, &["new-selection-replaces"]),
    (Fault::SameIds, &["contexts-have-ids-of-their-own"]),
    (Fault::SelectsTwice, &["contexts-have-ids-of-their-own"]),
    (Fault::SelectsUnasked, &["contexts-have-ids-of-their-own"]),
    (
        Fault::OneContextUnanswered,
        &["contexts-have-ids-of-their-own"],
    ),
    (
        Fault::ContextOfOtherExport,
        &[
            "other-exports-context-void",
            "unknown-export-unknown-to-all",
        ],
    ),
    (
        Fault::ContextOfListedExport,
        &["other-exports-context-void"],
    ),
    (Fault::FailedSelectionKept, &["failed-selection-clears"]),
    (
        Fault::OverlongQueryAccepted,
        &["failed-selection-clears", "query-lengths-checked"],
    ),
    (Fault::EmptySelectionKept, &["empty-selection-clears"]),
    (Fault::EmptySelectionSelectsAll, &["empty-selection-clears"]),
    (
        Fault::ChunkTwice,
        &["contexts-have-ids-of-their-own", "extents-cover-the-export"],
    ),
    (
        Fault::WrongContextId,
        &["contexts-have-ids-of-their-own", "extents-cover-the-export"],
    ),
    (
        Fault::NoExtents,
        &["contexts-have-ids-of-their-own", "extents-cover-the-export"],
    ),
    (Fault::EmptyExtent, &["extents-cover-the-export"]),
    (Fault::ExtentsBeyondRequest, &["extents-cover-the-export"]),
    (Fault::ExtentBeyondEnd, &["extents-cover-the-export"]),
    (Fault::UnalignedExtent, &["extents-cover-the-export"]),
    (Fault::ReqOneIgnored, &["extents-cover-the-export"]),
    (Fault::ReqOneTooLong, &["extents-cover-the-export"]),
    (
        Fault::StatusSimple,
        &["contexts-have-ids-of-their-own", "extents-cover-the-export"],
    ),
    (Fault::RepeatedCookieChanged, &["cookies-come-back"]),
    (Fault::ChunksOverlap, &["structured-read-covers"]),
    (Fault::ChunkMissing, &["structured-read-covers"]),
    (Fault::DfIgnored, &["df-read-in-one-piece"]),
    (Fault::StructuredErrorsSimple, &["structured-read-errors"]),
    (Fault::LargeReadRefused, &["large-read-answered"]),
    (Fault::EmptyReadCloses, &["empty-read-survived"]),
    (Fault::ReadsBeyondEnd, &["beyond-the-end-refused"]),
    (Fault::StatusBeyondEnd, &["beyond-the-end-refused"]),
    (Fault::BeyondWrongErrno, &["beyond-the-end-is-einval"]),
    (Fault::UnalignedServed, &["unaligned-read-refused"]),
    (Fault::RequestMagicIgnored, &["request-magic-checked"]),
    (Fault::UnknownCommandAccepted, &["unknown-command-refused"]),
    (Fault::UnknownCommandCloses, &["unknown-command-refused"]),
    (Fault::UnknownFlagIgnored, &["unknown-request-flag-refused"]),
    (Fault::FlushFails, &["flush-succeeds"]),
    (Fault::FuaRefusedOnRead, &["fua-accepted-on-read"]),
    (Fault::ReadOnlyWritable, &["read-only-refuses-writes"]),
    (Fault::ReadOnlyWrongErrno, &["read-only-is-eperm"]),
    (Fault::CacheFails, &["cache-succeeds"]),
    (Fault::CacheFlagsIgnored, &["cache-succeeds"]),
    (Fault::DiscAnswered, &["disc-ends-the-session"]),
    (Fault::FuaWritesLost, &["write-read-back"]),
    (Fault::WritesBeyondEnd, &["write-beyond-the-end-refused"]),
    (
        Fault::WriteBeyondWrongErrno,
        &["write-beyond-the-end-is-enospc"],
    ),
    (Fault::FailedWriteKeepsPayload, &["failed-write-survived"]),
    (
        Fault::WriteFlagIgnored,
        &["write-with-unknown-flag-refused"],
    ),
    (
        Fault::WriteFlagKeepsPayload,
        &["write-with-unknown-flag-refused"],
    ),
    (Fault::LargeWriteRefused, &["large-write-stored"]),
    (Fault::NoHoleZeroesLess, &["write-zeroes-reads-zero"]),
    (Fault::ZeroesMore, &["write-zeroes-reads-zero"]),
    (Fault::FastZeroHalf, &["fast-zero-all-or-nothing"]),
    (Fault::TrimsMore, &["trim-keeps-the-rest"]),
    (Fault::StaleReads, &["multi-conn-coherent"]),
    (Fault::DiesOfTruncation, &["truncated-input-survived"]),
    (Fault::HugeOptionAwaited, &["huge-option-not-awaited"]),
    (Fault::OptionsUnbounded, &["options-have-a-number"]),
    (Fault::SilentLockOut, &["silent-sessions-lock-nobody-out"]),
    (Fault::IdleForever, &["idle-handshake-ends"]),
];

/// What does not apply to the server without faults: it forces TLS, and its export is not read-only.
const NOT_THERE: &[&str] = &[
    "selective-options-answered",
    "read-only-refuses-writes",
    "read-only-is-eperm",
];

/// The faults that no other part of the battery is to meet: they spoil what comes after them.
const ALONE: &[Fault] = &[
    Fault::DiesOfTruncation,
    Fault::OptionsUnbounded,
    Fault::SilentLockOut,
    Fault::IdleForever,
];

fn everything() -> Selection {
    Selection {
        write: true,
        intrusive: true,
        ..Selection::default()
    }
}

fn examine(server: &Server, selection: &Selection) -> Report {
    run(server, selection, &|_| {}, &Cancel::new())
}

/// What is examined for a fault: everything that can have to do with it.
fn selection(fault: Fault, expected: &[&str]) -> Selection {
    let mut selection = everything();
    if ALONE.contains(&fault) {
        selection.only = expected.iter().map(|id| (*id).to_owned()).collect();
        return selection;
    }
    selection.skip.push("resources".into());
    // A handshake for each byte, with which only what happens at STARTTLS has to do.
    if !expected.iter().any(|id| id.starts_with("starttls")) {
        selection.skip.push("starttls-split-injection-dead".into());
    }
    selection
}

fn examined(fault: Fault, expected: &[&str]) -> Result<(), String> {
    let mut server = server(fault);
    server.timeout = match fault {
        // Found at the deadline only.
        Fault::ExportNameIgnored | Fault::IdleForever | Fault::SilentLockOut => {
            Duration::from_secs(3)
        }
        _ => Duration::from_secs(20),
    };
    let report = examine(&server, &selection(fault, expected));
    let wanted: BTreeSet<&str> = expected.iter().copied().collect();
    let found = findings(&report);
    if found == wanted {
        return Ok(());
    }
    Err(format!(
        "{fault:?}: wanted {wanted:?}, found {found:?}\n{report}\n"
    ))
}

#[test]
fn every_fault_is_found_by_the_whole_battery_exactly() {
    let next = AtomicUsize::new(0);
    let wrong = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some((fault, expected)) =
                    PLANTED.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    if let Err(text) = examined(*fault, expected) {
                        wrong.lock().unwrap().push(text);
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{}", wrong.concat());
}

#[test]
fn every_check_has_a_fault() {
    let proven: BTreeSet<&str> = PLANTED
        .iter()
        .flat_map(|(_, expected)| expected.iter().copied())
        .collect();
    let all = CHECKS.iter().map(|check| check.id).collect();
    assert_eq!(proven, all);
}

#[test]
fn a_server_without_faults_has_no_finding_in_the_whole_battery() {
    let mut server = server(Fault::Nothing);
    server.timeout = Duration::from_secs(5);
    let report = examine(&server, &everything());
    assert!(findings(&report).is_empty(), "{report}");
    let missing: Vec<_> = report
        .results
        .iter()
        .filter(|examined| !matches!(examined.outcome, Outcome::Passed { .. }))
        .map(|examined| examined.check.id)
        .collect();
    assert_eq!(missing, NOT_THERE, "{report}");
    let summary = report.summary.unwrap();
    assert_eq!(summary.mode, Mode::Forced);
    assert_eq!(summary.features.size, Some(4 << 20));
    assert_eq!(summary.features.structured_replies, Some(true));
    assert_eq!(summary.features.contexts.unwrap().len(), 2);
    assert!(summary.features.tls.unwrap().starts_with("TLS 1.3"));
}

#[test]
fn a_server_that_forces_tls_for_one_export_has_no_finding() {
    let report = examine(&server(Fault::Selective), &everything_but_resources());
    assert!(findings(&report).is_empty(), "{report}");
    assert_eq!(report.not_run().count(), 0, "{report}");
    assert_eq!(report.summary.unwrap().mode, Mode::Selective);
}

#[test]
fn features_that_a_server_lacks_are_no_findings_of_the_whole_battery() {
    for fault in [
        Fault::NoStructuredReplies,
        Fault::NoContexts,
        Fault::NoTls12,
        Fault::ReadOnly,
    ] {
        let report = examine(&server(fault), &everything_but_resources());
        assert!(findings(&report).is_empty(), "{fault:?}: {report}");
        assert_eq!(report.not_run().count(), 0, "{fault:?}: {report}");
    }
}

fn everything_but_resources() -> Selection {
    Selection {
        skip: vec!["resources".into()],
        ..everything()
    }
}

#[test]
fn what_is_not_allowed_is_not_done() {
    let report = examine(&server(Fault::Nothing), &Selection::default());
    for examined in &report.results {
        let harmless = examined.check.needs == Needs::Nothing;
        assert_eq!(
            matches!(examined.outcome, Outcome::Passed { .. }),
            harmless && !NOT_THERE.contains(&examined.check.id),
            "{examined}"
        );
    }
}

#[test]
fn without_certificates_only_what_lies_before_tls_is_examined() {
    let mut server = server(Fault::Nothing);
    server.identity = None;
    let report = examine(&server, &Selection::default());
    assert!(findings(&report).is_empty(), "{report}");
    let passed = |id: &str| {
        report.results.iter().any(|examined| {
            examined.check.id == id && matches!(examined.outcome, Outcome::Passed { .. })
        })
    };
    for id in [
        "greeting-newstyle",
        "plaintext-options-refused",
        "starttls-in-pieces",
        "old-tls-refused",
    ] {
        assert!(passed(id), "{id}: {report}");
    }
    assert!(report.not_run().count() > 30, "{report}");
}

#[test]
fn a_cancelled_run_ends_at_once() {
    let cancel = Cancel::new();
    cancel.cancel();
    let report = run(&server(Fault::Nothing), &everything(), &|_| {}, &cancel);
    assert!(report.duration < Duration::from_secs(2), "{report}");
    assert_eq!(report.results.len(), CHECKS.len());
    assert!(findings(&report).is_empty(), "{report}");
}

/// A server that says the same to everybody, and nothing else.
fn says(words: &'static [u8]) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut server = server(Fault::Nothing);
    server.address = Address::Tcp(listener.local_addr().unwrap());
    server.timeout = Duration::from_secs(2);
    std::thread::spawn(move || {
        for socket in listener.incoming() {
            // Whether anybody listens to the end does not matter.
            let _ = socket.unwrap().write_all(words);
        }
    });
    server
}

#[test]
fn what_is_no_server_of_the_kind_is_named() {
    for (words, mode) in [
        (&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], Mode::NotNbd),
        (b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53", Mode::Oldstyle),
        (b"NBDMAGICIHAVEOPT\0\0", Mode::NotFixed),
        (b"", Mode::Unknown),
    ] {
        let report = examine(&says(words), &everything());
        assert_eq!(report.summary.as_ref().unwrap().mode, mode, "{report}");
        let found = findings(&report);
        let expected: &[&str] = match mode {
            Mode::Unknown => &[],
            _ => &["greeting-newstyle"],
        };
        assert_eq!(found, expected.iter().copied().collect(), "{report}");
        assert!(report.not_run().count() > 80, "{report}");
    }
}

#[test]
fn a_unix_socket_is_as_good() {
    let mut server = server(Fault::NoTls);
    let Address::Tcp(address) = server.address else {
        panic!("{:?}", server.address)
    };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        for inner in listener.incoming() {
            let (inner, outer) = (inner.unwrap(), TcpStream::connect(address).unwrap());
            let (mut from, mut to) = (inner.try_clone().unwrap(), outer.try_clone().unwrap());
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Write);
            });
            let (mut from, mut to) = (outer, inner);
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Both);
            });
        }
    });
    server.address = Address::Unix(path);
    let report = examine(&server, &everything_but_resources());
    assert_eq!(findings(&report), ["export-needs-tls"].into(), "{report}");
    assert_eq!(report.not_run().count(), 0, "{report}");
    assert_eq!(report.summary.unwrap().mode, Mode::NoTls);
}
