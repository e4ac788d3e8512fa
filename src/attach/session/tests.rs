use super::*;
use crate::attach::record::tests::record;
use crate::nbd::BlockSizes;
use crate::tls::Side;

fn volume() -> VolumeId {
    record(1, 1).volume
}

fn info() -> ExportInfo {
    ExportInfo {
        size: 1 << 30,
        flags: record(1, 1).flags,
        block_sizes: Some(BlockSizes {
            minimum: 1,
            preferred: 4096,
            maximum_payload: 32 << 20,
        }),
        description: Some(format!("hawser volume={} epoch=7", volume())),
    }
}

fn foreign() -> Foreign {
    Foreign {
        host: "storage.example".into(),
        port: 10809,
        export: "disk".into(),
        server_name: "storage.example".into(),
    }
}

fn problem(outcome: Result<impl std::fmt::Debug, AttachError>) -> String {
    outcome.unwrap_err().to_string()
}

#[test]
fn an_export_says_what_its_device_is() {
    let export = Export::new(&volume(), &info()).unwrap();
    assert_eq!(export.size_bytes, 1 << 30);
    assert_eq!(export.block_size_bytes, 512);
    assert_eq!(export.epoch, Some(7));
    let foreign = ExportInfo {
        size: 1_000_000,
        block_sizes: None,
        description: Some("hawser-like".into()),
        ..info()
    };
    let export = Export::new(&volume(), &foreign).unwrap();
    assert_eq!(export.size_bytes, 1953 * 512);
    assert_eq!((export.epoch, export.maximum_payload), (None, None));
}

#[test]
fn exports_of_which_no_device_can_be_made_are_refused() {
    let empty = ExportInfo {
        size: 511,
        ..info()
    };
    assert!(problem(Export::new(&volume(), &empty)).contains("no data"));
    let endless = ExportInfo {
        size: u64::MAX,
        ..info()
    };
    assert!(problem(Export::new(&volume(), &endless)).contains("18446744073709551615 bytes"));
    let mut other = record(2, 1).peer();
    assert!(problem(other.export(&info())).contains("serves vol-01"));
    // Of a foreign volume the name is nobody's business, and the epoch counts all the same.
    other.foreign = Some(foreign());
    assert_eq!(other.export(&info()).unwrap().epoch, Some(7));
    let coarse = ExportInfo {
        block_sizes: Some(BlockSizes {
            minimum: 1 << 16,
            preferred: 1 << 16,
            maximum_payload: 32 << 20,
        }),
        ..info()
    };
    assert!(problem(Export::new(&volume(), &coarse)).contains("65536"));
}

#[test]
fn k20_only_the_same_export_may_go_on() {
    let size = 1 << 30;
    let record = record(1, 1);
    let same = Export::new(&volume(), &info()).unwrap();
    same.check_against(&record, size).unwrap();

    let mut grown = same.clone();
    grown.size_bytes *= 2;
    grown.flags = grown.flags.with(TransmissionFlags::SEND_TRIM);
    grown.check_against(&record, size).unwrap();
    assert!(problem(same.check_against(&record, 2 * size)).contains("offers 1073741824 bytes"));

    let mut other = same.clone();
    other.epoch = Some(8);
    assert!(matches!(
        other.check_against(&record, size),
        Err(AttachError::EpochChanged {
            known: 7,
            found: 8,
            ..
        })
    ));
    other.epoch = None;
    assert!(problem(other.check_against(&record, size)).contains("another kind"));

    let mut poorer = same.clone();
    poorer.flags = poorer.flags.without(TransmissionFlags::SEND_FLUSH);
    assert!(problem(poorer.check_against(&record, size)).contains("SEND_FLUSH"));
    let mut frozen = same.clone();
    frozen.flags = frozen.flags.with(TransmissionFlags::READ_ONLY);
    assert!(problem(frozen.check_against(&record, size)).contains("READ_ONLY"));
    let mut narrow = same.clone();
    narrow.maximum_payload = Some(1 << 20);
    assert!(narrow.check_against(&record, size).is_err());
    let mut coarse = same.clone();
    coarse.block_size_bytes = 4096;
    assert!(problem(coarse.check_against(&record, size)).contains("4096"));

    let mut single = record.clone();
    single.connections = 1;
    single.flags = single.flags.with(TransmissionFlags::CAN_MULTI_CONN);
    same.check_against(&single, size).unwrap();
    single.connections = 2;
    assert!(problem(same.check_against(&single, size)).contains("CAN_MULTI_CONN"));
}

#[test]
fn a_vanished_peer_ends_the_connection_within_the_timeout() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    notice_silence(&socket, Duration::from_secs(9)).unwrap();
    assert_eq!(sockopt::tcp_user_timeout(&socket).unwrap(), 8000);
    assert!(sockopt::socket_keepalive(&socket).unwrap());
    let probe = Duration::from_secs(3);
    assert_eq!(sockopt::tcp_keepidle(&socket).unwrap(), probe);
    assert_eq!(sockopt::tcp_keepintvl(&socket).unwrap(), probe);
    assert_eq!(sockopt::tcp_keepcnt(&socket).unwrap(), 3);
    notice_silence(&socket, Duration::from_secs(1)).unwrap();
    assert_eq!(
        sockopt::tcp_keepidle(&socket).unwrap(),
        Duration::from_secs(1)
    );
}

#[test]
fn a_description_that_is_not_ours_says_nothing() {
    assert_eq!(described("hawser volume=v epoch=3"), Some(("v", 3)));
    for other in [
        "",
        "hawser",
        "hawser volume=v",
        "hawser epoch=3 volume=v",
        "hawser volume=v epoch=x",
        "hawser volume=v epoch=3 more",
    ] {
        assert_eq!(described(other), None, "{other}");
    }
}

#[test]
fn a_foreign_server_is_asked_for_its_own_export_under_its_own_name() {
    let issued = tls::Authority::temporary()
        .unwrap()
        .issue(&tls::Leaf::new(Side::Client, vec!["node.example".into()]))
        .unwrap();
    let secret = Secret::from_map("the request", &issued, Side::Client).unwrap();
    let address = ([192, 0, 2, 1], 10809).into();
    let mut peer = record(1, 1).peer();
    assert!(matches!(
        peer.target(address, &secret, Profile::Kernel),
        Err(AttachError::Certificate { .. })
    ));
    peer.foreign = Some(foreign());
    let target = peer.target(address, &secret, Profile::Kernel).unwrap();
    assert_eq!(target.export.as_str(), "disk");
    assert_eq!(target.server_name.to_str(), "storage.example");
    peer.foreign = Some(Foreign {
        server_name: "2001:db8::1".into(),
        ..foreign()
    });
    let target = peer.target(address, &secret, Profile::Kernel).unwrap();
    assert!(matches!(target.server_name, ServerName::IpAddress(_)));
}
