//! The main job, start to end, shown to a doubter.

pub mod uml;
