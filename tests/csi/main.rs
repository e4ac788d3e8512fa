//! The CSI interface as others see it.

mod published;
