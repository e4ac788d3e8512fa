//! Servers that mean harm: to keep a client waiting for ever, or to make it allocate without end.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use hawser::nbd::codec::Put;
use hawser::nbd::option_reply::{Information, MetaContextReply, reply};
use hawser::nbd::reply::{Extent, block_status, chunk_header, none, simple};
use hawser::nbd::request::RawRequest;
use hawser::nbd::{ChunkType, Cookie, Errno, OptionCode, ReplyCode, magic};
use hawser::verify::Target;
use rustls::ServerConfig;

use super::certificates::{Clients, Versions, volume};
use super::faulty::{Fault, Options, Shared, Tls, option};

type Secured = Options<Tls>;

/// What the server does to its client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hostility {
    // Before TLS.
    Silent,
    SendsGarbage,
    Oldstyle,
    DripsGreeting,
    DripsRefusals,
    EndlessRefusals,
    HugeRefusal,
    RefusesStartTls,
    // In the place of TLS.
    SilentHandshake,
    EndlessHandshake,
    EndlessEmptyRecords,
    OddRecords,
    // Inside TLS.
    SilentInside,
    DripsInside,
    EndlessInformation,
    EndlessListing,
    EndlessContexts,
    HugeOptionReply,
    EndlessKeyUpdates,
    EndlessChunks,
    HugeChunk,
    TooManyExtents,
    AnothersCookie,
    GarbageReply,
    SilentInTransmission,
}

use Hostility::*;

pub(crate) const ALL: &[Hostility] = &[
    Silent,
    SendsGarbage,
    Oldstyle,
    DripsGreeting,
    DripsRefusals,
    EndlessRefusals,
    HugeRefusal,
    RefusesStartTls,
    SilentHandshake,
    EndlessHandshake,
    EndlessEmptyRecords,
    OddRecords,
    SilentInside,
    DripsInside,
    EndlessInformation,
    EndlessListing,
    EndlessContexts,
    HugeOptionReply,
    EndlessKeyUpdates,
    EndlessChunks,
    HugeChunk,
    TooManyExtents,
    AnothersCookie,
    GarbageReply,
    SilentInTransmission,
];

pub(crate) fn start(hostility: Hostility) -> Target {
    let volume = volume(Clients::Genuine, Versions::Both, "volume.server.test");
    let (config, mut target) = (volume.config, volume.target);
    let listener = TcpListener::bind(target.address).unwrap();
    target.address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for (count, socket) in listener.incoming().enumerate() {
            let (socket, config) = (socket.unwrap(), config.clone());
            // Each ends when its client has had enough.
            std::thread::spawn(move || serve(socket, hostility, config, count));
        }
    });
    target
}

/// Waits until the client goes away.
fn wait(mut from: impl Read) -> io::Result<()> {
    while from.read(&mut [0; 4096])? > 0 {}
    Ok(())
}

/// Sends the same again and again until the client goes away.
fn endless(mut to: impl Write, bytes: &[u8]) -> io::Result<()> {
    let bytes = bytes.repeat(1 + 4096 / bytes.len());
    loop {
        to.write_all(&bytes)?;
    }
}

fn drip(mut to: impl Write, bytes: &[u8]) -> io::Result<()> {
    for byte in bytes {
        to.write_all(&[*byte])?;
        to.flush()?;
        std::thread::sleep(Duration::from_millis(15));
    }
    Ok(())
}

fn greeting(second: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put_u64(magic::NBDMAGIC);
    bytes.put_u64(second);
    bytes.put_u16(3);
    bytes
}

fn serve(
    mut socket: TcpStream,
    hostility: Hostility,
    config: Arc<ServerConfig>,
    count: usize,
) -> io::Result<()> {
    match hostility {
        Silent => return wait(socket),
        SendsGarbage => return endless(socket, b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        Oldstyle => return endless(socket, &greeting(magic::OLDSTYLE)),
        DripsGreeting => drip(&mut socket, &greeting(magic::IHAVEOPT))?,
        _ => socket.write_all(&greeting(magic::IHAVEOPT))?,
    }
    socket.read_exact(&mut [0; 4])?;
    loop {
        let (code, _) = option(&mut socket)?;
        let refusal = reply(code, ReplyCode::ERR_TLS_REQD, b"use TLS");
        match (hostility, code) {
            (RefusesStartTls, OptionCode::STARTTLS) => {
                let refusal = reply(code, ReplyCode::ERR_POLICY, &[b'\x1b'; 4096]);
                socket.write_all(&refusal)?;
            }
            (_, OptionCode::STARTTLS) => break,
            (_, OptionCode::EXPORT_NAME) => return Ok(()),
            (DripsRefusals, _) => drip(&mut socket, &refusal)?,
            (EndlessRefusals, _) => return endless(socket, &refusal),
            (HugeRefusal, _) => {
                let mut header = refusal[..16].to_vec();
                header.put_u32(u32::MAX);
                socket.write_all(&header)?;
                return endless(socket, b"words");
            }
            _ => socket.write_all(&refusal)?,
        }
    }
    socket.write_all(&reply(OptionCode::STARTTLS, ReplyCode::ACK, &[]))?;
    match hostility {
        SilentHandshake => wait(socket),
        // A ServerHello of 16 MiB, in full records.
        EndlessHandshake => {
            let mut record = vec![22, 3, 3, 0x40, 0];
            record.extend_from_slice(&[2, 0xff, 0xff, 0xff]);
            record.resize(5 + (16 << 10), 0);
            endless(socket, &record)
        }
        EndlessEmptyRecords => endless(socket, &[22, 3, 3, 0, 0]),
        OddRecords => {
            let odd: &[&[u8]] = &[
                &[24, 3, 3, 0, 3, 1, 0xff, 0xff],
                &[23, 3, 3, 0, 1, 0],
                &[20, 3, 3, 0, 1, 1],
                &[21, 3, 3, 0, 2, 1, 90],
                &[99, 3, 3, 0, 1, 0],
                &[22, 3, 3, 0xff, 0xff, 0],
                &[22, 9, 9, 0, 4, 0, 0, 0, 0],
                &[0x80, 0x2e, 1, 0, 2],
            ];
            endless(socket, odd[count % odd.len()])
        }
        _ => inside(
            Secured::secured(socket, config, Shared::new(Fault::Nothing))?,
            hostility,
        ),
    }
}

fn inside(mut secured: Secured, hostility: Hostility) -> io::Result<()> {
    loop {
        let (code, payload) = option(&mut secured.stream)?;
        let answer = secured.answer(code, &payload);
        let stream = &mut secured.stream;
        match (hostility, code) {
            (SilentInside, _) => return wait(stream),
            (DripsInside, _) => drip(stream, &answer)?,
            (EndlessInformation, OptionCode::INFO) => {
                let words = Information::Description("x".repeat(4096)).encode();
                return endless(stream, &reply(code, ReplyCode::INFO, &words));
            }
            (EndlessListing, OptionCode::LIST_META_CONTEXT)
            | (EndlessContexts, OptionCode::SET_META_CONTEXT) => {
                let name = format!("x:{}", "y".repeat(4000));
                let context = MetaContextReply { id: 1, name }.encode();
                return endless(stream, &reply(code, ReplyCode::META_CONTEXT, &context));
            }
            (HugeOptionReply, _) => {
                let mut header = answer[..16].to_vec();
                header.put_u32(u32::MAX);
                stream.write_all(&header)?;
                return endless(stream, b"words");
            }
            (EndlessKeyUpdates, _) => loop {
                stream
                    .conn
                    .refresh_traffic_keys()
                    .map_err(io::Error::other)?;
                stream.flush()?;
            },
            (_, OptionCode::GO) => {
                stream.write_all(&answer)?;
                return transmission(secured, hostility);
            }
            _ => stream.write_all(&answer)?,
        }
    }
}

fn transmission(mut secured: Secured, hostility: Hostility) -> io::Result<()> {
    let stream = &mut secured.stream;
    loop {
        let mut bytes = [0; RawRequest::LENGTH];
        stream.read_exact(&mut bytes)?;
        let RawRequest { cookie, .. } = RawRequest::parse(&bytes).map_err(io::Error::other)?;
        match hostility {
            EndlessChunks => {
                let mut chunk = none(cookie);
                chunk[5] = 0; // not the last one
                return endless(stream, &chunk);
            }
            HugeChunk => {
                stream.write_all(&chunk_header(
                    cookie,
                    ChunkType::BLOCK_STATUS,
                    true,
                    u32::MAX,
                ))?;
                return endless(stream, b"extents!");
            }
            TooManyExtents => {
                let extents = vec![
                    Extent {
                        length: 1,
                        flags: 0
                    };
                    (1 << 20) + 1
                ];
                stream.write_all(&block_status(cookie, true, 1, &extents))?;
            }
            AnothersCookie => stream.write_all(&simple(Cookie(1), Errno::OK))?,
            GarbageReply => return endless(stream, b"garbage"),
            _ => return wait(stream),
        }
    }
}
