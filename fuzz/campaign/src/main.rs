//! A campaign of faults against a built `layerstore`: kills, damaged bytes, full disks, read-only directories, many processes
//! at once, losses of power, and an object store that fails. After each, nothing that a command acknowledged is lost, and nothing panics, hangs or takes giant memory.
//! `make campaign`; see CONTRIBUTING.md.

mod check;
mod child;
mod crowd;
mod damage;
mod full;
mod history;
mod inputs;
mod kill;
mod place;
mod power;
mod read_only;
mod report;
mod s3;
// The server of the tests.
#[allow(dead_code)]
#[path = "../../../tests/all/s3/mod.rs"]
mod server;
mod step;
mod store;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};

use child::{Program, Trouble};
use damage::Prepared;
use inputs::Inputs;
use place::Place;
use power::{Counts, Settings};
use report::Report;

/// Runs a campaign of faults against a layerstore binary.
#[derive(Parser)]
struct Options {
    /// The layerstore binary
    #[arg(long)]
    binary: PathBuf,
    /// Seed of the first round of each kind; those after it have the numbers after it
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Begin no round after so many minutes; the kinds share them
    #[arg(long, default_value_t = 5.0, conflicts_with = "rounds")]
    minutes: f64,
    /// Rounds of each kind, however long they take
    #[arg(long)]
    rounds: Option<u64>,
    /// Only faults of this kind; may be given more than once
    #[arg(long)]
    only: Vec<Kind>,
    /// Where the folders of rounds that found something are moved to
    #[arg(long, default_value = "campaign-failures")]
    keep: PathBuf,
    /// Memory that a command may have as data, in MiB; more is a finding
    #[arg(long, default_value_t = 2048)]
    memory: u64,
    /// Seconds after which a command hangs
    #[arg(long, default_value_t = 300)]
    patience: u64,
    /// Imports of each of the 8 processes of a round of `crowd`
    #[arg(long, default_value_t = 50)]
    imports: usize,
    /// Losses of power, which are all made before the rounds of other kinds
    #[arg(long, default_value_t = 200)]
    losses: usize,
    /// The recorder that losses of power need; else the one beside this program
    #[arg(long)]
    recorder: Option<PathBuf>,
    /// Show each kind of refusal, with its count
    #[arg(long)]
    refusals: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// SIGKILL at random moments
    Kill,
    /// Flipped, overwritten, cut, added and removed bytes and files
    Damage,
    /// A disk, or a limit of file sizes, that is full
    Full,
    /// Directories and files that cannot be written to
    ReadOnly,
    /// 8 processes at once on one store
    Crowd,
    /// Losses of power, simulated from what commands do to files
    Power,
    /// Requests of a store on S3 that are refused, lost, answered late or not at all
    S3,
}

impl Kind {
    fn name(self) -> String {
        self.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned())
    }

    fn round(
        self,
        program: &Program,
        place: &mut Place,
        options: &Options,
        prepared: &mut Option<Prepared>,
    ) -> Result<(), Trouble> {
        match self {
            Kind::Kill => kill::round(place),
            Kind::Damage => damage::round(program, place, prepared),
            Kind::Full => full::round(place),
            Kind::ReadOnly => read_only::round(place),
            Kind::Crowd => crowd::round(place, options.imports),
            // All losses are made before the rounds.
            Kind::Power => Ok(()),
            Kind::S3 => s3::round(place),
        }
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    match campaign(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(trouble) => {
            eprintln!("error: {}", trouble.what);
            ExitCode::from(2)
        }
    }
}

/// Returns whether nothing was found.
fn campaign(options: &Options) -> Result<bool, Trouble> {
    let disk = full::small_disk()?;
    if let Err(why) = &disk {
        eprintln!("note: no small disk can be mounted ({why}); `full` has limits of file sizes only");
    }
    let folder = tempfile::Builder::new().prefix("layerstore-campaign-").tempdir()?;
    let program = Program::new(&options.binary, options.memory << 20, Duration::from_secs(options.patience))?;
    let inputs = Inputs::make(&program, folder.path())?;
    let kinds = if options.only.is_empty() { Kind::value_variants() } else { &options.only[..] };
    let losses = match kinds.contains(&Kind::Power) {
        true => Some(lose_power(options, &program, &inputs, folder.path())?),
        false => None,
    };
    let kinds: Vec<Kind> = kinds.iter().copied().filter(|kind| *kind != Kind::Power).collect();
    let mut report = Report::new(kinds.iter().map(|kind| kind.name()));
    let (mut prepared, began) = (None, Instant::now());
    loop {
        // The kind that has had the least time, or rounds, is next.
        let next = (0..kinds.len()).min_by_key(|&at| match options.rounds {
            Some(_) => (report.lines[at].rounds, Duration::ZERO),
            None => (0, report.lines[at].took),
        });
        let Some(at) = next else { break };
        let over = match options.rounds {
            Some(rounds) => report.lines[at].rounds >= rounds,
            None => began.elapsed().as_secs_f64() >= options.minutes * 60.0,
        };
        if over {
            break;
        }
        let (kind, seed) = (kinds[at], options.seed.wrapping_add(report.lines[at].rounds));
        let on_disk = disk.as_ref().ok().filter(|_| kind == Kind::Full && full::on_small_disk(seed));
        let mut place = Place::new(&program, &inputs, on_disk.map_or(folder.path(), |disk| disk.path()), seed)?;
        if kind == Kind::S3 {
            s3::go_there(&mut place);
        }
        let begin = Instant::now();
        let outcome = kind.round(&program, &mut place, options, &mut prepared);
        let tally = program.take_tally();
        let line = &mut report.lines[at];
        line.took += begin.elapsed();
        eprintln!("{} {seed}: {:.1} s", kind.name(), begin.elapsed().as_secs_f64());
        line.add(&place.counts, &tally);
        report.add_refusals(tally.refusals);
        if let Err(trouble) = outcome {
            let kept = options.keep.join(format!("{}-{seed}", kind.name()));
            report.lines[at].found(&trouble)?;
            eprintln!("{} {}: {}", kind.name(), trouble.name(), trouble.what);
            eprintln!("  again: make campaign CAMPAIGN=\"--only {} --seed {seed} --rounds 1\"", kind.name());
            eprintln!("  the store: {}", place.store.keep(&kept)?.display());
        }
    }
    if !kinds.is_empty() {
        print!("{}", report.table(began.elapsed()));
    }
    print!("{}", losses.as_ref().map_or(String::new(), Counts::table));
    if options.refusals {
        print!("{}", report.refusals());
    }
    Ok(report.is_clean() && losses.is_none_or(|losses| losses.is_clean()))
}

/// Makes all losses of power.
fn lose_power(options: &Options, program: &Program, inputs: &Inputs, parent: &Path) -> Result<Counts, Trouble> {
    let library = match &options.recorder {
        Some(recorder) => recorder.clone(),
        None => power::library()?,
    };
    let (losses, seed, keep) = (options.losses, options.seed, &options.keep);
    let counts = power::campaign(program, inputs, &Settings { losses, seed, library: &library, parent, keep })?;
    program.take_tally();
    Ok(counts)
}
