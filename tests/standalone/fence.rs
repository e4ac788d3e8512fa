//! ControllerUnpublish is a fence: when it is answered, the node's sessions are over and no new one begins.

use std::fs;
use std::path::Path;
use std::time::Duration;

use hawser::client::{ProbeSession, Target, Transmitting};
use hawser::nbd::ExportName;
use hawser::tls::{Profile, Secret, Side, client_config, server_identity};
use rustix::process::Signal;

use crate::calls::MIB;
use crate::home::{Home, NODE, OTHER_NODE, process_of, send};

/// A session as a node that has the volume's client Secret can make it.
fn session(
    secret: &Path,
    address: &str,
    id: &str,
    attachment: &str,
) -> Result<Transmitting, String> {
    let secret = Secret::load(secret, Side::Client).unwrap();
    let export = ExportName::try_from(format!("{id}/{attachment}").as_str()).unwrap();
    let target = Target {
        address: address.parse().unwrap(),
        export: export.clone(),
        tls: client_config(&secret, Profile::Probe).unwrap(),
        server_name: server_identity(&id.parse().unwrap()).try_into().unwrap(),
        timeout: Duration::from_secs(10),
    };
    let session = ProbeSession::connect(&target).map_err(|error| error.to_string())?;
    session.go(&export).map_err(|error| error.to_string())
}

/// How a detachment meets the server.
enum Fate {
    Alive,
    Killed,
    /// Killed, and not to be started again.
    Gone,
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unpublished_node_is_out_whatever_became_of_the_server() {
    let home = Home::new();
    for (n, fate) in [Fate::Alive, Fate::Killed, Fate::Gone]
        .into_iter()
        .enumerate()
    {
        let mut parent = home.start().await;
        let id = parent
            .create(&format!("pvc-{n}"), MIB)
            .await
            .unwrap()
            .volume_id;
        let attachment = parent.publish(&id, NODE).await.unwrap();
        let secret = home.path("secrets").join(format!("{id}-client"));
        let server = home.statistics(&id).await.unwrap();
        let mut open = session(&secret, &server.address, &id, &attachment).unwrap();
        assert!(open.read(0, 4096).is_ok());
        match fate {
            Fate::Alive => {}
            Fate::Killed => send(process_of(&server), Signal::KILL),
            Fate::Gone => {
                fs::rename(home.volume(&id).join("data"), home.path("data")).unwrap();
                send(process_of(&server), Signal::KILL);
            }
        }
        parent.unpublish(&id, NODE).await.unwrap();
        assert!(open.read(0, 4096).is_err(), "the session went on");
        if matches!(fate, Fate::Gone) {
            parent.kill();
            fs::rename(home.path("data"), home.volume(&id).join("data")).unwrap();
            parent = home.start().await;
        }
        // Also what the server has written down, for a time when nobody is there to correct it.
        let server = home.next_server(&id, 0).await;
        let refused = session(&secret, &server.address, &id, &attachment);
        assert!(refused.is_err(), "a revoked attachment was let in");
        let allowed = fs::read_to_string(home.volume(&id).join("attachments.json")).unwrap();
        assert!(!allowed.contains(&attachment), "{allowed}");
        parent.kill();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unpublish_is_not_answered_while_a_server_might_still_write() {
    let home = Home::new();
    let parent = std::sync::Arc::new(home.start().await);
    let id = parent.create("pvc-1", MIB).await.unwrap().volume_id;
    parent.publish(&id, NODE).await.unwrap();
    let server = home.statistics(&id).await.unwrap();
    send(process_of(&server), Signal::STOP);
    let unpublishing = {
        let (parent, id) = (parent.clone(), id.clone());
        tokio::spawn(async move { parent.unpublish(&id, NODE).await })
    };
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!unpublishing.is_finished());
    assert!(parent.publish(&id, OTHER_NODE).await.is_err());
    send(process_of(&server), Signal::CONT);
    unpublishing.await.unwrap().unwrap();
    parent.publish(&id, OTHER_NODE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_that_was_interrupted_is_completed_at_the_next_start() {
    let home = Home::new();
    let mut parent = home.start().await;
    let id = parent.create("pvc-1", MIB).await.unwrap().volume_id;
    let attachment = parent.publish(&id, NODE).await.unwrap();
    let server = home.statistics(&id).await.unwrap();
    // The parent records the revocation, and is killed before the server has heard of it.
    send(process_of(&server), Signal::STOP);
    let controller = parent.controller.0.clone();
    let caller = hawser::proto::csi::ControllerUnpublishVolumeRequest {
        volume_id: id.clone(),
        node_id: NODE.to_owned(),
        ..Default::default()
    };
    let unpublishing = tokio::spawn(async move {
        let mut controller = controller;
        controller.controller_unpublish_volume(caller).await
    });
    let record = home.volume(&id).join("volume.json");
    while !fs::read_to_string(&record).unwrap().contains("revoking") {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    parent.kill();
    assert!(unpublishing.await.unwrap().is_err());
    send(process_of(&server), Signal::CONT);
    let allowed = home.statistics(&id).await.unwrap().attachments;
    assert_eq!(allowed[0].id, attachment);
    let parent = home.start().await;
    parent.create("pvc-1", MIB).await.unwrap();
    assert_eq!(home.statistics(&id).await.unwrap().attachments, []);
    assert!(!fs::read_to_string(&record).unwrap().contains("revoking"));
    parent.publish(&id, OTHER_NODE).await.unwrap();
}
