//! Bars with whiskers, as SVG, with nothing but text.

use std::fmt::Write as _;

use super::spread::Spread;

const WIDTH: f64 = 720.0;
const LABEL: f64 = 130.0;
const BAR: f64 = 16.0;
const GAP: f64 = 30.0;

/// The servers' figures in one case.
pub(crate) struct Group {
    pub(crate) title: String,
    pub(crate) unit: &'static str,
    pub(crate) bars: Vec<(String, Spread)>,
}

pub(crate) fn draw(groups: &[Group]) -> String {
    let mut body = String::new();
    let mut y = GAP;
    for group in groups {
        let most = group
            .bars
            .iter()
            .map(|(_, spread)| spread.most)
            .fold(0.0, f64::max);
        let scale = (WIDTH - LABEL - 110.0) / most.max(f64::MIN_POSITIVE);
        let _ = writeln!(
            body,
            r#"<text x="8" y="{y:.0}" font-weight="bold">{}: server's processor time, {}</text>"#,
            group.title, group.unit
        );
        y += 8.0;
        for (server, spread) in &group.bars {
            let colour = match server.as_str() {
                "hawser" => "#0b7285",
                "floor" => "#adb5bd",
                plain if plain.ends_with("plain") => "#e9c46a",
                _ => "#e76f51",
            };
            let x = |value: f64| LABEL + value * scale;
            let (middle, text) = (y + BAR / 2.0, y + BAR - 4.0);
            let _ = writeln!(
                body,
                concat!(
                    r#"<text x="{:.0}" y="{:.0}" text-anchor="end">{}</text>"#,
                    r#"<rect x="{:.0}" y="{:.0}" width="{:.1}" height="{:.0}" fill="{}"/>"#,
                    r##"<path d="M{:.1} {:.1}H{:.1}" stroke="#222"/>"##,
                    r#"<text x="{:.1}" y="{:.0}">{:.2}</text>"#
                ),
                LABEL - 6.0,
                text,
                server,
                LABEL,
                y,
                spread.median * scale,
                BAR - 3.0,
                colour,
                x(spread.least),
                middle - 1.5,
                x(spread.most),
                x(spread.most) + 6.0,
                text,
                spread.median
            );
            y += BAR;
        }
        y += GAP;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{y:.0}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
    )
}
