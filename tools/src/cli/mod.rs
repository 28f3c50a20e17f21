//! The command line: which commands there are, and what becomes of their errors.

pub mod check_config;
mod errors;
pub mod serve;

use crate::{admin, demo, doctor, guest};
use anyhow::Result;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Keeps the pages of shared files in memory once and grants them to guests.
///
/// A daemon (`copage serve`) holds the pages of the directories it exports. Guests (domains of this Xen
/// host, or processes of this machine) mount an export, run programs off it, or map its files by the
/// library, and all see the same read-only frames of memory.
#[derive(Debug, Parser)]
#[command(name = "copage", version, max_term_width = 100)]
#[command(after_help = "\
Examples:
  copage demo                          see it work: no configuration, ends by itself
  copage doctor                        what this machine can do, what it lacks, how to get it
  copage serve --export usr=/usr &     a daemon that shares /usr
  copage mount usr /mnt &              ordinary programs open, map and run files from /mnt
  copage exec usr bin/ls -l /          a program, its loader and its libraries off the share
  copage pages usr:bin/ls              what is held of a file, and who was granted it

Exit codes: 0 it is done; 1 it failed, or what was asked is not so (audit, doctor); 2 the command line
or the configuration is wrong. COPAGE_RUN_DIR names the daemon's run directory for all commands.")]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::Args),
    Demo(demo::DemoArgs),
    Doctor(doctor::Args),
    CheckConfig(check_config::Args),
    Export(admin::export::Args),
    Attach(admin::attach::AttachArgs),
    Detach(admin::attach::DetachArgs),
    Guests(admin::guests::Args),
    Pages(admin::pages::Args),
    Grants(admin::grants::Args),
    Leases(admin::leases::Args),
    Audit(admin::audit::Args),
    Stats(admin::stats::Args),
    Reclaim(admin::control::ReclaimArgs),
    Budget(admin::control::BudgetArgs),
    Fence(admin::control::FenceArgs),
    Stop(admin::control::StopArgs),
    Mount(guest::mount::Args),
    Umount(guest::umount::Args),
    Exec(guest::exec::Args),
    Ls(guest::ls::Args),
    Stat(guest::stat::Args),
    Cat(guest::cat::Args),
    Cp(guest::cp::Args),
    #[command(hide = true)]
    ExecKeeper(guest::keeper::Args),
    /// One guest of the demo.
    #[command(hide = true)]
    DemoAgent(demo::AgentArgs),
}

impl Command {
    fn run(&self) -> Result<ExitCode> {
        match self {
            Self::Serve(args) => serve::run(args),
            Self::Demo(args) => demo::run(args),
            Self::Doctor(args) => doctor::run(args),
            Self::CheckConfig(args) => check_config::run(args),
            Self::Export(args) => admin::export::run(args),
            Self::Attach(args) => admin::attach::attach(args),
            Self::Detach(args) => admin::attach::detach(args),
            Self::Guests(args) => admin::guests::run(args),
            Self::Pages(args) => admin::pages::run(args),
            Self::Grants(args) => admin::grants::run(args),
            Self::Leases(args) => admin::leases::run(args),
            Self::Audit(args) => admin::audit::run(args),
            Self::Stats(args) => admin::stats::run(args),
            Self::Reclaim(args) => admin::control::reclaim(args),
            Self::Budget(args) => admin::control::budget(args),
            Self::Fence(args) => admin::control::fence(args),
            Self::Stop(args) => admin::control::stop(args),
            Self::Mount(args) => guest::mount::run(args),
            Self::Umount(args) => guest::umount::run(args),
            Self::Exec(args) => guest::exec::run(args),
            Self::Ls(args) => guest::ls::run(args),
            Self::Stat(args) => guest::stat::run(args),
            Self::Cat(args) => guest::cat::run(args),
            Self::Cp(args) => guest::cp::run(args),
            Self::ExecKeeper(args) => guest::keeper::run(args),
            Self::DemoAgent(args) => demo::run_agent(args),
        }
    }
}

/// The program: reads the command line, runs the command, says what failed.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return errors::of_command_line(&error),
    };
    cli.command
        .run()
        .unwrap_or_else(|error| errors::of_command(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// Every command that is shown teaches by at least two examples, each beginning as one would
    /// type it.
    #[test]
    fn every_command_has_examples() {
        fn check(command: &clap::Command) {
            for sub in command.get_subcommands().filter(|c| !c.is_hide_set()) {
                let help = sub
                    .get_after_help()
                    .map(ToString::to_string)
                    .unwrap_or_default();
                let examples = help.lines().filter(|l| l.starts_with("  ")).count();
                assert!(help.starts_with("Examples:"), "{}: {help}", sub.get_name());
                assert!(examples >= 2, "{}: {help}", sub.get_name());
                assert!(sub.get_about().is_some(), "{}", sub.get_name());
                check(sub);
            }
        }
        check(&Cli::command());
    }

    /// The examples themselves are accepted (those that are plain `copage …` lines).
    #[test]
    fn examples_parse() {
        fn check(command: &clap::Command, seen: &mut usize) {
            let help = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            for line in help
                .lines()
                .filter_map(|line| line.strip_prefix("  copage "))
            {
                // A comment is set off by blanks; quotes and pipes are the shell's.
                let line = line.split("  ").next().unwrap_or(line);
                let line = line.split(['|', '>', '&']).next().unwrap_or(line);
                if line.contains(['\'', '"', '$', ';', '*']) {
                    continue;
                }
                let words = std::iter::once("copage").chain(line.split_whitespace());
                if let Err(error) = Cli::try_parse_from(words) {
                    panic!("copage {line}\n{error}");
                }
                *seen += 1;
            }
            for sub in command.get_subcommands() {
                check(sub, seen);
            }
        }
        let mut seen = 0;
        check(&Cli::command(), &mut seen);
        assert!(seen > 40, "{seen}");
    }

    /// What follows the program is the program's, also where copage has an option of that name.
    #[test]
    fn a_programs_arguments_are_its_own() {
        for rest in [
            "--help",
            "--version",
            "--run-dir x",
            "-h",
            "-- x",
            "--show-text",
        ] {
            let words = "copage exec --show-text usr bin/ls"
                .split(' ')
                .chain(rest.split(' '));
            let cli = Cli::try_parse_from(words).unwrap();
            let shown = format!("{cli:?}");
            let last = rest.split(' ').next_back().unwrap();
            assert!(
                shown.contains(&format!(
                    "\"bin/ls\", \"{}",
                    rest.split(' ').next().unwrap()
                )),
                "{shown}"
            );
            assert!(shown.contains(&format!("\"{last}\"]")), "{shown}");
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for line in [
            "",
            "serve --frames-mib 0",
            "serve --frames-mib 9999999999",
            "serve --export usr",
            "serve --export =/usr",
            "serve --export u/s=/usr",
            "serve --log loud",
            "export add a/b /usr",
            "export add a /usr --mode cow",
            "export add a /usr --allow b,c",
            "budget",
            "budget 3",
            "reclaim",
            "reclaim 5 --unused",
            "grants --list 0",
            "stats --watch 0",
            "stats --watch --host-cache",
            "guests --run-dir /a --socket /b",
            "frobnicate",
        ] {
            let words = std::iter::once("copage").chain(line.split_whitespace());
            assert!(Cli::try_parse_from(words).is_err(), "{line}");
        }
    }
}
