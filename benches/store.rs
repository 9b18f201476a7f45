//! Opening, loading, naming and importing, each beside what it is measured against in the same run. `make bench`.
//!
//! `cargo bench -- load` runs a part: `resolve`, `load`, `snapshot`, `import`, `s3` or `scale`. The times are medians. MiniLM is imported where `demo/minilm` holds it (`make demo` fetches it), calibrated with
//! `demo/calibration.safetensors`.

mod s3;
mod scale;
// The server of the tests.
#[allow(dead_code, unused_imports)]
#[path = "../tests/all/s3/mod.rs"]
mod server;

use std::path::Path;
use std::time::{Duration, Instant};

use chrono::Utc;
use layerstore::layer::{DType, DenseLayer, KeyValueConfig, Layer, LowRankConfig, MethodConfig, Rank, SharedLayer};
use layerstore::{
    ErrorBasis, ImportOptions, LayerRecord, Provenance, RowLocations, Rules, Source, Store, formats, import,
};
use ndarray::{Array1, Array2};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const CATALOGUE_LAYERS: usize = 100_000;
const ROUNDS: usize = 21;

fn main() -> Result<()> {
    // `cargo test` also runs bench targets: measuring is for `cargo bench` alone.
    if !std::env::args().any(|a| a == "--bench") {
        return Ok(());
    }
    let arguments: Vec<String> = std::env::args().skip_while(|a| !["--load", "--read"].contains(&a.as_str())).collect();
    if let [order, uri, raws @ ..] = &arguments[..] {
        return tokio::runtime::Runtime::new()?.block_on(load_in_turn(uri, raws, order == "--read"));
    }
    let arguments: Vec<String> = std::env::args().skip_while(|a| a != "--scale").skip(1).collect();
    if let [what, uri, model] = &arguments[..] {
        return tokio::runtime::Runtime::new()?.block_on(scale::measure(what, uri, model));
    }
    let named: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wanted = |name: &str| named.is_empty() || named.iter().any(|n| n == name);
    let runtime = tokio::runtime::Runtime::new()?;
    let folder = tempfile::tempdir()?;
    runtime.block_on(async {
        if wanted("resolve") {
            open_and_resolve(&folder.path().join("catalogue")).await?;
        }
        if wanted("load") {
            first_load(folder.path()).await?;
        }
        if wanted("snapshot") {
            snapshots(folder.path()).await?;
        }
        if wanted("import") {
            import_minilm(folder.path()).await?;
        }
        if wanted("s3") {
            s3::s3().await?;
        }
        if wanted("scale") {
            scale::scale(folder.path()).await?;
        }
        Ok(())
    })
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e3
}

fn matrix(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let mut state = seed | 1;
    Array2::from_shape_fn((rows, columns), |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    })
}

fn made(recipe: u8) -> Provenance {
    Provenance { recipe: [recipe; 32], relative_error: Some(0.0), error_basis: ErrorBasis::Weights }
}

fn name(i: usize) -> String {
    format!("transformer.layers.{}.mlp.experts.{}.proj", i / 100, i % 100)
}

/// Stores `names` layers in one commit, made of these artifacts in turn.
async fn store_as(store: &Store, model: &str, layers: &[SharedLayer], recipe: u8, names: usize) -> Result<()> {
    let mut writer = store.writer().await?;
    let mut added = vec![];
    for (i, layer) in layers.iter().enumerate() {
        let parts = layer.to_parts();
        added.push((layer, writer.add(&parts, made(recipe.wrapping_add(i as u8))).await?.0, parts.stored_bytes()));
    }
    let record = |i: usize| {
        let (layer, artifact, bytes) = &added[i % added.len()];
        LayerRecord {
            model: model.to_owned(),
            layer: name(i),
            method: layer.method(),
            in_features: layer.in_features() as u64,
            out_features: layer.out_features() as u64,
            artifact: *artifact,
            relative_error: Some(0.0),
            error_basis: ErrorBasis::Weights,
            dense_bytes: *bytes,
            stored_bytes: *bytes,
            config: layer.config(),
            source: Source::default(),
            created_at: Utc::now(),
            locations: RowLocations::default(),
        }
    };
    writer.commit(model, &(0..names).map(record).collect::<Vec<_>>(), None).await?;
    Ok(())
}

async fn open_and_resolve(path: &Path) -> Result<()> {
    let uri = path.display().to_string();
    let store = Store::create(&uri).await?;
    let layer = DenseLayer::from_f32(matrix(8, 8, 1).view(), None).shared();
    for model in 0..10u8 {
        store_as(&store, &format!("model-{model}"), std::slice::from_ref(&layer), model, CATALOGUE_LAYERS / 10).await?;
    }
    drop(store);
    let (mut ours, mut lance) = (vec![], vec![]);
    for round in 0..ROUNDS {
        let started = Instant::now();
        let store = Store::open(&uri).await?;
        let layer = name(100 * round + 99 - round);
        let handle = store.latest().await?.layer("model-7", &layer).await?;
        ours.push(started.elapsed());
        assert_eq!(handle.record().layer, layer);
        let started = Instant::now();
        lance::Dataset::open(&format!("{uri}/layers.lance")).await?;
        lance.push(started.elapsed());
    }
    let (ours, lance) = (median(ours), median(lance));
    println!(
        "open a store of {CATALOGUE_LAYERS} layers and resolve one: {ours:.2} ms; Lance's open alone: {lance:.2} ms"
    );
    Ok(())
}

/// A layer's first load, in a store that was just opened and in one that has loaded another layer, beside reading a raw
/// file of the same bytes. Files are in the system's cache for both, and each round is a program of its own: what a program
/// has given back is at hand for what it reads next, and a first load has nothing of the kind.
async fn first_load(folder: &Path) -> Result<()> {
    const SAME: u64 = 6;
    let key_value = MethodConfig::from(KeyValueConfig::default());
    let low_rank = MethodConfig::from(LowRankConfig { rank: Rank::Components(32), ..LowRankConfig::default() });
    let compressed = |method: &MethodConfig, rows: usize, columns: usize| -> layerstore::Result<Vec<SharedLayer>> {
        let bias = Array1::from_elem(rows, 0.5);
        let layer = |seed| method.compress(matrix(rows, columns, 77 + seed).view(), Some(bias.view()), None);
        (0..SAME).map(layer).collect()
    };
    let dense = |n: usize| -> Vec<SharedLayer> {
        (0..SAME).map(|seed| DenseLayer::from_f32(matrix(n, n, 99 + seed).view(), None).shared()).collect()
    };
    let kinds = [
        ("low_rank int4 1536 × 384", compressed(&low_rank, 1536, 384)?),
        ("key_value 1536 × 384", compressed(&key_value, 1536, 384)?),
        ("low_rank int4 4096 × 1024", compressed(&low_rank, 4096, 1024)?),
        ("dense f32 1024 × 1024", dense(1024)),
        ("dense f32 4096 × 4096", dense(4096)),
    ];
    for (place, (kind, layers)) in kinds.iter().enumerate() {
        let uri = folder.join(format!("load-{place}")).display().to_string();
        store_as(&Store::create(&uri).await?, "m", layers, 0, layers.len()).await?;
        let bytes = layers[0].to_parts().stored_bytes();
        let raws: Vec<_> = (0..SAME).map(|i| folder.join(format!("raw-{place}-{i}"))).collect();
        for raw in &raws {
            std::fs::write(raw, vec![7u8; bytes as usize])?;
        }
        let (mut first, mut further, mut first_file, mut file) = (vec![], vec![], vec![], vec![]);
        for round in 0..2 * ROUNDS {
            let own = std::env::current_exe()?;
            // Whichever comes first in a program runs code that nobody has run before: each does so every other time.
            let order = if round % 2 == 0 { "--load" } else { "--read" };
            let run = std::process::Command::new(own).args(["--bench", order]).arg(&uri).args(&raws).output()?;
            assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
            let found: [Vec<Duration>; 2] = serde_json::from_slice(&run.stdout)?;
            let [mut layers, mut files] = found;
            let (layer, read) = (layers.remove(0), files.remove(0));
            if round % 2 == 0 {
                first.push(layer)
            } else {
                first_file.push(read)
            }
            further.extend(layers);
            file.extend(files);
        }
        let (first, further) = (median(first), median(further));
        let (first_file, file) = (median(first_file), median(file));
        println!(
            "load, {kind}, {:.2} MiB: a program's first {first:.2} ms ({:.1}×), each further {further:.2} ms ({:.1}×); reading raw files of the same bytes {first_file:.2} ms and {file:.2} ms",
            bytes as f64 / f64::from(1 << 20),
            first / first_file,
            further / file,
        );
    }
    Ok(())
}

/// Loads the layers of a store and reads as many files, in turn, either one first; prints how long each took.
async fn load_in_turn(uri: &str, raws: &[String], files_first: bool) -> Result<()> {
    let store = Store::open(uri).await?;
    let handles = store.latest().await?.handles("m").await?;
    let (mut layers, mut files, mut kept) = (vec![], vec![], vec![]);
    for (handle, raw) in handles.iter().zip(raws) {
        let mut layer = None;
        if !files_first {
            let started = Instant::now();
            layer = Some(handle.load().await?);
            layers.push(started.elapsed());
        }
        let raw = raw.clone();
        let started = Instant::now();
        let read = tokio::task::spawn_blocking(move || std::fs::read(raw)).await??;
        files.push(started.elapsed());
        if files_first {
            let started = Instant::now();
            layer = Some(handle.load().await?);
            layers.push(started.elapsed());
        }
        kept.push((layer, read));
    }
    println!("{}", serde_json::to_string(&[layers, files])?);
    Ok(())
}

async fn snapshots(folder: &Path) -> Result<()> {
    let mut times = vec![];
    for (name, layers) in [("10 MB", 1), ("1 GB", 100)] {
        let uri = folder.join(format!("snapshot-{layers}")).display().to_string();
        let store = Store::create(&uri).await?;
        for i in 0..layers {
            let raw: Vec<u8> =
                (0..10_000_000u32).map(|b| (b.wrapping_mul(2_654_435_761) >> 13) as u8 ^ i as u8).collect();
            let layer = DenseLayer::new(DType::U8, vec![1000, 10_000], raw.into(), None)?.shared();
            store_as(&store, &format!("m{i}"), &[layer], i as u8, 1).await?;
        }
        let mut taken = vec![];
        for round in 0..ROUNDS {
            let started = Instant::now();
            store.create_snapshot(&format!("s{round}")).await?;
            taken.push(started.elapsed());
        }
        times.push((name, median(taken)));
    }
    println!("snapshot of a store of {}: {:.2} ms; of {}: {:.2} ms", times[0].0, times[0].1, times[1].0, times[1].1);
    Ok(())
}

/// What the time of an import is given for.
const IMPORT_RULES: &str = r"
[[rule]]
layers = 'encoder\..*\.(query|key|value|dense)'
method = 'low_rank'
rank = 32
scaling = 'exact'
bias_correction = true
";

async fn import_minilm(folder: &Path) -> Result<()> {
    let checkpoint = Path::new("demo/minilm/model.safetensors");
    let calibration = Path::new("demo/calibration.safetensors");
    if !checkpoint.exists() || !calibration.exists() {
        println!("import of MiniLM: left out, since {} is not there; run `make demo` first", checkpoint.display());
        return Ok(());
    }
    let store = Store::create(&folder.join("minilm").display().to_string()).await?;
    let rules = folder.join("rules.toml");
    std::fs::write(&rules, IMPORT_RULES)?;
    let started = Instant::now();
    let source = formats::open(checkpoint)?;
    let options = ImportOptions::from_files(Some(&rules), Some(calibration))?;
    let report = import(&store, source, "int4", options).await?;
    let all = started.elapsed().as_secs_f64();
    let of =
        |method: &str| -> f64 { report.layers.iter().filter(|l| l.method.as_str() == method).map(|l| l.seconds).sum() };
    let (compressing, dense) = (of("low_rank"), of("dense"));
    println!(
        "import of MiniLM, int4 with rank 32 exact: {all:.2} s, of which compressing {compressing:.2} s, reading and hashing what stays dense {dense:.2} s, writing and committing {:.2} s",
        all - compressing - dense
    );
    let started = Instant::now();
    let again = import(
        &store,
        formats::open(checkpoint)?,
        "f32",
        ImportOptions { rules: Rules::default(), ..ImportOptions::default() },
    )
    .await?;
    println!(
        "a second import, all dense: {:.2} s, {} bytes written",
        started.elapsed().as_secs_f64(),
        again.written_bytes
    );
    let started = Instant::now();
    let third = import(&store, formats::open(checkpoint)?, "f32", ImportOptions::default()).await?;
    println!("the same again: {:.2} s, {} bytes written", started.elapsed().as_secs_f64(), third.written_bytes);
    Ok(())
}
