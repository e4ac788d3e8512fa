use tonic::Code;

use super::*;
use crate::csi::memory::{Memory, NODE_LIMIT, NODES, ROOM};
use crate::proto::csi::volume_capability::access_mode::Mode;
use crate::proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use crate::proto::csi::{CapacityRange, CreateVolumeRequest, VolumeCapability};

fn service() -> ControllerService {
    ControllerService::new(Arc::new(Memory::default()))
}

fn mounted(fs_type: &str) -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode {
            mode: Mode::SingleNodeWriter.into(),
        }),
        access_type: Some(AccessType::Mount(MountVolume {
            fs_type: fs_type.into(),
            ..MountVolume::default()
        })),
    }
}

fn block(mode: Mode) -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode { mode: mode.into() }),
        access_type: Some(AccessType::Block(BlockVolume {})),
    }
}

fn create(name: &str, required_bytes: i64, limit_bytes: i64) -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: name.into(),
        volume_capabilities: vec![mounted("")],
        capacity_range: Some(CapacityRange {
            required_bytes,
            limit_bytes,
        }),
        ..CreateVolumeRequest::default()
    }
}

async fn created(service: &ControllerService, request: CreateVolumeRequest) -> csi::Volume {
    let response = service.create_volume(Request::new(request)).await;
    response.unwrap().into_inner().volume.unwrap()
}

async fn refused(service: &ControllerService, request: CreateVolumeRequest) -> Status {
    let response = service.create_volume(Request::new(request)).await;
    response.unwrap_err()
}

fn publish(volume: &csi::Volume, node: &str) -> csi::ControllerPublishVolumeRequest {
    csi::ControllerPublishVolumeRequest {
        volume_id: volume.volume_id.clone(),
        node_id: node.into(),
        volume_capability: Some(mounted("")),
        ..csi::ControllerPublishVolumeRequest::default()
    }
}

async fn published(
    service: &ControllerService,
    request: csi::ControllerPublishVolumeRequest,
) -> Result<HashMap<String, String>, Code> {
    let response = service
        .controller_publish_volume(Request::new(request))
        .await;
    response
        .map(|response| response.into_inner().publish_context)
        .map_err(|status| status.code())
}

#[tokio::test]
async fn creating_twice_gives_the_same_volume_and_another_size_is_refused() {
    let service = service();
    let first = created(&service, create("a", 1 << 30, 0)).await;
    assert_eq!(first.capacity_bytes, 1 << 30);
    assert_eq!(created(&service, create("a", 1 << 30, 0)).await, first);
    let other = refused(&service, create("a", 2 << 30, 0)).await;
    assert_eq!(other.code(), Code::AlreadyExists);
    let mut other = create("a", 1 << 30, 0);
    other.volume_capabilities = vec![block(Mode::SingleNodeWriter)];
    assert_eq!(refused(&service, other).await.code(), Code::AlreadyExists);
}

#[tokio::test]
async fn sizes_are_as_asked_or_refused() {
    let service = service();
    let sizes = [
        ("one", 1, 0, 16 << 20),
        ("unaligned", (16 << 20) + 1, 0, (16 << 20) + 4096),
        ("limit only", 0, 20 << 20, 20 << 20),
        ("unaligned limit only", 0, (20 << 20) + 5, 20 << 20),
        ("wide limit only", 0, i64::MAX, 1 << 30),
    ];
    for (name, required, limit, expected) in sizes {
        let volume = created(&service, create(name, required, limit)).await;
        assert_eq!(volume.capacity_bytes, expected, "{name}");
    }
    let mut no_range = create("no range", 1, 0);
    no_range.capacity_range = None;
    assert_eq!(created(&service, no_range).await.capacity_bytes, 1 << 30);
    for (required, limit, code) in [
        (0, 0, Code::InvalidArgument),
        (-1, 0, Code::InvalidArgument),
        (2, 1, Code::OutOfRange),
        (1, 4096, Code::OutOfRange),
        (i64::MAX, 0, Code::OutOfRange),
        (i64::MAX - 4095, 0, Code::ResourceExhausted),
    ] {
        let status = refused(&service, create("no", required, limit)).await;
        assert_eq!(
            status.code(),
            code,
            "{required} {limit}: {}",
            status.message()
        );
    }
}

#[tokio::test]
async fn a_file_system_gets_a_volume_it_fits_in_and_is_remembered() {
    let service = service();
    for (kind, minimum) in [("ext4", 16), ("xfs", 300), ("btrfs", 128)] {
        let mut request = create(kind, 1, 0);
        request.volume_capabilities = vec![mounted(kind)];
        let volume = created(&service, request).await;
        assert_eq!(volume.capacity_bytes, minimum << 20);
        assert_eq!(volume.volume_context["csi.storage.k8s.io/fstype"], kind);
    }
}

#[tokio::test]
async fn what_cannot_be_created_is_refused_and_the_field_is_named() {
    let service = service();
    let good = || create("x", 1 << 30, 0);
    let map = |key: &str| HashMap::from([(key.to_owned(), "1".to_owned())]);
    let source = csi::VolumeContentSource { r#type: None };
    let cases = [
        (
            "name",
            CreateVolumeRequest {
                name: String::new(),
                ..good()
            },
        ),
        (
            "name",
            CreateVolumeRequest {
                name: "x".repeat(129),
                ..good()
            },
        ),
        (
            "name",
            CreateVolumeRequest {
                name: "a\u{7}".into(),
                ..good()
            },
        ),
        (
            "volume_capability",
            CreateVolumeRequest {
                volume_capabilities: vec![],
                ..good()
            },
        ),
        (
            "MULTI_NODE_MULTI_WRITER",
            CreateVolumeRequest {
                volume_capabilities: vec![block(Mode::MultiNodeMultiWriter)],
                ..good()
            },
        ),
        (
            "not both",
            CreateVolumeRequest {
                volume_capabilities: vec![block(Mode::SingleNodeWriter), mounted("")],
                ..good()
            },
        ),
        (
            "different file systems",
            CreateVolumeRequest {
                volume_capabilities: vec![mounted("xfs"), mounted("ext4")],
                ..good()
            },
        ),
        (
            "\"colour\" is unknown",
            CreateVolumeRequest {
                parameters: map("colour"),
                ..good()
            },
        ),
        (
            "secrets",
            CreateVolumeRequest {
                secrets: map("a b"),
                ..good()
            },
        ),
        (
            "volume_content_source",
            CreateVolumeRequest {
                volume_content_source: Some(source),
                ..good()
            },
        ),
        (
            "accessibility_requirements",
            CreateVolumeRequest {
                accessibility_requirements: Some(csi::TopologyRequirement::default()),
                ..good()
            },
        ),
        (
            "mutable_parameters",
            CreateVolumeRequest {
                mutable_parameters: map("iops"),
                ..good()
            },
        ),
    ];
    for (named, request) in cases {
        let status = refused(&service, request).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{named}");
        assert!(status.message().contains(named), "{}", status.message());
    }
    let mut longest = good();
    longest.name = "ä".repeat(64);
    created(&service, longest).await;
}

#[tokio::test]
async fn publishing_may_be_repeated_but_not_changed_and_nodes_are_known() {
    let service = service();
    let volume = created(&service, create("a", 1 << 30, 0)).await;
    let context = published(&service, publish(&volume, NODES[0]))
        .await
        .unwrap();
    assert_eq!(context[READ_ONLY], "false");
    assert_eq!(
        published(&service, publish(&volume, NODES[0]))
            .await
            .unwrap(),
        context
    );

    let mut read_only = publish(&volume, NODES[0]);
    read_only.readonly = true;
    assert_eq!(
        published(&service, read_only).await,
        Err(Code::AlreadyExists)
    );
    assert_eq!(
        published(&service, publish(&volume, NODES[1])).await,
        Err(Code::FailedPrecondition)
    );
    assert_eq!(
        published(&service, publish(&volume, "nowhere")).await,
        Err(Code::NotFound)
    );
    let mut as_block = publish(&volume, NODES[0]);
    as_block.volume_capability = Some(block(Mode::SingleNodeWriter));
    assert_eq!(
        published(&service, as_block).await,
        Err(Code::InvalidArgument)
    );
    let mut none = publish(&volume, NODES[0]);
    none.volume_capability = None;
    assert_eq!(published(&service, none).await, Err(Code::InvalidArgument));
    assert_eq!(
        published(&service, publish(&volume, "")).await,
        Err(Code::InvalidArgument)
    );
    let long = "n".repeat(257);
    assert_eq!(
        published(&service, publish(&volume, &long)).await,
        Err(Code::InvalidArgument)
    );
    for unknown in ["fake-vol-id", &VolumeId::from_bytes([9; 16]).to_string()] {
        let mut request = publish(&volume, NODES[0]);
        request.volume_id = unknown.into();
        assert_eq!(published(&service, request).await, Err(Code::NotFound));
    }
}

#[tokio::test]
async fn a_node_takes_its_limit_and_no_more() {
    let service = service();
    for number in 0..NODE_LIMIT {
        let volume = created(&service, create(&format!("v{number}"), 1 << 30, 0)).await;
        published(&service, publish(&volume, NODES[0]))
            .await
            .unwrap();
    }
    let volume = created(&service, create("one more", 1 << 30, 0)).await;
    assert_eq!(
        published(&service, publish(&volume, NODES[0])).await,
        Err(Code::ResourceExhausted)
    );
}

#[tokio::test]
async fn unpublishing_and_deleting_may_be_repeated_and_need_no_volume() {
    let service = service();
    let volume = created(&service, create("a", 1 << 30, 0)).await;
    published(&service, publish(&volume, NODES[0]))
        .await
        .unwrap();
    let delete = |id: &str| {
        service.delete_volume(Request::new(csi::DeleteVolumeRequest {
            volume_id: id.into(),
            ..csi::DeleteVolumeRequest::default()
        }))
    };
    let unpublish = |id: &str, node: &str| {
        let request = csi::ControllerUnpublishVolumeRequest {
            volume_id: id.into(),
            node_id: node.into(),
            ..csi::ControllerUnpublishVolumeRequest::default()
        };
        service.controller_unpublish_volume(Request::new(request))
    };
    let in_use = delete(&volume.volume_id).await.unwrap_err();
    assert_eq!(in_use.code(), Code::FailedPrecondition);
    assert!(in_use.message().contains(NODES[0]));
    for node in [NODES[1], NODES[0], NODES[0], ""] {
        unpublish(&volume.volume_id, node).await.unwrap();
    }
    for id in [&volume.volume_id, &volume.volume_id, "fake-vol-id"] {
        delete(id).await.unwrap();
        unpublish(id, "nowhere").await.unwrap();
    }
    assert_eq!(delete("").await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(
        unpublish("", "").await.unwrap_err().code(),
        Code::InvalidArgument
    );
}

#[tokio::test]
async fn listing_goes_on_after_what_was_told_even_if_that_is_deleted() {
    let service = service();
    for number in 0..5 {
        created(&service, create(&format!("v{number}"), 1 << 30, 0)).await;
    }
    let list = |max_entries, token: &str| {
        service.list_volumes(Request::new(csi::ListVolumesRequest {
            max_entries,
            starting_token: token.into(),
        }))
    };
    let ids = |page: &csi::ListVolumesResponse| -> Vec<String> {
        let volumes = page.entries.iter().map(|e| e.volume.clone().unwrap());
        volumes.map(|volume| volume.volume_id).collect()
    };
    let all = list(0, "").await.unwrap().into_inner();
    assert_eq!((all.entries.len(), all.next_token.as_str()), (5, ""));
    let first = list(2, "").await.unwrap().into_inner();
    let deleted = csi::DeleteVolumeRequest {
        volume_id: first.next_token.clone(),
        ..csi::DeleteVolumeRequest::default()
    };
    service.delete_volume(Request::new(deleted)).await.unwrap();
    let rest = list(3, &first.next_token).await.unwrap().into_inner();
    assert_eq!(rest.next_token, "");
    assert_eq!([ids(&first), ids(&rest)].concat(), ids(&all));
    assert_eq!(list(0, "nonsense").await.unwrap_err().code(), Code::Aborted);
    assert_eq!(
        list(-1, "").await.unwrap_err().code(),
        Code::InvalidArgument
    );
}

#[tokio::test]
async fn a_volume_says_where_it_is_published() {
    let service = service();
    let volume = created(&service, create("a", 1 << 30, 0)).await;
    published(&service, publish(&volume, NODES[0]))
        .await
        .unwrap();
    let get = |id: &str| {
        service.controller_get_volume(Request::new(csi::ControllerGetVolumeRequest {
            volume_id: id.into(),
        }))
    };
    let found = get(&volume.volume_id).await.unwrap().into_inner();
    assert_eq!(found.status.unwrap().published_node_ids, [NODES[0]]);
    assert_eq!(found.volume.unwrap(), volume);
    assert_eq!(get("fake-vol-id").await.unwrap_err().code(), Code::NotFound);
    let listed = service
        .list_volumes(Request::new(csi::ListVolumesRequest::default()))
        .await
        .unwrap()
        .into_inner();
    let status = listed.entries[0].status.clone().unwrap();
    assert_eq!(status.published_node_ids, [NODES[0]]);
}

#[tokio::test]
async fn growing_may_be_repeated_and_never_shrinks() {
    let service = service();
    let volume = created(&service, create("a", 1 << 30, 0)).await;
    let grow = |required_bytes, limit_bytes| {
        let request = csi::ControllerExpandVolumeRequest {
            volume_id: volume.volume_id.clone(),
            capacity_range: Some(CapacityRange {
                required_bytes,
                limit_bytes,
            }),
            ..csi::ControllerExpandVolumeRequest::default()
        };
        service.controller_expand_volume(Request::new(request))
    };
    for (required, size) in [(2 << 30, 2 << 30), (2 << 30, 2 << 30), (1, 2 << 30)] {
        let grown = grow(required, 0).await.unwrap().into_inner();
        assert_eq!(
            (grown.capacity_bytes, grown.node_expansion_required),
            (size, true)
        );
    }
    assert_eq!(grow(1, 1 << 30).await.unwrap_err().code(), Code::OutOfRange);
    assert_eq!(grow(0, 0).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(
        grow(i64::MAX, 0).await.unwrap_err().code(),
        Code::OutOfRange
    );
    let unknown = csi::ControllerExpandVolumeRequest {
        volume_id: "fake-vol-id".into(),
        capacity_range: Some(CapacityRange {
            required_bytes: 1,
            limit_bytes: 0,
        }),
        ..csi::ControllerExpandVolumeRequest::default()
    };
    let status = service
        .controller_expand_volume(Request::new(unknown))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
}

#[tokio::test]
async fn capabilities_are_confirmed_or_the_reason_is_told() {
    let service = service();
    let mut request = create("a", 1 << 30, 0);
    request.volume_capabilities = vec![mounted("xfs")];
    request.parameters = HashMap::from([("connections".into(), "4".into())]);
    let volume = created(&service, request.clone()).await;
    let ask = |volume_capabilities, parameters| {
        let request = csi::ValidateVolumeCapabilitiesRequest {
            volume_id: volume.volume_id.clone(),
            volume_context: volume.volume_context.clone(),
            volume_capabilities,
            parameters,
            ..csi::ValidateVolumeCapabilitiesRequest::default()
        };
        service.validate_volume_capabilities(Request::new(request))
    };
    let good = ask(vec![mounted("")], request.parameters)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(good.confirmed.unwrap().volume_capabilities, [mounted("")]);
    let other = HashMap::from([("connections".to_owned(), "5".to_owned())]);
    for (capabilities, parameters) in [
        (vec![block(Mode::SingleNodeWriter)], HashMap::new()),
        (vec![block(Mode::MultiNodeMultiWriter)], HashMap::new()),
        (vec![mounted("")], other),
    ] {
        let answer = ask(capabilities, parameters).await.unwrap().into_inner();
        assert!(answer.confirmed.is_none() && !answer.message.is_empty());
    }
    let none = ask(vec![], HashMap::new()).await.unwrap_err();
    assert_eq!(none.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn capacity_is_told_for_what_can_be_made() {
    let service = service();
    let ask = |volume_capabilities| {
        // csi-provisioner asks with the StorageClass as it is.
        let secret = "csi.storage.k8s.io/node-stage-secret-name";
        service.get_capacity(Request::new(csi::GetCapacityRequest {
            volume_capabilities,
            parameters: HashMap::from([(secret.to_owned(), "${pv.name}-hawser-client".to_owned())]),
            ..csi::GetCapacityRequest::default()
        }))
    };
    let any = ask(vec![]).await.unwrap().into_inner();
    assert_eq!(any.available_capacity, i64::try_from(ROOM).unwrap());
    let xfs = ask(vec![mounted("xfs")]).await.unwrap().into_inner();
    assert_eq!(xfs.minimum_volume_size, Some(300 << 20));
    let impossible = ask(vec![block(Mode::MultiNodeMultiWriter)]).await.unwrap();
    assert_eq!(impossible.into_inner().available_capacity, 0);
}

/// Of a volume on another server Hawser has a record at most, and says so where it cannot do what is asked.
#[tokio::test]
async fn a_volume_on_another_server_is_attached_and_nothing_else() {
    let service = service();
    let context = HashMap::from([("uri".to_owned(), "nbds://storage.example/disk".to_owned())]);
    let elsewhere = |node: &str| csi::ControllerPublishVolumeRequest {
        volume_id: "legacy".into(),
        node_id: node.into(),
        volume_capability: Some(block(Mode::SingleNodeWriter)),
        volume_context: context.clone(),
        ..csi::ControllerPublishVolumeRequest::default()
    };
    let first = published(&service, elsewhere(NODES[0])).await.unwrap();
    assert_eq!(
        published(&service, elsewhere(NODES[0])).await.unwrap(),
        first
    );
    assert_eq!(first[READ_ONLY], "false");
    assert_ne!(
        published(&service, elsewhere(NODES[1])).await.unwrap(),
        first
    );
    let mut as_ours = elsewhere(NODES[0]);
    as_ours.volume_id = VolumeId::from_bytes([1; 16]).to_string();
    assert_eq!(
        published(&service, as_ours).await,
        Err(Code::InvalidArgument)
    );
    let mut plain = elsewhere(NODES[0]);
    plain
        .volume_context
        .insert("uri".into(), "nbd://storage.example/disk".into());
    assert_eq!(published(&service, plain).await, Err(Code::InvalidArgument));

    let validate = |mode| csi::ValidateVolumeCapabilitiesRequest {
        volume_id: "legacy".into(),
        volume_capabilities: vec![block(mode)],
        volume_context: context.clone(),
        ..csi::ValidateVolumeCapabilitiesRequest::default()
    };
    for (mode, is_confirmed) in [
        (Mode::SingleNodeWriter, true),
        (Mode::MultiNodeReaderOnly, true),
        (Mode::MultiNodeMultiWriter, false),
    ] {
        let validated = service
            .validate_volume_capabilities(Request::new(validate(mode)))
            .await
            .unwrap();
        assert_eq!(
            validated.into_inner().confirmed.is_some(),
            is_confirmed,
            "{mode:?}"
        );
    }

    let expand = csi::ControllerExpandVolumeRequest {
        volume_id: "legacy".into(),
        capacity_range: Some(CapacityRange {
            required_bytes: 1 << 30,
            limit_bytes: 0,
        }),
        ..csi::ControllerExpandVolumeRequest::default()
    };
    let refused = service
        .controller_expand_volume(Request::new(expand))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    assert!(
        refused.message().contains("grown at that server"),
        "{refused:?}"
    );
    let unpublish = csi::ControllerUnpublishVolumeRequest {
        volume_id: "legacy".into(),
        ..csi::ControllerUnpublishVolumeRequest::default()
    };
    service
        .controller_unpublish_volume(Request::new(unpublish))
        .await
        .unwrap();
    let delete = csi::DeleteVolumeRequest {
        volume_id: "legacy".into(),
        ..csi::DeleteVolumeRequest::default()
    };
    service.delete_volume(Request::new(delete)).await.unwrap();
}
