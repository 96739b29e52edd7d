//! Notes for run.json what this build was made with: the compiler, and the versions of the libraries that can change a number.

use std::process::Command;

const LIBRARIES: [&str; 6] = ["candle-core", "gemm", "rayon", "safetensors", "serde_json", "tokenizers"];

fn main() {
    let lock = concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.lock");
    println!("cargo::rerun-if-changed={lock}");
    println!("cargo::rerun-if-changed=build.rs");
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let version = Command::new(rustc).arg("--version").output().ok();
    let version = version.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_string()).unwrap_or_default();
    println!("cargo::rustc-env=MOE_LAB_RUSTC={version}");
    let text = std::fs::read_to_string(lock).unwrap_or_default();
    let versions: Vec<String> =
        LIBRARIES.iter().filter_map(|name| Some(format!("{name} {}", locked(&text, name)?))).collect();
    println!("cargo::rustc-env=MOE_LAB_LIBRARIES={}", versions.join(","));
}

/// The version of a package in the text of Cargo.lock.
fn locked<'a>(lock: &'a str, name: &str) -> Option<&'a str> {
    let after = lock.split_once(&format!("name = \"{name}\"\nversion = \""))?.1;
    after.split('"').next()
}
