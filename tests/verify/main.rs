//! Each check catches its fault, a server without faults has no finding, and none can stall or exhaust an attach.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a helper of a test that fails fails the test"
)]

mod attach;
mod certificates;
mod command;
mod faulty;
mod goldens;
mod hostile;
mod peers;
mod planted;

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use faulty::{Fault, start};
use hawser::verify::{CHECKS, Cancel, Outcome, Policy, Report, Selection, Server, battery, run};

fn findings(report: &Report) -> BTreeSet<&str> {
    report
        .findings()
        .map(|examined| examined.check.id)
        .collect()
}

fn attach_checks() -> BTreeSet<&'static str> {
    CHECKS
        .iter()
        .filter(|check| check.attach)
        .map(|check| check.id)
        .collect()
}

#[test]
fn a_server_without_faults_has_no_finding() {
    let report = battery(&start(Fault::Nothing));
    assert!(
        report
            .results
            .iter()
            .all(|examined| matches!(examined.outcome, Outcome::Passed { .. })),
        "{report}"
    );
    assert_eq!(report.results.len(), attach_checks().len());
    assert_eq!(Policy::Strict.decide(&report), Ok(()));
}

#[test]
fn every_fault_is_found_by_its_check_and_no_other() {
    let checks = attach_checks();
    let mut proven = BTreeSet::new();
    for (fault, expected) in planted::PLANTED {
        let expected: BTreeSet<&str> = checks
            .intersection(&expected.iter().copied().collect())
            .copied()
            .collect();
        // To an attach, a server that does not force TLS has findings besides.
        if expected.is_empty() || *fault == Fault::SelectiveStateSurvives {
            continue;
        }
        let mut target = start(*fault);
        if *fault == Fault::ExportNameIgnored {
            // Found at the deadline only.
            target.timeout = Duration::from_secs(2);
        }
        let report = battery(&target);
        assert_eq!(findings(&report), expected, "{fault:?}: {report}");
        assert_eq!(report.not_run().count(), 0, "{fault:?}: {report}");
        assert!(Policy::Strict.decide(&report).is_err(), "{fault:?}");
        assert_eq!(Policy::Warn.decide(&report), Ok(()));
        if expected.len() == 1 {
            proven.extend(expected);
        }
    }
    assert_eq!(proven, checks, "a check without a fault of its own");
}

#[test]
fn features_that_a_server_lacks_are_no_findings() {
    for fault in [Fault::NoStructuredReplies, Fault::NoContexts] {
        let report = battery(&start(fault));
        let inapplicable = report
            .results
            .iter()
            .filter(|examined| matches!(examined.outcome, Outcome::Inapplicable { .. }))
            .count();
        assert!(inapplicable >= 4, "{report}");
        assert_eq!(Policy::Strict.decide(&report), Ok(()), "{report}");
    }
}

#[test]
fn hostile_servers_end_with_a_finding_in_bounded_time_and_memory() {
    for hostility in hostile::ALL {
        let mut target = hostile::start(*hostility);
        target.timeout = Duration::from_millis(250);
        let started = Instant::now();
        let report = battery(&target);
        // Every check ends at its deadline; two rounds of them and the slack of a busy machine.
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "{hostility:?}: {report}"
        );
        assert_ne!(report.findings().count(), 0, "{hostility:?}: {report}");
        for examined in &report.results {
            let text = examined.text();
            assert!(text.len() < 500, "{hostility:?}: {text}");
            assert!(!text.contains(char::is_control), "{hostility:?}: {text:?}");
        }
        assert!(Policy::Strict.decide(&report).is_err());
    }
    for hostility in hostile::ALL {
        let mut server = Server::from(&hostile::start(*hostility));
        server.timeout = Duration::from_millis(250);
        let started = Instant::now();
        let report = run(&server, &Selection::default(), &|_| {}, &Cancel::new());
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "{hostility:?}: {report}"
        );
        // On a busy machine an honest greeting may be late too: then nothing is known, which is no pass either.
        assert!(
            report.findings().count() + report.not_run().count() > 0,
            "{hostility:?}: {report}"
        );
        for examined in &report.results {
            let text = examined.text();
            assert!(text.len() < 500, "{hostility:?}: {text}");
            assert!(!text.contains(char::is_control), "{hostility:?}: {text:?}");
        }
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|line| line.trim().strip_suffix(" kB"))
        .unwrap();
    let peak: u64 = peak.parse().unwrap();
    assert!(
        peak < 1 << 20,
        "{peak} KiB, that of all servers and tests included"
    );
}

#[test]
fn a_server_that_is_not_there_is_a_doubt_and_no_finding() {
    let mut target = start(Fault::Nothing);
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap();
    target.address = nobody.local_addr().unwrap();
    drop(nobody);
    let report = battery(&target);
    assert_eq!(report.findings().count(), 0, "{report}");
    assert_eq!(report.not_run().count(), attach_checks().len(), "{report}");
    assert!(Policy::Strict.decide(&report).is_err());
}

#[test]
fn a_client_that_the_server_refuses_is_a_doubt_and_no_finding() {
    let mut target = start(Fault::Nothing);
    target.tls = start(Fault::Nothing).tls;
    let report = battery(&target);
    assert_eq!(report.findings().count(), 0, "{report}");
    assert!(report.not_run().count() >= 8, "{report}");
    assert!(Policy::Strict.decide(&report).is_err());
}
