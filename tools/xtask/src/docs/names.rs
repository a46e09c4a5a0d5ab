//! Pages name the test that shows what they say. A name that no test has would be a promise that nobody holds.

use std::path::Path;

use super::markdown::{Page, code};
use crate::error::{At, Result};

/// The headings of columns with names of tests.
const COLUMNS: &[&str] = &["Shown by", "Caught by"];

/// Names of tests that no source has.
pub(crate) fn unknown(root: &Path, pages: &[Page]) -> Result<Vec<String>> {
    let mut source = String::new();
    for path in crate::check::rust_files(root)? {
        source.push_str(&std::fs::read_to_string(&path).at("read", &path)?);
    }
    Ok(pages.iter().flat_map(|page| of_a_page(page, &source)).collect())
}

fn of_a_page(page: &Page, source: &str) -> Vec<String> {
    let (mut column, mut last) = (None, None);
    let mut findings = Vec::new();
    for (line, cells) in &page.rows {
        if last.replace(*line) != Some(line - 1) {
            // The first row of a table has its headings.
            column = cells.iter().position(|cell| COLUMNS.contains(&cell.as_str()));
            continue;
        }
        let names = column.and_then(|n| cells.get(n)).map(|cell| code(cell)).unwrap_or_default();
        for name in names.iter().map(|path| path.rsplit("::").next().unwrap_or(path)) {
            let is_name = name.contains('_') && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
            if is_name && !source.contains(&format!("fn {name}(")) {
                findings.push(format!("{}:{line}: no test is called {name}", page.path.display()));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_that_is_named_has_to_be_there() {
        let text = "| Fault | Shown by |\n|---|---|\n| a_b | `x::a_thing_holds`, `tests/a_b.rs`; lab |\n| b | `no_such_test` |\n";
        let page = Page::read("docs/x.md".into(), text);
        assert_eq!(of_a_page(&page, "fn a_thing_holds() {"), ["docs/x.md:4: no test is called no_such_test"]);
    }
}
