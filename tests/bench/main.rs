//! `hawser serve` beside nbdkit and qemu-nbd: the same file in memory, the same certificates, the same cipher, driven by
//! clients that none of the three wrote.
//!
//! The servers run side by side and take turns at each case, so that what else the machine does falls on all of them, and
//! only while the machine's processors are near each other, so that none has it harder.
//! What is compared is above all the server's own processor time, which the client's speed hardly touches. Nothing is
//! asserted: the figures are read by people, beside the goals. `make bench`; `docs/performance.md` says how to read it.

mod awake;
mod clients;
mod distance;
mod floor;
mod network;
mod plot;
mod report;
mod servers;
mod spread;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use self::awake::Awake;
use self::clients::{Access, Case, Client};
use self::distance::Distance;
use self::report::Report;
use self::servers::{Cipher, Kind, Server, Site};

/// Bytes of the file that is served. It is in memory, with everything else.
const SIZE: u64 = 256 << 20;

fn main() -> Result<ExitCode> {
    let options = Options::parse()?;
    // fio has to be another user than root, whom a network of somebody else has not.
    let alone = !options.as_is && rustix::process::geteuid().is_root();
    if alone && let Some(status) = network::alone()? {
        return Ok(status);
    }
    let site = Site::new(&options.directory, SIZE, options.before.clone())?;
    let _awake = options.awake.then(Awake::keep).transpose()?;
    let mut report = Report::new(&options)?;
    let mut distance = Distance::watch()?;
    for cipher in [Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305] {
        if options.cipher.is_none_or(|only| only == cipher) {
            measure(&site, cipher, &options, &mut distance, &mut report)?;
        }
    }
    report.finish(options.output.as_deref(), &distance)?;
    Ok(ExitCode::SUCCESS)
}

fn measure(
    site: &Site,
    cipher: Cipher,
    options: &Options,
    distance: &mut Distance,
    report: &mut Report,
) -> Result<()> {
    let mut servers = Vec::new();
    let before = site.before.as_ref().map(|_| Kind::Before);
    for kind in [Kind::Hawser, Kind::Nbdkit, Kind::Qemu]
        .into_iter()
        .chain(before)
    {
        servers.push(Server::start(site, kind, true)?);
    }
    for server in &servers {
        let used = server.negotiated_cipher(site, cipher)?;
        if used != cipher.number() {
            bail!("{server} speaks cipher suite {used:#06x}, not {cipher}");
        }
    }
    // Without TLS there is no cipher, and once is enough.
    if cipher == Cipher::Aes256Gcm {
        for kind in [Kind::Nbdkit, Kind::Qemu] {
            servers.push(Server::start(site, kind, false)?);
        }
    }
    let mut cases = cases(options.full);
    if let Some(only) = &options.only {
        cases.retain(|case| case.to_string().contains(only.as_str()));
    }
    for case in &cases {
        for repetition in 0..options.repetitions {
            let source = site.path("source");
            let floor = distance.near(|| floor::measure(&source, cipher, case))?;
            report.floor(cipher, case, floor);
            for turn in 0..servers.len() {
                // Who comes first has no advantage for long.
                let server = &servers[(turn + repetition) % servers.len()];
                let sample = distance
                    .near(|| case.run(site, server, cipher, options.seconds))
                    .with_context(|| format!("{case} on {server} with {cipher}"))?;
                report.sample(cipher, case, server, sample);
            }
        }
        report.show(cipher, case);
    }
    if options.only.is_none() {
        let case = Case::new(Client::Fio, Access::Read, 128 << 10, 16, 128);
        for server in servers.iter().filter(|server| server.tls) {
            let before = server.reset_peak()?;
            case.run(site, server, cipher, options.seconds)?;
            report.memory(cipher, server, before, server.peak()?);
        }
    }
    Ok(())
}

/// What is measured: the sizes and depths of the goals, and around them in the full run.
fn cases(full: bool) -> Vec<Case> {
    use Access::{Read, Write};
    let mut cases = Vec::new();
    let both = |cases: &mut Vec<Case>, client, block, connections, depth| {
        for access in [Read, Write] {
            cases.push(Case::new(client, access, block, connections, depth));
        }
    };
    const KIB: u32 = 1 << 10;
    if full {
        for block in [4, 16, 64, 256, 1024] {
            for connections in [1, 4, 16] {
                for depth in [1, 16, 64, 128] {
                    // 16 * 128 * 1 MiB would be 2 GiB in the client.
                    if block * connections * depth <= 256 << 10 {
                        both(&mut cases, Client::Fio, block * KIB, connections, depth);
                    }
                }
            }
        }
    } else {
        both(&mut cases, Client::Fio, 256 * KIB, 1, 16);
        both(&mut cases, Client::Fio, 4 * KIB, 1, 64);
        both(&mut cases, Client::Fio, 4 * KIB, 1, 1);
        both(&mut cases, Client::Fio, 16 * KIB, 4, 16);
    }
    both(&mut cases, Client::Libnbd, 4 * KIB, 1, 1);
    both(&mut cases, Client::Nbdcopy, 256 * KIB, 4, 16);
    if full {
        both(&mut cases, Client::Nbdcopy, 1024 * KIB, 1, 16);
        both(&mut cases, Client::Nbdcopy, 64 * KIB, 16, 16);
    }
    cases
}

/// What the command line says.
struct Options {
    full: bool,
    repetitions: usize,
    /// How long a client that can be told runs.
    seconds: f64,
    directory: PathBuf,
    /// Where the report goes, as JSON and SVG.
    output: Option<PathBuf>,
    only: Option<String>,
    /// Another hawser, which takes part.
    before: Option<PathBuf>,
    cipher: Option<Cipher>,
    /// In the machine's own network, with its settings.
    as_is: bool,
    /// The processors are not to go to sleep.
    awake: bool,
}

impl Options {
    fn parse() -> Result<Self> {
        let mut options = Self {
            full: false,
            repetitions: 3,
            seconds: 0.7,
            directory: "/dev/shm".into(),
            output: None,
            only: None,
            before: None,
            cipher: None,
            as_is: false,
            awake: false,
        };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            let mut value = || {
                arguments
                    .next()
                    .with_context(|| format!("{argument} what?"))
            };
            match argument.as_str() {
                "--bench" => {}
                "--full" => (options.full, options.repetitions) = (true, 5),
                "--as-is" => options.as_is = true,
                "--awake" => options.awake = true,
                "--repetitions" => options.repetitions = value()?.parse()?,
                "--seconds" => options.seconds = value()?.parse()?,
                "--directory" => options.directory = value()?.into(),
                "--output" => options.output = Some(value()?.into()),
                "--before" => options.before = Some(value()?.into()),
                "--only" => options.only = Some(value()?),
                "--cipher" => options.cipher = Some(Cipher::named(&value()?)?),
                other => bail!("unknown argument {other}"),
            }
        }
        Ok(options)
    }
}
