//! From a seed that breaks a promise to the few acts that do.

use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::{Broken, Plan, Story, run};

/// Cutting down ends after this, whatever is left.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a plan comes to; a panic of the engine is a broken promise too.
pub(crate) fn attempt(plan: &Plan) -> Result<Story, Broken> {
    catch_unwind(AssertUnwindSafe(|| run(plan))).unwrap_or_else(|cause| {
        let text = cause.downcast_ref::<String>().cloned();
        let text = text.or_else(|| cause.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(Broken { rule: "nothing panics", seen: text.unwrap_or_default() })
    })
}

/// Leaves acts out, in ever smaller groups, as long as the same promise stays broken. Returns the numbers of those left.
pub(crate) fn shrink(plan: &Plan, rule: &str) -> Vec<usize> {
    let began = Instant::now();
    let mut kept: Vec<usize> = (0..plan.steps.len()).collect();
    let mut group = kept.len().div_ceil(2);
    while group > 0 {
        let (mut at, before) = (0, kept.len());
        while at < kept.len() && began.elapsed() < PATIENCE {
            let fewer: Vec<usize> = kept[..at].iter().chain(kept.iter().skip(at + group)).copied().collect();
            match attempt(&plan.only(&fewer)) {
                Err(broken) if broken.rule == rule => kept = fewer,
                _ => at += group,
            }
        }
        // The last acts may need another round: what one left out was needed for may have gone since.
        group = if group == 1 && kept.len() < before { 1 } else { group / 2 };
        if began.elapsed() >= PATIENCE {
            break;
        }
    }
    kept
}

/// What to show of a seed that breaks a promise.
pub(crate) fn report(plan: &Plan, broken: &Broken) -> String {
    let kept = shrink(plan, broken.rule);
    let small = plan.only(&kept);
    let seen = attempt(&small).err().map_or_else(|| broken.seen.clone(), |broken| broken.seen);
    let mut text = format!("seed {} breaks a promise: {}\n{:?}\n", plan.seed, broken.rule, plan.shape);
    let _ = writeln!(text, "the acts that do, {} of {}:", kept.len(), plan.steps.len());
    for (number, (at, act)) in kept.iter().zip(&small.steps) {
        let _ = writeln!(text, "  [{number}] {:?}: {act:?}", at.to_duration());
    }
    let numbers: Vec<String> = kept.iter().map(ToString::to_string).collect();
    let _ = writeln!(text, "{seen}");
    let _ = write!(
        text,
        "replay with: SEED={} KEEP={} cargo test -p moonrail-control --test simulation any_cluster",
        plan.seed,
        numbers.join(",")
    );
    text
}
