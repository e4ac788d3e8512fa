//! The process: start, control, growth, certificates, faults of the disk, end.

use hawser::nbd::{Command, CommandFlags, Errno, ReplyCode};
use hawser::proto::control::{
    AllowRequest, DrainRequest, GrowRequest, RevokeRequest, StatisticsRequest,
};

use crate::bench::{Bench, EXPORT, attachment};
use crate::wire::Tls;

const NONE: CommandFlags = CommandFlags(0);
const MIB: u64 = 1 << 20;

#[test]
fn a_file_is_served_by_hand() {
    let bench = Bench::new(MIB);
    let mut server = bench.serve_file(&[]);
    let mut wire = Tls::connect(server.address, &bench.client());
    let (size, _) = wire.go(EXPORT).unwrap().export();
    assert_eq!(size, MIB);
    assert_eq!(wire.write(NONE, 4096, b"over the wire"), Errno::OK);
    assert_eq!(wire.read(4096, 13).unwrap(), b"over the wire");
    assert_eq!(wire.flush(), Errno::OK);
    wire.request(Command::DISC, NONE, 0, 0, 0);
    wire.hears_the_end();
    server.signal("-TERM");
    assert!(server.wait().success());
    assert_eq!(
        &std::fs::read(bench.data()).unwrap()[4096..4109],
        b"over the wire"
    );
}

#[tokio::test]
async fn a_volume_is_served_to_whom_the_control_socket_says() {
    let bench = Bench::new(MIB);
    let mut server = bench.serve_volume(&[]);
    let mut control = bench.control().await;
    let export = bench.export(&attachment(1));
    let mut wire = Tls::connect(server.address, &bench.client());
    assert_eq!(wire.go(&export), Err(ReplyCode::ERR_UNKNOWN));
    control
        .allow(AllowRequest {
            attachment: attachment(1).to_string(),
            read_only: false,
        })
        .await
        .unwrap();
    wire.go(&export).unwrap();
    assert_eq!(wire.write(NONE, 0, b"x"), Errno::OK);
    let statistics = control
        .statistics(StatisticsRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(statistics.address, server.address.to_string());
    assert_eq!(statistics.attachments[0].sessions, 1);
    assert_eq!(statistics.attachments[0].written_bytes, 1);
    let error = control
        .grow(GrowRequest {
            size_bytes: 2 * MIB,
        })
        .await
        .unwrap_err();
    assert_eq!(error.code(), tonic::Code::OutOfRange);
    std::fs::File::options()
        .write(true)
        .open(bench.data())
        .unwrap()
        .set_len(2 * MIB)
        .unwrap();
    let grown = control
        .grow(GrowRequest {
            size_bytes: 2 * MIB,
        })
        .await
        .unwrap();
    assert_eq!(grown.into_inner().size_bytes, 2 * MIB);
    assert_eq!(wire.write(NONE, 2 * MIB - 1, b"x"), Errno::OK);
    let revoked = control
        .revoke(RevokeRequest {
            attachment: attachment(1).to_string(),
        })
        .await
        .unwrap();
    assert_eq!(revoked.into_inner().closed_sessions, 1);
    wire.hears_the_end();
    control.drain(DrainRequest {}).await.unwrap();
    assert!(server.wait().success());
}
