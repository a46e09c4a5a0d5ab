//! The terminal of a live view: one screen of its own, keys as they are pressed, and everything as it was afterwards.
//!
//! Through rustix, which the engine has anyway: what is needed of a terminal is five calls and six sequences that every
//! terminal since the VT220 knows.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Read, Stdin, Write};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{InputModes, LocalModes, OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// Another screen, without a cursor; and back.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
/// What a terminal that does not tell its size is taken for.
const USUAL: (usize, usize) = (80, 24);

/// How a line stands out. Nothing is told by colour alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Style {
    /// Not at all.
    Plain,
    /// The head of a table.
    Head,
    /// Something to look at.
    Bad,
}

/// A line of a screen, no wider than that.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Line {
    /// Without control characters.
    pub text: String,
    /// How it stands out.
    pub style: Style,
}

/// What a key asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Key {
    /// `q`, Ctrl-C, Ctrl-D, or nobody can press one any more.
    Leave,
    /// Further down by so many lines; up if negative.
    Scroll(isize),
    /// To the top.
    Home,
    /// Nothing that is known.
    Other,
}

/// The terminal, taken over until it is dropped.
pub struct Terminal {
    input: Stdin,
    saved: Termios,
    colour: bool,
}

impl Terminal {
    /// Takes it over; `None` if input or output is no terminal.
    ///
    /// # Errors
    /// It cannot be set; then nothing is changed.
    pub fn open() -> io::Result<Option<Self>> {
        let input = io::stdin();
        if !input.is_terminal() || !io::stdout().is_terminal() {
            return Ok(None);
        }
        let saved = tcgetattr(&input)?;
        let mut raw = saved.clone();
        // Keys at once and unseen. Ctrl-C is a key as well: the program that ends restores the terminal, a signal would not.
        raw.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG | LocalModes::IEXTEN);
        raw.input_modes.remove(InputModes::IXON | InputModes::ICRNL);
        tcsetattr(&input, OptionalActions::Flush, &raw)?;
        let colour = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let terminal = Self { input, saved, colour };
        put(ENTER);
        Ok(Some(terminal))
    }

    /// Columns and lines, now.
    pub fn size(&self) -> (usize, usize) {
        match tcgetwinsize(&self.input) {
            Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col.into(), size.ws_row.into()),
            _ => USUAL,
        }
    }

    /// Shows these lines, and nothing else.
    pub fn draw(&self, lines: &[Line]) {
        let (columns, rows) = self.size();
        put(&screen(lines, columns, rows, self.colour));
    }

    /// The next key, waiting `within` for it.
    pub fn key(&mut self, within: Duration) -> Option<Key> {
        let timeout = Timespec { tv_sec: within.as_secs() as i64, tv_nsec: i64::from(within.subsec_nanos()) };
        let mut fds = [PollFd::new(&self.input, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return None,
            Ok(_) => {}
            Err(_) => return Some(Key::Leave),
        }
        let mut bytes = [0; 64];
        match self.input.lock().read(&mut bytes) {
            Ok(0) => Some(Key::Leave),
            Ok(count) => Some(key(&bytes[..count])),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => None,
            Err(_) => Some(Key::Leave),
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        put(LEAVE);
        let _ = tcsetattr(&self.input, OptionalActions::Flush, &self.saved);
    }
}

/// A terminal that is gone takes nothing, and the next key says so.
fn put(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Over what is there, line by line, so that nothing flickers.
fn screen(lines: &[Line], columns: usize, rows: usize, colour: bool) -> String {
    let mut text = String::from("\x1b[H");
    for (at, line) in lines.iter().take(rows).enumerate() {
        let on = match line.style {
            Style::Plain => "",
            Style::Head => "\x1b[7m",
            Style::Bad if colour => "\x1b[1;31m",
            Style::Bad => "\x1b[1m",
        };
        let end = if at == 0 { "" } else { "\r\n" };
        let shown: String = line.text.chars().filter(|c| !c.is_control()).take(columns).collect();
        let _ = write!(text, "{end}{on}{shown}{}\x1b[K", if on.is_empty() { "" } else { "\x1b[0m" });
    }
    text.push_str("\x1b[J");
    text
}

/// Keys pressed while nobody looked come together: leaving counts most, the last of the others.
fn key(bytes: &[u8]) -> Key {
    const PAGE: isize = 10;
    if bytes.iter().any(|byte| matches!(byte, b'q' | b'Q' | 3 | 4)) {
        return Key::Leave;
    }
    match bytes {
        [.., b'j'] | [.., 0x1b, b'[' | b'O', b'B'] => Key::Scroll(1),
        [.., b'k'] | [.., 0x1b, b'[' | b'O', b'A'] => Key::Scroll(-1),
        [.., b' '] | [.., 0x1b, b'[', b'6', b'~'] => Key::Scroll(PAGE),
        [.., 0x1b, b'[', b'5', b'~'] => Key::Scroll(-PAGE),
        [.., b'g'] | [.., 0x1b, b'[', b'H'] | [.., 0x1b, b'[', b'1', b'~'] => Key::Home,
        _ => Key::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_screen_is_never_wider_or_longer_than_the_terminal_and_obeys_no_name() {
        let line = |text: &str, style| Line { text: text.into(), style };
        let lines = [line("0123456789", Style::Head), line("a\x1b[2Jb", Style::Bad), line("third", Style::Plain)];
        assert_eq!(screen(&lines, 4, 2, false), "\x1b[H\x1b[7m0123\x1b[0m\x1b[K\r\n\x1b[1ma[2J\x1b[0m\x1b[K\x1b[J");
        assert!(screen(&lines, 80, 24, true).contains("\x1b[1;31ma[2Jb\x1b[0m"));
    }

    #[test]
    fn keys_of_all_kinds_of_terminals() {
        for leave in [&b"q"[..], b"Q", b"\x03", b"\x04", b"jjq"] {
            assert_eq!(key(leave), Key::Leave);
        }
        assert_eq!(
            (key(b"\x1b[B"), key(b"\x1bOA"), key(b"\x1b[6~")),
            (Key::Scroll(1), Key::Scroll(-1), Key::Scroll(10))
        );
        assert_eq!((key(b"g"), key(b"\x1b"), key(b"x")), (Key::Home, Key::Other, Key::Other));
    }
}
