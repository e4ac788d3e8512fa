//! What a StorageClass may ask for, as CreateVolume's `parameters` and afterwards as `volume_context`.
//!
//! | parameter | values | default |
//! |---|---|---|
//! | `connections` | 1 to 16: connections of one attachment | 4 |
//! | `verify` | `strict`: no attachment to a server that fails verification; `warn`; `off` | `strict` |
//! | `ioTimeout` | 2 to 300 seconds until a request on a dead connection is sent again | 10 |
//! | `reconnectTimeout` | 10 to 86400 seconds that I/O waits for a server before it fails | 600 |
//! | `pool` | an NbdPool's name | the only one there is |
//! | `certificates` | `managed`, `certManager`, `secret`: who makes them | `managed` |
//! | `issuer`, `issuerKind`, `issuerGroup` | with `certManager`: its issuer | none, `Issuer`, `cert-manager.io` |
//! | `serverSecret` | with `secret`: the Secret of the volumes' servers | `<volume id>-server` |
//! | `csi.storage.k8s.io/fstype` | `ext4`, `xfs`, `btrfs`, where the capability names none | `ext4` |
//!
//! A static PersistentVolume on a server that is not Hawser's has two keys more in its `volume_context`, `uri` and
//! `format`: see [`super::foreign`].
//!
//! What is not in the table is refused by name: a misspelt parameter must not silently mean its default.

use std::collections::{BTreeMap, HashMap};
use std::ops::RangeInclusive;
use std::time::Duration;

use tonic::Status;

use super::foreign::{self, Formatting};
use super::status::invalid;
use crate::attach::{Foreign, Options};
use crate::filesystem::Kind;
use crate::volumes::Certificates;

const CONNECTIONS: &str = "connections";
const VERIFY: &str = "verify";
const IO_TIMEOUT: &str = "ioTimeout";
const RECONNECT_TIMEOUT: &str = "reconnectTimeout";
const POOL: &str = "pool";
const CERTIFICATES: &str = "certificates";
const ISSUER: &str = "issuer";
const ISSUER_KIND: &str = "issuerKind";
const ISSUER_GROUP: &str = "issuerGroup";
const SERVER_SECRET: &str = "serverSecret";

/// What only the controller acts on: no node needs to know.
const CONTROLLERS: [&str; 6] = [
    POOL,
    CERTIFICATES,
    ISSUER,
    ISSUER_KIND,
    ISSUER_GROUP,
    SERVER_SECRET,
];

/// The longest name of a Kubernetes object.
const NAME_LIMIT: usize = 253;
pub(super) const FS_TYPE: &str = "csi.storage.k8s.io/fstype";
pub(super) const URI: &str = "uri";
const FORMAT: &str = "format";

/// How the keys begin that csi-provisioner acts on; it refuses those that it does not know.
const PROVISIONER: &str = "csi.storage.k8s.io/";

/// What csi-provisioner adds to say for whom a volume is made (`--extra-create-metadata`). Nothing depends on it.
const METADATA: [&str; 3] = [
    "csi.storage.k8s.io/pvc/name",
    "csi.storage.k8s.io/pvc/namespace",
    "csi.storage.k8s.io/pv/name",
];

/// What Kubernetes adds to a volume's context: about the pod (podInfoOnMount), and who provisioned it.
const KUBERNETES: [&str; 2] = ["csi.storage.k8s.io/", "storage.kubernetes.io/"];

const CONNECTIONS_RANGE: RangeInclusive<u64> = 1..=16;
const IO_TIMEOUT_RANGE: RangeInclusive<u64> = 2..=300;
const RECONNECT_TIMEOUT_RANGE: RangeInclusive<u64> = 10..=86_400;

/// How a volume is attached and formatted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Parameters {
    pub(super) options: Options,
    /// The file system of a volume whose capability leaves it open.
    pub(super) kind: Option<Kind>,
    /// Where the volume is, if its server is not Hawser's.
    pub(super) foreign: Option<Foreign>,
    /// Whether a file system may be made on a foreign export.
    pub(super) formatting: Formatting,
    /// The pool that is to keep it, where there are several.
    pub(super) pool: Option<String>,
    pub(super) certificates: Certificates,
}

impl Parameters {
    /// Takes CreateVolume's `parameters`, in which every key must be known.
    pub(super) fn parse(map: &HashMap<String, String>) -> Result<Self, Status> {
        Self::read(map, Source::Class)
            .map_err(|problems| invalid(format!("parameters: {problems}")))
    }

    /// Takes GetCapacity's `parameters`. csi-provisioner gives CreateVolume what is left of a StorageClass without the
    /// keys that it acts on itself, the Secrets' names among them; GetCapacity gets the whole.
    pub(super) fn parse_class(map: &HashMap<String, String>) -> Result<Self, Status> {
        Self::read(map, Source::WholeClass)
            .map_err(|problems| invalid(format!("parameters: {problems}")))
    }

    /// Takes a `volume_context`, to which Kubernetes adds keys of its own.
    pub(super) fn parse_context(map: &HashMap<String, String>) -> Result<Self, Status> {
        Self::read(map, Source::Volume)
            .map_err(|problems| invalid(format!("volume_context: {problems}")))
    }

    /// What was recorded in a volume's own context.
    pub(super) fn recorded(context: &BTreeMap<String, String>) -> Result<Self, Status> {
        let map = context
            .iter()
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        Self::parse_context(&map)
    }

    /// The parameters of `map` that a node needs. Defaults are left out: a volume follows them to the next version.
    pub(super) fn context(map: &HashMap<String, String>) -> BTreeMap<String, String> {
        map.iter()
            .filter(|(key, _)| !METADATA.contains(&key.as_str()))
            .filter(|(key, _)| !CONTROLLERS.contains(&key.as_str()))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    }

    /// Reads `map`; all problems are told at once.
    fn read(map: &HashMap<String, String>, source: Source) -> Result<Self, String> {
        let mut parameters = Self::default();
        let mut problems = Vec::new();
        // In a fixed order, so that the same mistake is the same message.
        for (key, value) in map.iter().collect::<BTreeMap<_, _>>() {
            if let Err(problem) = parameters.set(key, value, source) {
                problems.push(problem);
            }
        }
        if parameters.foreign.is_none() && map.contains_key(FORMAT) && problems.is_empty() {
            problems.push(format!("{FORMAT} goes with {URI} only"));
        }
        match certificates(map) {
            Ok(certificates) => parameters.certificates = certificates,
            Err(problem) => problems.push(problem),
        }
        if problems.is_empty() {
            Ok(parameters)
        } else {
            Err(problems.join("; "))
        }
    }

    fn set(&mut self, key: &str, value: &str, source: Source) -> Result<(), String> {
        match key {
            CONNECTIONS => {
                let number = number(key, value, CONNECTIONS_RANGE)?;
                self.options.connections =
                    u8::try_from(number).map_err(|error| error.to_string())?;
            }
            IO_TIMEOUT => self.options.timeout = seconds(key, value, IO_TIMEOUT_RANGE)?,
            RECONNECT_TIMEOUT => {
                self.options.dead_timeout = seconds(key, value, RECONNECT_TIMEOUT_RANGE)?;
            }
            VERIFY => {
                self.options.policy = value.parse().map_err(|error| format!("{key}: {error}"))?;
            }
            FS_TYPE => {
                self.kind = match value {
                    "" => None,
                    text => Some(text.parse().map_err(|error| format!("{key}: {error}"))?),
                }
            }
            URI if source == Source::Volume => {
                let found = foreign::parse(value).map_err(|error| format!("{key}: {error}"))?;
                self.foreign = Some(found);
            }
            FORMAT if source == Source::Volume => {
                self.formatting = value.parse().map_err(|error| format!("{key}: {error}"))?;
            }
            URI | FORMAT => {
                return Err(format!(
                    "{key:?} is for a PersistentVolume on a server of its own; Hawser makes volumes on its own only"
                ));
            }
            POOL => self.pool = Some(name(key, value)?),
            // Read together, afterwards.
            CERTIFICATES | ISSUER | ISSUER_KIND | ISSUER_GROUP | SERVER_SECRET => {}
            key if source.passes(key) => {}
            key => {
                return Err(format!(
                    "{key:?} is unknown; there are {CONNECTIONS}, {VERIFY}, {IO_TIMEOUT}, \
                     {RECONNECT_TIMEOUT}, {FS_TYPE}, {}",
                    CONTROLLERS.join(", ")
                ));
            }
        }
        Ok(())
    }
}

/// Where parameters come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// CreateVolume's `parameters`.
    Class,
    /// GetCapacity's `parameters`.
    WholeClass,
    /// A `volume_context`.
    Volume,
}

impl Source {
    /// Whether that key, which is none of ours, is passed over.
    fn passes(self, key: &str) -> bool {
        match self {
            Self::Class => METADATA.contains(&key),
            Self::WholeClass => key.starts_with(PROVISIONER),
            Self::Volume => KUBERNETES.iter().any(|prefix| key.starts_with(prefix)),
        }
    }
}

/// The name of a Kubernetes object.
fn name(key: &str, value: &str) -> Result<String, String> {
    let proper = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.');
    if (1..=NAME_LIMIT).contains(&value.len()) && value.bytes().all(proper) {
        return Ok(value.to_owned());
    }
    Err(format!("{key} {value:?} is not the name of an object"))
}

/// Who makes the certificates; what belongs to another source is refused rather than ignored.
fn certificates(map: &HashMap<String, String>) -> Result<Certificates, String> {
    let value = |key: &str| map.get(key).map(String::as_str);
    let source = value(CERTIFICATES).unwrap_or("managed");
    let allowed: &[&str] = match source {
        "managed" => &[],
        "certManager" => &[ISSUER, ISSUER_KIND, ISSUER_GROUP],
        "secret" => &[SERVER_SECRET],
        other => {
            return Err(format!(
                "{CERTIFICATES}: {other:?} is none of managed, certManager, secret"
            ));
        }
    };
    let all = [ISSUER, ISSUER_KIND, ISSUER_GROUP, SERVER_SECRET];
    let mut foreign = all.iter().filter(|key| !allowed.contains(key));
    if let Some(key) = foreign.find(|key| map.contains_key(**key)) {
        return Err(format!(
            "{key} says nothing where {CERTIFICATES} is {source}"
        ));
    }
    Ok(match source {
        "certManager" => Certificates::CertManager {
            issuer: match value(ISSUER) {
                Some(text) => name(ISSUER, text)?,
                None => return Err(format!("{CERTIFICATES} {source} needs {ISSUER}")),
            },
            kind: match value(ISSUER_KIND).unwrap_or("Issuer") {
                "" => return Err(format!("{ISSUER_KIND} is empty")),
                kind => kind.to_owned(),
            },
            group: name(
                ISSUER_GROUP,
                value(ISSUER_GROUP).unwrap_or("cert-manager.io"),
            )?,
        },
        "secret" => Certificates::Secret {
            server: value(SERVER_SECRET)
                .map(|text| name(SERVER_SECRET, text))
                .transpose()?,
        },
        _ => Certificates::Managed,
    })
}

fn number(key: &str, value: &str, range: RangeInclusive<u64>) -> Result<u64, String> {
    match value.parse() {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => Err(format!(
            "{key} {value:?} is not a whole number from {} to {}",
            range.start(),
            range.end()
        )),
    }
}

fn seconds(key: &str, value: &str, range: RangeInclusive<u64>) -> Result<Duration, String> {
    number(key, value, range).map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::Policy;

    fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs
            .iter()
            .map(|&(key, value)| (key.to_owned(), value.to_owned()))
            .collect()
    }

    #[test]
    fn a_class_may_ask_for_what_the_table_says() {
        let asked = map(&[
            ("connections", "2"),
            ("verify", "warn"),
            ("ioTimeout", "5"),
            ("reconnectTimeout", "86400"),
            ("csi.storage.k8s.io/fstype", "btrfs"),
            ("csi.storage.k8s.io/pvc/name", "data"),
            ("pool", "fast"),
            ("certificates", "certManager"),
            ("issuer", "storage"),
        ]);
        let parsed = Parameters::parse(&asked).unwrap();
        assert_eq!(
            parsed,
            Parameters {
                options: Options {
                    connections: 2,
                    timeout: Duration::from_secs(5),
                    dead_timeout: Duration::from_secs(86_400),
                    policy: Policy::Warn,
                },
                kind: Some(Kind::Btrfs),
                pool: Some("fast".to_owned()),
                certificates: Certificates::CertManager {
                    issuer: "storage".to_owned(),
                    kind: "Issuer".to_owned(),
                    group: "cert-manager.io".to_owned(),
                },
                ..Parameters::default()
            }
        );
        let context = Parameters::context(&asked);
        assert!(!context.contains_key("csi.storage.k8s.io/pvc/name"));
        assert!(!context.contains_key("pool") && !context.contains_key("issuer"));
        let recorded = Parameters::recorded(&context).unwrap();
        assert_eq!(
            (recorded.options, recorded.kind),
            (parsed.options, parsed.kind)
        );
        assert_eq!(Parameters::parse(&map(&[])).unwrap(), Parameters::default());
    }

    #[test]
    fn each_unknown_or_senseless_parameter_is_named() {
        for (key, value) in [
            ("conections", "4"),
            ("connections", "0"),
            ("connections", "17"),
            ("connections", "four"),
            ("connections", ""),
            ("connections", "99999999999999999999999"),
            ("verify", "Strict"),
            ("ioTimeout", "1"),
            ("ioTimeout", "10s"),
            ("reconnectTimeout", "-1"),
            ("csi.storage.k8s.io/fstype", "zfs"),
            ("csi.storage.k8s.io/nonsense", "1"),
            ("pool", ""),
            ("pool", "Fast"),
            ("certificates", "mine"),
            ("certificates", "certManager"),
            ("issuer", "storage"),
            ("serverSecret", "mine"),
        ] {
            let refused = Parameters::parse(&map(&[(key, value)])).unwrap_err();
            assert_eq!(refused.code(), tonic::Code::InvalidArgument);
            assert!(refused.message().contains(key), "{}", refused.message());
        }
        let both = Parameters::parse(&map(&[("one", ""), ("two", "")])).unwrap_err();
        assert!(both.message().contains("one") && both.message().contains("two"));
    }

    #[test]
    fn a_context_may_carry_what_kubernetes_adds() {
        let context = map(&[
            ("csi.storage.k8s.io/pod.name", "web-0"),
            ("storage.kubernetes.io/csiProvisionerIdentity", "1-2-hawser"),
        ]);
        assert_eq!(
            Parameters::parse_context(&context).unwrap(),
            Parameters::default()
        );
        assert!(Parameters::parse_context(&map(&[("device", "/dev/sda")])).is_err());
    }

    #[test]
    fn only_a_volume_may_be_elsewhere() {
        let uri = ("uri", "nbds://storage.example/disk");
        let elsewhere = map(&[uri, ("format", "if-empty"), ("connections", "2")]);
        let parsed = Parameters::parse_context(&elsewhere).unwrap();
        assert_eq!(parsed.foreign.unwrap().export, "disk");
        assert_eq!(parsed.formatting, Formatting::IfEmpty);
        assert_eq!(parsed.options.connections, 2);
        for (bad, part) in [
            (Parameters::parse(&map(&[uri])), "uri"),
            (
                Parameters::parse_context(&map(&[("uri", "nbd://storage.example/disk")])),
                "nbds",
            ),
            (
                Parameters::parse_context(&map(&[uri, ("format", "always")])),
                "if-empty",
            ),
            (
                Parameters::parse_context(&map(&[("format", "if-empty")])),
                "goes with uri",
            ),
        ] {
            let refused = bad.unwrap_err();
            assert!(refused.message().contains(part), "{}", refused.message());
        }
    }

    /// A row of the table in docs/parameters.md: what is allowed, and the default.
    fn told(key: &str) -> (String, String) {
        let document = include_str!("../../docs/parameters.md");
        let row = document
            .lines()
            .find_map(|line| line.strip_prefix(&format!("| `{key}` | ")))
            .unwrap_or_else(|| panic!("docs/parameters.md has no {key}"));
        let mut cells = row.split(" | ").map(str::to_owned);
        (cells.next().unwrap(), cells.next().unwrap())
    }

    #[test]
    fn the_documentation_has_each_parameter_its_values_and_its_default() {
        let parse = |key: &str, value: &str| Parameters::parse(&map(&[(key, value)]));
        let default = Options::default();
        for (key, range, default) in [
            (CONNECTIONS, CONNECTIONS_RANGE, default.connections.into()),
            (IO_TIMEOUT, IO_TIMEOUT_RANGE, default.timeout.as_secs()),
            (
                RECONNECT_TIMEOUT,
                RECONNECT_TIMEOUT_RANGE,
                default.dead_timeout.as_secs(),
            ),
        ] {
            let values = format!("{} to {}", range.start(), range.end());
            assert_eq!(told(key), (values, default.to_string()), "{key}");
            for (number, is_allowed) in [
                (range.start() - 1, false),
                (*range.start(), true),
                (*range.end(), true),
                (range.end() + 1, false),
            ] {
                let parsed = parse(key, &number.to_string());
                assert_eq!(parsed.is_ok(), is_allowed, "{key} {number}");
            }
        }
        for (key, default) in [
            (VERIFY, default.policy.to_string()),
            (FS_TYPE, Kind::default().to_string()),
        ] {
            let (values, told_default) = told(key);
            assert_eq!(told_default, format!("`{default}`"), "{key}");
            for value in values.split(", ").map(|value| value.trim_matches('`')) {
                assert!(parse(key, value).is_ok(), "{key} {value}");
            }
        }
        for kind in Kind::ALL {
            assert!(told(FS_TYPE).0.contains(&format!("`{kind}`")), "{kind}");
            let size = format!("| `{kind}` | {} MiB |", kind.minimum_size() >> 20);
            assert!(
                include_str!("../../docs/parameters.md").contains(&size),
                "{size}"
            );
        }
        for policy in [Policy::Strict, Policy::Warn, Policy::Off] {
            assert!(told(VERIFY).0.contains(&format!("`{policy}`")), "{policy}");
        }
    }
}
