//! What no caller should send, and what should not happen to files: each is answered in a way that says what to do, and
//! the volumes and everybody else's calls go on.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use hawser::proto::csi::volume_capability::AccessType;
use hawser::proto::csi::{
    CapacityRange, ControllerExpandVolumeRequest, ControllerPublishVolumeRequest,
    CreateVolumeRequest, ListVolumesRequest,
};
use rustix::process::Signal;
use tonic::Code;

use crate::calls::{MIB, block, mount, refusal};
use crate::home::{Home, NODE, OTHER_NODE, process_of, send};

/// No volume of ours, though it looks like one.
const UNKNOWN: &str = "vol-00000000000000000000000000000000";

fn of(name: &str, required_bytes: i64, limit_bytes: i64) -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: name.to_owned(),
        capacity_range: Some(CapacityRange {
            required_bytes,
            limit_bytes,
        }),
        volume_capabilities: vec![block()],
        ..CreateVolumeRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_name_that_csi_allows_is_a_volume_and_no_other() {
    let home = Home::new();
    let parent = home.start().await;
    let ascii: String = (b' '..=b'~').map(char::from).collect();
    let good = [
        "a".to_owned(),
        "x".repeat(128),
        format!("{ascii}\t\n\r"),
        // Every character of Latin-1 that is no control character, 64 to a name.
        ('\u{a0}'..='\u{cf}').collect(),
        ('\u{d0}'..='\u{ff}').collect(),
        "\u{2028}\u{202e}\u{feff}\u{e000}\u{fffd}\u{10ffff}🦀".to_owned(),
        ".".to_owned(),
        "..".to_owned(),
        " ".to_owned(),
    ];
    let mut ids = Vec::new();
    for name in &good {
        let id = parent.create(name, MIB).await.unwrap().volume_id;
        assert_eq!(parent.create(name, MIB).await.unwrap().volume_id, id);
        ids.push(id);
    }
    for name in [
        String::new(),
        "x".repeat(129),
        "é".repeat(65),
        "a\0b".to_owned(),
        "a\u{1b}[2Jb".to_owned(),
        "a\u{7f}".to_owned(),
        "a\u{85}".to_owned(),
    ] {
        let (code, text) = refusal(parent.create(&name, MIB).await);
        assert_eq!(code, Code::InvalidArgument, "{name:?}: {text}");
        assert!(text.starts_with("name "), "{text}");
    }
    assert_eq!(parent.volumes().await.len(), good.len());
    // No name of a volume can write a line of its own into the log.
    assert!(!home.log().lines().any(|line| line.starts_with('\u{1b}')));
    for id in ids {
        parent.delete(&id).await.unwrap();
    }
    assert_eq!(home.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn sizes_that_cannot_be_are_refused_and_leave_nothing() {
    let home = Home::new();
    let parent = home.start_with(&[]).await;
    for (required, limit, code) in [
        (0, 0, Code::InvalidArgument),
        (-1, 0, Code::InvalidArgument),
        (0, -1, Code::InvalidArgument),
        (i64::MIN, i64::MIN, Code::InvalidArgument),
        (2 * MIB, MIB, Code::OutOfRange),
        (MIB + 1, MIB + 2, Code::OutOfRange),
        (1, 4096, Code::OutOfRange),
        (i64::MAX, 0, Code::OutOfRange),
        (i64::MAX, i64::MAX, Code::OutOfRange),
        (i64::MAX - 4096, 0, Code::ResourceExhausted),
    ] {
        let mut controller = parent.controller.0.clone();
        let answer = controller.create_volume(of("n", required, limit)).await;
        let (found, text) = refusal(answer);
        assert_eq!(found, code, "{required} {limit}: {text}");
        assert!(text.contains("bytes"), "{text}");
    }
    assert_eq!(home.leftovers(), Vec::<String>::new());

    let id = parent.create("n", 1).await.unwrap().volume_id;
    let expand = |id: &str, required_bytes, limit_bytes| {
        let request = ControllerExpandVolumeRequest {
            volume_id: id.to_owned(),
            capacity_range: Some(CapacityRange {
                required_bytes,
                limit_bytes,
            }),
            ..ControllerExpandVolumeRequest::default()
        };
        let mut controller = parent.controller.0.clone();
        async move {
            let answer = controller.controller_expand_volume(request).await?;
            Ok(answer.into_inner().capacity_bytes)
        }
    };
    // What it has already is enough.
    assert_eq!(expand(&id, 1, 0).await.unwrap(), MIB);
    assert_eq!(expand(&id, 4096, MIB).await.unwrap(), MIB);
    assert_eq!(expand(&id, 0, 2 * MIB).await.unwrap(), MIB);
    for (required, limit, code) in [
        (0, 0, Code::InvalidArgument),
        (-1, 0, Code::InvalidArgument),
        (1, 4096, Code::OutOfRange),
        (0, 4096, Code::OutOfRange),
        (i64::MAX, 0, Code::OutOfRange),
        (i64::MAX - 4096, 0, Code::ResourceExhausted),
        (1 << 50, 0, Code::ResourceExhausted),
    ] {
        let (found, text) = refusal(expand(&id, required, limit).await);
        assert_eq!(found, code, "{required} {limit}: {text}");
    }
    assert_eq!(refusal(expand(UNKNOWN, MIB, 0).await).0, Code::NotFound);
    let volumes = parent.volumes().await;
    assert_eq!(volumes[&id].0, MIB);
    assert_eq!(home.statistics(&id).await.unwrap().size_bytes, 1 << 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_understood_is_named() {
    let home = Home::new();
    let parent = home.start().await;
    let create = |request| {
        let mut controller = parent.controller.0.clone();
        async move { controller.create_volume(request).await }
    };
    let mut request = of("n", MIB, 0);
    for (key, value) in [("colour", "blue"), ("Verify", "off"), ("connections", "0")] {
        request.parameters.insert(key.into(), value.into());
    }
    let (code, text) = refusal(create(request).await);
    assert_eq!(code, Code::InvalidArgument);
    for part in ["colour", "Verify", "connections"] {
        assert!(text.contains(part), "{text}");
    }
    for (kind, code) in [
        ("ntfs", Code::InvalidArgument),
        ("EXT4", Code::InvalidArgument),
        ("ext4 ", Code::InvalidArgument),
        ("../ext4", Code::InvalidArgument),
    ] {
        let mut request = of("n", 64 * MIB, 0);
        request.volume_capabilities = vec![mount(kind)];
        let (found, text) = refusal(create(request).await);
        assert_eq!(found, code, "{text}");
        assert!(text.contains(kind) && text.contains("xfs"), "{text}");
    }
    let mut secret = of("n", MIB, 0);
    secret
        .secrets
        .insert("a key".into(), "-----BEGIN PRIVATE KEY-----".into());
    let (code, text) = refusal(create(secret).await);
    assert_eq!(code, Code::InvalidArgument);
    assert!(!text.contains("BEGIN"), "{text}");
    let mut nothing = of("n", MIB, 0);
    nothing.volume_capabilities[0].access_type = None::<AccessType>;
    assert_eq!(refusal(create(nothing).await).0, Code::InvalidArgument);
    // More than a message may have: refused, and the socket goes on.
    assert!(create(of(&"x".repeat(8 << 20), MIB, 0)).await.is_err());

    let list = |max_entries, starting_token: &str| {
        let request = ListVolumesRequest {
            max_entries,
            starting_token: starting_token.to_owned(),
        };
        let mut controller = parent.controller.0.clone();
        async move { controller.list_volumes(request).await }
    };
    assert_eq!(refusal(list(-1, "").await).0, Code::InvalidArgument);
    assert_eq!(refusal(list(0, "17").await).0, Code::Aborted);
    assert_eq!(home.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_for_what_is_not_there_or_in_the_wrong_order() {
    let home = Home::new();
    let parent = home.start().await;
    for id in [UNKNOWN, "pvc-1", "../../etc", "vol-\n", &"x".repeat(128)] {
        parent.delete(id).await.unwrap();
        parent.unpublish(id, NODE).await.unwrap();
        assert_eq!(refusal(parent.publish(id, NODE).await).0, Code::NotFound);
        let (code, text) = refusal(parent.expand(id, MIB).await);
        assert_eq!(code, Code::NotFound);
        assert!(text.contains(&id.escape_debug().to_string()), "{text}");
    }
    for id in ["", &"x".repeat(129)] {
        assert_eq!(refusal(parent.delete(id).await).0, Code::InvalidArgument);
        assert_eq!(
            refusal(parent.unpublish(id, NODE).await).0,
            Code::InvalidArgument
        );
        assert_eq!(
            refusal(parent.publish(id, NODE).await).0,
            Code::InvalidArgument
        );
        assert_eq!(
            refusal(parent.expand(id, MIB).await).0,
            Code::InvalidArgument
        );
    }
    let id = parent.create("n", MIB).await.unwrap().volume_id;
    for node in ["", &"x".repeat(257)] {
        assert_eq!(
            refusal(parent.publish(&id, node).await).0,
            Code::InvalidArgument
        );
    }
    let (code, text) = refusal(parent.publish(&id, "nowhere").await);
    assert_eq!(code, Code::NotFound);
    assert!(text.contains("nowhere"), "{text}");
    parent.unpublish(&id, OTHER_NODE).await.unwrap();
    parent.unpublish(&id, "nowhere").await.unwrap();

    let attachment = parent.publish(&id, NODE).await.unwrap();
    // The same node with another readonly.
    let again = ControllerPublishVolumeRequest {
        volume_id: id.clone(),
        node_id: NODE.to_owned(),
        volume_capability: Some(block()),
        readonly: true,
        ..ControllerPublishVolumeRequest::default()
    };
    let mut controller = parent.controller.0.clone();
    let answer = controller.controller_publish_volume(again).await;
    assert_eq!(refusal(answer).0, Code::AlreadyExists);
    let as_mount = ControllerPublishVolumeRequest {
        volume_id: id.clone(),
        node_id: NODE.to_owned(),
        volume_capability: Some(mount("ext4")),
        ..ControllerPublishVolumeRequest::default()
    };
    let answer = controller.controller_publish_volume(as_mount).await;
    let (code, text) = refusal(answer);
    assert_eq!(code, Code::InvalidArgument, "{text}");
    assert!(text.contains(&id), "{text}");
    // Detaching another node leaves this one alone.
    parent.unpublish(&id, OTHER_NODE).await.unwrap();
    assert_eq!(parent.publish(&id, NODE).await.unwrap(), attachment);
    for _ in 0..2 {
        let (code, text) = refusal(parent.delete(&id).await);
        assert_eq!(code, Code::FailedPrecondition);
        assert!(text.contains(&id) && text.contains(NODE), "{text}");
    }
    assert_eq!(parent.publish(&id, NODE).await.unwrap(), attachment);
    parent.unpublish(&id, NODE).await.unwrap();
    parent.delete(&id).await.unwrap();
    assert_eq!(home.leftovers(), Vec::<String>::new());
}

/// Whatever became of a volume's files, the volume can be deleted, and a new one made.
#[tokio::test(flavor = "multi_thread")]
async fn a_volume_whose_files_were_lost_can_be_deleted() {
    let home = Home::new();
    let parent = home.start().await;
    type Harm = fn(&std::path::Path);
    let harms: [(&str, Harm); 5] = [
        ("data deleted", |directory| {
            fs::remove_file(directory.join("data")).unwrap();
        }),
        ("data truncated", |directory| {
            let data = fs::File::options().write(true).open(directory.join("data"));
            data.unwrap().set_len(10).unwrap();
        }),
        ("data is a directory", |directory| {
            fs::remove_file(directory.join("data")).unwrap();
            fs::create_dir(directory.join("data")).unwrap();
        }),
        ("everything deleted", |directory| {
            fs::remove_dir_all(directory).unwrap();
        }),
        ("attachments.json is garbage", |directory| {
            fs::write(directory.join("attachments.json"), b"\0{{").unwrap();
        }),
    ];
    for (name, harm) in harms {
        for kill in [false, true] {
            let id = parent.create(name, MIB).await.unwrap().volume_id;
            parent.publish(&id, NODE).await.unwrap();
            let server = home.statistics(&id).await.unwrap();
            harm(&home.volume(&id));
            if kill {
                send(process_of(&server), Signal::KILL);
            }
            // A server that is dying may hold its volume a little longer.
            let mut unpublished = parent.unpublish(&id, NODE).await;
            while unpublished.as_ref().err().map(tonic::Status::code) == Some(Code::Unavailable) {
                unpublished = parent.unpublish(&id, NODE).await;
            }
            for done in [unpublished, parent.delete(&id).await] {
                if let Err(status) = done {
                    panic!("{name}, server killed: {kill}: {status}\n{}", home.log());
                }
            }
            assert_eq!(home.leftovers(), Vec::<String>::new(), "{name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_record_is_named_and_its_data_is_left() {
    let home = Home::new();
    let parent = home.start().await;
    let id = parent.create("n", MIB).await.unwrap().volume_id;
    parent.create("other", MIB).await.unwrap();
    assert!(parent.terminate().success());
    let record = home.volume(&id).join("volume.json");
    let whole = fs::read(&record).unwrap();
    fs::write(&record, &whole[..whole.len() / 2]).unwrap();
    let mut parent = home.start().await;
    for (code, text) in [
        refusal(parent.create("n", MIB).await),
        refusal(parent.publish(&id, NODE).await),
        refusal(parent.expand(&id, 2 * MIB).await),
        refusal(parent.delete(&id).await),
    ] {
        assert_eq!(code, Code::Internal, "{text}");
        assert!(text.contains(&id) && text.contains("volume.json"), "{text}");
    }
    assert!(home.volume(&id).join("data").exists());
    parent.create("other", MIB).await.unwrap();
    parent.kill();
    fs::write(&record, &whole).unwrap();
    let parent = home.start().await;
    parent.delete(&id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_the_sockets_disturbs_nobody() {
    let home = Home::new();
    let parent = home.start().await;
    let id = parent.create("n", MIB).await.unwrap().volume_id;
    let server = home.statistics(&id).await.unwrap();
    let control = home.path("state/servers").join(&id).join("control");
    for path in [&control, &home.path("csi.sock")] {
        for bytes in [
            vec![0xff; 100_000],
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            // A frame of 16 MiB after HTTP/2's preface.
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\x04\0\0\0\0\0".to_vec(),
            Vec::new(),
        ] {
            let mut socket = UnixStream::connect(path).unwrap();
            socket
                .set_read_timeout(Some(Duration::from_millis(100)))
                .unwrap();
            let _ = socket.write_all(&bytes);
            let _ = socket.read(&mut [0; 4096]);
        }
    }
    // Silent ones, and many of them.
    let silent: Vec<_> = (0..100)
        .map(|_| UnixStream::connect(&control).unwrap())
        .collect();
    assert_eq!(
        home.statistics(&id).await.unwrap().process_id,
        server.process_id
    );
    parent.publish(&id, NODE).await.unwrap();
    drop(silent);
    parent.unpublish(&id, NODE).await.unwrap();
    parent.delete(&id).await.unwrap();
}

/// Paths that cannot be used are said, and what is in the way is left.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_the_way_at_the_start_is_said_and_left() {
    for name in ["state", "secrets", "pool", "csi.sock"] {
        let home = Home::new();
        let path = home.path(name);
        fs::write(&path, b"mine").unwrap();
        let text = home.refused(&home.path("pool"));
        assert!(text.contains(path.to_str().unwrap()), "{text}");
        assert_eq!(fs::read(&path).unwrap(), b"mine");
        fs::remove_file(&path).unwrap();
        home.start().await.create("n", MIB).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_in_place_of_a_secret_is_named_and_never_repeated() {
    let home = Home::new();
    let parent = home.start().await;
    let id = parent.create("n", MIB).await.unwrap().volume_id;
    let server = home.statistics(&id).await.unwrap();
    let key = home.path("secrets").join(format!("{id}-server/tls.key"));
    assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o77, 0);
    let whole = fs::read_to_string(&key).unwrap();
    let half = &whole[..whole.len() / 2];
    fs::write(&key, half).unwrap();
    send(process_of(&server), Signal::KILL);
    home.logged("the volume has no server").await;
    let (code, text) = refusal(parent.publish(&id, NODE).await);
    assert_eq!(code, Code::Unavailable, "{text}");
    assert!(text.contains(&id) && text.contains("tls.key"), "{text}");
    let told = fs::read_to_string(home.path("state/servers").join(&id).join("log"));
    let told = told.unwrap_or_default() + &home.log() + &text;
    let secret = half.lines().nth(1).unwrap();
    assert!(!told.contains(&secret[..16]), "key material in the log");
    fs::write(&key, whole).unwrap();
    parent.publish(&id, NODE).await.unwrap();
}
