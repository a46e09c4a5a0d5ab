//! `cargo xtask mutants`: the engine with one rule switched off at a time. A test must notice each.
//!
//! ```text
//!  the checkout, uncommitted changes too ──(copied)──▶ target/mutants/source ──▶ every test that is to catch one passes
//!                                                        │  for each mutant: text replaced, the test built and run
//!                                                        ▼
//!                      caught (which test), caught by the time limit, SURVIVED, or no mutant at all: it does not compile
//! ```
//! The checkout itself is only read. A mutant that survives means that a checker is missing.

mod control;
mod datapath;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{At, Error, Result};
use crate::process::{Bounded, Ending, last_lines};
use crate::workspace;

/// A rule of the engine, switched off.
#[derive(Debug)]
struct Mutant {
    /// For the command line; unique.
    name: &'static str,
    /// The rule that no longer holds.
    without: &'static str,
    /// What changes in the source. Each text occurs exactly once in its file.
    edits: &'static [Edit],
    /// Who must notice.
    catcher: Catcher,
}

#[derive(Debug)]
struct Edit {
    /// From the top of the repository.
    file: &'static str,
    from: &'static str,
    to: &'static str,
}

/// The test that must fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Catcher {
    suite: Suite,
    /// Its whole name as the test runner prints it.
    test: &'static str,
}

/// What cargo builds and runs as one program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Suite {
    /// The crate, which lies in the folder of the same name without `moonrail-`.
    package: &'static str,
    /// The file under `tests/`; `None`: the unit tests in `src/`.
    target: Option<&'static str>,
}

impl Suite {
    const fn unit(package: &'static str) -> Self {
        Self { package, target: None }
    }

    const fn of(package: &'static str, target: &'static str) -> Self {
        Self { package, target: Some(target) }
    }

    const fn test(self, test: &'static str) -> Catcher {
        Catcher { suite: self, test }
    }

    fn name(self) -> String {
        format!("{} {}", self.package, self.target.unwrap_or("unit tests"))
    }
}

/// Building one suite after a change of the engine; the first build compiles the dependencies too.
const BUILD_LIMIT: Duration = Duration::from_secs(1200);
/// Running it. A mutant may wait for ever.
const RUN_LIMIT: Duration = Duration::from_secs(300);
/// Memory for a program under test, in bytes: a mutant may also grow for ever.
const MEMORY_LIMIT: u64 = 8 << 30;

fn all() -> impl Iterator<Item = &'static Mutant> {
    datapath::MUTANTS.iter().chain(control::MUTANTS)
}

/// Runs the named mutants, all when none is named, and prints a table. One call at a time.
///
/// # Errors
/// When one survived, could not be made, or a test fails without any.
pub(crate) fn run(names: &[String]) -> Result<()> {
    let mutants = selected(names)?;
    let started = Instant::now();
    let nursery = Nursery::set_up()?;
    nursery.check_catchers(&mutants)?;
    let mut rows = Vec::new();
    for (at, mutant) in mutants.iter().enumerate() {
        let began = Instant::now();
        let fate = nursery.fate(mutant);
        let row = format!("{:<32} {fate} ({} s)", mutant.name, began.elapsed().as_secs());
        println!("{}/{} {row}", at + 1, mutants.len());
        if !matches!(fate, Fate::Caught(_)) {
            println!("      it is an engine without: {}", mutant.without);
        }
        rows.push((row, fate));
    }
    println!("\n=== mutants, in {} s", started.elapsed().as_secs());
    for (row, _) in &rows {
        println!("{row}");
    }
    let caught = rows.iter().filter(|(_, fate)| matches!(fate, Fate::Caught(_))).count();
    println!("{caught} of {} caught", rows.len());
    if caught == rows.len() {
        Ok(())
    } else {
        Err(Error::new(
            format!("{} mutants were not caught", rows.len() - caught),
            "add the test that notices, or mend the entry in tools/xtask/src/mutants",
        ))
    }
}

/// Prints what there is.
pub(crate) fn list() {
    let mut out = std::io::stdout().lock();
    for mutant in all() {
        // Whoever reads may have seen enough.
        if writeln!(out, "{:<32} without: {}", mutant.name, mutant.without).is_err() {
            return;
        }
    }
}

fn selected(names: &[String]) -> Result<Vec<&'static Mutant>> {
    if let Some(unknown) = names.iter().find(|name| all().all(|mutant| mutant.name != **name)) {
        return Err(Error::new(format!("there is no mutant called {unknown}"), "see `cargo xtask mutants --list`"));
    }
    Ok(all().filter(|mutant| names.is_empty() || names.iter().any(|name| name == mutant.name)).collect())
}

/// What became of a mutant.
#[derive(Debug)]
enum Fate {
    /// By whom.
    Caught(String),
    Survived,
    /// It could not be tried.
    Failed(Error),
}

impl std::fmt::Display for Fate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Caught(by) => write!(f, "caught by {by}"),
            Self::Survived => f.write_str("SURVIVED"),
            Self::Failed(error) => write!(f, "NOT TRIED: {error}"),
        }
    }
}

/// The copy of the source in which mutants live, with a target folder of its own.
#[derive(Debug)]
struct Nursery {
    source: PathBuf,
    target: PathBuf,
}

impl Nursery {
    fn set_up() -> Result<Self> {
        let folder = workspace::target().join("mutants");
        let nursery = Self { source: folder.join("source"), target: folder.join("target") };
        let root = workspace::root();
        // What is committed, changed or new, and not what is ignored.
        let listed = Bounded::new("git", Duration::from_secs(60))
            .in_folder(&root)
            .args(["ls-files", "--cached", "--others", "--exclude-standard", "-z"])
            .output()?;
        let files: Vec<&str> = listed.split('\0').filter(|name| root.join(name).is_file()).collect();
        for name in &files {
            nursery.take(&root, name)?;
        }
        nursery.drop_others(&files)?;
        Ok(nursery)
    }

    /// Copies a file unless it is there already: cargo builds anew what is newer than its last build.
    fn take(&self, root: &Path, name: &str) -> Result<()> {
        let (from, to) = (root.join(name), self.source.join(name));
        let bytes = std::fs::read(&from).at("read", &from)?;
        if std::fs::read(&to).is_ok_and(|there| there == bytes) {
            return Ok(());
        }
        let folder = to.parent().unwrap_or(&self.source);
        std::fs::create_dir_all(folder).at("create", folder)?;
        std::fs::write(&to, bytes).at("write", &to)
    }

    /// Removes what an earlier copy had: cargo would find its tests.
    fn drop_others(&self, files: &[&str]) -> Result<()> {
        let mut folders = vec![self.source.clone()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).at("list", &folder)?.flatten() {
                let path = entry.path();
                let name = path.strip_prefix(&self.source).unwrap_or(&path).to_string_lossy().into_owned();
                if path.is_dir() {
                    folders.push(path);
                } else if !files.contains(&name.as_str()) {
                    std::fs::remove_file(&path).at("remove", &path)?;
                }
            }
        }
        Ok(())
    }

    fn cargo_test(&self, suite: Suite, limit: Duration) -> Bounded {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let command = workspace::by_hand(Bounded::new("prlimit", limit))
            .in_folder(&self.source)
            .env("CARGO_TARGET_DIR", &self.target)
            .env("CARGO_INCREMENTAL", "1")
            .env_remove("SEED")
            .env_remove("SEEDS")
            .env_remove("FROM")
            .arg(format!("--data={MEMORY_LIMIT}"))
            .arg(cargo)
            .args(["test", "--package", suite.package]);
        match suite.target {
            Some(target) => command.args(["--test", target]),
            None => command.arg("--lib"),
        }
    }

    fn build(&self, suite: Suite) -> Result<()> {
        match self.cargo_test(suite, BUILD_LIMIT).arg("--no-run").ending()? {
            (Ending::Success, _) => Ok(()),
            (Ending::Limit, _) => {
                Err(Error::new(format!("{} was not built within {} s", suite.name(), BUILD_LIMIT.as_secs()), ""))
            }
            (Ending::Failure, said) => Err(Error::new(
                format!("{} does not compile:\n{}", suite.name(), errors_in(&said)),
                "write the change so that the compiler takes it",
            )),
        }
    }

    fn run(&self, suite: Suite, tests: &[&str]) -> Result<(Ending, String)> {
        self.cargo_test(suite, RUN_LIMIT).args(["--", "--exact"]).args(tests).ending()
    }

    /// Without any mutant every catcher passes, or what it says of one means nothing.
    fn check_catchers(&self, mutants: &[&Mutant]) -> Result<()> {
        let mut suites: BTreeMap<Suite, Vec<&str>> = BTreeMap::new();
        for Catcher { suite, test } in mutants.iter().map(|mutant| mutant.catcher) {
            let tests = suites.entry(suite).or_default();
            if !tests.contains(&test) {
                tests.push(test);
            }
        }
        for (suite, tests) in suites {
            let began = Instant::now();
            self.build(suite)?;
            let built = began.elapsed();
            let (ending, said) = self.run(suite, &tests)?;
            let ran = passed_in(&said);
            if ending != Ending::Success || ran < tests.len() as u64 {
                return Err(Error::new(
                    format!("{} does not pass without any mutant:\n{}", suite.name(), failure_in(&said)),
                    "mend the test first, or its name in tools/xtask/src/mutants",
                ));
            }
            let took = began.elapsed();
            println!("{}: {ran} passed without mutants; built in {:.1?}, {:.1?} in all", suite.name(), built, took);
        }
        Ok(())
    }

    fn fate(&self, mutant: &Mutant) -> Fate {
        let mut before: Vec<(PathBuf, String)> = Vec::new();
        let tried = self.mutate(mutant, &mut before).and_then(|()| self.try_out(mutant.catcher));
        // The last first: two edits of one file kept two states of it.
        for (path, text) in before.into_iter().rev() {
            if let Err(error) = std::fs::write(&path, text).at("write", &path) {
                return Fate::Failed(error);
            }
        }
        tried.unwrap_or_else(Fate::Failed)
    }

    fn mutate(&self, mutant: &Mutant, before: &mut Vec<(PathBuf, String)>) -> Result<()> {
        for edit in mutant.edits {
            let path = self.source.join(edit.file);
            let text = std::fs::read_to_string(&path).at("read", &path)?;
            let mutated = replaced(&text, edit)?;
            std::fs::write(&path, mutated).at("write", &path)?;
            before.push((path, text));
        }
        Ok(())
    }

    fn try_out(&self, catcher: Catcher) -> Result<Fate> {
        self.build(catcher.suite)?;
        let (ending, said) = self.run(catcher.suite, &[catcher.test])?;
        Ok(match ending {
            Ending::Success => Fate::Survived,
            Ending::Limit => {
                Fate::Caught(format!("the limit of {} s on {}", RUN_LIMIT.as_secs(), catcher.suite.name()))
            }
            Ending::Failure => {
                let by = first_failed(&said).unwrap_or_else(|| "the end of the program".to_owned());
                Fate::Caught(format!("{by} of {}", catcher.suite.name()))
            }
        })
    }
}

/// `text` with the edit made, which must fit in exactly one place.
fn replaced(text: &str, edit: &Edit) -> Result<String> {
    match text.matches(edit.from).count() {
        1 => Ok(text.replacen(edit.from, edit.to, 1)),
        count => Err(Error::new(
            format!("the text of a mutant occurs {count} times in {}, not once: {}", edit.file, edit.from),
            "the source has changed: make tools/xtask/src/mutants follow",
        )),
    }
}

/// What the compiler had against it.
fn errors_in(said: &str) -> String {
    let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("error")).take(5).collect();
    errors.join("\n")
}

/// What the first failed test said; else how the output ends.
fn failure_in(said: &str) -> String {
    let told: Vec<&str> = said.lines().skip_while(|line| !line.starts_with("---- ")).take(12).collect();
    if told.is_empty() { last_lines(said, 12) } else { told.join("\n") }
}

/// The test that failed first, by the runner's words.
fn first_failed(said: &str) -> Option<String> {
    let failed = |line: &str| Some(line.strip_prefix("test ")?.strip_suffix(" ... FAILED")?.to_owned());
    said.lines().find_map(failed)
}

/// How many tests passed.
fn passed_in(said: &str) -> u64 {
    let count = |line: &str| line.strip_prefix("test result: ok. ")?.split(' ').next()?.parse::<u64>().ok();
    said.lines().filter_map(count).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mutant_still_fits_the_source_and_its_catcher_exists() {
        let root = workspace::root();
        let read = |name: &str| std::fs::read_to_string(root.join(name)).unwrap_or_default();
        let mut wrong = Vec::new();
        for mutant in all() {
            let fits = |edit: &Edit| replaced(&read(edit.file), edit).err();
            wrong.extend(mutant.edits.iter().filter_map(fits).map(|error| format!("{}: {error}", mutant.name)));
            if mutant.edits.iter().any(|edit| edit.from == edit.to) {
                wrong.push(format!("{}: changes nothing", mutant.name));
            }
            let Catcher { suite, test } = mutant.catcher;
            let crate_folder = match suite.package {
                "moonrail" => "runtime",
                package => package.trim_start_matches("moonrail-"),
            };
            let (mut modules, function) = match test.rsplit_once("::") {
                Some((modules, function)) => (modules.split("::").collect::<Vec<_>>(), function),
                None => (Vec::new(), test),
            };
            // `a::b::tests::it`: src/a/b.rs, src/a/b/mod.rs, or the module `tests` in a file of its own.
            let inner = modules.join("/");
            modules.pop_if(|last| *last == "tests");
            let outer = modules.join("/");
            let places = match suite.target {
                Some(target) if inner.is_empty() => vec![format!("{crate_folder}/tests/{target}.rs")],
                Some(_) => {
                    vec![format!("{crate_folder}/tests/{inner}.rs"), format!("{crate_folder}/tests/{inner}/mod.rs")]
                }
                None => [format!("{outer}.rs"), format!("{outer}/mod.rs"), format!("{inner}.rs")]
                    .map(|path| format!("{crate_folder}/src/{path}"))
                    .to_vec(),
            };
            if !places.iter().any(|place| read(place).contains(&format!("fn {function}("))) {
                wrong.push(format!("{}: no {test} in {places:?}", mutant.name));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    #[test]
    fn names_are_unique_and_known_ones_are_found() {
        let mut names: Vec<&str> = all().map(|mutant| mutant.name).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
        assert!(count >= 20);
        assert_eq!(selected(&[names[0].to_owned()]).expect("one").len(), 1);
        assert_eq!(selected(&[]).expect("all").len(), count);
        assert!(selected(&["nobody".to_owned()]).is_err());
    }

    #[test]
    fn an_edit_fits_once_or_not_at_all() {
        let edit = Edit { file: "x.rs", from: "a > b", to: "true" };
        assert_eq!(replaced("if a > b {", &edit).expect("once"), "if true {");
        assert!(replaced("if a < b {", &edit).is_err(), "gone");
        assert!(replaced("a > b || a > b", &edit).is_err(), "twice");
    }

    #[test]
    fn the_runners_words_are_understood() {
        let said = "test a ... ok\ntest b::c ... FAILED\ntest d ... FAILED\ntest result: FAILED. 1 passed; 2 failed\n";
        assert_eq!(first_failed(said).as_deref(), Some("b::c"));
        assert_eq!(passed_in(said), 0);
        assert_eq!(passed_in("test result: ok. 2 passed; 0 failed\n\ntest result: ok. 3 passed; 0 failed\n"), 5);
        assert_eq!(failure_in("x\n---- b::c stdout ----\nwrong\n"), "---- b::c stdout ----\nwrong");
        assert_eq!(failure_in("no room\n"), "no room");
        assert_eq!(errors_in("warning: x\nerror[E0308]: mismatched\n --> y\nerror: aborting\n").lines().count(), 2);
    }
}
