//! The main job, start to end, shown to a doubter.
//!
//! It runs where it finds a kernel with nbd and tls: the host's, if we are root, or else a user-mode Linux, in which
//! the same program tells the same story.

mod load;
mod plugin;
mod show;
mod story;
pub mod uml;
mod wire;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};

use self::uml::{Access, Kernel, Machine};

/// The demo takes half a minute; a machine that still runs after this hangs.
const DEADLINE: Duration = Duration::from_secs(300);

/// The programs that the story calls, with the Debian packages that have them.
const TOOLS: [(&str, &str); 4] = [
    ("mkfs.ext4", "e2fsprogs"),
    ("blkid", "util-linux"),
    ("mount", "mount"),
    ("tcpdump", "tcpdump"),
];

/// Show the whole job on this machine: provision, verify, attach, write, fail, recover, grow, fence, delete.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Whose kernel attaches the volume.
    #[arg(long, value_enum, default_value_t = Where::Auto)]
    kernel: Where,
    /// Where volumes, Secrets and logs are kept meanwhile; a temporary directory by default, removed at the end.
    #[arg(long)]
    scratch: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Where {
    /// The host's if it has nbd and tls and we are root, else user-mode Linux.
    Auto,
    Host,
    Uml,
}

/// Runs the demo. Any failure is an error; its text is the last thing printed.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    check_tools()?;
    let lacking = host_lacks();
    match (args.kernel, &lacking) {
        (Where::Host, Some(lacking)) => bail!("the demo cannot run on this kernel: {lacking}"),
        (Where::Host | Where::Auto, None) => on_this_kernel(args.scratch.as_deref())?,
        (Where::Uml | Where::Auto, lacking) => {
            let why = lacking.as_deref().unwrap_or("it was asked for");
            in_user_mode_linux(why)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn check_tools() -> anyhow::Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    for (tool, package) in TOOLS {
        let found = std::env::split_paths(&path)
            .chain(["/usr/sbin".into(), "/sbin".into()])
            .any(|directory| directory.join(tool).exists());
        if !found {
            bail!("{tool} is missing: run `apt-get install {package}`");
        }
    }
    Ok(())
}

/// Why the volume cannot be attached in the running kernel.
fn host_lacks() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("we are not root".into());
    }
    let lacking: Vec<_> = [
        ("nbd", Path::new("/sys/module/nbd")),
        ("tls", Path::new("/sys/module/tls")),
    ]
    .into_iter()
    .filter(|(module, loaded)| {
        !loaded.exists()
            && !Command::new("modprobe")
                .arg(module)
                .stderr(Stdio::null())
                .status()
                .is_ok_and(|status| status.success())
    })
    .map(|(module, _)| module)
    .collect();
    (!lacking.is_empty()).then(|| format!("the host's kernel has no module {}", lacking.join(", ")))
}

fn on_this_kernel(scratch: Option<&Path>) -> anyhow::Result<()> {
    println!(
        "Hawser: one volume, start to end, in Linux {}\n",
        rustix::system::uname().release().to_string_lossy()
    );
    let temporary;
    let scratch = match scratch {
        Some(scratch) => scratch,
        None => {
            temporary = Temporary::new()?;
            &temporary.0
        }
    };
    tokio::runtime::Runtime::new()
        .context("start the runtime")?
        .block_on(story::tell(scratch))
}

fn in_user_mode_linux(why: &str) -> anyhow::Result<()> {
    let kernel = Kernel::installed()?;
    println!(
        "Using user-mode Linux {}, a kernel that is an ordinary process ({why}).",
        kernel.version()
    );
    let program = std::env::current_exe()?;
    let folder = program.parent().context("the program is in no folder")?;
    let outcome = Machine::new(kernel)
        .deadline(DEADLINE)
        .share(Access::ReadOnly, folder)
        .run(
            &[
                program.as_os_str(),
                "demo".as_ref(),
                "--kernel=host".as_ref(),
            ],
            |line| println!("{line}"),
        )?;
    if outcome.status != 0 {
        bail!(
            "the demo failed in user-mode Linux (status {}); the kernel said:\n{}",
            outcome.status,
            outcome.console
        );
    }
    Ok(())
}

/// A directory that is removed at the end.
struct Temporary(PathBuf);

impl Temporary {
    fn new() -> anyhow::Result<Self> {
        let path = PathBuf::from(format!("/run/hawser-demo-{}", std::process::id()));
        std::fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
