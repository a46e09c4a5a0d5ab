//! As much of Markdown as the pages use: headings, links, tables of quoted messages. Code is told apart from text.

use std::path::PathBuf;

/// A page, taken apart.
#[derive(Debug)]
pub(crate) struct Page {
    /// From the top of the repository.
    pub(crate) path: PathBuf,
    /// What may stand behind `#` in a link to it.
    pub(crate) anchors: Vec<String>,
    /// Line and target of each link.
    pub(crate) links: Vec<(usize, String)>,
    /// Line and language of each block of code.
    pub(crate) blocks: Vec<(usize, String)>,
    /// Line and cells of each row of each table, headings included; code keeps its backticks.
    pub(crate) rows: Vec<(usize, Vec<String>)>,
}

impl Page {
    pub(crate) fn read(path: PathBuf, text: &str) -> Self {
        let mut page = Self { path, anchors: Vec::new(), links: Vec::new(), blocks: Vec::new(), rows: Vec::new() };
        let mut fence = None;
        for (number, line) in text.lines().enumerate().map(|(index, line)| (index + 1, line)) {
            let start = line.trim_start();
            let marks = start.bytes().take_while(|byte| *byte == b'`').count();
            match fence {
                Some(open) if marks >= open && start[marks..].trim().is_empty() => fence = None,
                None if marks >= 3 => {
                    fence = Some(marks);
                    page.blocks.push((number, start[marks..].trim().to_owned()));
                }
                Some(_) => {}
                None => page.line(number, line),
            }
        }
        page
    }

    fn line(&mut self, number: usize, line: &str) {
        let level = line.bytes().take_while(|byte| *byte == b'#').count();
        if (1..=6).contains(&level) && line[level..].starts_with(' ') {
            let anchor = anchor(&line[level..]);
            // The second of one name is numbered, as GitHub and mdBook do.
            let before = self.anchors.iter().filter(|other| is_nth(other, &anchor)).count();
            self.anchors.push(if before == 0 { anchor } else { format!("{anchor}-{before}") });
        }
        if line.starts_with('|') {
            self.rows.push((number, cells(line)));
        }
        // A link may break within its text, `[many words\nmore](target)`; its target never does.
        self.links.extend(targets(&without_code(line)).into_iter().map(|target| (number, target)));
    }
}

/// Whether it is this anchor, with a number of its own or without.
fn is_nth(other: &str, anchor: &str) -> bool {
    let number = other.strip_prefix(anchor).filter(|rest| rest.is_empty() || rest.starts_with('-'));
    number.is_some_and(|rest| rest.trim_start_matches('-').bytes().all(|byte| byte.is_ascii_digit()))
}

/// What GitHub and mdBook make of a heading: letters, digits, `-` and `_` stay, blanks become `-`, the rest goes.
pub(crate) fn anchor(heading: &str) -> String {
    let kept = heading.trim().chars().filter_map(|c| match c {
        c if c.is_alphanumeric() || c == '-' || c == '_' => Some(c.to_lowercase().to_string()),
        c if c.is_whitespace() => Some("-".to_owned()),
        _ => None,
    });
    kept.collect()
}

/// The line without what stands between backticks.
fn without_code(line: &str) -> String {
    line.split('`').step_by(2).collect::<Vec<_>>().join("` `")
}

/// What stands between backticks.
pub(crate) fn code(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// Targets of `](target)` and of `[name]: target`.
fn targets(line: &str) -> Vec<String> {
    let named = line.strip_prefix('[').and_then(|rest| rest.split_once("]: ")).map(|(_, target)| target);
    let inline = line.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target);
    inline.chain(named).map(|target| target.split_whitespace().next().unwrap_or_default().to_owned()).collect()
}

/// A `|` in code must be written `\|`, as in GitHub's own tables.
fn cells(line: &str) -> Vec<String> {
    let inner = line.trim().trim_start_matches('|').trim_end_matches('|').replace("\\|", "\u{0}");
    inner.split('|').map(|cell| cell.trim().replace('\u{0}', "|")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(text: &str) -> Page {
        Page::read("x.md".into(), text)
    }

    #[test]
    fn headings_become_what_a_link_says() {
        assert_eq!(anchor(" 1. NICs: `moonrail nics`"), "1-nics-moonrail-nics");
        assert_eq!(anchor(" Über `MC_MTU`"), "über-mc_mtu");
        let twice = page("# A b\n## a B\n# a b c\n```sh\n# no heading\n```\n#none\n");
        assert_eq!(twice.anchors, ["a-b", "a-b-1", "a-b-c"]);
    }

    #[test]
    fn links_in_code_are_none() {
        let page = page(
            "[a](b.md) and [c\nd](e.md#f), `[no](g)`\n```text\n[no](h)\n```\n[named]: i.md\n````md\n```\n[no](j)\n````\n[k](l)\n",
        );
        let targets: Vec<&str> = page.links.iter().map(|(_, target)| target.as_str()).collect();
        assert_eq!(targets, ["b.md", "e.md#f", "i.md", "l"]);
        assert_eq!(page.links[1].0, 2, "the line where the target stands");
        assert_eq!(page.blocks, [(3, "text".to_owned()), (7, "md".to_owned())]);
    }

    #[test]
    fn rows_have_cells() {
        let page = page("| a | `b\\|c` |\n|---|---|\nno row\n");
        assert_eq!(page.rows[0], (1, vec!["a".to_owned(), "`b|c`".to_owned()]));
        assert_eq!(code(&page.rows[0].1[1]), ["b|c"]);
    }
}
