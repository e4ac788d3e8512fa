//! The figures over the number of volumes: a table, JSON and a picture.

use std::fmt::{self, Write as _};
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::spread::{Spread, round};
use crate::world::{Asked, Life};

const MIB: f64 = 1_048_576.0;

/// What was measured with so many volumes.
pub(crate) struct Point {
    pub(crate) volumes: usize,
    /// How long each of the volumes before took, several at a time.
    pub(crate) filling: Duration,
    /// In a second in which nobody wants anything.
    pub(crate) idle: Asked,
    /// For one volume's life.
    pub(crate) asked: Asked,
    pub(crate) lives: Vec<Life>,
    /// Bytes of memory.
    pub(crate) controller: f64,
    pub(crate) agent: f64,
}

/// A figure that is drawn, and its unit.
type Figure = (&'static str, fn(&Point) -> f64);

const FIGURES: [Figure; 9] = [
    ("CreateVolume, ms", |point| point.median(|life| life.create)),
    ("ControllerPublish, ms", |point| {
        point.median(|life| life.publish)
    }),
    ("ControllerUnpublish, ms", |point| {
        point.median(|life| life.unpublish)
    }),
    ("DeleteVolume, ms", |point| point.median(|life| life.delete)),
    ("requests for one life", |point| point.asked.requests),
    ("events for one life", |point| point.asked.events),
    ("requests/s when idle", |point| point.idle.requests),
    ("controller, MiB", |point| point.controller / MIB),
    ("agent, MiB", |point| point.agent / MIB),
];

impl Point {
    fn spread(&self, call: fn(&Life) -> Duration) -> Option<Spread> {
        Spread::of(self.lives.iter().map(|life| call(life).as_secs_f64() * 1e3))
    }

    fn median(&self, call: fn(&Life) -> Duration) -> f64 {
        self.spread(call).map_or(0.0, |spread| spread.median)
    }

    fn json(&self) -> Value {
        let spread = |call| Spread::json(self.spread(call));
        json!({
            "volumes": self.volumes,
            "ms a volume, 16 at a time": round(self.filling.as_secs_f64() * 1e3),
            "CreateVolume ms": spread(|life| life.create),
            "ControllerPublish ms": spread(|life| life.publish),
            "ControllerUnpublish ms": spread(|life| life.unpublish),
            "DeleteVolume ms": spread(|life| life.delete),
            "requests for one life": round(self.asked.requests),
            "watch events for one life": round(self.asked.events),
            "requests/s when idle": round(self.idle.requests),
            "watch events/s when idle": round(self.idle.events),
            "controller MiB": round(self.controller / MIB),
            "agent MiB": round(self.agent / MIB),
        })
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.json())
    }
}

#[derive(Default)]
pub(crate) struct Curve(Vec<Point>);

impl Curve {
    pub(crate) fn add(&mut self, point: Point) {
        self.0.push(point);
    }

    pub(crate) fn table(&self) -> String {
        let mut table = format!("{:<26}", "volumes");
        for point in &self.0 {
            let _ = write!(table, "{:>10}", point.volumes);
        }
        table.push('\n');
        for (name, figure) in FIGURES {
            let _ = write!(table, "{name:<26}");
            for point in &self.0 {
                let _ = write!(table, "{:>10.1}", figure(point));
            }
            table.push('\n');
        }
        table
    }

    /// Writes `OUTPUT.json` and `OUTPUT.svg`.
    pub(crate) fn write(&self, output: &Path) -> Result<()> {
        let points: Vec<Value> = self.0.iter().map(Point::json).collect();
        let mut text = String::from("[\n");
        for (index, point) in points.iter().enumerate() {
            let comma = if index + 1 < points.len() { "," } else { "" };
            let _ = writeln!(text, "  {point}{comma}");
        }
        text.push_str("]\n");
        for (extension, text) in [("json", text), ("svg", self.draw())] {
            let path = output.with_extension(extension);
            fs::write(&path, text).with_context(|| path.display().to_string())?;
        }
        Ok(())
    }

    /// A small picture for each figure, three in a row; the number of volumes grows tenfold at each third.
    fn draw(&self) -> String {
        const WIDTH: f64 = 240.0;
        const HEIGHT: f64 = 130.0;
        const LEFT: f64 = 46.0;
        const TOP: f64 = 30.0;
        let most = self.0.iter().map(|point| point.volumes).max().unwrap_or(1);
        let decades = (most.max(10) as f64).log10();
        let mut body = String::new();
        for (index, (name, figure)) in FIGURES.into_iter().enumerate() {
            let (column, row) = ((index % 3) as f64, (index / 3) as f64);
            let (left, top) = (column * WIDTH + LEFT, row * HEIGHT + TOP);
            let (width, height) = (WIDTH - LEFT - 24.0, HEIGHT - TOP - 26.0);
            let highest = self.0.iter().map(figure).fold(f64::MIN_POSITIVE, f64::max);
            let _ = writeln!(
                body,
                r##"<text x="{left:.0}" y="{:.0}" font-weight="bold">{name}</text><path d="M{left:.0} {top:.0}v{height:.0}h{width:.0}" fill="none" stroke="#adb5bd"/><text x="{:.0}" y="{:.0}" text-anchor="end">{highest:.1}</text>"##,
                top - 8.0,
                left - 4.0,
                top + 8.0,
            );
            let mut line = String::new();
            for point in &self.0 {
                let x = left + width * (point.volumes.max(1) as f64).log10() / decades;
                let y = top + height * (1.0 - figure(point) / highest);
                let _ = write!(line, "{x:.1},{y:.1} ");
                let _ = writeln!(
                    body,
                    r##"<circle cx="{x:.1}" cy="{y:.1}" r="3" fill="#0b7285"/><text x="{x:.0}" y="{:.0}" text-anchor="middle" fill="#666">{}</text>"##,
                    top + height + 13.0,
                    point.volumes,
                );
            }
            let _ = writeln!(
                body,
                r##"<polyline points="{}" fill="none" stroke="#0b7285"/>"##,
                line.trim()
            );
        }
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"720\" height=\"{:.0}\" font-family=\"sans-serif\" font-size=\"10\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n",
            3.0 * HEIGHT
        )
    }
}
