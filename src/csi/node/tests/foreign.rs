//! Volumes on servers that are not Hawser's: known from the request only, never formatted unless that says so.

use super::*;
use crate::tls::{Authority, Leaf, Side};

const HANDLE: &str = "legacy/disk-1";

/// A node that is asked for a foreign volume, whose device is a file of zeros.
struct Elsewhere {
    node: Fixture,
    secrets: HashMap<String, String>,
    context: HashMap<String, String>,
}

impl Elsewhere {
    async fn new(extra: &[(&str, &str)]) -> Self {
        let mut node = Fixture::mounted().await;
        node.volume = VolumeId::foreign(HANDLE);
        node.device_of(HANDLE);
        let issued = Authority::temporary()
            .unwrap()
            .issue(&Leaf::new(Side::Client, vec!["node.example".into()]))
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let uri = ("uri", "nbds://storage.example/disk");
        let context = std::iter::once(&uri).chain(extra);
        Self {
            node,
            secrets: issued
                .into_iter()
                .map(|(key, value)| (key, text(value)))
                .collect(),
            context: context
                .map(|&(key, value)| (key.into(), value.into()))
                .collect(),
        }
    }

    fn to_stage(&self) -> csi::NodeStageVolumeRequest {
        csi::NodeStageVolumeRequest {
            volume_id: HANDLE.into(),
            secrets: self.secrets.clone(),
            volume_context: self.context.clone(),
            ..self.node.to_stage()
        }
    }

    fn to_publish(&self) -> csi::NodePublishVolumeRequest {
        csi::NodePublishVolumeRequest {
            volume_id: HANDLE.into(),
            secrets: self.secrets.clone(),
            volume_context: self.context.clone(),
            ..self.node.to_publish("pod")
        }
    }

    async fn unstage(&self) {
        let request = csi::NodeUnstageVolumeRequest {
            volume_id: HANDLE.into(),
            staging_target_path: self.node.path("staging"),
        };
        let unstaged = self.node.service.node_unstage_volume(Request::new(request));
        unstaged.await.unwrap();
        assert_eq!(self.node.machine.attached(), 0);
    }

    async fn unpublish(&self) {
        let request = csi::NodeUnpublishVolumeRequest {
            volume_id: HANDLE.into(),
            target_path: self.node.path("pod"),
        };
        let service = &self.node.service;
        service
            .node_unpublish_volume(Request::new(request))
            .await
            .unwrap();
    }

    async fn refused(&self, request: csi::NodeStageVolumeRequest, code: Code, part: &str) {
        let refused = self.node.stage(request).await.unwrap_err();
        let message = refused.message();
        assert!(
            refused.code() == code && message.contains(part),
            "{refused:?}"
        );
        assert_eq!(self.node.machine.attached(), 0);
    }
}

impl Fixture {
    fn device_of(&self, handle: &str) {
        let path = self.machine.device_path(&VolumeId::foreign(handle));
        File::create(path).unwrap().set_len(SIZE).unwrap();
    }
}

#[tokio::test]
async fn an_empty_export_is_formatted_only_on_request_and_never_twice() {
    let volume = Elsewhere::new(&[]).await;
    volume
        .refused(
            volume.to_stage(),
            Code::FailedPrecondition,
            "format: if-empty",
        )
        .await;

    let volume = Elsewhere::new(&[("format", "if-empty")]).await;
    volume.node.stage(volume.to_stage()).await.unwrap();
    volume.node.stage(volume.to_stage()).await.unwrap();
    volume.unstage().await;
    volume.unstage().await;
    // Found as it was left.
    volume.node.stage(volume.to_stage()).await.unwrap();
    volume.unstage().await;
    volume.node.device_of(HANDLE);
    volume
        .refused(
            volume.to_stage(),
            Code::FailedPrecondition,
            "may have lost data",
        )
        .await;
}

#[tokio::test]
async fn a_file_system_of_others_is_mounted_as_it_is_and_never_formatted_over() {
    let volume = Elsewhere::new(&[]).await;
    let path = volume.node.machine.device_path(&VolumeId::foreign(HANDLE));
    let made = std::process::Command::new("mkfs.ext4")
        .args(["-q", "-F"])
        .arg(&path)
        .status();
    assert!(made.unwrap().success());
    let mut as_xfs = volume.to_stage();
    as_xfs.volume_capability = Some(VolumeCapability {
        access_type: Some(AccessType::Mount(MountVolume {
            fs_type: "xfs".into(),
            ..MountVolume::default()
        })),
        ..volume.node.capability(volume.node.mode).unwrap()
    });
    volume
        .refused(as_xfs, Code::FailedPrecondition, "ask for ext4")
        .await;
    volume.node.stage(volume.to_stage()).await.unwrap();
    assert_eq!(
        volume
            .node
            .machine
            .foreign
            .lock()
            .unwrap()
            .as_ref()
            .unwrap()
            .host,
        "storage.example"
    );
}

#[tokio::test]
async fn the_request_must_say_where_it_is_and_bring_a_secret() {
    let volume = Elsewhere::new(&[]).await;
    let mut without = volume.to_stage();
    without.secrets.clear();
    volume
        .refused(without, Code::Unauthenticated, "nodeStageSecretRef")
        .await;
    let mut nowhere = volume.to_stage();
    nowhere.volume_context.clear();
    volume.refused(nowhere, Code::NotFound, HANDLE).await;
    let mut as_ours = volume.to_stage();
    as_ours.volume_id = VolumeId::from_bytes([1; 16]).to_string();
    volume
        .refused(as_ours, Code::InvalidArgument, "another name")
        .await;
    let mut plain = volume.to_stage();
    plain
        .volume_context
        .insert("uri".into(), "nbd://storage.example/disk".into());
    volume.refused(plain, Code::InvalidArgument, "nbds").await;
}

#[tokio::test]
async fn the_whole_way_with_a_reboot_and_a_new_secret() {
    let mut volume = Elsewhere::new(&[("format", "if-empty")]).await;
    volume.node.stage(volume.to_stage()).await.unwrap();
    volume.node.publish(volume.to_publish()).await.unwrap();
    // As the kubelet does again and again, with a Secret that may be another.
    volume.node.publish(volume.to_publish()).await.unwrap();
    assert_eq!(volume.node.machine.renewed.load(Ordering::Relaxed), 2);
    let mut moved = volume.to_stage();
    moved
        .volume_context
        .insert("uri".into(), "nbds://other.example/disk".into());
    assert_eq!(code(volume.node.stage(moved).await), Code::AlreadyExists);

    volume.node.machine.reboot();
    volume.node.restart();
    volume.node.publish(volume.to_publish()).await.unwrap();
    assert_eq!(volume.node.machine.mounted().len(), 2);
    volume.unpublish().await;
    volume.unstage().await;
}

#[tokio::test]
async fn it_grows_to_what_its_server_offers() {
    let volume = Elsewhere::new(&[("format", "if-empty")]).await;
    volume.node.stage(volume.to_stage()).await.unwrap();
    let expand = csi::NodeExpandVolumeRequest {
        volume_id: HANDLE.into(),
        volume_path: volume.node.path("staging"),
        capacity_range: Some(CapacityRange {
            required_bytes: DOUBLE,
            limit_bytes: 0,
        }),
        ..csi::NodeExpandVolumeRequest::default()
    };
    let expanded = volume
        .node
        .service
        .node_expand_volume(Request::new(expand))
        .await;
    assert_eq!(expanded.unwrap().into_inner().capacity_bytes, DOUBLE);
    assert_eq!(volume.node.machine.grown.load(Ordering::Relaxed), 1);
}
