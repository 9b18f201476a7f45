//! Codebooks of an attention block, learned from its inputs.

use chrono::Utc;
use ndarray::{Array2, Axis};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::Serialize;

use super::work::{Cancel, Progress};
use crate::error::{Error, Result};
use crate::layer::{Accuracy, CodebookStep, Layer, Method, Parts, VqAttentionConfig, VqAttentionLayer};
use crate::store::{ErrorBasis, LayerHandle, LayerRecord, Provenance, RowLocations, Snapshot, Source, Store};
use crate::tasks::unwrap_join;

/// How codebooks are trained.
#[derive(Debug, Clone)]
pub struct Training {
    /// Settings of a block that is not there yet, or is to begin anew; without, its own.
    pub config: Option<VqAttentionConfig>,
    /// Times that all tokens are gone through.
    pub epochs: usize,
    /// Tokens of a step.
    pub batch: usize,
    /// Whether to begin with k-means again, in place of what the block has.
    pub anew: bool,
}

impl Default for Training {
    fn default() -> Self {
        Training { config: None, epochs: 10, batch: 1024, anew: false }
    }
}

/// What training did.
#[derive(Debug, Clone, Serialize)]
pub struct TrainingReport {
    /// The model.
    pub model: String,
    /// The attention block's name in the model.
    pub layer: String,
    /// The version that the commit made.
    pub version: u64,
    /// Batches that the codebooks were updated with.
    pub steps: usize,
    /// The commitment loss of queries, over the first epoch and over the last: the mean squared distance of a token to its
    /// codewords, summed over heads. `None` where queries have no codebook.
    pub queries: Option<[f64; 2]>,
    /// The commitment loss of keys, likewise.
    pub keys: Option<[f64; 2]>,
    /// Codewords that had died and were given to other vectors.
    pub revived: usize,
    /// The new artifact's name, in hex.
    pub artifact: String,
    /// Bytes that the artifact takes.
    pub stored_bytes: u64,
}

/// Trains the codebooks of a block from inputs of its projections (or queries and keys themselves, where it has none), a row
/// a token, and stores it as a new version of the model. A block that is not there is made, its codebooks begun by k-means.
///
/// # Errors
/// When the block is there and no attention, or is not and has no settings; inputs do not fit; the storage refuses; or the
/// work is cancelled: then the store is as it was.
pub async fn train_codebooks(
    store: &Store,
    model: &str,
    layer: &str,
    inputs: (Array2<f32>, Array2<f32>),
    training: Training,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<TrainingReport> {
    if training.batch == 0 {
        return Err(Error::expected("tokens of a step", 0, "at least 1"));
    }
    let mut writer = cancel.unless(store.writer()).await?;
    let snapshot = store.latest().await?;
    let there = stored_block(&snapshot, model, layer).await?;
    let config = settings(training.config.as_ref(), there.as_ref())?;
    let (config, q, k) = projected(&snapshot, model, layer, config, inputs).await?;
    let begin = there.filter(|_| !training.anew && training.config.is_none());
    let steps = steps(training.epochs, q.nrows().max(k.nrows()), training.batch)?;
    progress.started(steps + 1, steps as u64);
    progress.layer("k-means");
    let trained = learn(begin, config, (q, k), &training, progress, cancel).await;
    progress.finished();
    let Trained { attention, queries, keys, revived, steps } = trained?;
    let parts = attention.to_parts();
    let made = Provenance { recipe: parts.id().0, relative_error: None, error_basis: ErrorBasis::Activations };
    cancel.unless(writer.add(&parts, made)).await.map_err(|e| e.in_layer(layer))?;
    cancel.unless(writer.ready()).await?;
    let message = format!("codebooks of '{layer}' trained");
    let version = writer.commit_layers(model, &[record(model, layer, &attention, &parts)], Some(&message)).await?;
    Ok(TrainingReport {
        model: model.to_owned(),
        layer: layer.to_owned(),
        version,
        steps,
        queries,
        keys,
        revived,
        artifact: parts.id().to_string(),
        stored_bytes: parts.stored_bytes(),
    })
}

/// The steps of a training.
fn steps(epochs: usize, tokens: usize, batch: usize) -> Result<usize> {
    const MOST: usize = u32::MAX as usize;
    let batches = tokens.div_ceil(batch);
    epochs.checked_mul(batches).filter(|steps| *steps <= MOST).ok_or_else(|| {
        Error::expected(
            "epochs of a training",
            format!("{epochs}, of {batches} steps each"),
            format!("{MOST} steps at most"),
        )
    })
}

/// Loads the codebooks and settings of the block; `None` where the model has no layer of that name.
async fn stored_block(snapshot: &Snapshot, model: &str, layer: &str) -> Result<Option<VqAttentionLayer>> {
    let records = layers_of(snapshot, model).await?;
    match records.iter().find(|r| r.layer == layer) {
        Some(record) if record.method != VqAttentionConfig::NAME => {
            let found = format!("'{layer}', a {} layer", record.method);
            Err(Error::expected("layer with codebooks", found, "a vq_attention layer, or a new name"))
        }
        Some(_) => Ok(Some(snapshot.attention(model, layer).await?.load_attention().await?)),
        None => Ok(None),
    }
}

/// Reads the model's rows; none where there is no such model yet.
async fn layers_of(snapshot: &Snapshot, model: &str) -> Result<Vec<LayerRecord>> {
    let known = snapshot.models().await?.iter().any(|m| m.model == model);
    if known { snapshot.layers(model).await } else { Ok(vec![]) }
}

/// Returns the settings to train with: those that were given, else the block's own.
fn settings(given: Option<&VqAttentionConfig>, there: Option<&VqAttentionLayer>) -> Result<VqAttentionConfig> {
    let config = given.or(there.map(VqAttentionLayer::settings)).cloned().ok_or_else(|| {
        let expected = "a file of them, see `docs/rules.md`";
        Error::expected("settings of a new attention block", "none", expected)
    })?;
    config.validate()?;
    if config.key_codes().is_none() {
        let found = format!("{:?}", config.mechanism);
        return Err(Error::expected("mechanism of an attention block to train", found, "one with codebooks"));
    }
    Ok(config)
}

/// Returns queries and keys, a row a token, and the settings with every length: the inputs are run through the block's
/// projections, or are queries and keys themselves, where it has none.
async fn projected(
    snapshot: &Snapshot,
    model: &str,
    layer: &str,
    config: VqAttentionConfig,
    (queries, keys): (Array2<f32>, Array2<f32>),
) -> Result<(VqAttentionConfig, Array2<f32>, Array2<f32>)> {
    match snapshot.projections(model, layer, &config).await? {
        (Some(projections), _) => {
            let shape =
                |handle: &LayerHandle| (handle.record().out_features as usize, handle.record().in_features as usize);
            let config = config.of_projections([&projections[0], &projections[1], &projections[2]].map(shape))?;
            let q = projections[0].forward(queries.view(), Accuracy::Full).await?.y;
            Ok((config, q, projections[1].forward(keys.view(), Accuracy::Full).await?.y))
        }
        (None, _) => {
            let (q, k) = (queries.ncols(), keys.ncols());
            // Values are not seen here: they are as long as keys, unless the settings say otherwise.
            let values = config.d_v.map_or(Some(k), |d_v| d_v.checked_mul(config.kv_heads()));
            let values = values.ok_or_else(|| Error::expected("d_v", config.d_v.unwrap_or_default(), "a length"))?;
            let width = config.d_model.unwrap_or(q);
            Ok((config.of_projections([(q, width), (k, width), (values, width)])?, queries, keys))
        }
    }
}

fn record(model: &str, layer: &str, attention: &VqAttentionLayer, parts: &Parts) -> LayerRecord {
    LayerRecord {
        model: model.to_owned(),
        layer: layer.to_owned(),
        method: attention.method(),
        in_features: attention.in_features() as u64,
        out_features: attention.out_features() as u64,
        artifact: parts.id(),
        relative_error: None,
        error_basis: ErrorBasis::Activations,
        dense_bytes: 0,
        stored_bytes: parts.stored_bytes(),
        config: attention.config(),
        source: Source::default(),
        created_at: Utc::now(),
        locations: RowLocations::default(),
    }
}

struct Trained {
    attention: VqAttentionLayer,
    queries: Option<[f64; 2]>,
    keys: Option<[f64; 2]>,
    revived: usize,
    steps: usize,
}

async fn learn(
    started: Option<VqAttentionLayer>,
    config: VqAttentionConfig,
    (q, k): (Array2<f32>, Array2<f32>),
    training: &Training,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<Trained> {
    let (q, k) = (std::sync::Arc::new(q), std::sync::Arc::new(k));
    let mut attention = match started {
        Some(attention) => attention,
        None => {
            let (q, k) = (q.clone(), k.clone());
            let made = tokio::task::spawn_blocking(move || VqAttentionLayer::by_kmeans(config, q.view(), k.view()));
            unwrap_join(made.await)??
        }
    };
    progress.layer_done(0, false);
    let batches = q.nrows().max(k.nrows()).div_ceil(training.batch);
    let (mut queries, mut keys, mut revived, mut steps) = (None, None, 0, 0);
    let mut chance = ChaCha8Rng::seed_from_u64(attention.settings().seed);
    for epoch in 0..training.epochs {
        progress.layer(&format!("epoch {} of {}", epoch + 1, training.epochs));
        let mut losses = [Loss::default(); 2];
        let orders = [shuffled(q.nrows(), &mut chance), shuffled(k.nrows(), &mut chance)].map(std::sync::Arc::new);
        for batch in 0..batches {
            if cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let (q, k, orders, step) = (q.clone(), k.clone(), orders.clone(), steps as u64);
            let learned = tokio::task::spawn_blocking(move || {
                // As many batches of both, however many there are of each.
                let part = |x: &Array2<f32>, order: &[usize]| {
                    let (start, end) = (batch * order.len() / batches, (batch + 1) * order.len() / batches);
                    x.select(Axis(0), &order[start..end])
                };
                attention.learn(part(&q, &orders[0]).view(), part(&k, &orders[1]).view(), step)
            });
            let (after, step): (_, CodebookStep) = unwrap_join(learned.await)??;
            attention = after;
            for (loss, learned) in losses.iter_mut().zip([&step.queries, &step.keys]) {
                if let Some(learned) = learned {
                    let tokens = learned.codes.ncols() as f64;
                    loss.sum += f64::from(learned.commitment) * tokens;
                    loss.tokens += tokens;
                }
            }
            revived += step.revived;
            steps += 1;
            progress.layer_done(1, false);
        }
        for (all, loss) in [&mut queries, &mut keys].into_iter().zip(losses) {
            if loss.tokens > 0.0 {
                let mean = loss.sum / loss.tokens;
                let both: &mut [f64; 2] = all.get_or_insert([mean; 2]);
                both[1] = mean;
            }
        }
    }
    Ok(Trained { attention, queries, keys, revived, steps })
}

/// A loss over several steps.
#[derive(Debug, Clone, Copy, Default)]
struct Loss {
    sum: f64,
    tokens: f64,
}

/// 0 … n − 1 in an order by chance (Fisher and Yates).
fn shuffled(n: usize, chance: &mut ChaCha8Rng) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        order.swap(i, (chance.next_u64() % (i as u64 + 1)) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_counted_within_bounds() {
        assert_eq!(steps(10, 1025, 1024).unwrap(), 20);
        assert_eq!(steps(0, 5, usize::MAX).unwrap(), 0);
        for (epochs, tokens) in [(usize::MAX, 8), (usize::MAX, 1), (usize::MAX / 2, 4096), (1 << 32, 1)] {
            let message = steps(epochs, tokens, 1024).unwrap_err().to_string();
            assert!(message.contains(&epochs.to_string()), "{message}");
        }
    }
}
