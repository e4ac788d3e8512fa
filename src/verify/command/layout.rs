//! How wide lines may be, and how text is broken to fit.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;

/// Columns where nobody says how many there are: a file, a pipe.
const USUAL: usize = 80;

/// Columns beyond which prose is hard to read.
const WIDEST: usize = 100;

/// Columns below which a line holds less than a word; a terminal breaks such lines itself.
const NARROWEST: usize = 24;

/// The width of lines, in columns.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    width: usize,
}

impl Layout {
    pub(super) fn new(width: usize) -> Self {
        Self {
            width: width.clamp(NARROWEST, WIDEST),
        }
    }

    pub(super) fn of_stdout() -> Self {
        Self::new(columns(&io::stdout()).unwrap_or(USUAL))
    }

    /// Appends a paragraph: `head` before the first line, as many blanks as `indent` before the others. The text is
    /// printable already.
    pub(super) fn paragraph(self, out: &mut String, head: &str, indent: usize, text: &str) {
        let indent = indent.min(self.width / 3);
        let mut line = head.to_owned();
        let mut used = head.chars().count();
        let mut empty = true;
        let mut finish = |line: &mut String| {
            out.push_str(line.trim_end());
            out.push('\n');
            line.clear();
            line.extend(std::iter::repeat_n(' ', indent));
        };
        for mut word in text.split(' ').filter(|word| !word.is_empty()) {
            loop {
                let room = self.width.saturating_sub(used + usize::from(!empty));
                let length = word.chars().count();
                if length <= room {
                    if !empty {
                        line.push(' ');
                        used += 1;
                    }
                    line.push_str(word);
                    used += length;
                    empty = false;
                    break;
                }
                if empty && room > 0 {
                    let end = word
                        .char_indices()
                        .nth(room)
                        .map_or(word.len(), |(end, _)| end);
                    line.push_str(&word[..end]);
                    word = &word[end..];
                }
                finish(&mut line);
                used = indent;
                empty = true;
            }
        }
        finish(&mut line);
    }
}

/// The width of a terminal; `None` for anything else, and for a terminal that does not know.
pub(super) fn columns(stream: &(impl AsFd + IsTerminal)) -> Option<usize> {
    if !stream.is_terminal() {
        return None;
    }
    let size = rustix::termios::tcgetwinsize(stream).ok()?;
    Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paragraph(width: usize, head: &str, indent: usize, text: &str) -> String {
        let mut out = String::new();
        Layout { width }.paragraph(&mut out, head, indent, text);
        out
    }

    #[test]
    fn lines_break_between_words() {
        assert_eq!(
            paragraph(16, "  why  ", 7, "one two three four"),
            "  why  one two\n     three four\n"
        );
        assert_eq!(paragraph(80, "", 0, "one  two"), "one two\n");
        assert_eq!(paragraph(80, "head", 0, ""), "head\n");
    }

    #[test]
    fn a_long_word_is_cut() {
        assert_eq!(
            paragraph(12, "- ", 2, "ab abcdefghijklmnop"),
            "- ab\n  abcdefghij\n  klmnop\n"
        );
        assert_eq!(paragraph(3, "head", 2, "abcde"), "head\n ab\n cd\n e\n");
    }

    #[test]
    fn no_line_is_too_wide() {
        for width in NARROWEST..=WIDEST {
            let text =
                "some words and averyveryverylongoneindeed größer als alles andere".repeat(3);
            for line in paragraph(width, "  head  ", 8, &text).lines() {
                assert!(line.chars().count() <= width, "{width}: {line}");
            }
        }
    }
}
