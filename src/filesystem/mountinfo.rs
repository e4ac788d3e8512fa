//! What is mounted, as the kernel has it: proc(5), `/proc/self/mountinfo`.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::FilesystemError;

const MOUNTINFO: &str = "/proc/self/mountinfo";

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPoint {
    /// Major and minor number of the device. btrfs has anonymous ones.
    pub device: (u32, u32),
    /// What of the file system is mounted; not `/` for a bind mount of a part of it.
    pub root: PathBuf,
    pub point: PathBuf,
    /// The options of this mount: `rw`, `relatime`.
    pub options: Vec<String>,
    pub kind: String,
    /// What was mounted, by the name that mount(2) got: `/dev/nbd0`.
    pub source: PathBuf,
    /// The options of the file system, the same for all its mounts.
    pub super_options: Vec<String>,
}

impl MountPoint {
    /// Whether nothing can be written through this mount.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.options.iter().any(|option| option == "ro")
    }

    /// Whether the whole file system is read-only, as ext4 makes itself after an error.
    #[must_use]
    pub fn is_filesystem_read_only(&self) -> bool {
        self.super_options.iter().any(|option| option == "ro")
    }

    /// Reads one line. `None` if it is none.
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|&byte| byte == b' ');
        let mut field = || fields.next();
        let (_id, _parent) = (field()?, field()?);
        let device = field()?;
        let (root, point, options) = (unescape(field()?), unescape(field()?), words(field()?));
        // Optional fields, as many as there are, until a lone dash.
        while field()? != b"-" {}
        let (kind, source) = (field()?, unescape(field()?));
        let super_options = field().map(words).unwrap_or_default();
        let (major, minor) = std::str::from_utf8(device).ok()?.split_once(':')?;
        Some(Self {
            device: (major.parse().ok()?, minor.parse().ok()?),
            root,
            point,
            options,
            kind: String::from_utf8_lossy(kind).into_owned(),
            source,
            super_options,
        })
    }
}

/// Space, tab, newline, backslash and, in the source, `#` are written as `\` and three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, after @ ..] = rest {
        match rest {
            [
                b'\\',
                a @ b'0'..=b'3',
                b @ b'0'..=b'7',
                c @ b'0'..=b'7',
                after @ ..,
            ] => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

fn words(field: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(field);
    text.split(',').map(str::to_owned).collect()
}

/// All mounts of this process's namespace, in the order in which they were made.
pub fn mount_points() -> Result<Vec<MountPoint>, FilesystemError> {
    let path = Path::new(MOUNTINFO);
    let text = std::fs::read(path).map_err(FilesystemError::io("read", path))?;
    Ok(parse(&text))
}

fn parse(text: &[u8]) -> Vec<MountPoint> {
    text.split(|&byte| byte == b'\n')
        .filter_map(MountPoint::parse)
        .collect()
}

/// What is mounted at `point` itself: of several mounts on top of each other, the last.
pub(super) fn mounted_at(point: &Path) -> Result<Option<MountPoint>, FilesystemError> {
    let found = mount_points()?;
    Ok(found
        .into_iter()
        .rev()
        .find(|mount| mount.point.as_os_str().as_bytes() == point.as_os_str().as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"\
36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
37 35 0:5 /nbd0 /pub/dev rw,nosuid shared:2 master:1 propagate_from:3 - devtmpfs udev rw,size=4k
38 35 43:0 / /with\\040space\\011tab\\134back\\012line rw - ext4 /dev/nbd0 ro
39 35 0:41 / /b rw,relatime - btrfs /dev/nbd1 rw,space_cache=v2
40 35 0:42 / /empty rw -  none
";

    #[test]
    fn lines_of_every_shape() {
        let found = parse(TEXT);
        assert_eq!(found.len(), 5);
        assert_eq!(found[0].device, (98, 0));
        assert_eq!(found[0].root, Path::new("/mnt1"));
        assert_eq!(found[0].options, ["rw", "noatime"]);
        assert_eq!(found[1].kind, "devtmpfs");
        assert_eq!(found[2].point, Path::new("/with space\ttab\\back\nline"));
        assert!(found[2].is_filesystem_read_only() && !found[2].is_read_only());
        assert_eq!(found[3].source, Path::new("/dev/nbd1"));
    }

    #[test]
    fn what_is_cut_short_is_no_mount() {
        let line = TEXT.split(|&b| b == b'\n').next().unwrap();
        let end = line.windows(3).position(|w| w == b" - ").unwrap() + 3;
        for length in 0..end {
            assert_eq!(MountPoint::parse(&line[..length]), None, "{length}");
        }
    }

    #[test]
    fn escapes_that_are_none_stay() {
        for (field, path) in [
            ("\\04", "\\04"),
            ("\\048", "\\048"),
            ("\\777", "\\777"),
            ("a\\", "a\\"),
        ] {
            assert_eq!(unescape(field.as_bytes()), Path::new(path));
        }
    }

    #[test]
    fn the_kernel_has_a_root() {
        assert!(mounted_at(Path::new("/")).unwrap().is_some());
        assert_eq!(mounted_at(Path::new("/nonexistent")).unwrap(), None);
    }
}
