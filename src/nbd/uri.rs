//! Where a server and its export are, as people write it: NBD URIs, after `doc/uri.md` and libnbd's conventions.
//!
//! Nothing is looked up or opened here. What cannot be honoured is refused rather than ignored, since a parameter about
//! TLS that has no effect is worse than none.

use std::ffi::OsString;
use std::fmt::{self, Write};
use std::net::Ipv6Addr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::str::FromStr;

use super::ExportName;

#[cfg(test)]
mod tests;

/// The port that IANA assigned to NBD.
pub const DEFAULT_PORT: u16 = 10809;

/// Bytes of a host's name, as the DNS has it.
const MAX_HOST: usize = 253;

/// An NBD URI. Its `Display` is a URI again, in one spelling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uri {
    /// `nbds`: the connection must be inside TLS. Under `nbd` it may be.
    pub tls: bool,
    pub endpoint: Endpoint,
    pub export: ExportName,
    /// Who connects, for servers that authenticate by password; certificates do not need it.
    pub user: Option<String>,
    /// `tls-certificates`: the directory with our certificate and the authorities we trust.
    pub certificates: Option<PathBuf>,
    /// `tls-hostname`: the name that the server's certificate must bear, where that is not the host's.
    pub hostname: Option<String>,
}

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    Tcp {
        /// A name or an address, without brackets.
        host: String,
        port: u16,
    },
    /// A path; one that begins with NUL is a name in Linux' abstract namespace.
    Unix(PathBuf),
}

/// Why a text is no NBD URI, or none that can be followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidUri {
    #[error("an NBD URI begins with nbd://, nbds://, nbd+unix:// or nbds+unix://")]
    Scheme,
    #[error("NBD over vsock is not supported: use TCP or a unix socket")]
    Vsock,
    #[error("{0:?} must be percent-encoded in a URI")]
    Character(char),
    #[error("a percent sign must be followed by two hexadecimal digits; itself it is written %25")]
    PercentEncoding,
    #[error("the {0} is not UTF-8 without NUL")]
    Text(&'static str),
    #[error("a URI of an export has no fragment: write # as %23")]
    Fragment,
    #[error("the host is missing")]
    NoHost,
    #[error("{0:?} is not a host's name or address; an IPv6 address stands in brackets")]
    Host(String),
    #[error("{0:?} is not a port: a number from 1 to 65535")]
    Port(String),
    #[error(
        "{0:?} stands where a host would, and a unix socket has none: the export follows three slashes, as in \
         nbd+unix:///EXPORT?socket=PATH"
    )]
    HostOfSocket(String),
    #[error("the socket is missing: nbd+unix:///EXPORT?socket=PATH")]
    NoSocket,
    #[error("a socket goes with the schemes nbd+unix and nbds+unix only")]
    Socket,
    #[error("an export's name has at most 4096 bytes of UTF-8 without NUL")]
    Export,
    #[error("the parameter {0:?} is not known")]
    Parameter(String),
    #[error("the parameter {0} stands there twice")]
    Twice(&'static str),
    #[error("the parameter {0} has no value")]
    Empty(&'static str),
    #[error("pre-shared keys are not supported: use certificates (tls-certificates=DIRECTORY)")]
    PreSharedKey,
    #[error(
        "anonymous TLS is not supported, since anybody may be at its other end: use certificates"
    )]
    Anonymous,
    #[error("{0:?} is not a kind of TLS authentication: only x509 is supported")]
    TlsType(String),
    #[error(
        "a server whose certificate is not checked may be anybody: trust its authority in tls-certificates, and name \
         the server with tls-hostname, instead of tls-verify-peer=0"
    )]
    UncheckedPeer,
    #[error("{0:?} is not a value of tls-verify-peer: expected 1")]
    VerifyPeer(String),
}

impl Uri {
    /// The name that the server's certificate must bear; there is none to go by at a unix socket.
    #[must_use]
    pub fn server_name(&self) -> Option<&str> {
        match (&self.hostname, &self.endpoint) {
            (Some(name), _) => Some(name),
            (None, Endpoint::Tcp { host, .. }) => Some(host),
            (None, Endpoint::Unix(_)) => None,
        }
    }
}

impl FromStr for Uri {
    type Err = InvalidUri;

    fn from_str(text: &str) -> Result<Self, InvalidUri> {
        let (scheme, rest) = text.split_once("://").ok_or(InvalidUri::Scheme)?;
        let (tls, unix) = match scheme.to_ascii_lowercase().as_str() {
            "nbd" => (false, false),
            "nbds" => (true, false),
            "nbd+unix" => (false, true),
            "nbds+unix" => (true, true),
            "nbd+vsock" | "nbds+vsock" => return Err(InvalidUri::Vsock),
            _ => return Err(InvalidUri::Scheme),
        };
        if let Some(bad) = rest.chars().find(|c| !may_stand(*c)) {
            return Err(InvalidUri::Character(bad));
        }
        if rest.contains('#') {
            return Err(InvalidUri::Fragment);
        }
        let (hierarchy, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = hierarchy.split_once('/').unwrap_or((hierarchy, ""));
        let (user, place) = match authority.rsplit_once('@') {
            Some((user, place)) => (Some(user), place),
            None => (None, authority),
        };
        let user = user
            .filter(|user| !user.is_empty())
            .map(|user| decode_text(user, "user"))
            .transpose()?;
        let parameters = Parameters::parse(query)?;
        let endpoint = match (unix, parameters.socket) {
            (true, _) if !place.is_empty() => {
                return Err(InvalidUri::HostOfSocket(place.to_owned()));
            }
            (true, Some(socket)) => Endpoint::Unix(socket),
            (true, None) => return Err(InvalidUri::NoSocket),
            (false, Some(_)) => return Err(InvalidUri::Socket),
            (false, None) => tcp(place)?,
        };
        Ok(Self {
            tls,
            endpoint,
            export: ExportName::try_from(decode(path)?.as_slice())
                .map_err(|_| InvalidUri::Export)?,
            user,
            certificates: parameters.certificates,
            hostname: parameters.hostname,
        })
    }
}

/// Whether RFC 3986 allows a character unencoded at all; brackets only stand around an IPv6 address, which the host's
/// own check sees to.
fn may_stand(c: char) -> bool {
    c.is_ascii_graphic() && !matches!(c, '"' | '<' | '>' | '\\' | '^' | '`' | '{' | '|' | '}')
}

fn tcp(place: &str) -> Result<Endpoint, InvalidUri> {
    let bad = || InvalidUri::Host(place.to_owned());
    let (host, port) = if let Some(rest) = place.strip_prefix('[') {
        let (address, port) = rest.split_once(']').ok_or_else(bad)?;
        let address = decode_text(address, "host")?;
        // RFC 6874: a link-local address names its interface behind a percent sign.
        let (bare, zone) = match address.split_once('%') {
            Some((bare, zone)) => (bare, Some(zone)),
            None => (address.as_str(), None),
        };
        let sound = bare.parse::<Ipv6Addr>().is_ok()
            && zone.is_none_or(|zone| {
                !zone.is_empty() && zone.len() < 16 && zone.chars().all(|c| c.is_ascii_graphic())
            });
        if !sound {
            return Err(bad());
        }
        match port {
            "" => (address, None),
            port => (address, Some(port.strip_prefix(':').ok_or_else(bad)?)),
        }
    } else {
        let (host, port) = match place.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (place, None),
        };
        if host.is_empty() {
            return Err(InvalidUri::NoHost);
        }
        let host = decode_text(host, "host")?;
        let sound = host.len() <= MAX_HOST
            && host
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'));
        if !sound {
            return Err(bad());
        }
        (host, port)
    };
    let port = match port {
        // RFC 3986, section 3.2.3: an empty port is the default one.
        None | Some("") => DEFAULT_PORT,
        Some(digits) => digits
            .parse()
            .ok()
            .filter(|port| *port != 0 && digits.bytes().all(|b| b.is_ascii_digit()))
            .ok_or_else(|| InvalidUri::Port(digits.to_owned()))?,
    };
    Ok(Endpoint::Tcp { host, port })
}

#[derive(Default)]
struct Parameters {
    socket: Option<PathBuf>,
    certificates: Option<PathBuf>,
    hostname: Option<String>,
    tls_type: Option<()>,
    verify_peer: Option<()>,
}

impl Parameters {
    fn parse(query: &str) -> Result<Self, InvalidUri> {
        let mut parameters = Self::default();
        for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
            let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            let key = decode_text(key, "parameter")?;
            match key.as_str() {
                "socket" => once("socket", &mut parameters.socket, path("socket", value)?)?,
                "tls-certificates" => once(
                    "tls-certificates",
                    &mut parameters.certificates,
                    path("tls-certificates", value)?,
                )?,
                "tls-hostname" => {
                    let name = decode_text(value, "tls-hostname")?;
                    if name.is_empty() {
                        return Err(InvalidUri::Empty("tls-hostname"));
                    }
                    once("tls-hostname", &mut parameters.hostname, name)?;
                }
                "tls-type" => {
                    match decode_text(value, "tls-type")?.as_str() {
                        "x509" => {}
                        "psk" => return Err(InvalidUri::PreSharedKey),
                        "anon" => return Err(InvalidUri::Anonymous),
                        other => return Err(InvalidUri::TlsType(other.to_owned())),
                    }
                    once("tls-type", &mut parameters.tls_type, ())?;
                }
                "tls-verify-peer" => {
                    match decode_text(value, "tls-verify-peer")?.as_str() {
                        "1" | "true" => {}
                        "0" | "false" => return Err(InvalidUri::UncheckedPeer),
                        other => return Err(InvalidUri::VerifyPeer(other.to_owned())),
                    }
                    once("tls-verify-peer", &mut parameters.verify_peer, ())?;
                }
                "tls-psk-file" | "tls-username" => return Err(InvalidUri::PreSharedKey),
                _ => return Err(InvalidUri::Parameter(key)),
            }
        }
        Ok(parameters)
    }
}

fn once<T>(name: &'static str, place: &mut Option<T>, value: T) -> Result<(), InvalidUri> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(InvalidUri::Twice(name)),
    }
}

/// A path of this system, which need not be UTF-8.
fn path(name: &'static str, value: &str) -> Result<PathBuf, InvalidUri> {
    let bytes = decode(value)?;
    let nul = bytes.iter().rposition(|byte| *byte == 0);
    match (nul, bytes.len()) {
        (_, 0) => Err(InvalidUri::Empty(name)),
        (None, _) => Ok(OsString::from_vec(bytes).into()),
        (Some(0), 2..) if name == "socket" => Ok(OsString::from_vec(bytes).into()),
        (Some(_), _) => Err(InvalidUri::Text(name)),
    }
}

fn decode_text(text: &str, what: &'static str) -> Result<String, InvalidUri> {
    String::from_utf8(decode(text)?)
        .ok()
        .filter(|text| !text.contains('\0'))
        .ok_or(InvalidUri::Text(what))
}

fn decode(text: &str) -> Result<Vec<u8>, InvalidUri> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || {
            let digit = char::from(rest.next()?).to_digit(16)?;
            u8::try_from(digit).ok()
        };
        let (Some(high), Some(low)) = (digit(), digit()) else {
            return Err(InvalidUri::PercentEncoding);
        };
        bytes.push(high << 4 | low);
    }
    Ok(bytes)
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.tls { "nbds" } else { "nbd" })?;
        if matches!(self.endpoint, Endpoint::Unix(_)) {
            f.write_str("+unix")?;
        }
        f.write_str("://")?;
        if let Some(user) = &self.user {
            encode(f, user.as_bytes(), false)?;
            f.write_char('@')?;
        }
        if let Endpoint::Tcp { host, port } = &self.endpoint {
            if host.contains(':') {
                write!(f, "[{}]", host.replace('%', "%25"))?;
            } else {
                f.write_str(host)?;
            }
            if *port != DEFAULT_PORT {
                write!(f, ":{port}")?;
            }
        }
        f.write_char('/')?;
        encode(f, self.export.as_str().as_bytes(), true)?;
        let mut separator = '?';
        let mut parameter = |name: &str, value: &[u8]| {
            write!(f, "{separator}{name}=")?;
            separator = '&';
            encode(f, value, true)
        };
        if let Endpoint::Unix(socket) = &self.endpoint {
            parameter("socket", socket.as_os_str().as_bytes())?;
        }
        if let Some(directory) = &self.certificates {
            parameter("tls-certificates", directory.as_os_str().as_bytes())?;
        }
        if let Some(name) = &self.hostname {
            parameter("tls-hostname", name.as_bytes())?;
        }
        Ok(())
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display().to_string().escape_debug()),
        }
    }
}

fn encode(f: &mut fmt::Formatter<'_>, bytes: &[u8], slash: bool) -> fmt::Result {
    for byte in bytes {
        match byte {
            b'-' | b'.' | b'_' | b'~' => f.write_char(char::from(*byte))?,
            b'/' if slash => f.write_char('/')?,
            byte if byte.is_ascii_alphanumeric() => f.write_char(char::from(*byte))?,
            byte => write!(f, "%{byte:02X}")?,
        }
    }
    Ok(())
}
