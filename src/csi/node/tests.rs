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

mod foreign;
mod life;
mod publishing;
mod staging;

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
            placement: volumes::Placement::default(),
            certificates: volumes::Certificates::default(),
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
