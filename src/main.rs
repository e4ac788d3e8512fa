//! The `hawser` command: one subcommand for each role.

fn main() -> std::process::ExitCode {
    std::process::ExitCode::from(64)
}
