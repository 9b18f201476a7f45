//! What was counted.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use crate::child::{Tally, Trouble, TroubleKind};

/// What a round counts, beside the runs of the program.
#[derive(Debug, Default, Clone, Copy)]
pub struct Counts {
    /// Faults that took effect: commands killed, files damaged, commands run on a full or read-only disk or beside others.
    pub faults: u64,
    /// Wrong answers of a damaged store that `verify` tells of.
    pub told: u64,
    /// Other times, messages or sizes in a damaged store's lists, of which nothing tells.
    pub unnoticed: u64,
}

/// The counts of one kind.
#[derive(Debug, Default)]
pub struct Line {
    name: String,
    pub rounds: u64,
    pub took: Duration,
    counts: Counts,
    answered: u64,
    refused: u64,
    killed: u64,
    lost: u64,
    panicked: u64,
    hung: u64,
}

impl Line {
    /// Adds a round.
    pub fn add(&mut self, counts: &Counts, tally: &Tally) {
        self.rounds += 1;
        self.counts.faults += counts.faults;
        self.counts.told += counts.told;
        self.counts.unnoticed += counts.unnoticed;
        self.answered += tally.answered;
        self.refused += tally.refused;
        self.killed += tally.killed;
    }

    /// Adds what a round found; fails where the campaign itself is at fault.
    pub fn found(&mut self, trouble: &Trouble) -> Result<(), Trouble> {
        match trouble.kind {
            TroubleKind::Lost => self.lost += 1,
            TroubleKind::Panicked => self.panicked += 1,
            TroubleKind::Hung => self.hung += 1,
            TroubleKind::Campaign => {
                return Err(Trouble { kind: TroubleKind::Campaign, what: format!("{}: {}", self.name, trouble.what) });
            }
        }
        Ok(())
    }
}

/// The counts of all kinds.
pub struct Report {
    pub lines: Vec<Line>,
    refusals: BTreeMap<String, u64>,
}

impl Report {
    pub fn new(names: impl Iterator<Item = String>) -> Self {
        Report { lines: names.map(|name| Line { name, ..Line::default() }).collect(), refusals: BTreeMap::new() }
    }

    pub fn add_refusals(&mut self, refusals: BTreeMap<String, u64>) {
        for (line, count) in refusals {
            *self.refusals.entry(line).or_default() += count;
        }
    }

    pub fn is_clean(&self) -> bool {
        self.lines.iter().all(|line| line.lost + line.panicked + line.hung == 0)
    }

    /// The counts as a table of Markdown.
    pub fn table(&self, took: Duration) -> String {
        let heads = "| kind | rounds | faults | commands | answered | refused | killed | told by verify | unnoticed | lost | panicked | hung |";
        let mut text = format!("{heads}\n|{}\n", "---|".repeat(heads.matches('|').count() - 1));
        for line in &self.lines {
            let commands = line.answered + line.refused + line.killed;
            let numbers = [
                line.rounds,
                line.counts.faults,
                commands,
                line.answered,
                line.refused,
                line.killed,
                line.counts.told,
                line.counts.unnoticed,
                line.lost,
                line.panicked,
                line.hung,
            ];
            let cells: Vec<String> = numbers.iter().map(u64::to_string).collect();
            // Writing to a text cannot fail.
            let _ = writeln!(text, "| {} | {} |", line.name, cells.join(" | "));
        }
        let _ = writeln!(text, "in {:.1} minutes", took.as_secs_f64() / 60.0);
        text
    }

    /// Each kind of refusal with its count.
    pub fn refusals(&self) -> String {
        self.refusals.iter().map(|(line, count)| format!("{count:6}  {line}\n")).collect()
    }
}
