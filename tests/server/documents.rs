//! What `docs/` says of the tests, the command lines and the messages is so.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

fn document(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("docs")
        .join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The text of all files below `folder` that end in `.rs`.
fn sources(folder: &Path) -> String {
    let mut text = String::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            text += &sources(&path);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            text += &fs::read_to_string(&path).unwrap();
        }
    }
    text
}

fn code(folder: &str) -> String {
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder))
}

/// What stands between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The names of functions that are tests.
fn tests(code: &str) -> BTreeSet<&str> {
    let mut names = BTreeSet::new();
    let mut is_test = false;
    for line in code.lines().map(str::trim) {
        let name = line
            .trim_start_matches("async ")
            .strip_prefix("fn ")
            .and_then(|rest| rest.split(['(', '<']).next());
        match name {
            Some(name) if is_test => {
                names.insert(name);
                is_test = false;
            }
            Some(_) => is_test = false,
            None => is_test |= line.starts_with("#[test]") || line.starts_with("#[tokio::test"),
        }
    }
    names
}

#[test]
fn every_rule_of_the_protocol_has_a_row_and_its_tests_exist() {
    let code = code("src") + &code("tests");
    let tests = tests(&code);
    let document = document("protocol.md");
    let mut rules = Vec::new();
    for line in document.lines() {
        let cells: Vec<_> = line.split(" | ").collect();
        let rule = cells[0].strip_prefix("| C").and_then(|n| n.parse().ok());
        let Some(rule) = rule else { continue };
        let rule: u32 = rule;
        rules.push(rule);
        let [_, says, does, shown] = cells[..] else {
            panic!("C{rule} has {} columns", cells.len());
        };
        assert!(!says.is_empty() && !does.is_empty(), "C{rule}");
        for name in quoted(shown) {
            assert!(tests.contains(name), "C{rule}: there is no test {name}");
        }
        let is_tested = quoted(shown).next().is_some();
        let is_open = shown.starts_with("not tested") && does.contains("**not tested**");
        assert!(
            is_tested != is_open,
            "C{rule} has tests, or says that it has none"
        );
    }
    assert_eq!(rules, (1..=64).collect::<Vec<u32>>());
}

#[test]
fn every_option_is_in_the_parameters_and_none_besides() {
    let document = document("parameters.md");
    for role in ["serve", "standalone", "demo", "controller", "node", "agent"] {
        let help = Command::new(env!("CARGO_BIN_EXE_hawser"))
            .args([role, "--help"])
            .output()
            .unwrap();
        let help = String::from_utf8(help.stdout).unwrap();
        let offered: BTreeSet<_> = help
            .lines()
            .map(|line| line.trim_start_matches([' ', '-', 'h', 'V', ',']))
            .zip(help.lines())
            .filter(|(_, line)| line.trim_start().starts_with('-'))
            .filter_map(|(_, line)| line.split_once("--"))
            .map(|(_, rest)| rest.split([' ', '\n']).next().unwrap())
            .filter(|name| !["help", "version", "log", "log-format"].contains(name))
            .collect();
        let section = document
            .split_once(&format!("### hawser {role}\n"))
            .map(|(_, rest)| rest.split("\n#").next().unwrap())
            .unwrap();
        let told: BTreeSet<_> = section
            .lines()
            .filter_map(|line| line.strip_prefix("| `--"))
            .map(|row| row.split([' ', '`']).next().unwrap())
            .collect();
        assert_eq!(told, offered, "hawser {role}");
    }
}

#[test]
fn every_message_in_troubleshooting_is_one_of_ours() {
    // As the compiler reads it: a line that ends in a backslash goes on at the next one's first letter.
    let mut code = String::new();
    for part in self::code("src").split("\\\n") {
        code += if code.is_empty() {
            part
        } else {
            part.trim_start()
        };
    }
    let document = document("troubleshooting.md");
    let messages: Vec<_> = document
        .lines()
        .filter_map(|line| line.strip_prefix("> "))
        .collect();
    assert!(messages.len() > 50, "{}", messages.len());
    for message in messages {
        for part in message.split('…').map(str::trim) {
            assert!(
                part.len() < 3 || code.contains(part),
                "no error says {part:?}, as in: {message}"
            );
        }
    }
}
