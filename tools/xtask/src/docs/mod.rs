//! The documentation as something that can be wrong: [`check`] is part of `cargo xtask check`, [`book`] is `cargo xtask docs`.
//!
//! [`markdown`] reads a page, [`links`] follows what it points at, [`messages`] compares quoted messages with the source,
//! [`names`] the names of tests.

pub(crate) mod book;
mod links;
mod markdown;
mod messages;
mod names;

use std::path::{Path, PathBuf};

use crate::error::{At, Error, Result};
use markdown::Page;

/// Pages beside those of [`DOCS`].
const TOP: &[&str] = &["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"];
/// What the book is made of.
const DOCS: &str = "docs";
/// The book's table of contents, in [`DOCS`].
const SUMMARY: &str = "docs/SUMMARY.md";

/// Where the Rust of the pages is compiled: as documentation tests of the crate that an embedder uses.
const TESTED_BY: &str = "runtime/src/lib.rs";

/// Links that lead nowhere, pages that the book leaves out, Rust that nothing compiles, quoted messages that no program prints, and names
/// of tests that are not there.
pub(crate) fn check(root: &Path) -> Result<()> {
    let pages = pages(root)?;
    let mut findings = links::dead(root, &pages);
    findings.extend(links::left_out(&pages));
    findings.extend(links::named_but_missing(root, &crate::check::rust_files(root)?)?);
    let tested_by = root.join(TESTED_BY);
    findings.extend(untested(&pages, &std::fs::read_to_string(&tested_by).at("read", &tested_by)?));
    findings.extend(messages::unknown(root, &pages)?);
    findings.extend(names::unknown(root, &pages)?);
    if findings.is_empty() { Ok(()) } else { Err(Error::new(findings.join("\n  "), "")) }
}

fn pages(root: &Path) -> Result<Vec<Page>> {
    let mut paths: Vec<PathBuf> = TOP.iter().map(PathBuf::from).collect();
    let mut folders = vec![PathBuf::from(DOCS)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(root.join(&folder)).at("list", &folder)?.flatten() {
            let path = folder.join(entry.file_name());
            if root.join(&path).is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                paths.push(path);
            }
        }
    }
    paths.sort();
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(root.join(&path)).at("read", &path)?;
        Ok(Page::read(path, &text))
    };
    paths.into_iter().map(read).collect()
}

/// Pages with Rust that is no documentation test.
fn untested(pages: &[Page], tested_by: &str) -> Vec<String> {
    let tested = |page: &Page| tested_by.contains(&format!("include_str!(\"../../{}\")", page.path.display()));
    let with_rust = |page: &&Page| page.blocks.iter().any(|(_, language)| language.starts_with("rust"));
    let missing = pages.iter().filter(with_rust).filter(|page| !tested(page));
    missing
        .map(|page| format!("{} has Rust that nothing compiles: include it in {TESTED_BY}", page.path.display()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rust_that_nothing_compiles_is_found() {
        let pages = [
            Page::read("README.md".into(), "```rust,no_run\nfn main() {}\n```\n"),
            Page::read("docs/a.md".into(), "```sh\n```\n"),
        ];
        assert_eq!(
            untested(&pages, ""),
            ["README.md has Rust that nothing compiles: include it in runtime/src/lib.rs"]
        );
        assert!(untested(&pages, "#[doc = include_str!(\"../../README.md\")]").is_empty());
    }

    /// The check itself, on this checkout: `cargo xtask check` runs it, and so does every test of this crate.
    #[test]
    fn this_checkout_is_as_it_should_be() {
        check(&crate::workspace::root()).unwrap_or_else(|e| panic!("{e}"));
    }
}
