//! What can go wrong in a run, by what it means to the person: every Display is a sentence with its remedy.

use std::io::{Error, ErrorKind};
use std::path::Path;

#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// Bad run file, flag or data: exit status 2, nothing was written.
    #[error("{0}")]
    Usage(String),
    /// The system refused a file; the text names it.
    #[error("{0}")]
    Io(#[from] Error),
    /// A damaged or foreign checkpoint, a failed evaluation: exit status 1.
    #[error("{0}")]
    Failed(String),
    /// Loss or gradients left the numbers: exit status 3. The last checkpoint is untouched.
    #[error("{0}")]
    Diverged(String),
}

/// The sentence for a file whose format is higher than the one that is read here.
pub(crate) fn newer(file: &Path, format: u64, reads: u64) -> String {
    format!(
        "{} was written by a newer moe_lab (format {format}, this one reads {reads}): update moe_lab",
        file.display()
    )
}

impl TrainError {
    /// Exit status of a command that ends with this error.
    pub fn exit_status(&self) -> u8 {
        match self {
            TrainError::Usage(_) => 2,
            // What a person can mend by another path is usage; a full or broken disk is not.
            TrainError::Io(error) => match error.kind() {
                ErrorKind::NotFound
                | ErrorKind::PermissionDenied
                | ErrorKind::AlreadyExists
                | ErrorKind::NotADirectory => 2,
                ErrorKind::ReadOnlyFilesystem | ErrorKind::InvalidInput | ErrorKind::IsADirectory => 2,
                _ => 1,
            },
            TrainError::Failed(_) => 1,
            TrainError::Diverged(_) => 3,
        }
    }
}
