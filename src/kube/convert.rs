//! Between the API's objects and what the rest of Hawser knows.

use kube::ResourceExt;

use super::api::NbdVolume;
use crate::volumes::{Attachment, Format, InvalidName, Volume, VolumeOptions};

/// The volume that an object describes. Attachments that are to end are none any more; the size is what the volume has,
/// which may be less than what is asked for, or nothing yet.
pub fn volume(object: &NbdVolume) -> Result<Volume, InvalidName> {
    let spec = &object.spec;
    let status = object.status.clone().unwrap_or_default();
    let attachments = spec.attachments.iter().filter(|one| !one.revoked);
    Ok(Volume {
        id: object.name_any().parse()?,
        name: spec.name.clone(),
        size_bytes: status.size_bytes.unwrap_or_default(),
        options: VolumeOptions {
            content: spec.content,
            context: spec.context.clone(),
        },
        format: status.format.as_ref().map_or(Format::Never, Format::from),
        attachments: attachments
            .map(Attachment::try_from)
            .collect::<Result<_, _>>()?,
    })
}
