//! With the feature `torch`: how the linker and the loader find libtorch. Its folder goes into the run path, so that no variable is needed where
//! torch lies as it did at the build, and so does a torch beside the file (its neighbour among the installed packages).

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let Some(folder) = std::env::var_os("DEP_TCH_LIBTORCH_LIB") else { return };
    let folder = std::path::PathBuf::from(folder);
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", folder.display());
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/../torch/lib");
    // Without this the linker drops libtorch_cuda, which nothing names, and torch would see no device.
    println!("cargo:rustc-link-arg=-Wl,--no-as-needed");
    println!("cargo:rustc-link-arg=-L{}", folder.display());
    println!("cargo:rustc-link-arg=-ltorch");
    if folder.join("libtorch_cuda.so").exists() {
        println!("cargo:rustc-link-arg=-ltorch_cuda");
    }
}
