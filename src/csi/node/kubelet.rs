//! What the kubelet calls a volume. No call says it, but some of its paths are made of it.
//!
//! It is good for telling people only: a kubelet may make its paths otherwise tomorrow, and other orchestrators do.

use std::path::Path;

/// The PersistentVolume that is published or, of a raw block device, staged at `path`, as far as the path tells.
pub(super) fn persistent_volume(path: &Path) -> Option<&str> {
    let below = |path: &Path, folder| path.parent().is_some_and(|above| above.ends_with(folder));
    let named = match path.parent()? {
        pod if below(pod, "volumes/kubernetes.io~csi") || below(pod, "volumeDevices/publish") => {
            pod
        }
        _ if below(path, "volumeDevices/staging") => path,
        _ => return None,
    };
    named.file_name()?.to_str()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_in_the_paths_that_the_kubelet_makes_of_it() {
        for (path, name) in [
            (
                "pods/69dd9d97/volumes/kubernetes.io~csi/disk/mount",
                Some("disk"),
            ),
            (
                "plugins/kubernetes.io/csi/volumeDevices/publish/disk/69dd9d97",
                Some("disk"),
            ),
            (
                "plugins/kubernetes.io/csi/volumeDevices/staging/disk",
                Some("disk"),
            ),
            (
                "plugins/kubernetes.io/csi/csi.hawser.dev/7fd4ed3c/globalmount",
                None,
            ),
            ("somewhere/else", None),
        ] {
            let path = Path::new("/var/lib/kubelet").join(path);
            assert_eq!(persistent_volume(&path), name, "{}", path.display());
        }
        assert_eq!(persistent_volume(Path::new("/")), None);
    }
}
