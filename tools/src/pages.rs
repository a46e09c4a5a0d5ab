//! `moonrail completions` and `moonrail man`: made from the command line's own description, so that they are never behind it.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell as Generated;
use clap_mangen::Man;

use crate::cli::{Cli, CompletionsArgs, ManArgs, Shell};
use crate::failure::{Failure, Result};
use crate::say;

/// Runs `moonrail completions`.
pub fn completions(args: &CompletionsArgs) -> Result<ExitCode> {
    let shell = match args.shell {
        Shell::Bash => Generated::Bash,
        Shell::Zsh => Generated::Zsh,
        Shell::Fish => Generated::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "moonrail", &mut script);
    say::text(&script);
    Ok(ExitCode::SUCCESS)
}

/// Runs `moonrail man`.
pub fn man(args: &ManArgs) -> Result<ExitCode> {
    let mut command = Cli::command();
    // Names each subcommand's page after the whole command: moonrail-segments-ls.
    command.build();
    let Some(folder) = &args.folder else {
        say::text(&page(&command)?);
        return Ok(ExitCode::SUCCESS);
    };
    let cannot = |error: std::io::Error| {
        Failure::new(format!("{}: {error}", folder.display()), "name a folder that can be written to")
    };
    std::fs::create_dir_all(folder).map_err(cannot)?;
    let count = write_all(&command, "moonrail", folder)?;
    say::line(format_args!("{count} pages in {}", folder.display()));
    Ok(ExitCode::SUCCESS)
}

/// Writes the page of a command and those of its subcommands; how many.
fn write_all(command: &clap::Command, name: &str, folder: &Path) -> Result<usize> {
    let path = folder.join(format!("{name}.1"));
    let roff = page(command)?;
    let written = std::fs::File::create(&path).and_then(|mut file| file.write_all(&roff));
    written.map_err(|error| {
        Failure::new(format!("{}: {error}", path.display()), "make room, or name a folder that can be written to")
    })?;
    let mut count = 1;
    for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
        count += write_all(sub, &format!("{name}-{}", sub.get_name()), folder)?;
    }
    Ok(count)
}

/// A page in roff, of ASCII alone: not every troff is told the encoding.
fn page(command: &clap::Command) -> Result<Vec<u8>> {
    let mut roff = Vec::new();
    let made = Man::new(command.clone()).render(&mut roff);
    made.map_err(|error| Failure::new(format!("no manual page could be made: {error}"), "report this as a bug"))?;
    let mut page = String::new();
    for c in String::from_utf8_lossy(&roff).replace(".SH EXTRA", ".SH NOTES").chars() {
        if c.is_ascii() {
            page.push(c);
        } else {
            let _ = write!(page, "\\[u{:04X}]", u32::from(c));
        }
    }
    Ok(page.into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_with_its_examples() {
        let mut command = Cli::command();
        command.build();
        for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
            let page = String::from_utf8(page(sub).unwrap()).unwrap();
            assert!(page.contains(".TH") && page.contains("Example") && page.is_ascii(), "{}: {page}", sub.get_name());
        }
    }
}
