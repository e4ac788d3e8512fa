//! Compiles the protocol definitions in `proto/` to Rust, without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    tonic_prost_build::configure().compile_fds(protox::compile(
        ["proto/control.proto", "proto/pluginregistration.proto"],
        ["proto"],
    )?)?;

    let csi = protox::compile(["proto/csi.proto"], ["proto"])?;
    // A message that carries secrets has no Debug, so that no log line can print one by accident.
    let secretive: Vec<String> = csi
        .file
        .iter()
        .flat_map(|file| file.message_type.iter().map(move |m| (file.package(), m)))
        .filter(|(_, message)| message.field.iter().any(|field| field.name() == "secrets"))
        .map(|(package, message)| format!("{package}.{}", message.name()))
        .collect();
    tonic_prost_build::configure()
        .skip_debug(secretive)
        // A call that a plugin does not declare is answered with UNIMPLEMENTED.
        .generate_default_stubs(true)
        .compile_fds(csi)?;
    Ok(())
}
