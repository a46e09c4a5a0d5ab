//! Pages quote what the programs print. A quoted message that no source has would send its reader astray.

use std::path::Path;

use super::markdown::{Page, code};
use crate::error::{At, Result};

/// The heading of a column of quoted messages, and of one with names of `moonrail doctor`'s checks.
const PRINTS: &str = "It prints";
const CHECK: &str = "Check";
/// The crates whose messages those are.
const SOURCES: &[&str] = &["datapath/src", "control/src", "runtime/src", "tools/src"];
/// Shorter pieces would be found anywhere.
const PIECE: usize = 6;

/// Quoted messages and names of checks that the source does not have.
pub(crate) fn unknown(root: &Path, pages: &[Page]) -> Result<Vec<String>> {
    let mut source = String::new();
    for path in crate::check::rust_files(root)? {
        let place = path.strip_prefix(root).unwrap_or(&path);
        if SOURCES.iter().any(|folder| place.starts_with(folder)) {
            source.push_str(&as_printed(&std::fs::read_to_string(&path).at("read", &path)?));
        }
    }
    Ok(pages.iter().flat_map(|page| of_a_page(page, &source)).collect())
}

fn of_a_page(page: &Page, source: &str) -> Vec<String> {
    let (mut prints, mut check) = (None, None);
    let mut last = None;
    let mut findings = Vec::new();
    for (line, cells) in &page.rows {
        if last.replace(*line) != Some(line - 1) {
            // The first row of a table has its headings.
            let column = |name: &str| cells.iter().position(|cell| cell == name);
            (prints, check) = (column(PRINTS), column(CHECK).filter(|_| column(PRINTS).is_some()));
            continue;
        }
        let of = |column: Option<usize>| column.and_then(|n| cells.get(n)).map(|cell| code(cell)).unwrap_or_default();
        let place = |what: &str| format!("{}:{line}: no source prints {what:?}", page.path.display());
        for message in of(prints) {
            let pieces = message.split('…').map(str::trim).filter(|piece| piece.len() >= PIECE);
            findings.extend(pieces.filter(|piece| !source.contains(piece)).map(place));
        }
        let names = of(check).into_iter().filter(|name| !source.contains(&format!("\"{name}\"")));
        findings
            .extend(names.map(|name| format!("{}:{line}: moonrail doctor has no check {name:?}", page.path.display())));
    }
    findings
}

/// Source without comments, its long strings joined as the compiler joins them.
fn as_printed(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    for line in source.lines().filter(|line| !line.trim_start().starts_with("//")) {
        let continues = text.ends_with('\\');
        if continues {
            text.pop();
        } else {
            text.push('\n');
        }
        text.push_str(if continues { line.trim_start() } else { line });
    }
    text.replace("\\\"", "\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = r#"
        // A comment says that nothing else is printed.
        #[error(
            "port {port} is taken: \
             {why}; choose \"another\" one"
        )]
        const CHECK: &str = "handshake port";
"#;

    fn findings(rows: &str) -> Vec<String> {
        let page = Page::read("docs/x.md".into(), &format!("| It prints | Do | Check |\n|---|---|---|\n{rows}\n"));
        of_a_page(&page, &as_printed(SOURCE))
    }

    #[test]
    fn what_is_printed_may_be_quoted() {
        assert!(findings("| `port … is taken: …; choose \"another\" one` | | `handshake port` |").is_empty());
    }

    #[test]
    fn what_is_not_printed_may_not() {
        assert_eq!(findings("| `port … is so` | | |"), Vec::<String>::new(), "too short to tell");
        assert_eq!(findings("| `port … is not free` | | |"), ["docs/x.md:3: no source prints \"is not free\""]);
        assert_eq!(findings("| `nothing else is printed` | | |").len(), 1, "a comment prints nothing");
        assert_eq!(findings("| | | `port` |"), ["docs/x.md:3: moonrail doctor has no check \"port\""]);
    }

    #[test]
    fn other_tables_are_left_alone() {
        let page = Page::read("docs/x.md".into(), "| It says | Check |\n|---|---|\n| `no such message` | `none` |\n");
        assert!(of_a_page(&page, "").is_empty());
    }
}
