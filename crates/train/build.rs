//! Notes for run.json what this build was made with: the compiler, and the versions of the libraries that can change a number. With the feature
//! `torch` also how the linker and the loader find libtorch.

use std::path::PathBuf;
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
    if let Some(folder) = std::env::var_os("DEP_TCH_LIBTORCH_LIB") {
        link_torch(&PathBuf::from(folder));
    }
}

/// The version of a package in the text of Cargo.lock.
fn locked<'a>(lock: &'a str, name: &str) -> Option<&'a str> {
    let after = lock.split_once(&format!("name = \"{name}\"\nversion = \""))?.1;
    after.split('"').next()
}

/// The folder of libtorch goes into the run path, so that no variable is needed where torch lies as it did at the build, and so does a torch beside
/// the file in the environment whose bin folder holds it.
fn link_torch(folder: &std::path::Path) {
    println!("cargo::rustc-link-arg=-Wl,-rpath,{}", folder.display());
    for python in ["3.11", "3.12", "3.13"] {
        println!("cargo::rustc-link-arg=-Wl,-rpath,$ORIGIN/../lib/python{python}/site-packages/torch/lib");
    }
    // Without this the linker drops libtorch_cuda, which nothing names, and torch would see no device.
    println!("cargo::rustc-link-arg=-Wl,--no-as-needed");
    println!("cargo::rustc-link-arg=-L{}", folder.display());
    println!("cargo::rustc-link-arg=-ltorch");
    if folder.join("libtorch_cuda.so").exists() {
        println!("cargo::rustc-link-arg=-ltorch_cuda");
    }
}
