//! The fuzz corpus and every file that once broke something, replayed through the fuzz targets.

#[path = "../../../fuzz/targets.rs"]
mod targets;

use std::fs;
use std::path::Path;

#[test]
fn the_fuzz_corpus_and_the_regressions_pass() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    for (name, target) in targets::TARGETS {
        let mut count = 0;
        for kind in ["corpus", "regressions"] {
            let Ok(files) = fs::read_dir(root.join(kind).join(name)) else { continue };
            for file in files {
                let path = file.unwrap().path();
                println!("{}", path.display()); // shown where the target panics
                target(&fs::read(&path).unwrap());
                count += 1;
            }
        }
        assert!(count > 0, "fuzz/corpus/{name} is empty");
    }
    let named: Vec<_> = fs::read_dir(root.join("corpus")).unwrap().map(|folder| folder.unwrap().file_name()).collect();
    assert_eq!(named.len(), targets::TARGETS.len(), "each folder of fuzz/corpus belongs to a target: {named:?}");
}
