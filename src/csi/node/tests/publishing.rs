//! Where a staged volume may be, and what is told of it there.

use super::*;

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
async fn a_file_system_that_turned_read_only_gets_no_pod() {
    let node = Fixture::mounted().await;
    node.stage(node.to_stage()).await.unwrap();
    node.machine.turn_read_only();
    let refused = node.publish(node.to_publish("pod")).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("turned read-only"));
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
