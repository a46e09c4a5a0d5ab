//! `cargo xtask docs`: docs/ as a book of HTML pages.
//!
//! mdBook is a program, so it is built once, by its own lock file, into a cache: unoptimized, which takes a minute less than the
//! book ever will.

use std::path::PathBuf;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::process::{Bounded, Ending};
use crate::workspace::{self, cargo};

/// Another version is built aside, into a folder of its own.
const VERSION: &str = "0.5.4";
/// About 100 crates.
const INSTALL: Duration = Duration::from_secs(1200);
const BUILD: Duration = Duration::from_secs(60);

/// Builds the book and says where it is.
pub(crate) fn run() -> Result<()> {
    super::check(&workspace::root())?;
    println!("docs: {}", build()?.display());
    Ok(())
}

/// Builds the book; returns its first page.
pub(crate) fn build() -> Result<PathBuf> {
    let root = workspace::root();
    let book = workspace::target().join("book");
    let mdbook = Bounded::new(mdbook()?, BUILD).arg("build").arg(root.join(super::DOCS)).arg("--dest-dir").arg(&book);
    let (ending, said) = mdbook.ending()?;
    // What it only warns of is wrong too.
    if ending != Ending::Success || said.contains("WARN") {
        return Err(Error::new(format!("mdbook build: {}", said.trim()), "mend the page it names"));
    }
    Ok(book.join("index.html"))
}

/// The program, built if it is not there.
fn mdbook() -> Result<PathBuf> {
    let folder = workspace::cache("moonrail-mdbook")?.join(VERSION);
    let program = folder.join("bin/mdbook");
    if !program.exists() {
        println!("docs: building mdBook {VERSION} into {}", folder.display());
        let install = cargo(INSTALL).args([
            "install",
            "mdbook",
            "--version",
            VERSION,
            "--locked",
            "--no-default-features",
            "--debug",
        ]);
        // Cargo puts the program there when it is whole.
        install.arg("--root").arg(&folder).run().map_err(|e| {
            Error::new(format!("mdBook cannot be installed: {e}"), "it comes from crates.io: check the network")
        })?;
    }
    Ok(program)
}
