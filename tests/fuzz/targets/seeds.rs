//! Where a run begins: each target writes a few good inputs of its own making into its corpus.

use std::path::PathBuf;

/// Writes `inputs` into the directory that `COPAGE_SEEDS` names, if it names one. Called before the
/// corpus is read.
pub fn write(inputs: impl IntoIterator<Item = Vec<u8>>) {
    let Some(dir) = std::env::var_os("COPAGE_SEEDS").map(PathBuf::from) else {
        return;
    };
    for (i, input) in inputs.into_iter().enumerate() {
        std::fs::write(dir.join(format!("seed-{i}")), input).expect("the corpus can be written");
    }
}
