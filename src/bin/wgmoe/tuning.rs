//! Which tuning a command uses: `--tuning`, then `WGMOE_TUNING`, then what `wgmoe tune` stored for the device.

use crate::must_exist;
use crate::output::{self, Output};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use wgmoe::{Context, Error, Tuning};

/// Environment variable that chooses a tuning where `--tuning` does not.
const VARIABLE: &str = "WGMOE_TUNING";
/// No tuning at all: the plan's table decides.
const NONE: &str = "none";

/// The option of every command that runs layers.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Choices of kernels that `wgmoe tune` measured; none: the built-in table decides [default: $WGMOE_TUNING, or what is
    /// stored for the device]
    #[arg(long, value_name = "FILE|none")]
    tuning: Option<PathBuf>,
}

/// A tuning and where it came from.
pub struct Found {
    pub tuning: Arc<Tuning>,
    pub path: PathBuf,
}

impl Args {
    /// Refuses a file that is not there, before any work.
    pub fn check(&self) -> anyhow::Result<()> {
        match &self.tuning {
            Some(path) if path != Path::new(NONE) => must_exist("--tuning", path),
            _ => Ok(()),
        }
    }

    /// The tuning to use, which a line of its own names. One that cannot be used is reported, and the work goes on
    /// without: it decides how fast something is, not what comes out.
    pub fn find(&self, context: &Context, output: &mut Output) -> Option<Found> {
        let variable = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from);
        let asked = self.tuning.clone().or(variable);
        if context.gpu().is_none() || asked.as_deref() == Some(Path::new(NONE)) {
            return None;
        }
        let loaded = match &asked {
            Some(path) => Tuning::load(path, context).map(Some),
            None => Tuning::for_context(context),
        };
        match loaded {
            Ok(tuning) => {
                let path = asked.or_else(|| Tuning::stored_path(context.device()))?;
                let tuning = Arc::new(tuning?);
                let (number, date) = (tuning.entries().len(), tuning.date());
                output.line(&format!("tuning: {number} choices of {date}, from {}", path.display()));
                Some(Found { tuning, path })
            }
            Err(error) => {
                ignored(&error);
                None
            }
        }
    }
}

/// A tuning that is not used.
pub fn ignored(error: &Error) {
    output::warn(&format!("tuning ignored: {error}"));
}
