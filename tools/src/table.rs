//! Plain tables of at most 80 columns: two blanks between columns, numbers to the right, no lines to get in the way.

use std::fmt::Write as _;

/// Width that every terminal, ticket and mail has.
pub const WIDTH: usize = 80;
const GAP: usize = 2;

/// How a column is aligned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// Rows under a head. A table wider than [`WIDTH`] has its last column wrapped.
#[derive(Clone, Debug)]
pub struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns.
    pub fn new(columns: &[(&str, Align)]) -> Self {
        Self { columns: columns.iter().map(|(name, align)| ((*name).to_owned(), *align)).collect(), rows: Vec::new() }
    }

    /// Adds a row; missing cells are empty.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let mut cells: Vec<String> = cells.into_iter().take(self.columns.len()).collect();
        cells.resize(self.columns.len(), String::new());
        self.rows.push(cells);
    }

    /// The text, each line ended, indented by `indent` blanks.
    pub fn render(&self, indent: usize) -> String {
        let head: Vec<String> = self.columns.iter().map(|(name, _)| name.clone()).collect();
        let mut widths: Vec<usize> = head.iter().map(|name| chars(name)).collect();
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(chars(cell));
            }
        }
        if let Some((last, before)) = widths.split_last_mut() {
            let used = indent + before.iter().map(|w| w + GAP).sum::<usize>();
            *last = (*last).min(WIDTH.saturating_sub(used).max(16));
        }
        let mut text = String::new();
        for row in std::iter::once(&head).chain(&self.rows) {
            self.line(&mut text, row, &widths, indent);
        }
        text
    }

    fn line(&self, text: &mut String, row: &[String], widths: &[usize], indent: usize) {
        let Some((last, before)) = row.split_last() else { return };
        let mut line = " ".repeat(indent);
        for ((cell, width), (_, align)) in before.iter().zip(widths).zip(&self.columns) {
            pad(&mut line, cell, *width, *align);
            line.push_str(&" ".repeat(GAP));
        }
        let last_width = widths.last().copied().unwrap_or(0);
        let hanging = chars(&line);
        let align = self.columns.last().map_or(Align::Left, |(_, align)| *align);
        for (i, part) in wrap(last, last_width).iter().enumerate() {
            if i > 0 {
                line = " ".repeat(hanging);
            }
            pad(&mut line, part, last_width, align);
            let _ = writeln!(text, "{}", line.trim_end());
        }
    }
}

fn pad(line: &mut String, cell: &str, width: usize, align: Align) {
    let blanks = " ".repeat(width.saturating_sub(chars(cell)));
    match align {
        Align::Left => line.extend([cell, &blanks]),
        Align::Right => line.extend([&blanks, cell]),
    }
}

fn chars(text: &str) -> usize {
    text.chars().count()
}

/// Breaks text between words into lines of at most `width` characters; a longer word stands alone. Never empty.
pub fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("never empty");
        if line.is_empty() {
            line.push_str(word);
        } else if chars(line) + 1 + chars(word) <= width {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_to_the_right_and_long_text_is_wrapped() {
        let mut table = Table::new(&[("rail", Align::Left), ("bytes", Align::Right), ("why", Align::Left)]);
        table.row(["a".to_owned(), "1".to_owned(), "short".to_owned()]);
        table.row(["bb".to_owned(), "1000".to_owned(), "word ".repeat(30)]);
        let text = table.render(2);
        assert!(text.starts_with("  rail  bytes  why\n  a         1  short\n  bb     1000  word word"), "{text}");
        assert!(text.lines().all(|line| chars(line) <= WIDTH && !line.ends_with(' ')), "{text}");
        assert!(text.lines().count() > 3);
    }

    #[test]
    fn a_table_without_rows_shows_its_head() {
        assert_eq!(Table::new(&[("a", Align::Left), ("b", Align::Right)]).render(0), "a  b\n");
    }
}
