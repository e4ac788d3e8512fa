//! What is staged, what is formatted, what is refused.

use super::*;

#[tokio::test]
async fn it_is_formatted_once_and_never_again() {
    let node = Fixture::mounted().await;
    node.stage(node.to_stage()).await.unwrap();
    let done = Format::Done { fs: "ext4".into() };
    assert_eq!(node.format().await, done);
    node.unstage().await.unwrap();
    node.stage(node.to_stage()).await.unwrap();
    node.unstage().await.unwrap();
    // The file system is gone, whoever did that: it is not made anew over what may be left.
    node.device().write_all_at(&[0; 1 << 20], 0).unwrap();
    node.device().set_len(0).unwrap();
    node.device().set_len(SIZE).unwrap();
    let refused = node.stage(node.to_stage()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(
        refused.message().contains("not formatted again"),
        "{}",
        refused.message()
    );
    node.assert_clean();
}

#[tokio::test]
async fn what_is_not_empty_or_cannot_be_read_is_not_formatted() {
    let node = Fixture::mounted().await;
    node.device()
        .write_all_at(b"somebody's data", SIZE - 100)
        .unwrap();
    let refused = node.stage(node.to_stage()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert_eq!(node.format().await, Format::Never);
    node.assert_clean();

    node.device().set_len(0).unwrap();
    let refused = node.stage(node.to_stage()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert_eq!(node.format().await, Format::Never);
    node.assert_clean();
}

#[tokio::test]
async fn an_mkfs_that_was_broken_off_is_done_again() {
    let node = Fixture::mounted().await;
    let started = Format::Started { fs: "ext4".into() };
    NodeVolumes::set_format(node.memory.as_ref(), &node.volume, started)
        .await
        .unwrap();
    node.device()
        .write_all_at(b"half a superblock", 1024)
        .unwrap();
    node.stage(node.to_stage()).await.unwrap();
    assert_eq!(node.format().await, Format::Done { fs: "ext4".into() });
}

#[tokio::test]
async fn another_file_system_than_that_of_the_record_is_refused() {
    let node = Fixture::mounted().await;
    node.stage(node.to_stage()).await.unwrap();
    node.unstage().await.unwrap();
    let mut request = node.to_stage();
    request.volume_capability = Some(VolumeCapability {
        access_type: Some(AccessType::Mount(MountVolume {
            fs_type: "xfs".into(),
            ..MountVolume::default()
        })),
        ..node.capability(node.mode).unwrap()
    });
    assert_eq!(code(node.stage(request).await), Code::FailedPrecondition);
}

#[tokio::test]
async fn a_read_only_attachment_is_mounted_so_and_never_formatted() {
    let node = Fixture::mounted().await;
    let mut request = node.to_stage();
    request
        .publish_context
        .insert(READ_ONLY.into(), "true".into());
    let refused = node.stage(request.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("read-only attachment"));
    node.assert_clean();
    node.stage(node.to_stage()).await.unwrap();
    node.unstage().await.unwrap();
    node.stage(request).await.unwrap();
    let staging = PathBuf::from(node.path("staging"));
    assert_eq!(node.machine.options_at(&staging), ["ro"]);
}

#[tokio::test]
async fn requests_that_make_no_sense() {
    let node = Fixture::mounted().await;
    let good = || node.to_stage();
    let context = |key: &str, value: &str| HashMap::from([(key.to_owned(), value.to_owned())]);
    let cases = [
        (
            Code::InvalidArgument,
            csi::NodeStageVolumeRequest {
                volume_id: String::new(),
                ..good()
            },
        ),
        (
            Code::NotFound,
            csi::NodeStageVolumeRequest {
                volume_id: "fake".into(),
                ..good()
            },
        ),
        (
            Code::NotFound,
            csi::NodeStageVolumeRequest {
                volume_id: VolumeId::from_bytes([7; 16]).to_string(),
                ..good()
            },
        ),
        (
            Code::InvalidArgument,
            csi::NodeStageVolumeRequest {
                staging_target_path: String::new(),
                ..good()
            },
        ),
        (
            Code::InvalidArgument,
            csi::NodeStageVolumeRequest {
                staging_target_path: "a/b".into(),
                ..good()
            },
        ),
        (
            Code::InvalidArgument,
            csi::NodeStageVolumeRequest {
                volume_capability: None,
                ..good()
            },
        ),
        (
            Code::FailedPrecondition,
            csi::NodeStageVolumeRequest {
                volume_capability: node.capability(Mode::MultiNodeMultiWriter),
                ..good()
            },
        ),
        (
            Code::InvalidArgument,
            csi::NodeStageVolumeRequest {
                publish_context: HashMap::new(),
                ..good()
            },
        ),
        (
            Code::InvalidArgument,
            csi::NodeStageVolumeRequest {
                publish_context: context(ATTACHMENT, "x"),
                ..good()
            },
        ),
        (
            Code::InvalidArgument,
            csi::NodeStageVolumeRequest {
                volume_context: context("colour", "red"),
                ..good()
            },
        ),
        (
            Code::InvalidArgument,
            csi::NodeStageVolumeRequest {
                volume_context: context("connections", "9"),
                ..good()
            },
        ),
        (
            Code::FailedPrecondition,
            csi::NodeStageVolumeRequest {
                staging_target_path: node.path("vanished"),
                ..good()
            },
        ),
        (
            Code::InvalidArgument,
            csi::NodeStageVolumeRequest {
                staging_target_path: node
                    .machine
                    .device_path(&node.volume)
                    .to_str()
                    .unwrap()
                    .into(),
                ..good()
            },
        ),
    ];
    for (number, (expected, request)) in cases.into_iter().enumerate() {
        let result = node.stage(request).await;
        assert_eq!(code(result), expected, "case {number}");
    }
    node.assert_clean();
    let mut added_by_kubernetes = good();
    added_by_kubernetes.volume_context = context("connections", "1");
    added_by_kubernetes.volume_context.insert(
        "storage.kubernetes.io/csiProvisionerIdentity".into(),
        "x".into(),
    );
    node.stage(added_by_kubernetes).await.unwrap();
}

#[tokio::test]
async fn secrets_of_the_request_must_be_those_of_the_volume() {
    let node = Fixture::mounted().await;
    let secrets = |volume: &VolumeId| -> HashMap<String, String> {
        let authority = crate::tls::Authority::temporary().unwrap();
        let parts = authority.issue_client(volume).unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        parts
            .into_iter()
            .map(|(key, bytes)| (key, text(bytes)))
            .collect()
    };
    let mut swapped = node.to_stage();
    swapped.secrets = secrets(&VolumeId::from_bytes([3; 16]));
    let key = swapped.secrets["tls.key"].clone();
    let refused = node.stage(swapped.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert!(!refused.message().contains(key.lines().nth(1).unwrap()));
    for missing in ["tls.crt", "tls.key", "ca.crt"] {
        let mut request = swapped.clone();
        request.secrets.remove(missing);
        let refused = node.stage(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated);
        assert!(refused.message().contains(missing), "{}", refused.message());
    }
    node.assert_clean();
    let mut right = node.to_stage();
    right.secrets = secrets(&node.volume);
    node.stage(right).await.unwrap();
    let mut others = node.to_stage();
    others.secrets = HashMap::from([("password".to_owned(), "x".to_owned())]);
    node.unstage().await.unwrap();
    node.stage(others).await.unwrap();
}

#[tokio::test]
async fn staged_otherwise_already() {
    let node = Fixture::mounted().await;
    node.stage(node.to_stage()).await.unwrap();
    let mut other_mode = node.to_stage();
    other_mode.volume_capability = node.capability(Mode::SingleNodeMultiWriter);
    assert_eq!(code(node.stage(other_mode).await), Code::AlreadyExists);

    fs::create_dir(node.path("elsewhere")).unwrap();
    let mut elsewhere = node.to_stage();
    elsewhere.staging_target_path = node.path("elsewhere");
    let refused = node.stage(elsewhere).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains(&node.path("staging")));

    // Unstaging from where it is not staged does nothing.
    let request = csi::NodeUnstageVolumeRequest {
        volume_id: node.volume.to_string(),
        staging_target_path: node.path("elsewhere"),
    };
    node.service
        .node_unstage_volume(Request::new(request))
        .await
        .unwrap();
    assert_eq!(node.machine.attached(), 1);
}

#[tokio::test]
async fn a_device_that_is_in_use_elsewhere_is_neither_mounted_nor_detached() {
    let node = Fixture::mounted().await;
    node.machine.held_elsewhere.store(true, Ordering::Relaxed);
    assert_eq!(
        code(node.stage(node.to_stage()).await),
        Code::FailedPrecondition
    );
    node.machine.held_elsewhere.store(false, Ordering::Relaxed);
    node.stage(node.to_stage()).await.unwrap();
    node.machine.held_elsewhere.store(true, Ordering::Relaxed);
    assert_eq!(code(node.unstage().await), Code::FailedPrecondition);
    assert_eq!(node.machine.attached(), 1);
    node.machine.held_elsewhere.store(false, Ordering::Relaxed);
    node.unstage().await.unwrap();
    node.assert_clean();
}

#[tokio::test]
async fn a_volume_that_grew_while_it_was_away_is_grown_when_staged() {
    let node = Fixture::mounted().await;
    node.stage(node.to_stage()).await.unwrap();
    node.unstage().await.unwrap();
    node.stage(node.to_stage()).await.unwrap();
    node.unstage().await.unwrap();
    assert_eq!(node.machine.grown.load(Ordering::Relaxed), 0);
    node.device().set_len(2 * SIZE).unwrap();
    node.stage(node.to_stage()).await.unwrap();
    assert_eq!(node.machine.grown.load(Ordering::Relaxed), 1);
}
