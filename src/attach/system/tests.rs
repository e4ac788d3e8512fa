use super::*;
use crate::volumes::{AttachmentId, VolumeId};

/// A kernel made of files.
struct Fake {
    root: tempfile::TempDir,
    system: System,
}

impl Fake {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let system = System {
            sys: root.path().join("sys"),
            proc: root.path().join("proc"),
            dev: root.path().join("dev"),
        };
        Self { root, system }
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.root.path().join(path)).unwrap()
    }

    fn remove(&self, path: &str) {
        fs::remove_file(self.root.path().join(path)).unwrap();
    }
}

fn backend(volume: u8) -> Backend {
    Backend {
        volume: VolumeId::from_bytes([volume; 16]),
        attachment: AttachmentId::from_bytes([9; 16]),
    }
}

#[test]
fn k10_devices_are_found_by_their_backend_identifiers() {
    let fake = Fake::new();
    assert_eq!(fake.system.devices().unwrap(), []);
    fake.write("sys/block/nbd10/backend", &format!("{}\n", backend(1)));
    fake.write("sys/block/nbd2/backend", &format!("{}\n", backend(2)));
    fake.write("sys/block/nbd3/backend", "somebody else's\n");
    fake.write("sys/block/nbd4/size", "0\n");
    fake.write("sys/block/sda/backend", &format!("{}\n", backend(3)));
    fake.write("sys/block/nbdx/backend", &format!("{}\n", backend(4)));
    assert_eq!(
        fake.system.devices().unwrap(),
        [(2, backend(2)), (10, backend(1))]
    );
    assert_eq!(fake.system.backend(3).unwrap(), None);
    assert_eq!(fake.system.backend(77).unwrap(), None);
}

#[test]
fn sizes_are_in_sectors() {
    let fake = Fake::new();
    fake.write("sys/block/nbd0/size", "8388608\n");
    assert_eq!(fake.system.size_bytes(0).unwrap(), 4 << 30);
    fake.write("sys/block/nbd0/size", "garbage\n");
    assert!(fake.system.size_bytes(0).is_err());
    fake.write("sys/block/nbd0/size", &format!("{}\n", u64::MAX));
    assert!(fake.system.size_bytes(0).is_err());
}

#[test]
fn k30_a_device_is_gone_only_when_nothing_is_left() {
    let fake = Fake::new();
    fake.write("sys/block/nbd0/size", "0\n");
    fake.write("sys/block/nbd0/inflight", "       0        0\n");
    fs::create_dir_all(fake.root.path().join("sys/block/nbd0/holders")).unwrap();
    assert_eq!(fake.system.leftover(0).unwrap(), None);
    for (path, text) in [
        ("sys/block/nbd0/pid", "4711\n"),
        ("sys/block/nbd0/backend", "hawser:x\n"),
        ("sys/block/nbd0/holders/dm-0", ""),
    ] {
        fake.write(path, text);
        assert!(fake.system.leftover(0).unwrap().is_some(), "{path}");
        fake.remove(path);
    }
    fake.write("sys/block/nbd0/inflight", "       1        0\n");
    let left = fake.system.leftover(0).unwrap().unwrap();
    assert!(left.contains("under way"), "{left}");
    fake.write("sys/block/nbd0/inflight", "       0        0\n");
    fake.write("sys/block/nbd0/size", "8\n");
    let left = fake
        .system
        .wait_until_gone(0, Duration::from_millis(30))
        .unwrap();
    assert!(left.unwrap().contains("4096"));
}

#[test]
fn mounts_of_file_systems_and_of_raw_nodes_are_seen() {
    let fake = Fake::new();
    fake.write("sys/block/nbd3/dev", "43:96\n");
    fake.write("sys/block/nbd1/dev", "43:32\n");
    fake.write("sys/block/nbd10/dev", "43:320\n");
    fake.write(
        "proc/self/mountinfo",
        "22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n\
         90 22 43:96 / /stage/three rw,relatime shared:5 - ext4 /dev/nbd3 rw\n\
         91 22 0:6 /nbd10 /publish/ten rw,nosuid - devtmpfs udev rw\n",
    );
    let mounted = |index| fake.system.mounted_at(index).unwrap();
    assert_eq!(mounted(3).as_deref(), Some("/stage/three"));
    assert_eq!(mounted(10).as_deref(), Some("/publish/ten"));
    assert_eq!(mounted(1), None);
}

#[test]
fn k12_live_sockets_are_the_established_ones() {
    let fake = Fake::new();
    fake.write(
        "proc/net/tcp",
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
           0: 0100007F:2A39 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 100 1 0\n\
           1: 0100007F:D2F0 0100007F:2A39 01 00000000:00000000 02:000000A3 00000000     0        0 4711 2 0\n\
           2: 0100007F:D2F1 0100007F:2A39 08 00000000:00000001 00:00000000 00000000     0        0 4712 1 0\n",
    );
    fake.write(
        "proc/net/tcp6",
        "  sl  local_address                         remote_address                        st\n\
           0: 0000000000000000FFFF00000100007F:D2F2 0000000000000000FFFF00000100007F:2A39 01 00000000:00000000 \
         00:00000000 00000000     0        0 4713 1 0\n",
    );
    assert_eq!(
        fake.system.established_sockets().unwrap(),
        HashSet::from([4711, 4713])
    );
    fake.remove("proc/net/tcp6");
    assert_eq!(
        fake.system.established_sockets().unwrap(),
        HashSet::from([4711])
    );
    fake.remove("proc/net/tcp");
    assert!(fake.system.established_sockets().unwrap().is_empty());
}

#[test]
fn k29_requests_are_as_large_as_the_server_likes() {
    let fake = Fake::new();
    let queue = |name| format!("sys/block/nbd0/queue/{name}");
    for (name, text) in [
        ("max_hw_sectors_kb", "32768\n"),
        ("max_sectors_kb", "1280\n"),
        ("read_ahead_kb", "128\n"),
        ("scheduler", "[mq-deadline] none\n"),
    ] {
        fake.write(&queue(name), text);
    }
    fake.system.tune(0, Some(32 << 20));
    assert_eq!(fake.read(&queue("max_sectors_kb")), "1024");
    assert_eq!(fake.read(&queue("read_ahead_kb")), "1024");
    assert_eq!(fake.read(&queue("scheduler")), "none");
    fake.system.tune(0, Some(64 << 10));
    assert_eq!(fake.read(&queue("max_sectors_kb")), "64");
    fake.write(&queue("max_hw_sectors_kb"), "512\n");
    fake.system.tune(0, None);
    assert_eq!(fake.read(&queue("max_sectors_kb")), "512");
}

#[test]
fn kernel_tls_is_a_word_among_the_protocols() {
    let fake = Fake::new();
    let file = "proc/sys/net/ipv4/tcp_available_ulp";
    assert!(!fake.system.has_kernel_tls());
    fake.write(file, "espintcp mptcp\n");
    assert!(!fake.system.has_kernel_tls());
    fake.write(file, "espintcp mptcp tls\n");
    assert!(fake.system.has_kernel_tls());
}

#[test]
fn a_node_that_appears_late_is_waited_for() {
    let fake = Fake::new();
    assert!(
        fake.system
            .wait_for_node(0, Duration::from_millis(20))
            .is_err()
    );
    fake.write("dev/nbd0", "");
    fake.system.wait_for_node(0, Duration::ZERO).unwrap();
}

#[test]
fn partitions_take_their_share_of_the_minor_numbers() {
    for (partitions, most) in [
        (None, 1 << 15),
        (Some("16\n"), 1 << 15),
        (Some("0\n"), 1 << 20),
        (Some("15\n"), 1 << 16),
        (Some("255\n"), 1 << 12),
        (Some("4294967295"), 1),
        (Some("many"), 1 << 15),
    ] {
        assert_eq!(most_devices(partitions), most, "{partitions:?}");
    }
}
