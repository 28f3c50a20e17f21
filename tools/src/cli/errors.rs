//! Errors as the user sees them: one plain line, and an exit code.

use crate::config::ConfigErrors;
use crate::output::{OutputClosed, Usage};
use clap::error::ErrorKind;
use std::process::ExitCode;

/// The command line or the configuration is wrong.
pub(super) const WRONG_USAGE: u8 = 2;

/// What became of a command line that names no command to run; help and version are no errors.
pub(super) fn of_command_line(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // Whoever closed the pipe has seen enough.
            let _ = error.print();
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            ExitCode::from(WRONG_USAGE)
        }
        _ => {
            eprintln!("copage: {}", one_line(&error.render().to_string()));
            ExitCode::from(WRONG_USAGE)
        }
    }
}

/// What became of a command that failed.
pub(super) fn of_command(error: &anyhow::Error) -> ExitCode {
    if error.is::<OutputClosed>() {
        return ExitCode::SUCCESS;
    }
    if let Some(errors) = error.downcast_ref::<ConfigErrors>() {
        for line in errors.lines() {
            eprintln!("copage: {line}");
        }
        return ExitCode::from(WRONG_USAGE);
    }
    eprintln!("copage: {}", format!("{error:#}").replace('\n', " "));
    if error.is::<Usage>() {
        ExitCode::from(WRONG_USAGE)
    } else {
        ExitCode::FAILURE
    }
}

/// What clap says over several lines, in one: what is wrong, what it may have meant, where to look.
fn one_line(rendered: &str) -> String {
    let mut blocks = rendered.split("\n\n").map(|block| {
        block
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .collect::<Vec<_>>()
            .join(" ")
    });
    let first = blocks.next().unwrap_or_default();
    let mut text = first.strip_prefix("error: ").unwrap_or(&first).to_owned();
    let mut command = "copage".to_owned();
    for block in blocks {
        if let Some(usage) = block.strip_prefix("Usage: ") {
            let words = usage.split_whitespace();
            let names: Vec<_> = words
                .take_while(|w| !w.starts_with(['<', '[', '-']))
                .collect();
            command = names.join(" ");
        } else if let Some(tip) = block.strip_prefix("tip: ") {
            text = format!("{text}; {tip}");
        }
    }
    format!("{text}; see {command} --help")
}

#[cfg(test)]
mod tests {
    use super::super::Cli;
    use super::*;
    use clap::Parser;

    #[test]
    fn one_line_says_it_all() {
        let said = |line: &str| {
            let words = std::iter::once("copage").chain(line.split_whitespace());
            one_line(&Cli::try_parse_from(words).unwrap_err().render().to_string())
        };
        for (line, pieces) in [
            (
                "serve --no-froce",
                &["--no-froce", "--no-force", "; see copage serve --help"][..],
            ),
            ("frobnicate", &["frobnicate", "; see copage --help"]),
            (
                "export add",
                &["<NAME>", "<DIR>", "; see copage export add --help"],
            ),
            ("budget 3", &["3 is not in 4..=", "see copage"]),
            ("export add a/b /x", &["'a/b'", "has '/' in it"]),
        ] {
            let text = said(line);
            assert!(!text.contains('\n') && !text.starts_with("error"), "{text}");
            for piece in pieces {
                assert!(text.contains(piece), "{line}: {text}");
            }
        }
    }
}
