//! copage: the daemon and the command.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    copage::cli::main()
}
