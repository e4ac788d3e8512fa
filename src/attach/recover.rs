//! After a restart: which devices are there, and what becomes of each.

use std::path::PathBuf;
use std::sync::Arc;

use super::backend::Backend;
use super::error::{AttachError, chain};
use super::record::Record;
use super::system::detached;
use super::{Device, Inner, blocking, modules};
use crate::volumes::{AttachmentId, VolumeId};

/// What [`super::Attacher::recover`] found of one volume.
#[derive(Debug, Clone)]
pub struct Recovered {
    pub volume: VolumeId,
    pub attachment: AttachmentId,
    pub fate: Fate,
}

/// What became of it.
#[derive(Debug, Clone)]
pub enum Fate {
    /// It is looked after again.
    Resumed(Device),
    /// Its attach or detach was interrupted, or the machine was restarted: no device was left, and now no record is.
    Forgotten,
    /// There is a device, but nothing is recorded of it: it works until its sockets die. Unstage it, then stage it
    /// again.
    Unrecorded(PathBuf),
    /// There is a device, but it was given up or disconnected, and something still has it open.
    Failed { device: PathBuf, problem: String },
}

/// What to do about a volume, from what was written and what is there.
#[derive(Debug, PartialEq, Eq)]
enum Finding {
    Both(u32, Record),
    RecordOnly(Record),
    DeviceOnly(u32, Backend),
}

/// Brings records and devices together: every device and every record is in exactly one finding.
fn reconcile(records: Vec<Record>, devices: Vec<(u32, Backend)>) -> Vec<Finding> {
    let mut records = records;
    let mut findings = Vec::new();
    for (index, backend) in devices {
        match records
            .iter()
            .position(|record| record.backend() == backend)
        {
            Some(position) => findings.push(Finding::Both(index, records.remove(position))),
            None => findings.push(Finding::DeviceOnly(index, backend)),
        }
    }
    findings.extend(records.into_iter().map(Finding::RecordOnly));
    findings
}

impl Inner {
    pub(super) async fn recover(self: Arc<Self>) -> Result<Vec<Recovered>, AttachError> {
        let inner = self.clone();
        let findings = blocking(move || inner.findings()).await?;
        if findings.iter().any(|finding| finding.index().is_some()) {
            self.clone().listen().await?;
        }
        let mut recovered = Vec::new();
        for finding in findings {
            let volume = finding.backend().volume;
            let _lock = self.lock(&volume).await;
            let inner = self.clone();
            let Some(found) = blocking(move || Ok(inner.settle_or_say(finding))).await? else {
                continue;
            };
            if let Fate::Resumed(device) = &found.fate {
                let backend = Backend {
                    volume,
                    attachment: found.attachment.clone(),
                };
                self.watch(&backend, device.index);
            }
            tracing::info!(volume = %found.volume, "after a restart: {}", found.fate);
            recovered.push(found);
        }
        Ok(recovered)
    }

    fn findings(&self) -> Result<Vec<Finding>, AttachError> {
        // Records first: of a device that is made meanwhile there is a record before, and one that goes is gone.
        let records = self
            .records
            .all()
            .map_err(AttachError::system("list the devices' records"))?;
        let devices = self
            .system
            .devices()
            .map_err(AttachError::system("list the nbd devices"))?;
        Ok(reconcile(records, devices))
    }

    /// One volume's trouble must not keep the others from being looked after.
    fn settle_or_say(&self, finding: Finding) -> Option<Recovered> {
        let Backend { volume, attachment } = finding.backend();
        let device = finding.index().map(|index| self.system.path(index));
        self.settle(finding).unwrap_or_else(|error| {
            let problem = chain(&error);
            tracing::error!(%volume, "after a restart: {problem}");
            device.map(|device| Recovered {
                volume,
                attachment,
                fate: Fate::Failed { device, problem },
            })
        })
    }

    /// Does what a finding asks for, under the volume's lock; `None` if it has changed since.
    fn settle(&self, finding: Finding) -> Result<Option<Recovered>, AttachError> {
        let backend = finding.backend();
        let volume = &backend.volume;
        let now = self.device_of(volume)?;
        if now != finding.index().map(|index| (index, backend.clone())) {
            return Ok(None);
        }
        let fate = match finding {
            Finding::RecordOnly(record) => {
                if self.record_of(volume)? != Some(record) {
                    return Ok(None);
                }
                self.forget(volume)?;
                Fate::Forgotten
            }
            Finding::DeviceOnly(index, _) => Fate::Unrecorded(self.system.path(index)),
            Finding::Both(index, record) => self.resume(index, &backend, &record)?,
        };
        Ok(Some(Recovered {
            volume: backend.volume,
            attachment: backend.attachment,
            fate,
        }))
    }

    fn resume(&self, index: u32, backend: &Backend, record: &Record) -> Result<Fate, AttachError> {
        let device = self.system.path(index);
        let failed = |problem| Fate::Failed { device, problem };
        let mut driver = modules::driver()?;
        if let Some(problem) = &record.failed {
            // Given up, perhaps without the time to disconnect it.
            if driver.is_connected(index, &backend.to_string())? {
                driver.disconnect(index)?;
            }
            return Ok(failed(problem.clone()));
        }
        if !driver.is_connected(index, &backend.to_string())? {
            return Ok(failed("some process has it open".into()));
        }
        // Its sockets may be dead, and are replaced only after this.
        let (system, payload) = (self.system.clone(), record.maximum_payload);
        detached(move || system.tune(index, payload));
        self.describe(index, backend).map(Fate::Resumed)
    }
}

impl Finding {
    fn index(&self) -> Option<u32> {
        match self {
            Self::Both(index, _) | Self::DeviceOnly(index, _) => Some(*index),
            Self::RecordOnly(_) => None,
        }
    }

    fn backend(&self) -> Backend {
        match self {
            Self::Both(_, record) | Self::RecordOnly(record) => record.backend(),
            Self::DeviceOnly(_, backend) => backend.clone(),
        }
    }
}

impl std::fmt::Display for Fate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Resumed(device) => write!(f, "{} is looked after again", device.path.display()),
            Self::Forgotten => f.write_str("it has no device, its record is removed"),
            Self::Unrecorded(device) => write!(
                f,
                "nothing is recorded of {}; it works until its connections end",
                device.display()
            ),
            Self::Failed { device, problem } => {
                write!(f, "{} does not work any more: {problem}", device.display())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attach::record::tests::record;

    #[test]
    fn records_and_devices_are_brought_together() {
        let device = |index, volume, attachment| (index, record(volume, attachment).backend());
        let findings = reconcile(
            vec![record(1, 1), record(2, 1), record(3, 1)],
            vec![device(0, 1, 1), device(4, 3, 9), device(7, 8, 1)],
        );
        assert_eq!(
            findings,
            [
                Finding::Both(0, record(1, 1)),
                Finding::DeviceOnly(4, record(3, 9).backend()),
                Finding::DeviceOnly(7, record(8, 1).backend()),
                Finding::RecordOnly(record(2, 1)),
                Finding::RecordOnly(record(3, 1)),
            ]
        );
    }
}
