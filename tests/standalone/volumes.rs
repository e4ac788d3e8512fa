//! Volumes from their creation to their deletion.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::process::Signal;
use tokio::task::JoinSet;
use tonic::Code;

use crate::calls::{MIB, refusal};
use crate::home::{Home, NODE, OTHER_NODE, mode, process_of, send};

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_from_creation_to_deletion() {
    let home = Home::new();
    let parent = home.start().await;
    let volume = parent.create("pvc-1", 10 * MIB + 1).await.unwrap();
    let id = &volume.volume_id;
    assert_eq!(volume.capacity_bytes, 10 * MIB + 4096);
    assert_eq!(parent.create("pvc-1", 10 * MIB + 1).await.unwrap(), volume);
    assert_eq!(
        refusal(parent.create("pvc-1", 20 * MIB).await).0,
        Code::AlreadyExists
    );

    let data = fs::metadata(home.volume(id).join("data")).unwrap();
    assert_eq!(data.len(), u64::try_from(volume.capacity_bytes).unwrap());
    assert_eq!(data.blocks(), 0);
    let server = home.statistics(id).await.unwrap();
    assert_eq!(&server.volume, id);
    assert_eq!(server.size_bytes, data.len());
    for side in ["server", "client"] {
        let secret = home.path("secrets").join(format!("{id}-{side}"));
        assert_eq!(mode(&secret), 0o700);
        assert_eq!(mode(&secret.join("tls.key")), 0o600);
    }
    assert_eq!(mode(&home.path("csi.sock")), 0o600);

    let attachment = parent.publish(id, NODE).await.unwrap();
    assert_eq!(parent.publish(id, NODE).await.unwrap(), attachment);
    assert_eq!(
        refusal(parent.publish(id, OTHER_NODE).await).0,
        Code::FailedPrecondition
    );
    assert_eq!(
        refusal(parent.publish(id, "nowhere").await).0,
        Code::NotFound
    );
    assert_eq!(
        home.statistics(id).await.unwrap().attachments[0].id,
        attachment
    );
    assert_eq!(parent.volumes().await[id].1, [NODE]);
    assert_eq!(refusal(parent.delete(id).await).0, Code::FailedPrecondition);

    assert_eq!(parent.expand(id, 20 * MIB).await.unwrap(), 20 * MIB);
    assert_eq!(parent.expand(id, 20 * MIB).await.unwrap(), 20 * MIB);
    assert_eq!(home.statistics(id).await.unwrap().size_bytes, 20 << 20);

    parent.unpublish(id, NODE).await.unwrap();
    parent.unpublish(id, NODE).await.unwrap();
    assert_eq!(home.statistics(id).await.unwrap().attachments, []);
    let elsewhere = parent.publish(id, OTHER_NODE).await.unwrap();
    assert_ne!(elsewhere, attachment);
    parent.unpublish(id, "").await.unwrap();

    parent.delete(id).await.unwrap();
    assert_eq!(home.leftovers(), Vec::<String>::new());
    parent.delete(id).await.unwrap();
    assert!(parent.volumes().await.is_empty());
    assert!(parent.terminate().success());
    assert!(!home.path("csi.sock").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_volumes_are_created_side_by_side() {
    let home = Home::new();
    let parent = std::sync::Arc::new(home.start().await);
    let begun = std::time::Instant::now();
    let mut creating = JoinSet::new();
    for n in 0..200 {
        let parent = parent.clone();
        creating.spawn(async move { parent.create(&format!("pvc-{n}"), MIB).await });
    }
    while let Some(created) = creating.join_next().await {
        created.unwrap().unwrap();
    }
    println!("200 volumes created in {:.1?}", begun.elapsed());
    assert_eq!(parent.volumes().await.len(), 200);
    assert_eq!(home.server_processes().len(), 200);
    let mut deleting = JoinSet::new();
    for id in parent.volumes().await.into_keys() {
        let parent = parent.clone();
        deleting.spawn(async move { parent.delete(&id).await });
    }
    while let Some(deleted) = deleting.join_next().await {
        deleted.unwrap().unwrap();
    }
    println!("and deleted after {:.1?}", begun.elapsed());
    assert_eq!(home.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_promises_what_it_has_and_a_node_takes_what_it_may() {
    let home = Home::new();
    let parent = home.start_with(&["--max-volumes-per-node", "1"]).await;
    let (code, text) = refusal(parent.create("huge", i64::MAX / 2).await);
    assert!(
        matches!(code, Code::ResourceExhausted | Code::OutOfRange),
        "{code} {text}"
    );
    let (code, _) = refusal(parent.create("huge", i64::MAX).await);
    assert_eq!(code, Code::OutOfRange);
    assert_eq!(home.leftovers(), Vec::<String>::new());
    let first = parent.create("pvc-1", MIB).await.unwrap().volume_id;
    let second = parent.create("pvc-2", MIB).await.unwrap().volume_id;
    parent.publish(&first, NODE).await.unwrap();
    let (code, text) = refusal(parent.publish(&second, NODE).await);
    assert_eq!(code, Code::ResourceExhausted, "{text}");
    parent.publish(&first, NODE).await.unwrap();
    parent.unpublish(&first, NODE).await.unwrap();
    parent.publish(&second, NODE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_look_like_paths_are_names() {
    let home = Home::new();
    let parent = home.start().await;
    for name in [
        "../../escape",
        "a/b",
        ".",
        "\u{1f4be} \u{0}",
        &"x".repeat(128),
    ] {
        match parent.create(name, MIB).await {
            Ok(volume) => assert!(volume.volume_id.starts_with("vol-"), "{name}"),
            Err(status) => assert_eq!(status.code(), Code::InvalidArgument, "{name}"),
        }
    }
    for name in ["", &"x".repeat(129)] {
        assert_eq!(
            refusal(parent.create(name, MIB).await).0,
            Code::InvalidArgument
        );
    }
    for entry in fs::read_dir(home.path("pool/volumes")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(name.parse::<hawser::volumes::VolumeId>().is_ok(), "{name}");
    }
}

/// Writes until the disk is full, and closes the file: what remains is what others are left with.
fn fill(path: &Path) {
    let mut file = File::create(path).unwrap();
    for chunk in [vec![1; 1 << 16], vec![1; 1]] {
        while file.write_all(&chunk).is_ok() {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_full_disk_nothing_is_half_made_and_volumes_are_let_go() {
    let home = Home::with_pool_of("8m");
    let parent = home.start().await;
    let first = parent.create("pvc-1", 4 * MIB).await.unwrap().volume_id;
    let second = parent.create("pvc-2", 4 * MIB).await.unwrap().volume_id;
    let attachment = parent.publish(&first, NODE).await.unwrap();
    let pool = parent.sees(&home.path("pool"));
    let before: Vec<_> = home.leftovers();
    fill(&pool.join("filler"));

    let (code, text) = refusal(parent.create("pvc-3", MIB).await);
    assert_eq!(code, Code::ResourceExhausted, "{text}");
    let (code, text) = refusal(parent.expand(&first, 5 * MIB).await);
    assert_eq!(code, Code::ResourceExhausted, "{text}");
    assert_eq!(parent.volumes().await.len(), 2);
    assert_eq!(home.leftovers(), before);
    assert_eq!(fs::read_dir(pool.join("volumes")).unwrap().count(), 2);

    let server = home.statistics(&first).await.unwrap();
    send(process_of(&server), Signal::KILL);
    let server = home.next_server(&first, server.process_id).await;
    assert_eq!(server.attachments[0].id, attachment);
    parent.unpublish(&first, NODE).await.unwrap();
    assert_eq!(home.statistics(&first).await.unwrap().attachments, []);
    parent.publish(&first, OTHER_NODE).await.unwrap();
    parent.delete(&second).await.unwrap();

    fs::remove_file(pool.join("filler")).unwrap();
    parent.create("pvc-3", MIB).await.unwrap();
    assert_eq!(parent.expand(&first, 5 * MIB).await.unwrap(), 5 * MIB);
}
