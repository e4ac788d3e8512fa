use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;

use tempfile::TempDir;
use tonic::Code;

use super::fake::{Fake, Fault};
use super::*;
use crate::csi::memory::{Memory, NODES};
use crate::proto::csi::volume_capability::access_mode::Mode;
use crate::proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use crate::proto::csi::{CapacityRange, VolumeCapability};
use crate::volumes::{self, Content, CreateRequest, Format, VolumeOptions, Volumes};

const SIZE: u64 = 16 << 20;
const DOUBLE: i64 = 32 << 20;

/// A machine, its volumes, and one volume that is attached to it at the controller.
struct Fixture {
    directory: TempDir,
    machine: Arc<Fake>,
    memory: Arc<Memory>,
    service: NodeService,
    volume: VolumeId,
    attachment: String,
    mode: Mode,
    content: Content,
}

impl Fixture {
    async fn with(content: Content, mode: Mode) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let memory = Arc::new(Memory::default());
        let request = CreateRequest {
            name: "a".into(),
            required_bytes: SIZE,
            limit_bytes: None,
            options: VolumeOptions {
                content,
                context: [("connections".to_owned(), "1".to_owned())].into(),
            },
        };
        let volume = memory.create(request).await.unwrap().id;
        let attached = memory
            .attach(
                &volume,
                NODES[0],
                volumes::AccessMode::SingleNodeWriter,
                false,
            )
            .await
            .unwrap();
        let machine = Fake::new(directory.path());
        let device = File::create(machine.device_path(&volume)).unwrap();
        device.set_len(SIZE).unwrap();
        fs::create_dir(directory.path().join("staging")).unwrap();
        Self {
            service: service(&machine, &memory, directory.path()),
            directory,
            machine,
            memory,
            volume,
            attachment: attached.id.to_string(),
            mode,
            content,
        }
    }

    async fn mounted() -> Self {
        Self::with(Content::Filesystem, Mode::SingleNodeWriter).await
    }

    /// The process ends and begins anew.
    fn restart(&mut self) {
        self.service = service(&self.machine, &self.memory, self.directory.path());
    }

    fn path(&self, name: &str) -> String {
        // As the kernel has it, whatever the temporary directory is called.
        let directory = fs::canonicalize(self.directory.path()).unwrap();
        directory.join(name).to_str().unwrap().to_owned()
    }

    fn capability(&self, mode: Mode) -> Option<VolumeCapability> {
        Some(VolumeCapability {
            access_mode: Some(AccessMode { mode: mode.into() }),
            access_type: Some(match self.content {
                Content::Block => AccessType::Block(BlockVolume {}),
                Content::Filesystem => AccessType::Mount(MountVolume::default()),
            }),
        })
    }

    fn publish_context(&self) -> HashMap<String, String> {
        HashMap::from([(ATTACHMENT.to_owned(), self.attachment.clone())])
    }

    fn to_stage(&self) -> csi::NodeStageVolumeRequest {
        csi::NodeStageVolumeRequest {
            volume_id: self.volume.to_string(),
            publish_context: self.publish_context(),
            staging_target_path: self.path("staging"),
            volume_capability: self.capability(self.mode),
            ..csi::NodeStageVolumeRequest::default()
        }
    }

    fn to_publish(&self, target: &str) -> csi::NodePublishVolumeRequest {
        csi::NodePublishVolumeRequest {
            volume_id: self.volume.to_string(),
            publish_context: self.publish_context(),
            staging_target_path: self.path("staging"),
            target_path: self.path(target),
            volume_capability: self.capability(self.mode),
            ..csi::NodePublishVolumeRequest::default()
        }
    }

    async fn stage(&self, request: csi::NodeStageVolumeRequest) -> Result<(), Status> {
        let response = self.service.node_stage_volume(Request::new(request)).await;
        response.map(|_| ())
    }

    async fn publish(&self, request: csi::NodePublishVolumeRequest) -> Result<(), Status> {
        let response = self
            .service
            .node_publish_volume(Request::new(request))
            .await;
        response.map(|_| ())
    }

    async fn unpublish(&self, target: &str) -> Result<(), Status> {
        let request = csi::NodeUnpublishVolumeRequest {
            volume_id: self.volume.to_string(),
            target_path: self.path(target),
        };
        let response = self
            .service
            .node_unpublish_volume(Request::new(request))
            .await;
        response.map(|_| ())
    }

    async fn unstage(&self) -> Result<(), Status> {
        let request = csi::NodeUnstageVolumeRequest {
            volume_id: self.volume.to_string(),
            staging_target_path: self.path("staging"),
        };
        let response = self
            .service
            .node_unstage_volume(Request::new(request))
            .await;
        response.map(|_| ())
    }

    async fn format(&self) -> Format {
        Volumes::find(self.memory.as_ref(), &self.volume)
            .await
            .unwrap()
            .format
    }

    fn device(&self) -> File {
        let path = self.machine.device_path(&self.volume);
        File::options().write(true).open(path).unwrap()
    }

    /// Nothing is left but the volume.
    fn assert_clean(&self) {
        assert_eq!(self.machine.mounted(), [""; 0].map(PathBuf::from));
        assert_eq!(self.machine.attached(), 0);
        let state = fs::read_dir(self.directory.path().join("state"));
        assert_eq!(
            state.map(Iterator::count).unwrap_or(0),
            0,
            "a record is left"
        );
    }
}

fn service(machine: &Arc<Fake>, memory: &Arc<Memory>, directory: &Path) -> NodeService {
    NodeService::on(
        Box::new(machine.clone()),
        NodeServices {
            node_id: NODES[0].into(),
            maximum_volumes: 3,
            volumes: memory.clone(),
            devices: machine.clone(),
            state: directory.join("state"),
        },
    )
}

fn code(result: Result<(), Status>) -> Code {
    result.err().map_or(Code::Ok, |status| status.code())
}

#[tokio::test]
async fn the_whole_way_and_every_call_twice() {
    for content in [Content::Filesystem, Content::Block] {
        let node = Fixture::with(content, Mode::SingleNodeWriter).await;
        for _ in 0..2 {
            node.stage(node.to_stage()).await.unwrap();
        }
        for _ in 0..2 {
            node.publish(node.to_publish("pod")).await.unwrap();
        }
        let target = PathBuf::from(node.path("pod"));
        assert_eq!(target.is_dir(), content == Content::Filesystem);
        assert_eq!(target.is_file(), content == Content::Block);
        assert!(node.machine.mounted().contains(&target));
        assert_eq!(code(node.unstage().await), Code::FailedPrecondition);
        for _ in 0..2 {
            node.unpublish("pod").await.unwrap();
        }
        assert!(!target.exists());
        for _ in 0..2 {
            node.unstage().await.unwrap();
        }
        node.assert_clean();
        assert_eq!(
            node.format().await == Format::Never,
            content == Content::Block
        );
    }
}

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
async fn a_place_that_is_taken() {
    let node = Fixture::mounted().await;
    let (staging, pod) = (
        PathBuf::from(node.path("staging")),
        PathBuf::from(node.path("pod")),
    );
    node.machine.mount_something("/dev/sda1", &staging);
    assert_eq!(
        code(node.stage(node.to_stage()).await),
        Code::FailedPrecondition
    );
    node.machine.reboot();
    node.stage(node.to_stage()).await.unwrap();

    fs::write(&pod, "").unwrap();
    assert_eq!(
        code(node.publish(node.to_publish("pod")).await),
        Code::FailedPrecondition
    );
    fs::remove_file(&pod).unwrap();
    fs::create_dir(&pod).unwrap();
    fs::write(pod.join("precious"), "data").unwrap();
    assert_eq!(
        code(node.publish(node.to_publish("pod")).await),
        Code::FailedPrecondition
    );
    assert_eq!(code(node.unpublish("pod").await), Code::FailedPrecondition);
    assert!(pod.join("precious").exists());
    fs::remove_file(pod.join("precious")).unwrap();
    node.machine.mount_something("/dev/sda1", &pod);
    assert_eq!(
        code(node.publish(node.to_publish("pod")).await),
        Code::FailedPrecondition
    );
    assert_eq!(code(node.unpublish("pod").await), Code::FailedPrecondition);
    assert_eq!(
        code(node.publish(node.to_publish("no/such/directory")).await),
        Code::FailedPrecondition
    );
}

#[tokio::test]
async fn publishing_follows_the_table_of_the_specification() {
    for (mode, second) in [
        (Mode::SingleNodeWriter, Code::FailedPrecondition),
        (Mode::SingleNodeSingleWriter, Code::FailedPrecondition),
        (Mode::SingleNodeMultiWriter, Code::Ok),
    ] {
        let node = Fixture::with(Content::Filesystem, mode).await;
        node.stage(node.to_stage()).await.unwrap();
        node.publish(node.to_publish("one")).await.unwrap();
        let mut changed = node.to_publish("one");
        changed.readonly = true;
        assert_eq!(code(node.publish(changed).await), Code::AlreadyExists);
        assert_eq!(
            code(node.publish(node.to_publish("two")).await),
            second,
            "{mode:?}"
        );
        node.unpublish("one").await.unwrap();
        node.publish(node.to_publish("two")).await.unwrap();
    }
}

#[tokio::test]
async fn publishing_needs_a_stage_and_all_arguments() {
    let node = Fixture::mounted().await;
    let refused = node.publish(node.to_publish("pod")).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let mut unknown = node.to_publish("pod");
    unknown.volume_id = VolumeId::from_bytes([7; 16]).to_string();
    assert_eq!(code(node.publish(unknown).await), Code::NotFound);
    let mut no_stage = node.to_publish("pod");
    no_stage.staging_target_path.clear();
    assert_eq!(code(node.publish(no_stage).await), Code::FailedPrecondition);
    let mut no_target = node.to_publish("pod");
    no_target.target_path.clear();
    assert_eq!(code(node.publish(no_target).await), Code::InvalidArgument);
    let mut no_capability = node.to_publish("pod");
    no_capability.volume_capability = None;
    assert_eq!(
        code(node.publish(no_capability).await),
        Code::InvalidArgument
    );
    let mut no_volume = node.to_publish("pod");
    no_volume.volume_id.clear();
    assert_eq!(code(node.publish(no_volume).await), Code::InvalidArgument);
    node.unpublish("pod").await.unwrap();
    node.unstage().await.unwrap();
}

#[tokio::test]
async fn read_only_and_groups() {
    let node = Fixture::mounted().await;
    node.stage(node.to_stage()).await.unwrap();
    let with_group = |target: &str, read_only| {
        let mut request = node.to_publish(target);
        request.readonly = read_only;
        request.volume_capability = Some(VolumeCapability {
            access_type: Some(AccessType::Mount(MountVolume {
                volume_mount_group: "2000".into(),
                ..MountVolume::default()
            })),
            ..node.capability(node.mode).unwrap()
        });
        request
    };
    node.publish(with_group("pod", true)).await.unwrap();
    assert_eq!(
        node.machine.options_at(Path::new(&node.path("pod"))),
        ["ro"]
    );
    assert_eq!(*node.machine.groups.lock().unwrap(), [0_u32; 0]);
    node.unpublish("pod").await.unwrap();
    node.publish(with_group("pod", false)).await.unwrap();
    assert_eq!(*node.machine.groups.lock().unwrap(), [2000]);
}

#[tokio::test]
async fn after_a_reboot_publishing_stages_again() {
    let mut node = Fixture::mounted().await;
    node.stage(node.to_stage()).await.unwrap();
    node.publish(node.to_publish("pod")).await.unwrap();
    node.machine.reboot();
    node.restart();
    // The first try fails on the way; the second must still know that the volume was staged.
    node.machine.fault_at(0, Fault::Fails);
    assert_eq!(
        code(node.publish(node.to_publish("pod")).await),
        Code::Unavailable
    );
    node.publish(node.to_publish("pod")).await.unwrap();
    assert_eq!(node.machine.mounted().len(), 2);
    node.unpublish("pod").await.unwrap();
    node.unstage().await.unwrap();
    node.assert_clean();
}

#[tokio::test]
async fn a_lost_or_damaged_record_is_made_good_by_the_kernel() {
    for damage in [None, Some("{\"volume\":")] {
        let mut node = Fixture::mounted().await;
        node.stage(node.to_stage()).await.unwrap();
        node.publish(node.to_publish("pod")).await.unwrap();
        let record = node
            .directory
            .path()
            .join(format!("state/{}.json", node.volume));
        match damage {
            None => fs::remove_file(&record).unwrap(),
            Some(text) => fs::write(&record, text).unwrap(),
        }
        node.restart();
        assert_eq!(code(node.unstage().await), Code::FailedPrecondition);
        node.publish(node.to_publish("pod")).await.unwrap();
        node.unpublish("pod").await.unwrap();
        node.unstage().await.unwrap();
        assert_eq!(
            (node.machine.mounted().len(), node.machine.attached()),
            (0, 0)
        );
    }
}

#[tokio::test]
async fn a_file_system_that_turned_read_only_gets_no_pod() {
    let node = Fixture::mounted().await;
    node.stage(node.to_stage()).await.unwrap();
    node.machine.turn_read_only();
    let refused = node.publish(node.to_publish("pod")).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("turned read-only"));
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
async fn stats_and_expansion_want_the_volume_where_it_is() {
    for content in [Content::Filesystem, Content::Block] {
        let node = Fixture::with(content, Mode::SingleNodeWriter).await;
        let stats = |path: String| {
            let request = csi::NodeGetVolumeStatsRequest {
                volume_id: node.volume.to_string(),
                volume_path: path,
                ..csi::NodeGetVolumeStatsRequest::default()
            };
            node.service.node_get_volume_stats(Request::new(request))
        };
        let expand = |path: String, required_bytes| {
            let request = csi::NodeExpandVolumeRequest {
                volume_id: node.volume.to_string(),
                volume_path: path,
                capacity_range: Some(CapacityRange {
                    required_bytes,
                    limit_bytes: 0,
                }),
                ..csi::NodeExpandVolumeRequest::default()
            };
            node.service.node_expand_volume(Request::new(request))
        };
        let pod = || node.path("pod");
        assert_eq!(stats(pod()).await.unwrap_err().code(), Code::NotFound);
        node.stage(node.to_stage()).await.unwrap();
        node.publish(node.to_publish("pod")).await.unwrap();
        let usage = stats(pod()).await.unwrap().into_inner().usage;
        match content {
            Content::Block => assert_eq!(
                (usage.len(), usage[0].total),
                (1, i64::try_from(SIZE).unwrap())
            ),
            Content::Filesystem => assert_eq!((usage.len(), usage[1].used), (2, 1)),
        }
        for wrong in ["some/path", "/", "/nonexistent"] {
            assert_eq!(
                stats(wrong.into()).await.unwrap_err().code(),
                Code::NotFound
            );
            assert_eq!(
                expand(wrong.into(), 1).await.unwrap_err().code(),
                Code::NotFound
            );
        }
        assert_eq!(
            stats(String::new()).await.unwrap_err().code(),
            Code::InvalidArgument
        );

        let too_early = expand(pod(), DOUBLE).await.unwrap_err();
        assert_eq!(too_early.code(), Code::OutOfRange);
        Volumes::grow(node.memory.as_ref(), &node.volume, 2 * SIZE, None)
            .await
            .unwrap();
        let before = node.machine.grown.load(Ordering::Relaxed);
        for path in [pod(), node.path("staging")] {
            let grown = expand(path, DOUBLE).await.unwrap().into_inner();
            assert_eq!(grown.capacity_bytes, DOUBLE);
        }
        let grown = node.machine.grown.load(Ordering::Relaxed) - before;
        assert_eq!(grown > 0, content == Content::Filesystem);
    }
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

/// Stages and publishes with a fault at each step in turn; then either goes on or goes back, with a new process.
#[tokio::test]
async fn whatever_step_fails_or_dies_it_can_be_done_again_and_undone() {
    for content in [Content::Filesystem, Content::Block] {
        for fault in [Fault::Fails, Fault::Dies] {
            for goes_on in [true, false] {
                let mut step = 0;
                loop {
                    let mut node = Fixture::with(content, Mode::SingleNodeWriter).await;
                    node.machine.fault_at(step, fault);
                    let all = async {
                        node.stage(node.to_stage()).await?;
                        node.publish(node.to_publish("pod")).await?;
                        node.unpublish("pod").await?;
                        node.unstage().await
                    };
                    let _: Option<Result<(), Status>> = tokio::select! {
                        result = all => Some(result),
                        () = node.machine.died() => None,
                    };
                    if !node.machine.cleared_fault() {
                        break;
                    }
                    node.restart();
                    let context = format!("{content:?} {fault:?} at {step}, goes on: {goes_on}");
                    if goes_on {
                        node.stage(node.to_stage()).await.expect(&context);
                        node.publish(node.to_publish("pod")).await.expect(&context);
                    }
                    node.unpublish("pod").await.expect(&context);
                    node.unstage().await.expect(&context);
                    node.assert_clean();
                    step += 1;
                }
                assert!(step >= 3, "only {step} steps");
            }
        }
    }
}
