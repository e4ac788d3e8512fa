//! The sessions that become block devices: simple replies only, and nothing left over in userspace.

use std::net::TcpStream;

use rustls::{CipherSuite, ClientConnection, ExtractedSecrets};

use super::plaintext::upgraded;
use super::secure::Secure;
use super::{ClientError, Reason, Refusal, Step, Target};
use crate::nbd::client::{Answer, Fault, Kernel, Secured, Transmission};
use crate::nbd::{OptionCode, ReplyCode};

/// A session whose next byte is transmission's, taken apart for the kernel.
pub struct KernelSession {
    /// With TCP_NODELAY, without timeouts; nothing of it was read beyond GO's ACK.
    pub socket: TcpStream,
    /// Sequence numbers and keys of both directions, of TLS 1.3.
    pub secrets: ExtractedSecrets,
    pub cipher: Option<CipherSuite>,
    /// What GO said.
    pub transmission: Transmission,
}

/// A session whose next byte is transmission's, for a proxy in userspace.
pub struct ProxySession {
    /// With TCP_NODELAY, without timeouts.
    pub socket: TcpStream,
    /// Holds no unread plaintext and wants no write.
    pub tls: ClientConnection,
    /// What GO said.
    pub transmission: Transmission,
}

/// Negotiates a session for the kernel.
///
/// Fails where the server refuses GO, where the TLS version is not 1.3, or where the server sent anything behind
/// GO's ACK: the kernel would not see it, or could not read it.
pub fn kernel_session(target: &Target) -> Result<KernelSession, ClientError> {
    let (secure, transmission) = negotiate(target)?;
    let cipher = secure
        .tls()
        .negotiated_cipher_suite()
        .map(|suite| suite.suite());
    let (socket, secrets) = secure
        .into_secrets()
        .map_err(target.failed(Step::HandOver))?;
    Ok(KernelSession {
        socket,
        secrets,
        cipher,
        transmission,
    })
}

/// The same negotiation, for the userspace proxy.
pub fn proxy_session(target: &Target) -> Result<ProxySession, ClientError> {
    let (secure, transmission) = negotiate(target)?;
    let (socket, tls) = secure.into_parts().map_err(target.failed(Step::HandOver))?;
    Ok(ProxySession {
        socket,
        tls,
        transmission,
    })
}

fn negotiate(target: &Target) -> Result<(Secure, Transmission), ClientError> {
    let (wire, handshake) = upgraded(target)?;
    let mut secure = Secure::handshake(wire, target).map_err(target.failed(Step::Handshake))?;
    let failed = target.failed(Step::Option(OptionCode::GO));
    let mut options = Secured::<Kernel>::new(handshake);
    let go = options.go(&target.export);
    match ask(&mut secure, &mut options, &go) {
        Ok(Answer::Transmission(transmission)) => Ok((secure, transmission)),
        Ok(answer) => Err(failed(unexpected(OptionCode::GO, answer))),
        Err(reason) => Err(failed(reason)),
    }
}

/// Sends one option and reads its answer.
pub(super) fn ask<P>(
    secure: &mut Secure,
    options: &mut Secured<P>,
    option: &[u8],
) -> Result<Answer, Reason> {
    secure.write_all(option)?;
    loop {
        let mut bytes = vec![0; options.wanted()];
        secure.read_exact(&mut bytes)?;
        if let Some(answer) = options.receive(&bytes)? {
            return Ok(answer);
        }
    }
}

/// An answer that does not fit its option, as a reason: a refusal, most likely.
pub(super) fn unexpected(asked: OptionCode, answer: Answer) -> Reason {
    match answer {
        Answer::Refused { code, message } => Reason::Refused(Refusal { code, message }),
        _ => Fault::UnexpectedReply {
            asked,
            code: ReplyCode::ACK,
        }
        .into(),
    }
}
