//! What a client has asked for again on another connection, as the kernel does after its timeout (K21).

use hawser::nbd::{Command, CommandFlags, Errno};

use crate::bench::{Bench, EXPORT};
use crate::wire::{Tls, request};

const NONE: CommandFlags = CommandFlags(0);
const MIB: u64 = 1 << 20;

/// WRITEs, one behind the other, as bytes to send.
fn writes(ranges: impl Iterator<Item = (u64, Vec<u8>)>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (cookie, (offset, data)) in (1..).zip(ranges) {
        let length = u32::try_from(data.len()).unwrap();
        bytes.extend(request(Command::WRITE, NONE, cookie, offset, length));
        bytes.extend(data);
    }
    bytes
}

#[test]
fn k21_a_connection_that_was_given_up_changes_nothing_any_more() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let mut new = Tls::simple(server.address, &bench.client(), EXPORT);
    for round in 0..20 {
        let mut old = Tls::simple(server.address, &bench.client(), EXPORT);
        assert_eq!(new.write(NONE, 0, b"none"), Errno::OK);
        server.signal("-STOP");
        // So many are in the way of the last of them that the other connection is done before.
        let before = (0..500).map(|at| (4096 + at * 64, vec![1; 64]));
        old.say(&writes(before.chain([(0, b"old!".to_vec())])));
        old.cut();
        new.send_write(NONE, 2, 0, b"old!");
        server.signal("-CONT");
        assert_eq!(new.status().unwrap(), (2, Errno::OK));
        assert_eq!(new.write(NONE, 0, b"new!"), Errno::OK);
        server.logged("session ends");
        assert_eq!(new.read(0, 4).unwrap(), b"new!", "round {round}");
    }
}
