//! Where links lead. Nothing is fetched: only what is in the repository is looked at.

use std::path::{Component, Path, PathBuf};

use super::markdown::Page;
use super::{DOCS, SUMMARY};
use crate::error::{At, Result};

/// Links to files and headings that do not exist, and links out of the book, which its readers cannot follow.
pub(crate) fn dead(root: &Path, pages: &[Page]) -> Vec<String> {
    let mut findings = Vec::new();
    for page in pages {
        for (line, target) in page.links.iter().filter(|(_, target)| !is_elsewhere(target)) {
            let ended = follow(root, pages, page, target);
            findings.extend(ended.err().map(|why| format!("{}:{line}: [{target}] {why}", page.path.display())));
        }
    }
    findings
}

fn is_elsewhere(target: &str) -> bool {
    ["http://", "https://", "mailto:"].iter().any(|scheme| target.starts_with(scheme))
}

fn follow(root: &Path, pages: &[Page], from: &Page, target: &str) -> std::result::Result<(), String> {
    let (path, anchor) = target.split_once('#').map_or((target, None), |(path, anchor)| (path, Some(anchor)));
    let there = if path.is_empty() { from.path.clone() } else { beside(&from.path, path)? };
    if !root.join(&there).exists() {
        return Err(format!("leads to {}, which does not exist", there.display()));
    }
    if from.path.starts_with(DOCS) && !there.starts_with(DOCS) {
        return Err(format!("leads out of {DOCS}/: in the book there is nothing; name the file without a link"));
    }
    let Some(anchor) = anchor else { return Ok(()) };
    let page = pages.iter().find(|page| page.path == there);
    let page = page.ok_or_else(|| format!("{} is no page: it has no headings", there.display()))?;
    if page.anchors.iter().any(|known| known == anchor) {
        return Ok(());
    }
    Err(format!("{} has no heading #{anchor}; it has #{}", there.display(), page.anchors.join(" #")))
}

/// The path that `target` means in the page at `from`, from the top of the repository.
fn beside(from: &Path, target: &str) -> std::result::Result<PathBuf, String> {
    let mut path = from.parent().map(Path::to_path_buf).unwrap_or_default();
    for part in Path::new(target).components() {
        match part {
            Component::ParentDir if !path.pop() => return Err("leads out of the repository".to_owned()),
            Component::ParentDir | Component::CurDir => {}
            Component::Normal(name) => path.push(name),
            Component::RootDir | Component::Prefix(_) => return Err("is an absolute path".to_owned()),
        }
    }
    Ok(path)
}

/// Pages of the book that its table of contents does not have.
pub(crate) fn left_out(pages: &[Page]) -> Vec<String> {
    let Some(summary) = pages.iter().find(|page| page.path == Path::new(SUMMARY)) else {
        return vec![format!("{SUMMARY} does not exist: it is the book's table of contents")];
    };
    let listed: Vec<PathBuf> =
        summary.links.iter().filter_map(|(_, target)| beside(&summary.path, target).ok()).collect();
    let of_the_book = pages.iter().filter(|page| page.path.starts_with(DOCS) && page.path != summary.path);
    let missing = of_the_book.filter(|page| !listed.contains(&page.path));
    missing.map(|page| format!("{} is not in {SUMMARY}: nobody finds it in the book", page.path.display())).collect()
}

/// Pages that comments of the source name, and that do not exist.
pub(crate) fn named_but_missing(root: &Path, sources: &[PathBuf]) -> Result<Vec<String>> {
    let mut findings = Vec::new();
    for source in sources {
        let text = std::fs::read_to_string(source).at("read", source)?;
        for (index, line) in text.lines().enumerate().filter(|(_, line)| line.trim_start().starts_with("//")) {
            let missing = named(line).into_iter().filter(|page| !root.join(page).exists());
            let place = source.strip_prefix(root).unwrap_or(source);
            findings.extend(missing.map(|page| format!("{}:{} names {page}", place.display(), index + 1)));
        }
    }
    Ok(findings)
}

/// Every `docs/….md` of a line.
fn named(line: &str) -> Vec<&str> {
    let of_a_path = |c: char| c.is_ascii_alphanumeric() || "-_/.".contains(c);
    let words = line.split(|c| !of_a_path(c)).map(|word| word.trim_end_matches('.'));
    words
        .filter(|word| word.starts_with("docs/") && Path::new(word).extension().is_some_and(|end| end == "md"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(pages: &[(&str, &str)]) -> Vec<Page> {
        pages.iter().map(|(path, text)| Page::read(path.into(), text)).collect()
    }

    /// What is wrong with one link of docs/testing.md of this repository.
    fn of_a_link(target: &str) -> Vec<String> {
        let root = crate::workspace::root();
        let others = "# Operating\n## 2. What now?\n";
        let page = format!("# Here\n[x]({target})\n");
        dead(&root, &world(&[("docs/testing.md", page.as_str()), ("docs/operating.md", others)]))
    }

    #[test]
    fn links_that_lead_somewhere_are_fine() {
        for target in ["operating.md", "#here", "operating.md#2-what-now", "./adr/../operating.md", "https://a.b/c"] {
            assert!(of_a_link(target).is_empty(), "{target}: {:?}", of_a_link(target));
        }
    }

    #[test]
    fn links_that_lead_nowhere_are_found() {
        for (target, why) in [
            ("no-such.md", "does not exist"),
            ("operating.md#what-now", "no heading #what-now"),
            ("#there", "no heading #there"),
            ("../README.md", "leads out of docs/"),
            ("../../x", "out of the repository"),
            ("/etc/passwd", "absolute"),
            ("adr#x", "is no page"),
        ] {
            let findings = of_a_link(target);
            assert!(findings.len() == 1 && findings[0].contains(why), "{target}: {findings:?}");
            assert!(findings[0].starts_with("docs/testing.md:2: "), "{findings:?}");
        }
    }

    #[test]
    fn a_page_that_the_book_leaves_out_is_found() {
        let summary = ("docs/SUMMARY.md", "# Summary\n- [A](a.md)\n");
        let whole = world(&[summary, ("docs/a.md", "# A\n"), ("README.md", "# R\n")]);
        assert!(left_out(&whole).is_empty());
        let more = world(&[summary, ("docs/a.md", "# A\n"), ("docs/adr/b.md", "# B\n")]);
        assert_eq!(left_out(&more), ["docs/adr/b.md is not in docs/SUMMARY.md: nobody finds it in the book"]);
        assert_eq!(left_out(&[]).len(), 1, "without a table of contents");
    }

    #[test]
    fn pages_are_found_in_comments() {
        assert_eq!(
            named("/// see docs/adr/0001-packages.md, (docs/wire.md)."),
            ["docs/adr/0001-packages.md", "docs/wire.md"]
        );
        assert!(named("see docs/adr and https://docs.rs/x.md").is_empty());
    }
}
