//! What is told of a run, to the letter.

use std::net::Ipv4Addr;
use std::time::Duration;

use clap::Parser;

use super::conclusion::{Conclusion, FailOn, Verdict};
use super::layout::Layout;
use super::*;
use crate::verify::{
    Address, CHECKS, Check, Examined, Features, Group, Mode, Needs, Outcome, Report, Selection,
    Severity, Sizes, Summary,
};

/// What a hostile server would have a report say.
const HOSTILE: &str = "\u{1b}[2J\u{202e}</testcase>\"&]]>";

static SOUND: Check = Check {
    id: "greeting-sound",
    title: "The greeting is sound",
    group: Group::Greeting,
    section: "Newstyle negotiation",
    why: "Nobody can connect.",
    ..Check::USUAL
};
static STYLE: Check = Check {
    id: "greeting-stylish",
    title: "The greeting is beautiful",
    group: Group::Greeting,
    section: "Newstyle negotiation",
    severity: Severity::Style,
    why: "Beauty is its own reward.",
    ..Check::USUAL
};
static INJECTION: Check = Check {
    id: "starttls-injection",
    title: "Options injected behind STARTTLS have no effect inside TLS",
    group: Group::Starttls,
    section: "Option types, NBD_OPT_STARTTLS",
    severity: Severity::Security,
    why: "Somebody in the middle can change what a client negotiated.",
    ..Check::USUAL
};
static EXTENTS: Check = Check {
    id: "extents-covered",
    title: "BLOCK_STATUS covers what was asked for",
    group: Group::Contexts,
    section: "Metadata querying",
    severity: Severity::Data,
    why: "What is copied may lack something.",
    ..Check::USUAL
};
static WRITES: Check = Check {
    id: "writes-stay",
    title: "What was written is read",
    group: Group::Transmission,
    section: "Request types, NBD_CMD_WRITE",
    severity: Severity::Data,
    why: "It is lost.",
    needs: Needs::Write,
    ..Check::USUAL
};

fn examined(check: &'static Check, outcome: Outcome) -> Examined {
    Examined {
        check,
        outcome,
        duration: Duration::from_micros(1500),
    }
}

fn finding(check: &'static Check, evidence: &str) -> Examined {
    let evidence = evidence.to_owned();
    examined(check, Outcome::Finding { evidence })
}

fn report(results: Vec<Examined>) -> Report {
    Report {
        address: Address::Tcp((Ipv4Addr::new(192, 0, 2, 1), 10809).into()),
        export: "disk".into(),
        summary: Some(Summary {
            mode: Mode::Selective,
            evidence: "STARTTLS was accepted, and before it LIST ACK had their answer".into(),
            features: Features {
                handshake_flags: Some(3),
                tls: Some("TLS 1.3, TLS13_AES_256_GCM_SHA384".into()),
                exports: Some(vec!["disk".into()]),
                size: Some(1 << 30),
                flags: Some(vec!["HAS_FLAGS", "SEND_FLUSH"]),
                block_sizes: Some(Sizes {
                    minimum: 1,
                    preferred: 4096,
                    maximum_payload: 1 << 25,
                }),
                description: Some(HOSTILE.into()),
                structured_replies: Some(true),
                extended_headers: Some(false),
                contexts: Some(vec!["base:allocation".into()]),
                concurrent_sessions: Some(true),
            },
        }),
        results,
        duration: Duration::from_millis(1234),
    }
}

/// One of everything.
fn mixed() -> Report {
    let passed = |seen: &str| Outcome::Passed { seen: seen.into() };
    report(vec![
        examined(&SOUND, passed("newstyle, flags 0x0003")),
        finding(&STYLE, "a greeting as plain as they come"),
        finding(
            &INJECTION,
            &format!("the option was answered inside TLS with the message {HOSTILE}"),
        ),
        examined(
            &EXTENTS,
            Outcome::NotRun {
                reason: "the server closed the connection".into(),
            },
        ),
        examined(
            &WRITES,
            Outcome::Inapplicable {
                reason: "it overwrites the export: see --write".into(),
            },
        ),
    ])
}

fn uri() -> Uri {
    "nbds://storage.example/disk".parse().unwrap()
}

fn conclude<'a>(report: &'a Report, uri: &'a Uri, selection: &'a Selection) -> Conclusion<'a> {
    Conclusion {
        uri,
        report,
        selection,
        fail_on: FailOn::Interoperability,
        partial: false,
        signal: None,
    }
}

fn assert_golden(name: &str, golden: &str, text: &str) {
    assert_eq!(
        text, golden,
        "src/verify/command/goldens/{name} should be:\n{text}"
    );
}

#[test]
fn the_text_is_as_recorded() {
    let (report, uri, selection) = (mixed(), uri(), Selection::default());
    let conclusion = conclude(&report, &uri, &selection);
    let text = text::document(&conclusion, Layout::new(80), false);
    assert_golden("text.txt", include_str!("goldens/text.txt"), &text);
    let text = text::document(&conclusion, Layout::new(30), true);
    assert_golden("narrow.txt", include_str!("goldens/narrow.txt"), &text);
    assert!(text.lines().all(|line| line.chars().count() <= 30));
}

#[test]
fn an_interrupted_run_says_so() {
    let (report, uri, selection) = (mixed(), uri(), Selection::default());
    let conclusion = Conclusion {
        signal: Some(2),
        ..conclude(&report, &uri, &selection)
    };
    let text = text::document(&conclusion, Layout::new(80), false);
    assert!(text.contains("\nInterrupted: this is what was found until then.\n"));
    let json: serde_json::Value =
        serde_json::from_str(&json::document(&conclusion).unwrap()).unwrap();
    assert_eq!(json["verdict"], "interrupted");
    assert_eq!(json["exit_status"], 130);
}

#[test]
fn the_json_is_as_recorded() {
    let (report, uri, selection) = (mixed(), uri(), Selection::default());
    let text = json::document(&conclude(&report, &uri, &selection)).unwrap();
    let version = format!("\"hawser\": \"{}\"", env!("CARGO_PKG_VERSION"));
    let text = text.replace(&version, "\"hawser\": \"0\"");
    assert_golden("report.json", include_str!("goldens/report.json"), &text);
}

#[test]
fn the_junit_xml_is_as_recorded() {
    let (report, uri, selection) = (mixed(), uri(), Selection::default());
    let text = junit::document(&conclude(&report, &uri, &selection));
    assert_golden("junit.xml", include_str!("goldens/junit.xml"), &text);
    let partial = Conclusion {
        partial: true,
        fail_on: FailOn::Style,
        ..conclude(&report, &uri, &selection)
    };
    let text = junit::document(&partial);
    assert!(text.contains(" tests=\"5\" failures=\"2\" errors=\"0\" skipped=\"2\""));
}

#[test]
fn nothing_of_a_server_s_reaches_a_terminal_raw() {
    let (report, uri, selection) = (mixed(), uri(), Selection::default());
    let conclusion = conclude(&report, &uri, &selection);
    for verbose in [false, true] {
        let text = text::document(&conclusion, Layout::new(80), verbose);
        let raw = |c: char| c != '\n' && (c.is_control() || c == '\u{202e}');
        assert!(!text.contains(raw), "{text:?}");
    }
    let xml = junit::document(&conclusion);
    assert!(
        !xml.contains("\u{1b}") && xml.matches("</testcase>").count() == 4,
        "{xml}"
    );
}

#[test]
fn the_exit_status_follows_the_gravest_finding() {
    let (uri, selection) = (uri(), Selection::default());
    let judge = |report: &Report, fail_on, partial| {
        let conclusion = Conclusion {
            fail_on,
            partial,
            ..conclude(report, &uri, &selection)
        };
        (conclusion.verdict(), conclusion.exit_status())
    };
    use FailOn as F;
    let all = [
        F::Security,
        F::Data,
        F::Interoperability,
        F::Style,
        F::Never,
    ];
    let clean = report(vec![examined(
        &SOUND,
        Outcome::Passed {
            seen: String::new(),
        },
    )]);
    let style = report(vec![finding(&STYLE, "")]);
    let data = report(vec![finding(&EXTENTS, "")]);
    let security = report(vec![finding(&INJECTION, ""), finding(&STYLE, "")]);
    for (report, failing) in [
        (&clean, &all[..0]),
        (&style, &all[3..4]),
        (&data, &all[1..4]),
        (&security, &all[..4]),
    ] {
        for fail_on in all {
            let expected = match failing.contains(&fail_on) {
                true => (Verdict::Failed, 1),
                false => (Verdict::Passed, 0),
            };
            assert_eq!(judge(report, fail_on, false), expected, "{fail_on:?}");
        }
    }
    let in_doubt = report(vec![
        finding(&STYLE, ""),
        examined(
            &EXTENTS,
            Outcome::NotRun {
                reason: String::new(),
            },
        ),
    ]);
    assert_eq!(judge(&in_doubt, F::Data, false), (Verdict::Incomplete, 2));
    assert_eq!(judge(&in_doubt, F::Data, true), (Verdict::Passed, 0));
    assert_eq!(judge(&in_doubt, F::Style, true), (Verdict::Failed, 1));
}

#[derive(Debug, clap::Parser)]
struct Line {
    #[command(flatten)]
    args: Args,
}

fn selection(options: &[&str]) -> Result<Selection, String> {
    let words = ["verify", "nbd://localhost/"].iter().chain(options);
    let line = Line::try_parse_from(words).map_err(|error| error.to_string())?;
    line.args
        .choice
        .selection()
        .map_err(|error| error.to_string())
}

#[test]
fn checks_go_by_their_ids_and_their_groups_names() {
    let all = selection(&[]).unwrap();
    assert_eq!(all.only.len(), CHECKS.len());
    assert!(!all.write && !all.intrusive);
    let first = CHECKS[0];
    assert_eq!(selection(&["--check", first.id]).unwrap().only, [first.id]);
    let group = first.group.to_string();
    let of_group = selection(&["--check", &group]).unwrap().only;
    let rest = selection(&["--skip", &group]).unwrap().only;
    assert!(of_group.contains(&first.id.to_owned()));
    assert_eq!(of_group.len() + rest.len(), CHECKS.len());
    let both = format!("{},{}", first.id, CHECKS[1].id);
    assert_eq!(selection(&["--check", &both]).unwrap().only.len(), 2);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let first = CHECKS[0].id;
    for (options, words) in [
        (&["--check", "greetin"][..], "has the name \"greetin\""),
        (&["--check", first, "--skip", first], "no check is left"),
        (&["--write"], "--yes"),
        (&["--yes"], "--write"),
        (&["--cert", "c"], "--ca"),
        (&["--ca", "a", "--certificates", "d"], "cannot be used with"),
        (&["--timeout", "0"], "0 is not in 1..=600"),
        (&["--list"], "cannot be used with"),
    ] {
        let refusal = selection(options).unwrap_err();
        assert!(refusal.contains(words), "{options:?}: {refusal}");
    }
    for check in CHECKS.iter().filter(|check| check.needs != Needs::Nothing) {
        let refusal = selection(&["--check", check.id]).unwrap_err();
        assert!(refusal.contains("allow it with"), "{refusal}");
    }
}

/// A user reads there what `--list` says, and more comfortably.
#[test]
fn the_guide_lists_every_check_as_it_is() {
    let guide = include_str!("../../../docs/verify.md");
    let (_, guide) = guide.split_once("## The checks").unwrap();
    let missing: String = CHECKS
        .iter()
        .map(|check| {
            let allowed = match check.needs {
                Needs::Nothing => "",
                Needs::Write => "`--write`",
                Needs::Intrusive => "`--intrusive`",
            };
            format!(
                "| `{}` | {} | {} | {allowed} | {} |\n",
                check.id, check.group, check.severity, check.title
            )
        })
        .filter(|row| !guide.contains(row.as_str()))
        .collect();
    assert_eq!(missing, "", "rows that docs/verify.md lacks");
    let rows = guide.lines().filter(|line| line.starts_with("| `")).count();
    assert_eq!(
        rows,
        CHECKS.len(),
        "docs/verify.md lists a check that is none"
    );
}
