//! The whole way, repeated, interrupted and begun anew.

use super::*;

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
