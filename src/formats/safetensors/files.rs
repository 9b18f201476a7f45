//! Which files, and which of their tensors, are a checkpoint: an index says so, else the numbers in names of shards, else that
//! there is one file. Whatever else lies in the folder is left out, and named.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use regex::Regex;
use serde::Deserialize;

use super::super::regular;
use super::header::Unique;
use crate::error::{Error, Result};

const SUFFIX: &str = ".safetensors";
/// The file that a folder's checkpoint is in where there is no index, and the stem of shards.
const MODEL: &str = "model";

/// What a checkpoint is made of.
#[derive(Debug, Default)]
pub struct Chosen {
    /// The files, in order.
    pub files: Vec<PathBuf>,
    /// The name of the file that each tensor is to be taken from, where an index says so. Others are left out.
    pub listed: Option<HashMap<String, String>>,
    /// What was left out, and why.
    pub notes: Vec<String>,
}

/// Finds the files of the checkpoint at a path: a folder, an index, or a file.
///
/// # Errors
/// When there is none, files of it are missing, or nothing says which of several files belong to it.
pub fn chosen(path: &Path) -> Result<Chosen> {
    let kind = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if kind.is_dir() {
        return of_folder(path);
    }
    if path.extension().is_some_and(|e| e == "json") {
        return of_index(path);
    }
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let notes = match Shard::of(&name) {
        Some(shard) if shard.count > 1 => {
            let count = shard.count;
            vec![format!("'{name}' is one of {count} shards, taken by itself: give the folder, or the index, for all")]
        }
        _ => vec![],
    };
    Ok(Chosen { files: vec![path.to_owned()], listed: None, notes })
}

/// Names, the first few of them, as text.
fn listed(names: &[String]) -> String {
    const SHOWN: usize = 4;
    let shown: Vec<String> = names.iter().take(SHOWN).map(|name| format!("'{name}'")).collect();
    match names.len().checked_sub(SHOWN) {
        None | Some(0) => shown.join(", "),
        Some(more) => format!("{} and {more} more", shown.join(", ")),
    }
}

/// Says that files are left out, if there are any.
fn left_out(names: &[String], why: &str) -> Option<String> {
    let is = if names.len() == 1 { "is" } else { "are" };
    (!names.is_empty()).then(|| format!("{} {is} left out of the checkpoint: {why}", listed(names)))
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: Unique<String>,
}

/// The shards that an index names, and where it says that each tensor is.
fn of_index(index: &Path) -> Result<Chosen> {
    let text = regular::read_to_string(index)?;
    let parsed: ShardIndex = serde_json::from_str(&text)
        .map_err(|e| Error::file(index, format!("not an index of safetensors shards: {e}")))?;
    let listed: HashMap<String, String> = parsed.weight_map.0.into_iter().collect();
    let mut names: Vec<&String> = listed.values().collect();
    names.sort();
    names.dedup();
    if names.is_empty() {
        return Err(Error::file(index, "the index's weight_map names no shard"));
    }
    let folder = folder_of(index);
    let mut files = Vec::with_capacity(names.len());
    for name in names {
        // A shard lies beside its index: anything else is a mistake or an attempt to read other files.
        if Path::new(name).file_name().is_none_or(|n| n != name.as_str()) {
            return Err(Error::file(index, format!("shard '{name}' is not a plain file name")));
        }
        let file = folder.join(name);
        if !file.exists() {
            return Err(Error::file(index, format!("shard '{name}' is missing from {}", folder.display())));
        }
        files.push(file);
    }
    Ok(Chosen { files, listed: Some(listed), notes: vec![] })
}

fn folder_of(file: &Path) -> &Path {
    file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A shard's name: `STEM-00001-of-00002.safetensors`.
#[derive(Debug, PartialEq)]
struct Shard {
    stem: String,
    number: u64,
    count: u64,
}

impl Shard {
    fn of(name: &str) -> Option<Self> {
        static NAME: LazyLock<Regex> = LazyLock::new(|| {
            Regex::new(r"^(?i)(.*?)[-_.]?(\d{1,9})[-_]of[-_](\d{1,9})\.safetensors$").expect("a regular expression")
        });
        let parts = NAME.captures(name)?;
        let number = |i: usize| parts[i].parse().ok();
        Some(Shard { stem: parts[1].to_owned(), number: number(2)?, count: number(3)? })
    }
}

/// Whether a name is that of an index: `X.safetensors.index.json`, or with a variant before `.json`.
fn is_index(name: &str) -> bool {
    name.strip_suffix(".json").is_some_and(|name| {
        name.ends_with(".safetensors.index")
            || name.rsplit_once('.').is_some_and(|(n, _)| n.ends_with(".safetensors.index"))
    })
}

fn of_folder(folder: &Path) -> Result<Chosen> {
    let (mut indexes, mut names, mut folders) = (vec![], vec![], vec![]);
    for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let entry = entry.map_err(|e| Error::io(folder, e))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        match () {
            // What begins with a dot is hidden: half of a download, or what a file system keeps beside a file.
            () if name.starts_with('.') => {}
            () if is_index(&name) => indexes.push(name),
            () if !name.ends_with(SUFFIX) => {}
            () if entry.path().is_dir() => folders.push(name),
            () => names.push(name),
        }
    }
    indexes.sort();
    names.sort();
    folders.sort();
    let others = |chosen: &Chosen| -> Vec<String> {
        let is_chosen = |name: &&String| chosen.files.iter().any(|f| f.file_name().is_some_and(|f| f == name.as_str()));
        names.iter().filter(|name| !is_chosen(name)).chain(&folders).cloned().collect()
    };
    if let Some(index) = decisive(folder, &indexes)? {
        let mut chosen = of_index(&folder.join(index))?;
        let besides: Vec<String> =
            indexes.iter().filter(|name| *name != index).cloned().chain(others(&chosen)).collect();
        chosen.notes.extend(left_out(&besides, &format!("{index} says what belongs to it")));
        return Ok(chosen);
    }
    if let Some(shards) = shards(folder, &names)? {
        let mut chosen = Chosen { files: shards.iter().map(|name| folder.join(name)).collect(), ..Chosen::default() };
        let why = format!("the numbers of {} say what belongs to it", listed(&shards[..1]));
        chosen.notes.extend(left_out(&others(&chosen), &why));
        return Ok(chosen);
    }
    let name = single(folder, &names, &folders)?;
    let mut chosen = Chosen { files: vec![folder.join(name)], ..Chosen::default() };
    chosen
        .notes
        .extend(left_out(&others(&chosen), &format!("without an index or numbered shards it is '{name}' alone")));
    Ok(chosen)
}

/// The index that decides.
fn decisive<'a>(folder: &Path, indexes: &'a [String]) -> Result<Option<&'a String>> {
    let usual = |name: &&String| name.as_str() == "model.safetensors.index.json";
    let plain: Vec<&String> = indexes.iter().filter(|name| name.ends_with(".safetensors.index.json")).collect();
    match (indexes, &plain[..], indexes.iter().find(usual)) {
        ([], ..) => Ok(None),
        (_, _, Some(usual)) => Ok(Some(usual)),
        // An index of another precision is named after its variant.
        ([one], ..) => Ok(Some(one)),
        (_, [one], _) => Ok(Some(*one)),
        _ => Err(Error::file(
            folder,
            format!("the folder holds several indexes, {}: give the one that is meant", listed(indexes)),
        )),
    }
}

/// All shards of the set that the names' numbers make up, in order; `None` where no name has numbers.
fn shards<'a>(folder: &Path, names: &'a [String]) -> Result<Option<Vec<String>>> {
    let mut sets: BTreeMap<(String, u64), BTreeMap<u64, &'a String>> = BTreeMap::new();
    for name in names {
        if let Some(Shard { stem, number, count }) = Shard::of(name) {
            sets.entry((stem, count)).or_default().entry(number).or_insert(name);
        }
    }
    let usual: Vec<_> = sets.iter().filter(|((stem, _), _)| stem == MODEL).collect();
    let plain: Vec<_> =
        sets.iter().filter(|((stem, _), _)| !has_word(stem, &BESIDE) && !has_word(stem, &TWINS)).collect();
    let all: Vec<_> = sets.iter().collect();
    let ((_, count), set) = match (&all[..], &usual[..], &plain[..]) {
        ([], ..) => return Ok(None),
        ([one], ..) | (_, [one], _) | (_, [], [one]) => *one,
        _ => {
            let firsts: Vec<String> =
                sets.values().filter_map(|set| set.values().next()).map(|n| (*n).clone()).collect();
            return Err(Error::file(
                folder,
                format!("the folder holds shards of several checkpoints, such as {}: give an index", listed(&firsts)),
            ));
        }
    };
    // Counted from 1, or from 0.
    let first = u64::from(!set.contains_key(&0));
    let missing: Vec<u64> = (first..first.saturating_add(*count)).filter(|n| !set.contains_key(n)).take(9).collect();
    if !missing.is_empty() || set.len() as u64 != *count {
        let found: Vec<String> = set.values().map(|name| (*name).clone()).collect();
        let missing: Vec<String> = missing.iter().map(u64::to_string).collect();
        return Err(Error::file(
            folder,
            format!(
                "found {} of {count} shards, {}; number {} missing: expected all, or a file given by itself",
                set.len(),
                listed(&found),
                if missing.is_empty() { "none is".to_owned() } else { missing.join(", ") + " is" }
            ),
        ));
    }
    Ok(Some(set.values().map(|name| (*name).clone()).collect()))
}

/// Words in the names of files that belong to a training run, and not to the model.
const BESIDE: [&str; 8] = ["optimizer", "optim", "optimizers", "scheduler", "training", "trainer", "gradients", "rng"];
/// Words in the names of files that hold a model once more.
const TWINS: [&str; 10] = ["ema", "fp16", "bf16", "fp32", "f16", "f32", "fp8", "int8", "non", "swa"];

/// Whether one of these words is in the name of a file or a set of shards.
fn has_word(name: &str, of: &[&str]) -> bool {
    let stem = name.strip_suffix(SUFFIX).unwrap_or(name).to_lowercase();
    stem.split(['.', '-', '_']).any(|word| of.contains(&word))
}

/// The one file that is the checkpoint.
fn single<'a>(folder: &Path, names: &'a [String], folders: &[String]) -> Result<&'a String> {
    if let [one] = names {
        return Ok(one);
    }
    if let Some(usual) = names.iter().find(|name| name.as_str() == "model.safetensors") {
        return Ok(usual);
    }
    if names.is_empty() {
        let beside = match folders {
            [] => String::new(),
            _ => format!(", but folders: {}", listed(folders)),
        };
        return Err(Error::file(
            folder,
            format!("the folder holds neither an index (X.safetensors.index.json) nor a .safetensors file{beside}"),
        ));
    }
    let mut left: Vec<&String> = names.iter().filter(|name| !has_word(name, &BESIDE)).collect();
    if left.len() > 1 {
        // The plain one of a model that is there in other precisions, or averaged, too.
        let plain: Vec<&String> = left.iter().copied().filter(|name| !has_word(name, &TWINS)).collect();
        if !plain.is_empty() {
            left = plain;
        }
    }
    match left[..] {
        [one] => Ok(one),
        _ => Err(Error::file(
            folder,
            format!(
                "nothing says which of {} are the checkpoint: expected an index (X.safetensors.index.json), names with \
                 -00001-of-0000N, or one file",
                listed(names)
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names_of(names: &[&str]) -> std::result::Result<(Vec<String>, Vec<String>), String> {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let chosen = chosen(folder.path()).map_err(|e| e.to_string())?;
        let names = chosen.files.iter().map(|f| f.file_name().unwrap().to_string_lossy().into_owned());
        Ok((names.collect(), chosen.notes))
    }

    #[test]
    fn shards_are_named_with_numbers() {
        let shard = |name: &str| Shard::of(name).map(|s| (s.stem, s.number, s.count));
        assert_eq!(shard("model-00001-of-00002.safetensors"), Some(("model".into(), 1, 2)));
        assert_eq!(shard("unet.fp16-3-of-4.safetensors"), Some(("unet.fp16".into(), 3, 4)));
        assert_eq!(shard("00000-of-00002.safetensors"), Some((String::new(), 0, 2)));
        for other in ["model.safetensors", "model-1.safetensors", "model-of-2.safetensors", "1-of-2.bin"] {
            assert_eq!(shard(other), None);
        }
        for index in ["model.safetensors.index.json", "unet.safetensors.index.json", "unet.safetensors.index.fp16.json"]
        {
            assert!(is_index(index), "{index}");
        }
        assert!(!is_index("model.bin.index.json") && !is_index("config.json"));
    }

    #[test]
    fn one_checkpoint_of_a_folder() {
        for (names, expected) in [
            (&["a.safetensors"][..], &["a.safetensors"][..]),
            (&["model.safetensors", "optimizer.safetensors", "model.fp16.safetensors"], &["model.safetensors"]),
            (&["unet.safetensors", "unet.fp16.safetensors", "unet_ema.safetensors"], &["unet.safetensors"]),
            (&["weights.safetensors", "optimizer_state.safetensors", ".hidden.safetensors"], &["weights.safetensors"]),
            (&["w.fp16.safetensors", "optim.safetensors"], &["w.fp16.safetensors"]),
            (
                &["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors", "old.safetensors"],
                &["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"],
            ),
            (&["a-0-of-2.safetensors", "a-1-of-2.safetensors"], &["a-0-of-2.safetensors", "a-1-of-2.safetensors"]),
            (
                &["unet-1-of-1.safetensors", "unet.fp16-1-of-1.safetensors", "optimizer-1-of-2.safetensors"],
                &["unet-1-of-1.safetensors"],
            ),
            (
                &["model-1-of-1.safetensors", "ema-1-of-2.safetensors", "ema-2-of-2.safetensors"],
                &["model-1-of-1.safetensors"],
            ),
        ] {
            let (found, notes) = names_of(names).unwrap();
            assert_eq!(found, expected);
            let visible = names.iter().filter(|n| !n.starts_with('.')).count();
            assert_eq!(notes.is_empty(), visible == expected.len(), "{notes:?}");
        }
        for (names, expected) in [
            (&[][..], "neither an index"),
            (
                &["model-00001-of-00002.safetensors"],
                "found 1 of 2 shards, 'model-00001-of-00002.safetensors'; number 2",
            ),
            (&["model-2-of-2.safetensors", "model.safetensors"], "number 1 is missing"),
            (&["a-0-of-2.safetensors", "a-1-of-2.safetensors", "a-2-of-2.safetensors"], "found 3 of 2"),
            (&["a-1-of-1.safetensors", "b-1-of-1.safetensors"], "several checkpoints"),
            (&["a.safetensors", "b.safetensors"], "nothing says which"),
            (&["a.safetensors.index.json", "b.safetensors.index.json"], "several indexes"),
        ] {
            let message = names_of(names).unwrap_err();
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn an_index_of_any_name_decides() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a.safetensors", "b.safetensors", "old.safetensors"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let index = folder.path().join("diffusion.safetensors.index.json");
        let say = |text: &str| {
            std::fs::write(&index, text).unwrap();
            chosen(folder.path()).map_err(|e| e.to_string())
        };
        let found = say(r#"{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}"#).unwrap();
        assert_eq!((found.files.len(), found.listed.unwrap().len()), (2, 2));
        assert!(found.notes[0].contains("'old.safetensors' is left out"), "{:?}", found.notes);
        for (text, expected) in [
            (r#"{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}"#, "'x' is given twice"),
            (r#"{"weight_map": {"x": "a.safetensors"}, "weight_map": {}}"#, "duplicate field"),
            (r#"{"weight_map": {"x": "c.safetensors"}}"#, "'c.safetensors' is missing"),
            (r#"{"weight_map": {"x": "../a.safetensors"}}"#, "plain file name"),
            (r#"{"weight_map": {}}"#, "names no shard"),
            ("{}", "weight_map"),
            ("version https://git-lfs.github.com/spec/v1\n", "LFS"),
        ] {
            let message = say(text).unwrap_err();
            assert!(message.contains(expected), "{message}");
        }
    }
}
