//! Files in a root: writing them where nobody sees them, publishing, checking, loading, finding
//! and deleting them.

mod durable;
mod group;
mod look;
mod note;
mod root;
mod scan;
mod slice;
mod stored;
mod sys;
mod tmp;

pub use durable::SyncPlan;
pub use look::{Name, Names, StaleTemp, Stored};
pub use note::Use;
pub use root::Root;
pub use scan::{Found, Scan, Taken};
pub use slice::{Progress, Slice};
pub use stored::{Check, Loader, fits_memory};
pub use tmp::{DEFAULT_MODE, Options, Outcome, Published, TmpFile};
