//! `moonrail doctor`: everything that can be wrong with a node before it is started, and with its way to a peer.
//!
//! Checks run in the order in which things depend on each other, so the first failure is the cause and what stands below
//! it may only follow from it. [`system`], [`own`], [`store`], [`devices`], [`peer`] look, [`neighbours`] at who answers ARP, [`published`] at what a peer says of
//! itself; [`finding`] is what they say.

pub mod devices;
pub mod finding;
pub mod neighbours;
pub mod own;
pub mod peer;
pub mod published;
#[cfg(test)]
mod roots;
pub mod store;
pub mod system;

use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::path::Path;
use std::process::ExitCode;

use moonrail::Fabric;
use moonrail::config::Resolved;
use moonrail_control::metadata::PriorityMatrix;
use serde_json::json;

use crate::cli::{DoctorArgs, NodeArgs};
use crate::failure::{Failure, Result};
use crate::node;
use crate::say;
use crate::table::{WIDTH, wrap};
use finding::{Finding, Verdict};

/// Exit status when the worst is a warning; a failure is 1, wrong usage 2.
const WARNED: u8 = 3;

/// One group of the report.
struct Group {
    title: &'static str,
    findings: Vec<Finding>,
}

/// Runs the subcommand.
pub fn run(args: &DoctorArgs) -> Result<ExitCode> {
    let resolved = node::builder(&args.node)?.resolved().map_err(|e| Failure::told(&e))?;
    let groups = look(args, &resolved)?;
    let all: Vec<&Finding> = groups.iter().flat_map(|group| &group.findings).collect();
    let worst = all.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Skip);
    if args.json {
        let checks: Vec<_> = all.iter().map(|finding| finding.json()).collect();
        say::line(format!("{:#}", json!({ "worst": worst.word(), "checks": checks })));
    } else {
        let colour =
            std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        say::line(text(&groups, colour).trim_end());
    }
    Ok(match worst {
        Verdict::Fail => ExitCode::from(1),
        Verdict::Warn => ExitCode::from(WARNED),
        Verdict::Pass | Verdict::Skip => ExitCode::SUCCESS,
    })
}

fn look(args: &DoctorArgs, resolved: &Resolved) -> Result<Vec<Group>> {
    let (proc, sys) = (Path::new("/proc"), Path::new("/sys"));
    let env = |name: &str| std::env::var(name).ok();
    let named = |fabric| resolved.fabrics.as_ref().is_some_and(|all| all.contains(&fabric));
    let wants = |fabric| named(fabric) || resolved.policy.require == Some(fabric);
    let only_others = resolved.fabrics.is_some() && !named(Fabric::Rdma);
    let names = named_devices(&args.node)?;
    // The devices take a second, the store as long as it does not answer: side by side.
    let (devices, metadata) = std::thread::scope(|scope| {
        let metadata = scope.spawn(|| store::all(resolved, &env));
        let devices = if only_others {
            let why = format!("not used: --fabrics leaves {} out", Fabric::Rdma);
            devices::Found { findings: vec![Finding::skip("RDMA devices", why)], ..devices::Found::default() }
        } else {
            let asked = devices::Asked { resolved, names: &names, required: wants(Fabric::Rdma), bytes: args.size };
            devices::all(&asked, sys)
        };
        let metadata = metadata.join().unwrap_or_else(|_| {
            vec![Finding::fail("metadata", "the check itself failed", "report it, with the lines above")]
        });
        (devices, metadata)
    });
    let mut rdma = devices.findings;
    rdma.extend(neighbours::strict(&devices.interfaces, proc));
    rdma.push(system::kernel_log(proc, &devices.usable));
    let mut groups = vec![
        Group {
            title: "system",
            findings: vec![
                own::environment(resolved),
                system::memory(proc, sys, args.size),
                system::memlock(proc, args.size, devices.usable.len()),
                system::files(proc),
                system::fork(proc),
                system::ptrace(proc, wants(Fabric::Shm)),
            ],
        },
        Group { title: "this node", findings: vec![own::address(resolved), own::port(resolved)] },
        Group { title: "RDMA", findings: rdma },
        Group { title: "metadata", findings: metadata },
    ];
    if let Some(peer) = &args.peer {
        let broken = groups.iter().flat_map(|group| &group.findings).find(|f| f.verdict == Verdict::Fail);
        let findings = match broken {
            Some(first) => vec![Finding::skip("peer", format!("not asked before {:?} above is mended", first.check))],
            // Its own name, so that it is not taken for the node that is looked at, and never published for long.
            None => peer::all(peer, resolved, visitor(&args.node)?),
        };
        groups.push(Group { title: "peer", findings });
    }
    Ok(groups)
}

/// An engine with the node's options, but for its name and port: the node itself may be running.
///
/// # Errors
/// Options that contradict each other.
pub fn visitor(args: &NodeArgs) -> Result<moonrail::EngineBuilder> {
    let mut args = args.clone();
    if args.metadata == "P2PHANDSHAKE" {
        // The name is an address; without a port a free one is drawn.
        args.name =
            args.name.map(|name| moonrail_control::names::HostPort::parse(&name).map_or(name, |place| place.host));
    } else {
        args.name = Some(format!("moonrail-visitor-{}-{}", node::host_name(), std::process::id()));
    }
    args.port = None;
    node::builder(&args)
}

/// The devices that the options name; none: any.
fn named_devices(args: &NodeArgs) -> Result<Vec<String>> {
    let Some(path) = &args.nic_priority_matrix else {
        let auto = args.nics == ["auto"];
        return Ok(if auto { Vec::new() } else { args.nics.clone() });
    };
    let refused = |why: String| {
        Failure::usage(format!("{}: {why}", path.display()), "moonrail topology --matrix prints one that is right")
    };
    let text = std::fs::read_to_string(path).map_err(|e| refused(e.to_string()))?;
    let matrix = PriorityMatrix::parse(&text).map_err(|e| refused(e.to_string()))?;
    Ok(matrix.names().into_iter().map(str::to_owned).collect())
}

fn text(groups: &[Group], colour: bool) -> String {
    let mut text = String::new();
    for group in groups {
        let _ = writeln!(text, "{}", group.title);
        for finding in &group.findings {
            let verdict = finding.verdict;
            let word = if colour {
                format!("{}{}\x1b[0m", verdict.colour(), verdict.word())
            } else {
                verdict.word().to_owned()
            };
            let subject = finding.subject.as_ref().map(|subject| format!(" {subject}")).unwrap_or_default();
            let said = format!("{}{subject}: {}", finding.check, finding.evidence);
            paragraph(&mut text, &format!("  {word}  "), 8, &said);
            if let (Some(next), Verdict::Warn | Verdict::Fail) = (&finding.next, verdict) {
                paragraph(&mut text, "        -> ", 11, next);
            }
        }
    }
    let count = |verdict| groups.iter().flat_map(|g| &g.findings).filter(|f| f.verdict == verdict).count();
    let first = groups.iter().flat_map(|group| &group.findings).find(|finding| finding.verdict == Verdict::Fail);
    let _ = writeln!(
        text,
        "\n{} passed, {} warnings, {} failed, {} skipped",
        count(Verdict::Pass),
        count(Verdict::Warn),
        count(Verdict::Fail),
        count(Verdict::Skip)
    );
    if let Some(first) = first {
        let subject = first.subject.as_ref().map(|subject| format!(" {subject}")).unwrap_or_default();
        paragraph(&mut text, "first cause: ", 2, &format!("{}{subject}: {}", first.check, first.evidence));
    }
    text
}

/// `words` behind `lead`, further lines indented.
fn paragraph(text: &mut String, lead: &str, indent: usize, words: &str) {
    // The longest lead, escape codes not counted.
    for (i, line) in wrap(words, WIDTH - indent.max("first cause: ".len())).iter().enumerate() {
        if i == 0 {
            let _ = writeln!(text, "{lead}{line}");
        } else {
            let _ = writeln!(text, "{}{line}", " ".repeat(indent));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_reads_well_and_ends_with_the_first_cause() {
        let groups = [
            Group {
                title: "this node",
                findings: vec![
                    Finding::pass("address", "10.0.0.1"),
                    Finding::fail("handshake port", "taken ".repeat(30), "do ".repeat(40)),
                ],
            },
            Group {
                title: "RDMA",
                findings: vec![
                    Finding::warn("MTU", "small", "larger").about("rxe0"),
                    Finding::fail("GID", "null", "set"),
                ],
            },
        ];
        let shown = text(&groups, false);
        assert!(shown.lines().all(|line| line.chars().count() <= WIDTH), "{shown}");
        assert!(
            shown.contains("1 passed, 1 warnings, 2 failed, 0 skipped\nfirst cause: handshake port: taken"),
            "{shown}"
        );
        assert!(shown.contains("  WARN  MTU rxe0: small\n        -> larger\n"), "{shown}");
        assert!(text(&groups, true).contains("\x1b[31mFAIL\x1b[0m"));
    }
}
