//! Compiles the protocol definitions in `proto/` to Rust, without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["proto/control.proto", "proto/csi.proto"];
    for file in files {
        println!("cargo::rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["proto"])?;
    // A message that carries secrets has no Debug, so that no log line can print one by accident.
    let secretive: Vec<String> = descriptors
        .file
        .iter()
        .flat_map(|file| file.message_type.iter().map(move |m| (file.package(), m)))
        .filter(|(_, message)| message.field.iter().any(|field| field.name() == "secrets"))
        .map(|(package, message)| format!("{package}.{}", message.name()))
        .collect();
    tonic_prost_build::configure()
        .skip_debug(secretive)
        .compile_fds(descriptors)?;
    Ok(())
}
