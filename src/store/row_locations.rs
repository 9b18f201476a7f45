//! Where the rows of artifacts are.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The column of both tables that holds an artifact's [`RowLocations`], as JSON.
pub const LOCATIONS: &str = "places";

/// Where an artifact's rows were written, table by table: a reader that finds them there needs no search, and no look at
/// a table's versions.
///
/// gc may move rows, so a location is a hint: every row that is read there is held against the artifact's name, and rows
/// that are not there any more are looked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RowLocations(pub(super) BTreeMap<String, TableRows>);

impl RowLocations {
    /// Returns whether an artifact has as many rows in each table as another row says; of one that says nothing, it has.
    pub(super) fn as_many_rows(&self, other: &RowLocations) -> bool {
        other.0.is_empty()
            || self.0.len() == other.0.len()
                && self.0.iter().all(|(table, rows)| other.0.get(table).is_some_and(|o| o.rows == rows.rows))
    }
}

/// The rows of one table that belong to an artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TableRows {
    /// How many rows there are.
    pub rows: u64,
    /// Where they were written, in their order.
    #[serde(rename = "runs")]
    pub ranges: Vec<RowRange>,
}

/// Consecutive rows of one data file; deleted rows are counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RowRange {
    /// The file's name in the table's folder of data files.
    pub file: String,
    /// The rows of the file that come before these.
    pub offset: u64,
    /// How many rows there are.
    pub rows: u64,
}

/// [`RowLocations`] as the text that they are stored as: what a million of them take is a fraction.
#[derive(Debug, Clone)]
pub struct LocationsText(Box<str>);

impl LocationsText {
    /// Reads a column's text.
    ///
    /// # Errors
    /// When it is none of locations.
    pub fn read(text: &str) -> serde_json::Result<Self> {
        serde_json::from_str::<RowLocations>(text)?;
        Ok(LocationsText(text.into()))
    }

    /// Returns the locations.
    pub fn locations(&self) -> RowLocations {
        serde_json::from_str(&self.0).expect("was read when it was made")
    }
}

impl From<&RowLocations> for LocationsText {
    fn from(locations: &RowLocations) -> Self {
        LocationsText(serde_json::to_string(locations).expect("texts and numbers").into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_locations_as_they_were() {
        let ranges = vec![RowRange { file: "a.lance".into(), offset: 3, rows: 2 }];
        let locations = RowLocations([("weights".to_owned(), TableRows { rows: 2, ranges })].into());
        let text = LocationsText::from(&locations);
        assert_eq!(text.locations(), locations);
        assert_eq!(LocationsText::read(&text.0).unwrap().locations(), locations);
        assert!(LocationsText::read("{\"weights\":{\"rows\":2}}").is_err());
        assert!(LocationsText::read("[]").is_err());
    }
}
