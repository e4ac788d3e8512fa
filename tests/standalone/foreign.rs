//! Volumes on servers that are not Hawser's: a record of who uses them stands between two writing nodes, and nothing else.

use std::collections::HashMap;

use hawser::proto::csi::{ControllerPublishVolumeRequest, VolumeCapability};
use tonic::{Code, Status};

use crate::calls::{block, refusal};
use crate::home::{Controller, Home, NODE, OTHER_NODE};

async fn publish(
    controller: &Controller,
    handle: &str,
    node: &str,
    capability: VolumeCapability,
) -> Result<HashMap<String, String>, Status> {
    let uri = "nbds://storage.example/disk".to_owned();
    let request = ControllerPublishVolumeRequest {
        volume_id: handle.into(),
        node_id: node.into(),
        volume_capability: Some(capability),
        volume_context: HashMap::from([("uri".to_owned(), uri)]),
        ..ControllerPublishVolumeRequest::default()
    };
    let answer = controller
        .0
        .clone()
        .controller_publish_volume(request)
        .await?;
    Ok(answer.into_inner().publish_context)
}

#[tokio::test(flavor = "multi_thread")]
async fn one_node_writes_whatever_the_server_would_let_in() {
    let home = Home::new();
    let options = ["--max-volumes-per-node", "2"];
    let mut parent = home.start_with(&options).await;
    let first = publish(&parent, "disk", NODE, block()).await.unwrap();
    assert_eq!(
        publish(&parent, "disk", NODE, block()).await.unwrap(),
        first
    );
    parent.kill();

    let parent = home.start_with(&options).await;
    assert_eq!(
        publish(&parent, "disk", NODE, block()).await.unwrap(),
        first
    );
    let (code, text) = refusal(publish(&parent, "disk", OTHER_NODE, block()).await);
    assert_eq!(code, Code::FailedPrecondition);
    assert!(text.contains(NODE), "{text}");
    let (code, _) = refusal(publish(&parent, "disk", "nowhere", block()).await);
    assert_eq!(code, Code::NotFound);

    publish(&parent, "second", NODE, block()).await.unwrap();
    let (code, _) = refusal(publish(&parent, "third", NODE, block()).await);
    assert_eq!(code, Code::ResourceExhausted);

    for _ in 0..2 {
        parent.unpublish("disk", NODE).await.unwrap();
    }
    let second = publish(&parent, "disk", OTHER_NODE, block()).await.unwrap();
    assert_ne!(second["attachment"], first["attachment"]);
    parent.unpublish("disk", OTHER_NODE).await.unwrap();
    parent.unpublish("second", NODE).await.unwrap();
    let left = std::fs::read_dir(home.path("state/foreign"))
        .unwrap()
        .count();
    assert_eq!(left, 0);
}
