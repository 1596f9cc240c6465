//! Files in a root: writing them where nobody sees them, publishing, checking, loading, finding
//! and deleting them.
//!
//! ```text
//!  save ────┬─► write ─────────────────────┬─► unpublished ─┬─► entry ─┬─► root ──► sync_plan,
//!  import ──┴─► completion ─┬─► publish ───┤                └─► sync ──┘            sync_group
//!  load ────────────────────┴─► check ─────┴─► entry, payload
//!  removal ───► check, entry
//!  scan, note ────────────► entry
//! ```
//!
//! All arrows go down. `sys`, the system calls, `slice` and `effort` are below everything.

mod check;
mod completion;
mod effort;
mod entry;
mod import;
mod load;
mod note;
mod payload;
mod publish;
mod removal;
mod root;
mod save;
mod scan;
mod slice;
mod sync;
mod sync_group;
mod sync_plan;
mod sys;
mod unpublished;
mod write;

pub use check::Check;
pub use effort::Effort;
pub use entry::{Name, Names, StaleTemp, Stored};
pub use import::{Import, Received};
pub use load::{Loader, fits_memory};
pub use note::Use;
pub use payload::READ_PIECE;
pub use publish::{Outcome, Published};
pub use removal::Removal;
pub use root::Root;
pub use save::{Options, TmpFile};
pub use scan::{Found, Scan, Taken};
pub use slice::{Progress, Slice};
pub use sync_plan::SyncPlan;
pub use unpublished::{DEFAULT_MODE, SMALL_FILE};
pub use write::{WRITE_PIECE, WRITEBACK};
