//! Servers and their parent: who outlives whom.

use std::fs;

use rustix::process::Signal;

use crate::calls::{MIB, refusal};
use crate::home::{Home, NODE, process_of, send};

#[tokio::test(flavor = "multi_thread")]
async fn servers_outlive_their_parent_and_are_found_again() {
    let home = Home::new();
    let mut parent = home.start().await;
    let id = parent.create("pvc-1", MIB).await.unwrap().volume_id;
    let attachment = parent.publish(&id, NODE).await.unwrap();
    let before = home.statistics(&id).await.unwrap();
    parent.kill();
    assert_eq!(
        home.statistics(&id).await.unwrap().process_id,
        before.process_id
    );
    let parent = home.start().await;
    assert_eq!(parent.publish(&id, NODE).await.unwrap(), attachment);
    assert_eq!(
        home.statistics(&id).await.unwrap().process_id,
        before.process_id
    );
    assert!(parent.terminate().success());
    assert_eq!(
        home.statistics(&id).await.unwrap().process_id,
        before.process_id
    );

    // Found or started, a server is looked after.
    let parent = home.start().await;
    parent.publish(&id, NODE).await.unwrap();
    send(process_of(&before), Signal::KILL);
    let after = home.next_server(&id, before.process_id).await;
    assert_eq!(after.attachments[0].id, attachment);
    send(process_of(&after), Signal::KILL);
    let after = home.next_server(&id, after.process_id).await;
    assert_eq!(after.attachments[0].id, attachment);
    assert_eq!(home.server_processes(), [process_of(&after)]);
    assert!(parent.terminate().success());

    let parent = home.start_with(&["--stop-servers"]).await;
    assert!(parent.terminate().success());
    assert_eq!(home.server_processes(), Vec::<i32>::new());
    let epoch = fs::read_to_string(home.volume(&id).join("epoch.json")).unwrap();
    assert!(epoch.contains("\"clean\":true"), "{epoch}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_be_reached_is_replaced() {
    let home = Home::new();
    let mut parent = home.start().await;
    let id = parent.create("pvc-1", MIB).await.unwrap().volume_id;
    let before = home.statistics(&id).await.unwrap();
    parent.kill();
    fs::remove_dir_all(home.path("state")).unwrap();
    let parent = home.start().await;
    let after = home.next_server(&id, before.process_id).await;
    assert_eq!(home.server_processes(), [process_of(&after)]);
    parent.delete(&id).await.unwrap();
    assert_eq!(home.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_belongs_to_no_volume_is_removed_at_the_next_start() {
    let home = Home::new();
    let mut parent = home.start().await;
    let id = parent.create("pvc-1", MIB).await.unwrap().volume_id;
    parent.kill();
    // As if killed in the middle of a deletion: after the rename that is its point of no return.
    fs::rename(
        home.volume(&id),
        home.path("pool/volumes").join(format!(".deleting-{id}")),
    )
    .unwrap();
    let parent = home.start().await;
    assert!(parent.volumes().await.is_empty());
    home.assert_clean().await;
    parent.create("pvc-1", MIB).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn directories_have_one_owner_and_belong_together() {
    let (home, other) = (Home::new(), Home::new());
    let parent = home.start().await;
    let pool = home.path("pool");
    for home in [&home, &other] {
        let text = home.refused(&pool);
        assert!(text.contains("another running process"), "{text}");
    }
    parent.create("pvc-1", MIB).await.unwrap();
    assert!(parent.terminate().success());

    // As if the pool's file system were not mounted.
    fs::rename(&pool, home.path("elsewhere")).unwrap();
    let text = home.refused(&pool);
    assert!(text.contains("is the pool mounted?"), "{text}");
    assert_eq!(home.server_processes().len(), 1);
    fs::rename(home.path("elsewhere"), &pool).unwrap();
    assert_eq!(home.start().await.volumes().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_secret_is_named_and_the_volume_comes_back_with_the_right_one() {
    let home = Home::new();
    let parent = home.start().await;
    let id = parent.create("pvc-1", MIB).await.unwrap().volume_id;
    let other = parent.create("pvc-2", MIB).await.unwrap().volume_id;
    assert!(parent.terminate().success());
    let secret = |id: &str| home.path("secrets").join(format!("{id}-server"));
    fs::rename(secret(&id), home.path("right")).unwrap();
    fs::rename(secret(&other), secret(&id)).unwrap();
    fs::rename(home.path("right"), secret(&other)).unwrap();
    for process in home.server_processes() {
        send(process, Signal::KILL);
    }
    let mut parent = home.start().await;
    let (_, text) = refusal(parent.create("pvc-1", MIB).await);
    for part in [id.as_str(), secret(&id).to_str().unwrap(), other.as_str()] {
        assert!(text.contains(part), "{text}\nlacks {part}");
    }
    assert!(home.statistics(&id).await.is_none());
    parent.kill();
    for id in [&id, &other] {
        fs::remove_dir_all(secret(id)).unwrap();
    }
    let parent = home.start().await;
    parent.create("pvc-1", MIB).await.unwrap();
    parent.create("pvc-2", MIB).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_volume_is_not_served() {
    let home = Home::new();
    let parent = home.start().await;
    let id = parent.create("pvc-1", 2 * MIB).await.unwrap().volume_id;
    parent.publish(&id, NODE).await.unwrap();
    let server = home.statistics(&id).await.unwrap();
    let data = fs::File::options()
        .write(true)
        .open(home.volume(&id).join("data"))
        .unwrap();
    data.set_len(1 << 20).unwrap();
    send(process_of(&server), Signal::KILL);
    home.logged("truncated to 1048576 bytes").await;
    let (_, text) = refusal(parent.create("pvc-1", 2 * MIB).await);
    assert!(text.contains("truncated to 1048576 bytes"), "{text}");
    // It has no server, but the node must be able to let go of it, and its owner to delete it.
    parent.unpublish(&id, NODE).await.unwrap();
    parent.delete(&id).await.unwrap();
    assert_eq!(home.leftovers(), Vec::<String>::new());
}
