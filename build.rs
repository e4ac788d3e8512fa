//! Compiles the protocol definitions in `proto/` to Rust, without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["proto/control.proto"];
    for file in files {
        println!("cargo::rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
