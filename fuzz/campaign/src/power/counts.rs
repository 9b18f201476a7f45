//! What was counted of losses of power.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::check::Left;
use super::finding::{Finding, Wrong};

/// All counts.
#[derive(Debug, Default)]
pub struct Counts {
    pub losses: u64,
    pub distinct: u64,
    pub histories: u64,
    /// By the command that was running, or had just ended.
    pub commands: BTreeMap<&'static str, u64>,
    pub models: BTreeMap<&'static str, u64>,
    old: u64,
    new: u64,
    pub found: Vec<Found>,
}

/// Findings that are alike.
#[derive(Debug)]
pub struct Found {
    wrong: Wrong,
    command: &'static str,
    /// What the first one says, without what differs.
    alike: String,
    what: String,
    count: u64,
    kept: PathBuf,
}

impl Counts {
    pub fn is_clean(&self) -> bool {
        self.found.is_empty()
    }

    pub fn add(&mut self, left: Left) {
        match left {
            Left::Old => self.old += 1,
            Left::New => self.new += 1,
        }
    }

    /// Adds a finding; returns whether it is the first one of its kind, which is kept at the path.
    pub fn add_finding(&mut self, command: &'static str, finding: &Finding, kept: PathBuf) -> bool {
        let alike = alike(&finding.what);
        let same = |found: &&mut Found| (found.wrong, found.command, &found.alike) == (finding.wrong, command, &alike);
        if let Some(found) = self.found.iter_mut().find(same) {
            found.count += 1;
            return false;
        }
        self.found.push(Found { wrong: finding.wrong, command, alike, what: finding.what.clone(), count: 1, kept });
        true
    }

    /// The counts as a line, and each kind of finding with its count.
    pub fn table(&self) -> String {
        let by = |counts: &BTreeMap<&str, u64>| {
            let counts: Vec<String> = counts.iter().map(|(name, count)| format!("{name} {count}")).collect();
            counts.join(", ")
        };
        let wrong = Wrong::ALL.map(|wrong| {
            let found = self.found.iter().filter(|found| found.wrong == wrong);
            format!(" | {} {}", wrong.name(), found.map(|found| found.count).sum::<u64>())
        });
        let mut text = format!(
            "power: losses {} | distinct trees {} | histories {} | by command: {} | by model: {} | old {} new {}{}\n",
            self.losses,
            self.distinct,
            self.histories,
            by(&self.commands),
            by(&self.models),
            self.old,
            self.new,
            wrong.concat(),
        );
        for found in &self.found {
            let (command, wrong, what) = (found.command, found.wrong.name(), shortened(&found.what));
            text +=
                &format!("{:6}  {command}: {wrong}: {what}\n        first: {}\n", found.count, found.kept.display());
        }
        text
    }
}

/// The beginning of a message's first line.
pub fn shortened(what: &str) -> String {
    let line = what.trim_end().lines().next().unwrap_or_default();
    match line.char_indices().nth(400) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.to_owned(),
    }
}

/// The beginning of a message without numbers and names of files, which differ.
fn alike(what: &str) -> String {
    let is_word = |c: char| c.is_ascii_alphabetic() || c == '_';
    let mut words = vec![];
    for part in what.split(|c: char| c.is_whitespace() || "\"',:;()[]{}".contains(c)) {
        if part.len() > 1 && part.chars().all(is_word) && !words.contains(&part) {
            words.push(part);
        }
    }
    words.truncate(16);
    words.join(" ")
}
