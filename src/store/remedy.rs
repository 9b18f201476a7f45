//! What helps where something is damaged.

use serde::Serialize;

/// What mends a kind of damage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Remedy {
    /// [`repair`](crate::repair), or the next import: all that is needed is in the store's own files.
    Repair,
    /// [`repair`](crate::repair) from the checkpoint or from a store that has the artifact, or an import of the checkpoint.
    RepairFrom,
    /// [`repair`](crate::repair) from a store that has the artifact: it was made from no checkpoint.
    RepairFromStore,
    /// [`Store::gc`](crate::Store::gc): nothing uses it.
    Gc,
    /// [`Store::delete_snapshot`](crate::Store::delete_snapshot): the version that the snapshot named stays.
    DeleteSnapshot,
    /// The file's deletion, while no writer is at work.
    DeleteFile,
    /// A copy of the file, put in its place.
    RestoreFile,
    /// [`Store::restore`](crate::Store::restore) of an older version.
    RestoreVersion,
    /// [`repair`](crate::repair), which sets the file aside: the newest version that can be read is the latest then.
    RollBack,
}

impl Remedy {
    /// Returns what to do, as a person at a command line would do it.
    pub fn describe(self) -> &'static str {
        match self {
            Remedy::Repair => "layerstore repair, or the next import",
            Remedy::RepairFrom => {
                "layerstore repair --from the checkpoint, with --calibration where the layer was calibrated, or --from a store that has \
                 it; or an import of the checkpoint with its rules"
            }
            Remedy::RepairFromStore => "layerstore repair --from a store that has it",
            Remedy::Gc => "layerstore gc --apply, once it is old enough",
            Remedy::DeleteSnapshot => "layerstore snapshot delete",
            Remedy::DeleteFile => "the object's deletion, while no writer is at work",
            Remedy::RestoreFile => "a copy of the file, put in its place",
            Remedy::RestoreVersion => "layerstore restore of an older version",
            Remedy::RollBack => "layerstore repair, which goes back to the version before it",
        }
    }
}
