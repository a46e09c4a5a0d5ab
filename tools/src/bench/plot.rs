//! Throughput and latency over the block size: as text, and as SVG. Lines are told apart without colour.

use std::fmt::Write as _;

use super::load::name;
use super::report::Run;
use crate::units;

/// Where a value stands between two ends, 0 to 1.
#[derive(Clone, Copy, Debug)]
enum Scale {
    Linear { top: f64 },
    Log { bottom: f64, top: f64 },
}

impl Scale {
    /// From 0 to a round number.
    fn linear(values: impl Iterator<Item = f64>) -> Self {
        let most = values.fold(0.0, f64::max).max(1.0);
        let step = step(most / 4.0);
        Self::Linear { top: (most / step).ceil() * step }
    }

    /// Between powers of 10 around the values.
    fn log(values: impl Iterator<Item = f64> + Clone) -> Self {
        let least = values.clone().fold(f64::INFINITY, f64::min).max(1.0);
        let most = values.fold(1.0, f64::max);
        let bottom = 10f64.powf(least.min(most).log10().floor());
        let top = 10f64.powf(most.log10().ceil()).max(bottom * 10.0);
        Self::Log { bottom, top }
    }

    fn place(self, value: f64) -> f64 {
        match self {
            Self::Linear { top } => (value / top).clamp(0.0, 1.0),
            Self::Log { bottom, top } => {
                ((value.max(bottom) / bottom).log10() / (top / bottom).log10()).clamp(0.0, 1.0)
            }
        }
    }

    fn ticks(self) -> Vec<f64> {
        match self {
            Self::Linear { top } => {
                let step = step(top / 4.0);
                let mut ticks: Vec<f64> = (0..=10).map(|n| f64::from(n) * step).collect();
                ticks.retain(|tick| *tick <= top * 1.001);
                ticks
            }
            Self::Log { bottom, top } => {
                let decades = (top / bottom).log10().round() as i32;
                let within: &[f64] = if decades <= 2 { &[1.0, 2.0, 5.0] } else { &[1.0] };
                let all = (0..=decades).flat_map(|n| within.iter().map(move |k| bottom * 10f64.powi(n) * k));
                all.filter(|tick| *tick <= top * 1.001).collect()
            }
        }
    }
}

/// The next of 1, 2, 5, 10, … that is not smaller.
fn step(least: f64) -> f64 {
    let decade = 10f64.powf(least.max(1e-9).log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|k| k * decade).find(|step| *step >= least * 0.999).unwrap_or(least)
}

/// Block, bytes a second, p50 and p99 in nanoseconds.
type Point = (u64, f64, f64, f64);

/// Measurements that differ in nothing but the block size.
struct Series {
    label: String,
    points: Vec<Point>,
}

fn series(runs: &[Run]) -> Vec<Series> {
    let mut all: Vec<Series> = Vec::new();
    for Run { plan, outcome } in runs.iter().filter(|run| run.outcome.batches > 0) {
        let layout = plan.layout;
        let s = |n: u64| if n == 1 { "" } else { "s" };
        let label =
            format!("{}, batch of {}, {} thread{}", name(plan.op), layout.batch, layout.threads, s(layout.threads));
        let rate = outcome.bytes as f64 / outcome.elapsed.as_secs_f64().max(1e-9);
        let at = |quantile| outcome.latency.value_at_quantile(quantile) as f64;
        let point = (layout.block, rate, at(0.5), at(0.99));
        match all.iter_mut().find(|series| series.label == label) {
            Some(series) => series.points.push(point),
            None => all.push(Series { label, points: vec![point] }),
        }
    }
    for series in &mut all {
        series.points.sort_by_key(|point| point.0);
    }
    all
}

/// One of the two pictures: what of a point it shows, and how.
struct Panel {
    title: &'static str,
    scale: Scale,
    tick: fn(f64) -> String,
    /// One line per series, or two: the second is the 99th percentile.
    values: &'static [fn(&Point) -> f64],
}

fn panels(all: &[Series]) -> [Panel; 2] {
    let points = || all.iter().flat_map(|series| &series.points);
    [
        Panel {
            title: "throughput, bytes per second",
            scale: Scale::linear(points().map(|point| point.1)),
            tick: |value| format!("{}B/s", units::short(value)),
            values: &[|point| point.1],
        },
        Panel {
            title: "latency of a batch",
            scale: Scale::log(points().flat_map(|point| [point.2, point.3])),
            tick: |value| units::short_span(value as u64),
            values: &[|point| point.2, |point| point.3],
        },
    ]
}

/// The sizes measured, each once.
fn blocks(all: &[Series]) -> Vec<u64> {
    let mut blocks: Vec<u64> = all.iter().flat_map(|series| &series.points).map(|point| point.0).collect();
    blocks.sort_unstable();
    blocks.dedup();
    blocks
}

/// Place of a block on the axis, 0 to 1: logarithmic, one size alone in the middle.
fn across(block: u64, blocks: &[u64]) -> f64 {
    let log = |n: u64| (n as f64).log2();
    match (blocks.first(), blocks.last()) {
        (Some(&first), Some(&last)) if first < last => (log(block) - log(first)) / (log(last) - log(first)),
        _ => 0.5,
    }
}

/// Sizes that get a label, so that labels do not touch: `room` of them fit beside each other.
fn labelled(blocks: &[u64], room: usize) -> impl Iterator<Item = u64> + '_ {
    let every = blocks.len().div_ceil(room.max(1)).max(1);
    blocks.iter().copied().step_by(every)
}

const COLUMNS: usize = 66;
const ROWS: usize = 12;
const MARGIN: usize = 10;

/// Both pictures in 80 columns. A series is a letter; its 99th percentile is the capital.
pub fn text(runs: &[Run]) -> String {
    let all = series(runs);
    let mut text = String::new();
    if all.is_empty() {
        return text;
    }
    let blocks = blocks(&all);
    let letter = |at: usize, which: usize| {
        let letter = (b'a' + (at % 26) as u8) as char;
        if which == 0 { letter } else { letter.to_ascii_uppercase() }
    };
    for panel in panels(&all) {
        let mut grid = vec![[' '; COLUMNS]; ROWS];
        let row = |value: f64| ROWS - 1 - (panel.scale.place(value) * (ROWS - 1) as f64).round() as usize;
        for (which, value) in panel.values.iter().enumerate().rev() {
            for (at, series) in all.iter().enumerate() {
                for point in &series.points {
                    let column = (across(point.0, &blocks) * (COLUMNS - 1) as f64).round() as usize;
                    let cell = &mut grid[row(value(point))][column];
                    let own = letter(at, which);
                    *cell = if matches!(*cell, ' ') || *cell == own { own } else { '*' };
                }
            }
        }
        let mut labels = vec![String::new(); ROWS];
        for tick in panel.scale.ticks() {
            labels[row(tick)] = (panel.tick)(tick);
        }
        let _ = writeln!(text, "{}", panel.title);
        for (label, line) in labels.iter().zip(&grid) {
            let bar = if label.is_empty() { '|' } else { '+' };
            let line: String = line.iter().collect();
            let _ = writeln!(text, "{label:>MARGIN$} {bar}{}", line.trim_end());
        }
        let _ = writeln!(text, "{:>MARGIN$} +{}", "", "-".repeat(COLUMNS));
        let mut axis = vec![' '; MARGIN + 2 + COLUMNS];
        for block in labelled(&blocks, 6) {
            let label = units::size(block);
            let middle = MARGIN + 2 + (across(block, &blocks) * (COLUMNS - 1) as f64).round() as usize;
            let from = middle.saturating_sub(label.len() / 2).min(axis.len() - label.len());
            axis.splice(from..from + label.len(), label.chars());
        }
        let _ = writeln!(text, "{}\n", axis.into_iter().collect::<String>().trim_end());
    }
    let _ = writeln!(text, "small letters: throughput, p50 of the latency; capitals: its p99; *: several");
    for (at, series) in all.iter().enumerate() {
        let _ = writeln!(text, "  {}  {}", letter(at, 0), series.label);
    }
    text
}

const WIDTH: f64 = 860.0;
const LEFT: f64 = 90.0;
const PLOT_WIDTH: f64 = WIDTH - LEFT - 30.0;
const PLOT_HEIGHT: f64 = 260.0;
const PANEL: f64 = PLOT_HEIGHT + 90.0;
/// Dark enough for white paper, and of different greys.
const COLOURS: [&str; 6] = ["#000000", "#0b5fa5", "#a32020", "#1b7a3d", "#6a3d9a", "#8a5a00"];
const DASHES: [&str; 4] = ["", "8 4", "2 3", "10 3 2 3"];

/// Both pictures as an SVG document, with a title.
pub fn svg(runs: &[Run], title: &str) -> String {
    let all = series(runs);
    let blocks = blocks(&all);
    let height = 50.0 + 2.0 * PANEL + 22.0 * all.len() as f64 + 40.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let _ = writeln!(svg, "<text x=\"{LEFT}\" y=\"26\" font-size=\"16\">{}</text>", escaped(title));
    for (at, panel) in panels(&all).iter().enumerate() {
        panel_svg(&mut svg, panel, &all, &blocks, 60.0 + at as f64 * PANEL);
    }
    let top = 50.0 + 2.0 * PANEL;
    for (at, series) in all.iter().enumerate() {
        let y = top + 22.0 * at as f64;
        line_svg(&mut svg, &[(LEFT, y), (LEFT + 25.0, y), (LEFT + 50.0, y)], at, 0);
        let _ = writeln!(svg, "<text x=\"{}\" y=\"{}\">{}</text>", LEFT + 62.0, y + 4.0, escaped(&series.label));
    }
    let _ = writeln!(
        svg,
        "<text x=\"{LEFT}\" y=\"{}\">full marks: throughput, and median of the latency; hollow marks: 99th percentile</text>",
        top + 22.0 * all.len() as f64 + 8.0
    );
    svg.push_str("</svg>\n");
    svg
}

fn panel_svg(svg: &mut String, panel: &Panel, all: &[Series], blocks: &[u64], top: f64) {
    let x = |block| LEFT + 12.0 + across(block, blocks) * (PLOT_WIDTH - 24.0);
    let y = |value| top + PLOT_HEIGHT * (1.0 - panel.scale.place(value));
    let (right, bottom) = (LEFT + PLOT_WIDTH, top + PLOT_HEIGHT);
    let _ = writeln!(svg, "<text x=\"{LEFT}\" y=\"{}\" font-weight=\"bold\">{}</text>", top - 10.0, panel.title);
    for tick in panel.scale.ticks() {
        let at = y(tick);
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#dddddd\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            at + 4.0,
            (panel.tick)(tick)
        );
    }
    for block in labelled(blocks, 9) {
        let at = x(block);
        let _ = writeln!(
            svg,
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{bottom}\" y2=\"{}\" stroke=\"black\"/>\
             <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            bottom + 5.0,
            bottom + 20.0,
            units::size(block)
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">block size</text>\
         <rect x=\"{LEFT}\" y=\"{top}\" width=\"{PLOT_WIDTH}\" height=\"{PLOT_HEIGHT}\" fill=\"none\" stroke=\"black\"/>",
        LEFT + PLOT_WIDTH / 2.0,
        bottom + 38.0
    );
    for (at, series) in all.iter().enumerate() {
        for (which, value) in panel.values.iter().enumerate() {
            let points: Vec<(f64, f64)> = series.points.iter().map(|point| (x(point.0), y(value(point)))).collect();
            line_svg(svg, &points, at, which);
        }
    }
}

/// A line with its marks: each series has another dash and another mark, the second line of it hollow ones.
fn line_svg(svg: &mut String, points: &[(f64, f64)], series: usize, which: usize) {
    let colour = COLOURS[series % COLOURS.len()];
    let dash = DASHES[series % DASHES.len()];
    let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let _ = writeln!(
        svg,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.6\" stroke-dasharray=\"{dash}\"/>",
        path.join(" ")
    );
    let fill = if which == 0 { colour } else { "white" };
    for (x, y) in points {
        let corners: &[(f64, f64)] = match series % 5 {
            0 => {
                let _ =
                    writeln!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{fill}\" stroke=\"{colour}\"/>");
                continue;
            }
            1 => &[(-4.0, -4.0), (4.0, -4.0), (4.0, 4.0), (-4.0, 4.0)],
            2 => &[(0.0, -5.0), (5.0, 4.0), (-5.0, 4.0)],
            3 => &[(0.0, -5.5), (5.5, 0.0), (0.0, 5.5), (-5.5, 0.0)],
            _ => &[(-5.0, -4.0), (5.0, -4.0), (0.0, 5.0)],
        };
        let corners: Vec<String> = corners.iter().map(|(dx, dy)| format!("{:.1},{:.1}", x + dx, y + dy)).collect();
        let _ = writeln!(svg, "<polygon points=\"{}\" fill=\"{fill}\" stroke=\"{colour}\"/>", corners.join(" "));
    }
}

fn escaped(text: &str) -> String {
    let plain = text.chars().filter(|c| !c.is_control()).collect::<String>();
    plain.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::run_of;
    use super::*;
    use moonrail::Op;

    fn sweep() -> Vec<Run> {
        let sizes = || (6..=24).step_by(2).map(|bit| 1u64 << bit);
        let mut runs: Vec<Run> = sizes().map(|block| run_of(Op::Write, block, 16, 1)).collect();
        runs.extend(sizes().map(|block| run_of(Op::Read, block, 32, 4)));
        runs
    }

    #[test]
    fn the_text_fits_80_columns_and_has_every_point_and_unit() {
        let text = text(&sweep());
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        for part in [
            "throughput, bytes per second",
            "latency of a batch",
            "0B/s",
            "64 B",
            "a  write, batch of 16, 1 thread\n",
            "b  read, batch of 32, 4 threads\n",
        ] {
            assert!(text.contains(part), "{part}:\n{text}");
        }
        let panel = text.split("latency").next().unwrap();
        let cells = || panel.lines().skip(1).take(ROWS).flat_map(|line| line.chars().skip(MARGIN + 2));
        for series in ['a', 'b'] {
            assert_eq!(cells().filter(|c| *c == series || *c == '*').count(), 10, "{series}:\n{text}");
        }
        assert!(super::text(&[]).is_empty());
        assert!(super::text(&sweep()[..1]).contains('a'), "one point is a plot too");
    }

    #[test]
    fn the_svg_is_well_formed_and_stays_inside() {
        let svg = svg(&sweep(), "a <b> & \"c\"");
        assert!(svg.contains("a &lt;b&gt; &amp; &quot;c&quot;") && svg.ends_with("</svg>\n"));
        let opened = svg.matches('<').count() - svg.matches("</").count() - svg.matches("/>").count();
        assert_eq!(opened, svg.matches("</").count(), "every tag is closed");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        for pair in svg.split("points=\"").skip(1).flat_map(|rest| rest.split('"').next().unwrap().split(' ')) {
            let (x, y) = pair.split_once(',').unwrap();
            let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
            assert!((0.0..=WIDTH).contains(&x) && (0.0..=2000.0).contains(&y), "{pair}");
        }
    }

    #[test]
    fn scales_hold_their_values_and_have_round_ticks() {
        let linear = Scale::linear([3.7e9, 1.0].into_iter());
        assert_eq!(linear.ticks(), [0.0, 1e9, 2e9, 3e9, 4e9]);
        assert_eq!((linear.place(0.0), linear.place(4e9)), (0.0, 1.0));
        let log = Scale::log([1500.0, 90_000.0].into_iter());
        assert_eq!(
            log.ticks().iter().map(|t| t.round() as u64).collect::<Vec<_>>(),
            [1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000]
        );
        assert!(log.place(1000.0).abs() < 1e-9 && (log.place(100_000.0) - 1.0).abs() < 1e-9);
        let alone = Scale::log([1000.0].into_iter());
        assert!(alone.ticks().len() >= 2);
        assert!(!Scale::linear(std::iter::empty()).ticks().is_empty());
    }
}
