//! A session at the options that may ask for everything: for verification.

use super::kernel::{ask, unexpected};
use super::plaintext::upgraded;
use super::secure::Secure;
use super::transmission::Transmitting;
use super::wire::Wire;
use super::{ClientError, Refusal, Step, Target};
use crate::nbd::client::{Answer, Handshake, Probe, Secured};
use crate::nbd::option_reply::MetaContextReply;
use crate::nbd::{ExportInfo, ExportName, OptionCode};

/// A connection inside TLS, at the options.
#[derive(Debug)]
pub struct ProbeSession {
    target: Target,
    secure: Secure,
    options: Secured<Probe>,
}

impl ProbeSession {
    /// Connects, and goes through STARTTLS and the TLS handshake.
    pub fn connect(target: &Target) -> Result<Self, ClientError> {
        let (wire, handshake) = upgraded(target)?;
        Self::begin(target.clone(), wire, handshake)
    }

    pub(super) fn begin(
        target: Target,
        wire: Wire,
        handshake: Handshake,
    ) -> Result<Self, ClientError> {
        let secure = Secure::handshake(wire, &target).map_err(target.failed(Step::Handshake))?;
        Ok(Self {
            target,
            secure,
            options: Secured::new(handshake),
        })
    }

    /// Asks for structured replies.
    pub fn structured_reply(&mut self) -> Result<Result<(), Refusal>, ClientError> {
        let option = self.options.structured_reply();
        self.ask(
            OptionCode::STRUCTURED_REPLY,
            &option,
            |answer| match answer {
                Answer::Accepted => Ok(()),
                other => Err(other),
            },
        )
    }

    /// Asks for the names of all exports.
    pub fn list(&mut self) -> Result<Result<Vec<String>, Refusal>, ClientError> {
        let option = self.options.list();
        self.ask(OptionCode::LIST, &option, |answer| match answer {
            Answer::Names(names) => Ok(names),
            other => Err(other),
        })
    }

    /// Asks what GO would say.
    pub fn info(
        &mut self,
        export: &ExportName,
    ) -> Result<Result<ExportInfo, Refusal>, ClientError> {
        let option = self.options.info(export);
        self.ask(OptionCode::INFO, &option, |answer| match answer {
            Answer::Export(info) => Ok(info),
            other => Err(other),
        })
    }

    /// Asks which contexts there are; no query means all.
    pub fn list_meta_context(
        &mut self,
        export: &ExportName,
        queries: &[&str],
    ) -> Result<Result<Vec<MetaContextReply>, Refusal>, ClientError> {
        let option = self.options.list_meta_context(export, queries);
        self.ask(OptionCode::LIST_META_CONTEXT, &option, contexts)
    }

    /// Selects contexts, in the place of all that were selected before.
    pub fn set_meta_context(
        &mut self,
        export: &ExportName,
        queries: &[&str],
    ) -> Result<Result<Vec<MetaContextReply>, Refusal>, ClientError> {
        let option = self.options.set_meta_context(export, queries);
        self.ask(OptionCode::SET_META_CONTEXT, &option, contexts)
    }

    /// Sends any option with any payload; what an acceptance says beyond that is not looked at.
    pub fn other(
        &mut self,
        option: OptionCode,
        payload: &[u8],
    ) -> Result<Result<(), Refusal>, ClientError> {
        let bytes = self.options.other(option, payload);
        self.ask(option, &bytes, |_| Ok(()))
    }

    /// Begins transmission; a refusal is an error, which ends the session.
    pub fn go(mut self, export: &ExportName) -> Result<Transmitting, ClientError> {
        let option = self.options.go(export);
        let failed = self.target.failed(Step::Option(OptionCode::GO));
        match ask(&mut self.secure, &mut self.options, &option) {
            Ok(Answer::Transmission(transmission)) => {
                Ok(Transmitting::new(self.target, self.secure, transmission))
            }
            Ok(answer) => Err(failed(unexpected(OptionCode::GO, answer))),
            Err(reason) => Err(failed(reason)),
        }
    }

    /// Ends the session politely, without waiting for an answer.
    pub fn abort(mut self) {
        let option = self.options.abort();
        if self.secure.write_all(&option).is_ok() {
            self.secure.close();
        }
    }

    fn ask<T>(
        &mut self,
        option: OptionCode,
        bytes: &[u8],
        accepted: impl FnOnce(Answer) -> Result<T, Answer>,
    ) -> Result<Result<T, Refusal>, ClientError> {
        let failed = self.target.failed(Step::Option(option));
        match ask(&mut self.secure, &mut self.options, bytes) {
            Ok(Answer::Refused { code, message }) => Ok(Err(Refusal { code, message })),
            Ok(answer) => match accepted(answer) {
                Ok(accepted) => Ok(Ok(accepted)),
                Err(answer) => Err(failed(unexpected(option, answer))),
            },
            Err(reason) => Err(failed(reason)),
        }
    }
}

fn contexts(answer: Answer) -> Result<Vec<MetaContextReply>, Answer> {
    match answer {
        Answer::Contexts(contexts) => Ok(contexts),
        other => Err(other),
    }
}
