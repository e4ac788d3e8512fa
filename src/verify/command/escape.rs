//! Text that a server sent, made harmless for what it is printed in.

use std::fmt::Write;

/// For a terminal: nothing in it moves the cursor, ends a line, or reorders or hides what stands around it.
pub(super) fn printable(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '"' | '\'' | '\\' => safe.push(c),
            // Escapes what is not printable: control and format characters, line separators, unassigned ones.
            c => safe.extend(c.escape_debug()),
        }
    }
    safe
}

/// JSON as it is, but for what a terminal would not print: that can only stand in strings, where it has an escape.
pub(super) fn json(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_ascii() || c.escape_debug().len() == 1 {
            safe.push(c);
            continue;
        }
        for unit in c.encode_utf16(&mut [0; 2]) {
            let _ = write!(safe, "\\u{unit:04x}");
        }
    }
    safe
}

/// For an XML attribute or text: the markup as entities, and what XML 1.0 cannot hold (section 2.2) as U+FFFD.
pub(super) fn xml(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '&' => safe.push_str("&amp;"),
            '"' => safe.push_str("&quot;"),
            ' '..='\u{7e}' => safe.push(c),
            '\u{fffe}' | '\u{ffff}' => safe.push(char::REPLACEMENT_CHARACTER),
            // Raw, they would become spaces in an attribute.
            '\t' | '\n' | '\r' => {
                let _ = write!(safe, "&#{};", u32::from(c));
            }
            c if c.is_control() => safe.push(char::REPLACEMENT_CHARACTER),
            c if c.escape_debug().len() > 1 => {
                let _ = write!(safe, "&#{};", u32::from(c));
            }
            c => safe.push(c),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_not_moved() {
        for (text, expected) in [
            (
                "plain \"text\" isn't \\ changed",
                "plain \"text\" isn't \\ changed",
            ),
            ("größe 硬盘", "größe 硬盘"),
            ("\u{1b}[2J\u{9b}1m", "\\u{1b}[2J\\u{9b}1m"),
            ("a\r\n\tb\u{7f}", "a\\r\\n\\tb\\u{7f}"),
            ("\u{202e}gnp.exe\u{2028}", "\\u{202e}gnp.exe\\u{2028}"),
            ("\u{200b}\u{feff}", "\\u{200b}\\u{feff}"),
        ] {
            assert_eq!(printable(text), expected);
        }
    }

    #[test]
    fn json_means_what_it_meant() {
        let text = "ä\u{9b}\u{202e}\u{e0001}\u{1b}\n硬盘\"\\";
        let raw = serde_json::to_string(text).unwrap();
        let safe = json(&raw);
        assert_eq!(
            safe,
            "\"ä\\u009b\\u202e\\udb40\\udc01\\u001b\\n硬盘\\\"\\\\\""
        );
        assert_eq!(serde_json::from_str::<String>(&safe).unwrap(), text);
    }

    #[test]
    fn xml_stays_well_formed() {
        assert_eq!(
            xml("<a b=\"c\">&\n\u{0}\u{1b}\u{ffff}é\u{9b}\u{202e}"),
            "&lt;a b=&quot;c&quot;&gt;&amp;&#10;\u{fffd}\u{fffd}\u{fffd}é\u{fffd}&#8238;"
        );
    }
}
