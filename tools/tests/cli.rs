//! The command as an operator meets it on a machine without RDMA: help, mistakes, exit statuses.

use std::process::{Command, Output};

/// A port on loopback that nothing listens on: 1 is tcpmux, which nobody runs.
const NOBODY: &str = "127.0.0.1:1";

fn moonrail(line: &str) -> Output {
    // A bound for every call: a command that hangs must fail the test, not stop the test run.
    let mut command = Command::new("timeout");
    command.args(["-k", "2", "60", env!("CARGO_BIN_EXE_moonrail")]).args(line.split_whitespace());
    for (key, _) in std::env::vars() {
        if key.starts_with("MC_") || key.starts_with("MOONRAIL_") {
            command.env_remove(key);
        }
    }
    command.output().expect("timeout and moonrail run")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn status(output: &Output) -> i32 {
    output.status.code().unwrap_or(-1)
}

#[test]
fn help_says_what_each_command_does_and_how_it_ends() {
    for (line, words) in [
        ("--help", ["topology", "serve", "bench", "Exit status"]),
        ("nics --help", ["--json", "--watch", "Exit status", "NIC"]),
        ("serve --help", ["--metadata", "--size", "--nic-priority-matrix", "Exit status"]),
        ("bench --help", ["--verify", "--block", "transfer_engine_bench", "Exit status"]),
        ("ping --help", ["--count", "--write", "Example", "Exit status"]),
        ("doctor --help", ["--size", "--json", "Examples", "Exit status"]),
        ("topology --help", ["--matrix", "--cores", "--nics", "Example"]),
        ("segments --help", ["ls", "show", "prune", "Exit status"]),
        ("segments ls --help", ["--metadata", "--no-probe", "--cluster-id", "Example"]),
        ("segments prune --help", ["--yes", "--silent", "left alone", "Example"]),
    ] {
        let output = moonrail(line);
        assert_eq!(status(&output), 0, "{line}: {}", stderr(&output));
        let text = stdout(&output);
        for word in words {
            assert!(text.contains(word), "{line} does not say {word}:\n{text}");
        }
        assert!(text.lines().all(|l| l.chars().count() <= 80), "{line} is wider than 80 columns:\n{text}");
    }
}

#[test]
fn wrong_usage_ends_with_2_and_says_what_is_right() {
    for (line, words) in [
        ("", "Usage"),
        ("launch", "launch"),
        ("bench", "SEGMENT"),
        ("bench a:1 --block 4x", "4x"),
        ("bench a:1 --block 0", "at least 1"),
        ("bench a:1 --duration 5s --iterations 3", "cannot be used with"),
        ("bench a:1 --op copy", "write"),
        ("bench a:1 --block 64KiB --stride 4KiB", "stride"),
        ("bench a:1 --timeout 1s", "5s"),
        ("bench a:1 --ask-target", "--verify"),
        ("serve --nics a --nic-priority-matrix b", "cannot be used with"),
        ("serve --name a:1 --port 2", "give one of them"),
        ("serve --size 0", "at least 1"),
        ("serve --poll sometimes", "adaptive"),
        ("serve --cores 0", "1..=64"),
    ] {
        let output = moonrail(line);
        assert_eq!(status(&output), 2, "{line}: {}", stderr(&output));
        assert!(stderr(&output).contains(words), "{line} does not say {words}:\n{}", stderr(&output));
    }
}

#[test]
fn with_mode_it_has_the_other_programs_command_line() {
    let help = moonrail("bench --mode=target --help");
    assert_eq!(status(&help), 1, "gflags ends with 1 after --help");
    for flag in [
        "mode",
        "metadata_server",
        "local_server_name",
        "segment_id",
        "protocol",
        "device_name",
        "nic_priority_matrix",
        "auto_discovery",
        "operation",
        "block_size",
        "batch_size",
        "threads",
        "buffer_size",
        "duration",
        "report_unit",
        "report_precision",
        "backend",
        "use_vram",
        "init_mem",
        "gpu_id",
    ] {
        assert!(stdout(&help).contains(&format!("    -{flag} (")), "{flag}");
    }
    for (line, words) in [
        ("bench --mode=target --bogus=1", "ERROR: unknown command line flag 'bogus'"),
        ("bench --mode=target --threads=x", "ERROR: illegal value 'x' specified for int32 flag 'threads'"),
        ("bench --mode=target --block_size", "ERROR: flag '--block_size' is missing its argument"),
        ("bench -mode=sideways", "Unsupported mode: must be 'initiator' or 'target'"),
        ("bench --mode initiator -operation=copy", "Unsupported operation: must be 'read' or 'write'"),
    ] {
        let output = moonrail(line);
        assert_eq!(status(&output), 1, "{line}");
        assert!(stderr(&output).contains(words), "{line} does not say {words}:\n{}", stderr(&output));
    }
}

#[test]
fn under_the_other_programs_name_it_is_that_program() {
    let folder = std::env::temp_dir().join(format!("moonrail-cli-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a temporary folder");
    let link = folder.join("transfer_engine_bench");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_moonrail"), &link).expect("a link");
    let output = Command::new(&link).args(["--version", "--undefok=x"]).output().expect("it runs");
    std::fs::remove_dir_all(&folder).expect("clean");
    assert!(output.status.success());
    assert!(stdout(&output).starts_with("moonrail "));
}

/// Whether this machine has an RDMA device: then the tests below have nothing to say here.
fn has_rdma() -> bool {
    std::fs::read_dir("/sys/class/infiniband").is_ok_and(|mut devices| devices.next().is_some())
}

#[test]
fn without_an_rdma_nic_nics_says_what_is_missing_and_what_to_do() {
    if has_rdma() {
        return;
    }
    let output = moonrail("nics");
    assert_eq!(status(&output), 1, "{}", stdout(&output));
    let text = stderr(&output);
    let missing = ["no RDMA device", "libibverbs"].iter().any(|words| text.contains(words));
    assert!(text.starts_with("error: ") && missing && text.contains("\n next: "), "{text}");
    let json = moonrail("nics --json");
    assert_eq!(status(&json), 1);
    assert!(stdout(&json).contains("\"devices\":[]") && stdout(&json).contains("\"problem\""), "{}", stdout(&json));
}

#[test]
fn with_rdma_only_and_no_nic_nothing_is_served_and_the_reason_is_told() {
    if has_rdma() {
        return;
    }
    for line in [
        "serve --name 127.0.0.1 --size 1MiB --fabrics rdma".to_owned(),
        "serve --name 127.0.0.1 --size 1MiB --require rdma".to_owned(),
        format!("bench {NOBODY} --name 127.0.0.1 --iterations 1 --fabrics rdma"),
        format!("bench {NOBODY} --name 127.0.0.1 --iterations 1"),
        format!("bench --mode=initiator --metadata_server=P2PHANDSHAKE --segment_id={NOBODY} --device_name=mlx5_9"),
    ] {
        let output = moonrail(&line);
        assert_eq!(status(&output), 1, "{line}: {}", stderr(&output));
        let text = stderr(&output);
        assert!(text.contains("error: ") && !text.contains("panicked"), "{line}: {text}");
    }
}
