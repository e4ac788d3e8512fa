//! Small files that are either the old ones or the new ones, whenever the machine stops.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

/// Replaces the file's contents. When this returns `Ok`, the new contents survive a loss of power.
pub(super) fn replace(path: &Path, contents: &[u8]) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let mut file = File::create(&temporary)?;
    file.write_all(contents)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    File::open(directory)?.sync_all()
}
