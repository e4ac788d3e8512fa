use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::json;

use super::*;

fn report(outcomes: &[Outcome]) -> Report {
    Report {
        address: Address::Tcp(([127, 0, 0, 1], 10809).into()),
        export: "vol/att".into(),
        summary: None,
        results: CHECKS
            .iter()
            .filter(|check| check.attach)
            .zip(outcomes)
            .map(|(check, outcome)| Examined {
                check,
                outcome: outcome.clone(),
                duration: Duration::from_micros(1500),
            })
            .collect(),
        duration: Duration::from_millis(2),
    }
}

fn first(index: usize) -> &'static Check {
    CHECKS
        .iter()
        .filter(|check| check.attach)
        .nth(index)
        .unwrap()
}

fn passed() -> Outcome {
    Outcome::Passed {
        seen: "as it should be".into(),
    }
}

fn finding() -> Outcome {
    Outcome::Finding {
        evidence: "LIST before TLS was answered with SERVER".into(),
    }
}

fn not_run() -> Outcome {
    Outcome::NotRun {
        reason: "connection refused".into(),
    }
}

#[test]
fn checks_have_ids_of_their_own_and_say_why() {
    let ids: BTreeSet<_> = CHECKS.iter().map(|check| check.id).collect();
    assert_eq!(ids.len(), CHECKS.len());
    for check in CHECKS {
        for text in [check.title, check.section, check.why] {
            assert!(!text.is_empty(), "{}", check.id);
        }
        assert!(!check.rules.is_empty(), "{}", check.id);
        assert!(
            check.rules.iter().all(|rule| (1..=64).contains(rule)),
            "{}",
            check.id
        );
        assert!(
            !check.attach || check.needs == Needs::Nothing,
            "{}: an attach only reads",
            check.id
        );
        assert!(
            check
                .id
                .chars()
                .all(|c| matches!(c, '-' | '.' | 'a'..='z' | '0'..='9')),
            "{}",
            check.id
        );
    }
}

#[test]
fn strict_refuses_findings_and_doubts_and_says_which() {
    let inapplicable = Outcome::Inapplicable {
        reason: "no contexts".into(),
    };
    let good = report(&[passed(), inapplicable]);
    assert_eq!(Policy::Strict.decide(&good), Ok(()));
    let found = report(&[finding(), passed()]);
    let refused = Policy::Strict.decide(&found).unwrap_err().to_string();
    for part in ["vol/att", first(0).id, "answered with SERVER"] {
        assert!(refused.contains(part), "{refused}");
    }
    let unknown = report(&[passed(), not_run()]);
    let refused = Policy::Strict.decide(&unknown).unwrap_err().to_string();
    assert!(refused.contains(first(1).id), "{refused}");
    for policy in [Policy::Warn, Policy::Off] {
        assert_eq!(policy.decide(&found), Ok(()));
        assert_eq!(policy.decide(&unknown), Ok(()));
    }
}

#[test]
fn policies_are_words() {
    for policy in [Policy::Strict, Policy::Warn, Policy::Off] {
        assert_eq!(policy.to_string().parse(), Ok(policy));
    }
    assert_eq!(Policy::default(), Policy::Strict);
    let error = "Strict".parse::<Policy>().unwrap_err().to_string();
    assert!(error.contains("strict, warn or off"), "{error}");
}

#[test]
fn reports_are_stable_for_programs() {
    let report = report(&[finding()]);
    let check = first(0);
    assert_eq!(
        serde_json::to_value(&report).unwrap(),
        json!({
            "address": "127.0.0.1:10809",
            "export": "vol/att",
            "results": [{
                "id": "plaintext-options-refused",
                "title": check.title,
                "group": "plaintext",
                "section": check.section,
                "severity": "security",
                "why": check.why,
                "needs": "nothing",
                "outcome": "finding",
                "evidence": "LIST before TLS was answered with SERVER",
                "duration_us": 1500,
            }],
            "duration_us": 2000,
        })
    );
}

#[test]
fn reports_tell_people_what_was_found_and_why_it_matters() {
    let text = report(&[finding(), passed(), not_run()]).to_string();
    for part in [
        "1 of 3 checks passed, 1 finding, 1 could not run",
        "FINDING  plaintext-options-refused",
        first(0).title,
        first(0).why,
        "connection refused",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(!text.contains(first(1).why), "{text}");
}

#[test]
fn a_check_has_the_time_that_was_given() {
    let seconds = Duration::from_secs;
    for (timeout, plain, intrusive) in [(1, 1, 5), (15, 15, 75), (60, 60, 75), (600, 600, 600)] {
        let time = |needs| run::time(needs, seconds(timeout));
        assert_eq!(time(Needs::Nothing), seconds(plain));
        assert_eq!(time(Needs::Write), seconds(plain));
        assert_eq!(time(Needs::Intrusive), seconds(intrusive));
    }
}
