//! Runs one of the system's tools: with a deadline, and with what it said in the error.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::process::{ExitStatus, Output, Stdio};
use std::time::Duration;

use tokio::process::Command;

use super::FilesystemError;

/// Where administrative tools are, in addition to what PATH says.
const SYSTEM_PATH: &str = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin";

/// Characters of a tool's output that an error repeats.
const OUTPUT_LIMIT: usize = 600;

/// A tool, the package that has it, and how long it may take.
pub(super) struct Tool {
    pub(super) name: &'static str,
    pub(super) package: &'static str,
    pub(super) limit: Duration,
}

impl Tool {
    /// Runs it on `subject` (for errors; it has to be among the arguments as well) and returns however it ends.
    ///
    /// On a dead device a tool can hang where no signal reaches it. It then keeps the device open, so that whatever
    /// needs the device for itself, as the tools and mount do, is refused by the kernel until it has gone.
    pub(super) async fn run<A: AsRef<OsStr>>(
        &self,
        subject: &Path,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Output, FilesystemError> {
        let path = match std::env::var_os("PATH") {
            Some(mut path) if !path.is_empty() => {
                path.push(":");
                path.push(SYSTEM_PATH);
                path
            }
            _ => SYSTEM_PATH.into(),
        };
        let child = Command::new(self.name)
            .args(arguments)
            .env("PATH", path)
            .env("LC_ALL", "C")
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => FilesystemError::ToolMissing {
                    tool: self.name,
                    package: self.package,
                },
                _ => FilesystemError::io(self.name, subject)(source),
            })?;
        match tokio::time::timeout(self.limit, child.wait_with_output()).await {
            Ok(output) => output.map_err(FilesystemError::io(self.name, subject)),
            Err(_) => Err(FilesystemError::Timeout {
                doing: self.name,
                subject: subject.to_owned(),
                limit: self.limit,
            }),
        }
    }

    /// Runs it and refuses any exit status but 0.
    pub(super) async fn succeed<A: AsRef<OsStr>>(
        &self,
        subject: &Path,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Output, FilesystemError> {
        let output = self.run(subject, arguments).await?;
        if output.status.success() {
            return Ok(output);
        }
        Err(self.failed(subject, output.status, &said(&output)))
    }

    pub(super) fn failed(&self, subject: &Path, exit: ExitStatus, output: &str) -> FilesystemError {
        FilesystemError::Tool {
            tool: self.name,
            subject: subject.to_owned(),
            exit,
            output: output.to_owned(),
        }
    }
}

/// What a tool has to say about its failure, in one line.
pub(super) fn said(output: &Output) -> String {
    let text = [&output.stderr, &output.stdout]
        .into_iter()
        .map(|bytes| String::from_utf8_lossy(bytes))
        .find(|text| !text.trim().is_empty())
        .unwrap_or_default();
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let line = lines.collect::<Vec<_>>().join("; ");
    let surplus = line.chars().count().saturating_sub(OUTPUT_LIMIT);
    line.chars().skip(surplus).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tool(name: &'static str, limit: Duration) -> Tool {
        Tool {
            name,
            package: "the-package",
            limit,
        }
    }

    #[tokio::test]
    async fn a_missing_tool_names_its_package() {
        let missing = tool("mkfs.nonesuch", Duration::from_secs(9));
        let error = missing
            .succeed(Path::new("/dev/x"), [""])
            .await
            .unwrap_err();
        assert!(error.to_string().contains("package the-package"), "{error}");
    }

    #[tokio::test]
    async fn a_failure_tells_what_the_tool_said() {
        let shell = tool("sh", Duration::from_secs(9));
        let script = "echo out; echo first >&2; echo second >&2; exit 3";
        let error = shell.succeed(Path::new("/dev/x"), ["-c", script]).await;
        let text = error.unwrap_err().to_string();
        assert!(
            text.contains("/dev/x") && text.contains("exit status: 3"),
            "{text}"
        );
        assert!(text.ends_with("first; second"), "{text}");
    }

    #[tokio::test]
    async fn a_tool_that_hangs_is_ended() {
        let shell = tool("sleep", Duration::from_millis(50));
        let error = shell.run(Path::new("/dev/x"), ["1000"]).await.unwrap_err();
        assert!(matches!(error, FilesystemError::Timeout { .. }), "{error}");
    }
}
