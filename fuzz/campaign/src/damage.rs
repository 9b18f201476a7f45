//! Damaged bytes in every kind of file of a store.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use fastrand::Rng;
use serde_json::Value;
use tempfile::TempDir;

use crate::check::check_models;
use crate::child::{Program, Ran, Trouble};
use crate::history::{History, State};
use crate::inputs::{BLOCK, args};
use crate::place::Place;
use crate::step::Step;
use crate::store::{Store, copy, number};

/// Damages one file of a store, does all that reads it, then a command that changes it, and reads again.
///
/// An answer is as before or an error, or `verify` fails. What was answered rightly before the change is so after it, and what the
/// change acknowledged is there.
pub fn round(program: &Program, place: &mut Place, prepared: &mut Option<Prepared>) -> Result<(), Trouble> {
    if prepared.is_none() {
        *prepared = Some(Prepared::make(program, place)?);
    }
    let Some(prepared) = prepared else { return Ok(()) };
    std::fs::create_dir(place.store.path())?;
    copy(prepared.folder.path(), &place.store.path())?;
    let damage = damage(&place.store.path(), &mut place.rng)?;
    place.counts.faults += 1;
    damaged(place, prepared).map_err(|trouble| Trouble { what: format!("{damage}: {}", trouble.what), ..trouble })
}

fn damaged(place: &mut Place, prepared: &Prepared) -> Result<(), Trouble> {
    let history = &prepared.history;
    let before = judged(place, prepared, None)?;
    let state = history.state();
    let models: Vec<String> = state.keys().cloned().collect();
    let model = models[place.rng.usize(..models.len())].clone();
    let variant = place.rng.usize(..place.inputs.variants.len());
    let step = match place.rng.u8(..8) {
        0..2 => Step::Collect,
        2..4 => Step::Import { model, variant },
        4 => Step::Import { model: "new".into(), variant },
        5 => Step::Restore("one".into()),
        6 => Step::Index,
        _ => Step::Train { model, block: 0 },
    };
    let ran = place.store.run(&step.args(place.inputs))?;
    let after = |trouble: Trouble| Trouble { what: format!("{}; after `{}`", trouble.what, ran.command), ..trouble };
    judged(place, prepared, Some(&before)).map_err(after)?;
    acknowledged(place, history, &step, &ran).map_err(after)
}

/// The store that rounds damage a copy of, which has files of every kind.
pub struct Prepared {
    folder: TempDir,
    history: History,
    /// Commands that read it, and what they answer.
    reads: Vec<(Vec<String>, Answer)>,
}

impl Prepared {
    fn make(program: &Program, place: &Place) -> Result<Self, Trouble> {
        let parent = place.store.folder().parent().unwrap_or(place.store.folder());
        let mut made = Place::new(program, place.inputs, parent, 0)?;
        let import = |model: &str, variant| Step::Import { model: model.to_owned(), variant };
        made.begin_with(&import("a", 2))?;
        for step in [
            import("b", 6),
            Step::Train { model: "b".into(), block: 0 },
            import("c", 10),
            Step::Index,
            Step::Snapshot("one".into()),
            Step::Forget("begun".into()),
            import("a", 3),
            import("d", 0),
            Step::Collect,
            import("b", 8),
            Step::Snapshot("two".into()),
            Step::Train { model: "a".into(), block: 1 },
            import("c", 7),
        ] {
            made.undisturbed(&step)?;
        }
        let folder = tempfile::Builder::new().prefix("prepared-").tempdir_in(parent)?;
        copy(&made.store.path(), folder.path())?;
        let read = |args: Vec<String>| match answer(&made.store, &args)? {
            Some(answer) => Ok((args, answer)),
            None => Err(Trouble::lost(format!("`{}` failed on the store that nothing was done to", args.join(" ")))),
        };
        let reads = reads(&made.history).into_iter().map(read).collect::<Result<_, Trouble>>()?;
        Ok(Prepared { folder, history: made.history, reads })
    }
}

/// Commands that read what is kept: at each kept version by its number, where each content is exported once, then of all versions.
fn reads(history: &History) -> Vec<Vec<String>> {
    let (mut reads, mut exported) = (vec![], BTreeSet::new());
    for at in history.kept() {
        reads.push(args!["--at", at, "models"].into());
        for (model, content) in &history.versions[&at].state {
            reads.push(args!["--at", at, "layers", model].into());
            if exported.insert(content) {
                reads.push(args!["--at", at, "export", model, "--output", "read.safetensors"].into());
            }
            if content.block.is_some() {
                reads.push(args!["--at", at, "show", model, BLOCK].into());
            }
        }
    }
    let one = history.snapshots["one"];
    reads.push(args!["--at", one, "nearest", "c", "layers.1", 0].into());
    reads.push(args!["--at", one, "shared", "a", "b"].into());
    reads.push(args!["snapshot", "list"].into());
    reads.extend(["log", "stats", "gc"].map(|command| args![command].into()));
    reads
}

/// Commands whose answers may differ: counts of bytes, and of what nobody uses.
const COUNTS: [&str; 2] = ["stats", "gc"];

/// What a command answered: what a layer is, and what is only told of it.
#[derive(PartialEq)]
struct Answer {
    content: Vec<u8>,
    rest: String,
}

/// What a command answers; nothing where it is refused.
fn answer(store: &Store, args: &[String]) -> Result<Option<Answer>, Trouble> {
    let ran = store.run(args)?;
    if !ran.is_done() {
        return Ok(None);
    }
    if args.iter().any(|arg| arg == "export") {
        return Ok(Some(Answer { content: std::fs::read(store.folder().join("read.safetensors"))?, rest: ran.out }));
    }
    let document: Value = serde_json::from_str(&ran.out)?;
    let rows = document.as_array().cloned().unwrap_or_default();
    let told = ["name", "version", "model", "layer", "method", "in_features", "out_features", "artifact", "config"];
    let picked = |row: &Value| told.map(|field| row.get(field).cloned().unwrap_or_default());
    let is = |commands: &[&str]| args.iter().any(|arg| commands.contains(&arg.as_str()));
    let content = match () {
        // Through an index `nearest` finds most of what is nearest, and with another index others.
        _ if is(&COUNTS) || is(&["nearest"]) => vec![],
        _ if is(&["shared"]) => ran.out.clone().into_bytes(),
        _ if is(&["show"]) => serde_json::to_vec(&picked(&document))?,
        _ => serde_json::to_vec(&rows.iter().map(picked).collect::<Vec<_>>())?,
    };
    Ok(Some(Answer { content, rest: ran.out }))
}

/// Reads everything, and judges it by what the whole store answered. Returns which answers were right.
fn judged(place: &mut Place, prepared: &Prepared, before: Option<&[bool]>) -> Result<Vec<bool>, Trouble> {
    // A change adds to the lists of all versions, which come last.
    let reads = prepared.reads.iter().filter(|(args, _)| before.is_none() || args[0] == "--at");
    let (mut wrong, mut other, mut right) = (vec![], 0, vec![]);
    for (at, (args, expected)) in reads.enumerate() {
        let found = answer(&place.store, args)?;
        right.push(found.as_ref().is_some_and(|found| found.content == expected.content));
        match found {
            _ if !right[at] && before.is_some_and(|before| before[at]) => {
                return Err(Trouble::lost(format!("`{}` was answered rightly before", args.join(" "))));
            }
            Some(found) if found.content != expected.content => wrong.push(args.join(" ")),
            Some(found) if found.rest != expected.rest && !COUNTS.contains(&args[0].as_str()) => other += 1,
            _ => {}
        }
    }
    let verified = place.store.run(&args!["verify"])?;
    match verified.is_done() {
        true if !wrong.is_empty() => {
            return Err(Trouble::lost(format!("wrong answers, and verify finds nothing: {wrong:?}")));
        }
        true => place.counts.unnoticed += other,
        false => place.counts.told += wrong.len() as u64,
    }
    Ok(right)
}

/// Whether what a change acknowledged is there, or `verify` fails.
fn acknowledged(place: &Place, history: &History, step: &Step, ran: &Ran) -> Result<(), Trouble> {
    let (true, Step::Import { model, .. } | Step::Train { model, .. }) = (ran.is_done(), step) else { return Ok(()) };
    let version = number(&serde_json::from_str(&ran.out)?, "version")?;
    let state = step.state_after(history).unwrap_or_default();
    let of_model = State::from([(model.clone(), state[model])]);
    match check_models(&place.store, place.inputs, version, &of_model, &mut Default::default()) {
        Err(trouble) if place.store.run(&args!["verify"])?.is_done() => Err(trouble),
        _ => Ok(()),
    }
}

/// Changes, cuts or removes one file; returns what was done.
fn damage(store: &Path, rng: &mut Rng) -> Result<String, Trouble> {
    let mut files = vec![];
    gather(store, store, &mut files)?;
    // By age, since names are random: the same in every campaign.
    files.sort();
    let mut classes: Vec<&str> = files.iter().map(|file| file.class).collect();
    classes.dedup();
    let class = classes[rng.usize(..classes.len())];
    let of_class: Vec<&StoreFile> = files.iter().filter(|file| file.class == class).collect();
    let mut tables: Vec<&str> = of_class.iter().map(|file| file.table.as_str()).collect();
    tables.dedup();
    let table = tables[rng.usize(..tables.len())];
    let of_table: Vec<&&StoreFile> = of_class.iter().filter(|file| file.table == table).collect();
    // Mostly the newest one, which matters most.
    let at = if rng.u8(..4) > 0 { of_table.len() - 1 } else { rng.usize(..of_table.len()) };
    let path = &of_table[at].path;
    let mut bytes = std::fs::read(path)?;
    let length = bytes.len();
    let at = rng.usize(..length.max(1));
    let end = (at + rng.usize(1..=16)).min(length);
    let what = match rng.u8(..10) {
        0..4 if length > 0 => {
            let bit = rng.u8(..8);
            bytes[at] ^= 1 << bit;
            format!("bit {bit} of byte {at} flipped")
        }
        4..6 if length > 0 => {
            let fill = [0, 0xff, 0x7f, 0x80][rng.usize(..4)];
            bytes[at..end].fill(fill);
            format!("bytes {at}..{end} set to {fill}")
        }
        6 if length > 0 => {
            bytes[at..end].fill_with(|| rng.u8(..));
            format!("bytes {at}..{end} set to others")
        }
        7 => {
            bytes.extend((0..rng.usize(1..32)).map(|_| rng.u8(..)));
            "bytes appended".to_owned()
        }
        8 => "removed".to_owned(),
        _ => {
            bytes.truncate(at);
            format!("cut to {at} bytes")
        }
    };
    match what == "removed" {
        true => std::fs::remove_file(path)?,
        false => std::fs::write(path, bytes)?,
    }
    let name = path.strip_prefix(store).unwrap_or(path);
    Ok(format!("{} ({length} bytes): {what}", name.display()))
}

/// A file of a store.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct StoreFile {
    class: &'static str,
    table: String,
    modified: SystemTime,
    path: PathBuf,
}

fn gather(store: &Path, folder: &Path, files: &mut Vec<StoreFile>) -> Result<(), Trouble> {
    const CLASSES: [&str; 8] =
        ["latest_version_hint", "_versions", "_transactions", "_deletions", "_indices", "_refs", "data", ".lock"];
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            gather(store, &path, files)?;
            continue;
        }
        let name = path.strip_prefix(store).unwrap_or(&path).display().to_string();
        let class = CLASSES.into_iter().find(|class| name.contains(class)).unwrap_or("other");
        let table = name.split('/').next().unwrap_or_default().to_owned();
        files.push(StoreFile { class, table, modified: path.metadata()?.modified()?, path });
    }
    Ok(())
}
