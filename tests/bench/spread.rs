//! What repetitions come to, and how it is written down.

use serde_json::{Value, json};

/// The middle, and how far the repetitions lie apart.
#[derive(Clone, Copy)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Spread {
    pub(crate) fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = match values.len() {
            0 => return None,
            even if even % 2 == 0 => (values[middle - 1] + values[middle]) / 2.0,
            _ => values[middle],
        };
        Some(Self {
            median,
            least: values[0],
            most: values[values.len() - 1],
        })
    }

    pub(crate) fn json(spread: Option<Self>) -> Value {
        spread.map_or(Value::Null, |spread| {
            json!([spread.median, spread.least, spread.most].map(round))
        })
    }
}

/// Four digits are more than the spread deserves.
pub(crate) fn round(value: f64) -> f64 {
    format!("{value:.3e}").parse().unwrap_or(value)
}

/// JSON with a line for each case's server: it is kept in the repository, where lines are compared.
pub(crate) fn compact(all: &Value) -> String {
    let pretty = format!("{all:#}\n");
    let mut text = String::with_capacity(pretty.len());
    let mut inside = false;
    for line in pretty.lines() {
        let trimmed = line.trim_start();
        if inside {
            text.push_str(trimmed);
            if trimmed.ends_with(',') {
                text.push(' ');
            }
        } else {
            text.push_str(line);
        }
        inside = if inside {
            !trimmed.starts_with(']')
        } else {
            trimmed.ends_with(": [")
                && !trimmed.starts_with("\"cases")
                && !trimmed.starts_with("\"memory")
        };
        if !inside {
            while text.ends_with(' ') {
                text.pop();
            }
            text.push('\n');
        }
    }
    text
}
