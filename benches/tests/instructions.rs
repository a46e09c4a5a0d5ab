//! What a request over shared memory costs its caller, in instructions: exact, so that it can have a budget.
//!
//! Counted in the profile that the tests are built in; docs/performance.md has the release profile's.

use std::process::Command;

use serde_json::Value;

/// Block, batch, and the most instructions that a batch may take in the dev profile (opt-level 1): what was counted and a tenth.
/// Blocks of 64 bytes alone: how larger ones are copied depends on the processor.
const BUDGETS: [(u64, u64, f64); 2] = [(64, 1, 433.0), (64, 32, 7370.0)];

#[test]
fn a_request_over_shared_memory_stays_within_its_instructions() {
    let folder = std::env::temp_dir().join(format!("moonrail-instructions-{}", std::process::id()));
    let mut benches = Command::new(env!("CARGO_BIN_EXE_moonrail-benches"));
    let output = benches.args(["instructions", "--quick", "--out"]).arg(&folder).output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    let saved = std::fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
    let record: Value = serde_json::from_str(&std::fs::read_to_string(saved).unwrap()).unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    println!("{said}");
    let cases = record["cases"].as_array().unwrap();
    for (block, batch, budget) in BUDGETS {
        let case = cases.iter().find(|case| case["block"] == block && case["batch"] == batch).unwrap();
        let counted = case["instructions_per_batch"].as_f64().unwrap();
        // Far below it, the budget would let a regression pass: then it is to be lowered.
        assert!(counted <= budget, "{batch} x {block} bytes took {counted} instructions, of {budget} allowed");
        assert!(
            counted >= 0.8 * budget,
            "{batch} x {block} bytes took {counted} instructions: lower the budget of {budget}"
        );
    }
}
