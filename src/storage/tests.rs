use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::volumes::{
    AccessMode, Attachment, AttachmentId, Content, Format, Volume, VolumeOptions,
};

const MIB: u64 = 1 << 20;

fn id(n: u8) -> VolumeId {
    VolumeId::from_bytes([n; 16])
}

fn volume(n: u8, size_bytes: u64) -> Volume {
    Volume {
        id: id(n),
        name: format!("pvc-{n}"),
        size_bytes,
        options: VolumeOptions {
            content: Content::Filesystem,
            context: BTreeMap::from([("fsType".to_owned(), "ext4".to_owned())]),
        },
        format: Format::Never,
        attachments: Vec::new(),
    }
}

fn open(directory: &Path) -> Pool {
    Pool::open(directory, "1000".parse().unwrap()).unwrap()
}

/// Every name below `directory` that is not a volume's own.
fn leftovers(directory: &Path) -> Vec<String> {
    fs::read_dir(directory.join("volumes"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.parse::<VolumeId>().is_err())
        .collect()
}

#[test]
fn a_volume_is_sparse_private_and_read_back() {
    let home = TempDir::new().unwrap();
    let made = open(home.path()).create(volume(1, 64 * MIB)).unwrap();
    let pool = open(home.path());
    assert_eq!(pool.find(&id(1)).unwrap(), made);
    let directory = pool.directory(&id(1));
    let data = fs::metadata(directory.join("data")).unwrap();
    assert_eq!((data.len(), data.blocks()), (64 * MIB, 0));
    assert_eq!(data.permissions().mode() & 0o777, 0o600);
    assert_eq!(
        fs::metadata(directory).unwrap().permissions().mode() & 0o777,
        0o700
    );
    pool.check(&id(1)).unwrap();
    assert!(matches!(
        pool.create(volume(1, MIB)),
        Err(StorageError::Exists(_))
    ));
}

#[test]
fn a_pool_has_one_owner() {
    let home = TempDir::new().unwrap();
    let pool = open(home.path());
    assert!(matches!(
        Pool::open(home.path(), Overcommit::NONE),
        Err(StorageError::Busy(_))
    ));
    drop(pool);
    open(home.path());
}

#[test]
fn a_pool_keeps_its_identity() {
    let (home, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    assert_eq!(Pool::identity_of(home.path()).unwrap(), None);
    let identity = open(home.path()).identity().to_owned();
    assert_eq!(open(home.path()).identity(), identity);
    assert_eq!(
        Pool::identity_of(home.path()).unwrap(),
        Some(identity.clone())
    );
    assert_ne!(open(other.path()).identity(), identity);
}

#[test]
fn what_a_killed_creation_or_deletion_left_is_removed() {
    let home = TempDir::new().unwrap();
    let pool = open(home.path());
    pool.create(volume(1, MIB)).unwrap();
    pool.create(volume(2, MIB)).unwrap();
    drop(pool);
    let volumes = home.path().join("volumes");
    fs::create_dir(volumes.join(format!(".creating-{}", id(3)))).unwrap();
    fs::rename(
        volumes.join(id(2).as_str()),
        volumes.join(format!(".deleting-{}", id(2))),
    )
    .unwrap();
    let pool = open(home.path());
    assert_eq!(leftovers(home.path()), Vec::<String>::new());
    assert!(pool.find(&id(1)).is_ok());
    assert!(matches!(pool.find(&id(2)), Err(StorageError::NotFound(_))));
    pool.create(volume(2, MIB)).unwrap();
    pool.create(volume(3, MIB)).unwrap();
}

#[test]
fn deletion_removes_everything_and_may_be_repeated() {
    let home = TempDir::new().unwrap();
    let pool = open(home.path());
    pool.create(volume(1, MIB)).unwrap();
    pool.delete(&id(1)).unwrap();
    pool.delete(&id(1)).unwrap();
    assert_eq!(
        fs::read_dir(home.path().join("volumes")).unwrap().count(),
        0
    );
    assert!(!pool.holds(&id(1)));
    pool.create(volume(1, 2 * MIB)).unwrap();
}

#[test]
fn changes_are_durable_and_refused_ones_leave_no_trace() {
    let home = TempDir::new().unwrap();
    let pool = open(home.path());
    pool.create(volume(1, MIB)).unwrap();
    let attachment = Attachment {
        id: AttachmentId::from_bytes([7; 16]),
        node: "node-a".to_owned(),
        read_only: false,
        mode: AccessMode::SingleNodeWriter,
    };
    let changed = pool
        .update::<StorageError>(&id(1), |record| {
            record.revoking.push(attachment);
            record.volume.format = Format::Done {
                fs: "xfs".to_owned(),
            };
            Ok(())
        })
        .unwrap();
    let refused = pool.update(&id(1), |record| {
        record.volume.format = Format::Never;
        Err(StorageError::InFlight(id(1)))
    });
    assert!(refused.is_err());
    drop(pool);
    assert_eq!(open(home.path()).find(&id(1)).unwrap(), changed);
}

#[test]
fn growth_changes_file_and_record_and_never_shrinks() {
    let home = TempDir::new().unwrap();
    let pool = open(home.path());
    pool.create(volume(1, MIB)).unwrap();
    for (wanted, expected) in [(3 * MIB, 3 * MIB), (3 * MIB, 3 * MIB), (MIB, 3 * MIB)] {
        assert_eq!(
            pool.grow(&id(1), wanted).unwrap().volume.size_bytes,
            expected
        );
        let data = fs::metadata(pool.directory(&id(1)).join("data")).unwrap();
        assert_eq!(data.len(), expected);
    }
}

#[test]
fn growth_that_was_interrupted_is_completed() {
    let home = TempDir::new().unwrap();
    let pool = open(home.path());
    pool.create(volume(1, MIB)).unwrap();
    let data = OpenOptions::new()
        .write(true)
        .open(pool.directory(&id(1)).join("data"))
        .unwrap();
    drop(pool);
    data.set_len(2 * MIB).unwrap();
    assert_eq!(
        open(home.path()).find(&id(1)).unwrap().volume.size_bytes,
        2 * MIB
    );
    assert_eq!(
        open(home.path()).find(&id(1)).unwrap().volume.size_bytes,
        2 * MIB
    );
}

#[test]
fn a_truncated_file_is_neither_served_nor_grown() {
    let home = TempDir::new().unwrap();
    let pool = open(home.path());
    pool.create(volume(1, 2 * MIB)).unwrap();
    let path = pool.directory(&id(1)).join("data");
    OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(MIB)
        .unwrap();
    for refused in [pool.check(&id(1)), pool.grow(&id(1), 4 * MIB).map(|_| ())] {
        let message = refused.unwrap_err().to_string();
        assert!(message.contains("truncated to 1048576 bytes"), "{message}");
    }
    assert_eq!(fs::metadata(&path).unwrap().len(), MIB);
    fs::remove_file(&path).unwrap();
    assert!(matches!(
        pool.check(&id(1)),
        Err(StorageError::Damaged { .. })
    ));
    pool.delete(&id(1)).unwrap();
}

#[test]
fn a_record_that_cannot_be_read_is_kept_and_said() {
    let home = TempDir::new().unwrap();
    let pool = open(home.path());
    for n in 1..=5 {
        pool.create(volume(n, MIB)).unwrap();
    }
    let record = |n| pool.directory(&id(n)).join("volume.json");
    fs::write(record(1), "{").unwrap();
    fs::remove_file(record(2)).unwrap();
    fs::copy(record(4), record(3)).unwrap();
    let newer = fs::read_to_string(record(4))
        .unwrap()
        .replace("\"version\": 1", "\"version\": 2");
    fs::write(record(4), newer).unwrap();
    drop(pool);
    let pool = open(home.path());
    for n in 1..=4 {
        assert!(
            matches!(pool.find(&id(n)), Err(StorageError::Damaged { .. })),
            "{n}"
        );
        assert!(
            matches!(pool.delete(&id(n)), Err(StorageError::Damaged { .. })),
            "{n}"
        );
        assert!(
            matches!(
                pool.create(volume(n, MIB)),
                Err(StorageError::Damaged { .. })
            ),
            "{n}"
        );
        assert!(pool.directory(&id(n)).join("data").exists());
    }
    let listed: Vec<_> = pool
        .list(None, 100)
        .iter()
        .map(|r| r.volume.id.clone())
        .collect();
    assert_eq!(listed, [id(5)]);
}

#[test]
fn lists_continue_where_they_ended() {
    let home = TempDir::new().unwrap();
    let pool = open(home.path());
    for n in [3, 1, 2] {
        pool.create(volume(n, MIB)).unwrap();
    }
    let ids = |after: Option<u8>, most| -> Vec<VolumeId> {
        let page = pool.list(after.map(id).as_ref(), most);
        page.iter().map(|record| record.volume.id.clone()).collect()
    };
    assert_eq!(ids(None, 2), [id(1), id(2)]);
    assert_eq!(ids(Some(2), 2), [id(3)]);
    assert_eq!(ids(Some(3), 2), []);
    assert_eq!(ids(None, 0), []);
}

#[test]
fn promises_end_where_the_ratio_ends() {
    let home = TempDir::new().unwrap();
    let pool = Pool::open(home.path(), Overcommit::NONE).unwrap();
    let all = pool.capacity().unwrap().available_bytes;
    // Other processes write to the same disk while this runs.
    let slack = all / 4 / 4096 * 4096;
    pool.create(volume(1, all - slack)).unwrap();
    let refused = pool.create(volume(2, all - slack)).unwrap_err();
    assert!(matches!(refused, StorageError::NoRoom { .. }), "{refused}");
    assert!(!pool.holds(&id(2)));
    let refused = pool.grow(&id(1), all + slack).unwrap_err();
    assert!(matches!(refused, StorageError::NoRoom { .. }), "{refused}");
    assert_eq!(pool.find(&id(1)).unwrap().volume.size_bytes, all - slack);
    assert!(pool.capacity().unwrap().available_bytes < 2 * slack);
    pool.delete(&id(1)).unwrap();
    pool.create(volume(2, all - slack)).unwrap();
}

#[test]
fn sizes_beyond_the_file_system_are_refused_and_leave_nothing() {
    let home = TempDir::new().unwrap();
    let pool = open(home.path());
    let refused = pool.create(volume(1, size::MAXIMUM)).unwrap_err();
    assert!(
        matches!(
            refused,
            StorageError::TooLarge { .. } | StorageError::NoRoom { .. }
        ),
        "{refused}"
    );
    assert_eq!(
        fs::read_dir(home.path().join("volumes")).unwrap().count(),
        0
    );
    assert!(!pool.holds(&id(1)));
}

#[test]
fn what_hands_put_mend_and_delete_is_noticed() {
    let (home, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let pool = open(home.path());
    let away = open(other.path());
    away.create(volume(1, MIB)).unwrap();
    pool.refresh(&id(1));
    assert!(pool.ids().is_empty());
    let directory = pool.directory(&id(1));
    fs::rename(away.directory(&id(1)), &directory).unwrap();
    pool.refresh(&id(1));
    assert_eq!(pool.find(&id(1)).unwrap().volume, volume(1, MIB));
    assert_eq!(pool.ids(), [id(1)]);

    let (record, aside) = (directory.join("volume.json"), directory.join("aside"));
    fs::rename(&record, &aside).unwrap();
    pool.refresh(&id(1));
    assert!(pool.find(&id(1)).is_ok());
    fs::rename(&directory, away.directory(&id(1))).unwrap();
    pool.refresh(&id(1));
    assert!(!pool.holds(&id(1)));
    fs::rename(away.directory(&id(1)), &directory).unwrap();
    pool.refresh(&id(1));
    assert!(matches!(
        pool.find(&id(1)),
        Err(StorageError::Damaged { .. })
    ));
    fs::rename(&aside, &record).unwrap();
    pool.refresh(&id(1));
    pool.check(&id(1)).unwrap();
}
