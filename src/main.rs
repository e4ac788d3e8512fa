//! The `hawser` command: one subcommand for each role.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// Block volumes over NBD, always inside mutually authenticated TLS.
#[derive(Parser)]
#[command(name = "hawser", version, propagate_version = true)]
struct Cli {
    /// What to log: a level, or tracing's filter syntax.
    #[arg(long, global = true, env = "HAWSER_LOG", default_value = "info")]
    log: String,
    /// How to write the log.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    #[command(subcommand)]
    role: Role,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Subcommand)]
enum Role {
    Serve(hawser::server::Args),
    Standalone(hawser::standalone::Args),
    Node(hawser::node::Args),
    Agent(hawser::agent::Args),
    Demo(hawser::demo::Args),
    Controller(hawser::kube::controller::Args),
    Manifests(hawser::kube::manifests::Args),
    Hook(hawser::kube::hook::Args),
    Verify(Box<hawser::verify::command::Args>),
}

/// Exit status of a command line that makes no sense, as in sysexits.h.
const USAGE: u8 = 64;

/// The exit status for this command line, of which only the role is sure: verification has its own, for pipelines that
/// tell findings from everything else.
fn usage() -> u8 {
    let matches = Cli::command().ignore_errors(true).try_get_matches();
    match matches.as_ref().map(clap::ArgMatches::subcommand_name) {
        Ok(Some("verify")) => hawser::verify::command::COULD_NOT_RUN,
        _ => USAGE,
    }
}

fn main() -> ExitCode {
    let cli = Cli::try_parse().unwrap_or_else(|error| {
        let _ = error.print();
        std::process::exit(if error.use_stderr() {
            usage().into()
        } else {
            0
        })
    });
    let filter = match EnvFilter::try_new(&cli.log) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("hawser: --log {:?}: {error}", cli.log);
            return ExitCode::from(USAGE);
        }
    };
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match cli.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    if rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .is_err()
    {
        eprintln!("hawser: a crypto provider was installed before ours");
        return ExitCode::FAILURE;
    }
    let result: anyhow::Result<ExitCode> = match cli.role {
        Role::Serve(args) => hawser::server::run(args),
        Role::Standalone(args) => hawser::standalone::run(args),
        Role::Node(args) => hawser::node::run(args),
        Role::Agent(args) => hawser::agent::run(args),
        Role::Demo(args) => hawser::demo::run(&args),
        Role::Controller(args) => hawser::kube::controller::run(args),
        Role::Manifests(args) => hawser::kube::manifests::run(&args),
        Role::Hook(args) => hawser::kube::hook::run(&args),
        Role::Verify(args) => Ok(hawser::verify::command::run(&args)),
    };
    result.unwrap_or_else(|error| {
        eprintln!("hawser: {error:#}");
        ExitCode::FAILURE
    })
}
