//! Codebooks of an attention block, learned from its inputs.

use std::sync::Arc;

use chrono::Utc;
use ndarray::{Array2, Axis, s};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::Serialize;

use super::measure::measure_attention;
use crate::error::{Error, Result, counted};
use crate::layer::{Accuracy, CodebookStep, Layer, Method, Parts, VqAttentionConfig, VqAttentionLayer};
use crate::store::{ErrorBasis, LayerHandle, LayerRecord, Provenance, RowLocations, Snapshot, Source, Store};
use crate::tasks::unwrap_join;
use crate::work::{Cancel, Progress};

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
    /// ‖ŷ − y‖ / ‖y‖ of the heads' outputs against exact attention, with the codebooks that the training began with and with those
    /// that it made: over the inputs, the first 16,384 at most, in windows of 128 tokens; values are those of the inputs of keys.
    /// `None` where there are not as many queries as keys, or no values of them.
    pub attention_error: Option<[f64; 2]>,
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
    if training.epochs == 0 && !training.anew && training.config.is_none() {
        return Err(Error::expected("epochs", 0, "at least 1: codewords that are there would stay as they are"));
    }
    let mut writer = cancel.unless(store.writer()).await?;
    let snapshot = store.latest().await?;
    let there = stored_block(&snapshot, model, layer).await?;
    let config = settings(training.config.as_ref(), there.as_ref())?;
    let (config, inputs) = projected(&snapshot, model, layer, config, inputs).await?;
    let begin = there.filter(|_| !training.anew && training.config.is_none());
    let batches = batches(training.epochs, inputs.q.nrows().max(inputs.k.nrows()), training.batch)?;
    progress.training_started(training.epochs, batches);
    progress.layer(layer);
    let trained = learn(begin, config, inputs, (training.epochs, batches), progress, cancel).await;
    progress.finished();
    let Trained { attention, queries, keys, attention_error, revived, steps } = trained?;
    let parts = attention.to_parts();
    let made = Provenance { recipe: parts.id().0, relative_error: None, error_basis: ErrorBasis::Activations };
    cancel.unless(writer.add(&parts, made)).await.map_err(|e| e.in_layer(layer))?;
    cancel.unless(writer.ready()).await?;
    let message = format!("codebooks of '{layer}', {}", counted(training.epochs, "epoch", "epochs"));
    let version = writer.commit_trained(model, &[record(model, layer, &attention, &parts)], &message).await?;
    Ok(TrainingReport {
        model: model.to_owned(),
        layer: layer.to_owned(),
        version,
        steps,
        queries,
        keys,
        attention_error,
        revived,
        artifact: parts.id().to_string(),
        stored_bytes: parts.stored_bytes(),
    })
}

/// The steps of an epoch, of a training that is not too long.
fn batches(epochs: usize, tokens: usize, batch: usize) -> Result<usize> {
    const MOST: usize = u32::MAX as usize;
    let batches = tokens.div_ceil(batch);
    let fits = epochs.checked_mul(batches).is_some_and(|steps| steps <= MOST);
    fits.then_some(batches).ok_or_else(|| {
        let found = format!("{epochs}, of {} each", counted(batches, "step", "steps"));
        Error::expected("epochs of a training", found, format!("{MOST} steps at most"))
    })
}

/// What codebooks are trained with, a row a token.
struct Inputs {
    q: Array2<f32>,
    k: Array2<f32>,
    /// Of the inputs of keys, where they have values.
    v: Option<Array2<f32>>,
}

impl Inputs {
    /// Returns the attention's error over the first of the tokens; `None` where there is none to be measured.
    fn error(&self, attention: &VqAttentionLayer) -> Result<Option<f64>> {
        let Some(v) = self.v.as_ref().filter(|_| self.q.nrows() == self.k.nrows()) else { return Ok(None) };
        let first = self.q.nrows().min(layerstore_core::calibration::SAMPLE_ROWS);
        let [q, k, v] = [&self.q, &self.k, v].map(|x| x.slice(s![..first, ..]).to_owned());
        Ok(Some(measure_attention(attention, [&q, &k, &v])?).filter(|e| e.is_finite()))
    }
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
    match snapshot.layers(model).await {
        Err(Error::UnknownModel { .. }) => Ok(vec![]),
        found => found,
    }
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
    if config.rotary {
        let expected = "a block whose queries and keys are not: import with --calibration-text makes the others";
        return Err(Error::expected("attention block to train", "one whose queries and keys are rotated", expected));
    }
    Ok(config)
}

/// Returns queries, keys and values, and the settings with every length: the inputs are run through the block's projections, or
/// are queries and keys themselves, where it has none.
async fn projected(
    snapshot: &Snapshot,
    model: &str,
    layer: &str,
    config: VqAttentionConfig,
    (queries, keys): (Array2<f32>, Array2<f32>),
) -> Result<(VqAttentionConfig, Inputs)> {
    match snapshot.projections(model, layer, &config).await? {
        (Some(projections), _) => {
            let shape =
                |handle: &LayerHandle| (handle.record().out_features as usize, handle.record().in_features as usize);
            let config = config.of_projections([&projections[0], &projections[1], &projections[2]].map(shape))?;
            let q = projections[0].forward(queries.view(), Accuracy::Full).await?.y;
            let k = projections[1].forward(keys.view(), Accuracy::Full).await?.y;
            let v = match projections[2].record().in_features as usize == keys.ncols() {
                true => Some(projections[2].forward(keys.view(), Accuracy::Full).await?.y),
                false => None,
            };
            Ok((config, Inputs { q, k, v }))
        }
        (None, _) => {
            let (q, k) = (queries.ncols(), keys.ncols());
            // Values are not seen here: they are as long as keys, unless the settings say otherwise.
            let values = config.d_v.map_or(Some(k), |d_v| d_v.checked_mul(config.kv_heads()));
            let values = values.ok_or_else(|| Error::expected("d_v", config.d_v.unwrap_or_default(), "a length"))?;
            let width = config.d_model.unwrap_or(q);
            let config = config.of_projections([(q, width), (k, width), (values, width)])?;
            let v = (values == k).then(|| keys.clone());
            Ok((config, Inputs { q: queries, k: keys, v }))
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
    attention_error: Option<[f64; 2]>,
    revived: usize,
    steps: usize,
}

async fn learn(
    started: Option<VqAttentionLayer>,
    config: VqAttentionConfig,
    inputs: Inputs,
    (epochs, batches): (usize, usize),
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<Trained> {
    let inputs = Arc::new(inputs);
    let begun = {
        let inputs = inputs.clone();
        tokio::task::spawn_blocking(move || {
            let attention = match started {
                Some(attention) => attention,
                None => VqAttentionLayer::by_kmeans(config, inputs.q.view(), inputs.k.view())?,
            };
            let error = inputs.error(&attention)?;
            Ok::<_, Error>((attention, error))
        })
    };
    let (mut attention, error_before) = unwrap_join(begun.await)??;
    let (mut queries, mut keys, mut revived, mut steps) = (None, None, 0, 0);
    let mut chance = ChaCha8Rng::seed_from_u64(attention.settings().seed);
    for _ in 0..epochs {
        let mut losses = [Loss::default(); 2];
        let orders = [&inputs.q, &inputs.k].map(|x| Arc::new(shuffled(x.nrows(), &mut chance)));
        for batch in 0..batches {
            if cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let (inputs, orders, step) = (inputs.clone(), orders.clone(), steps as u64);
            let learned = tokio::task::spawn_blocking(move || {
                // As many batches of both, however many there are of each.
                let part = |x: &Array2<f32>, order: &[usize]| {
                    let (start, end) = (batch * order.len() / batches, (batch + 1) * order.len() / batches);
                    x.select(Axis(0), &order[start..end])
                };
                attention.learn(part(&inputs.q, &orders[0]).view(), part(&inputs.k, &orders[1]).view(), step)
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
            progress.step_done();
        }
        for (all, loss) in [&mut queries, &mut keys].into_iter().zip(losses) {
            if loss.tokens > 0.0 {
                let mean = loss.sum / loss.tokens;
                let both: &mut [f64; 2] = all.get_or_insert([mean; 2]);
                both[1] = mean;
            }
        }
    }
    let measured = tokio::task::spawn_blocking(move || Ok::<_, Error>((inputs.error(&attention)?, attention))).await;
    let (error_after, attention) = unwrap_join(measured)??;
    let attention_error = error_before.zip(error_after).map(|(before, after)| [before, after]);
    Ok(Trained { attention, queries, keys, attention_error, revived, steps })
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
        assert_eq!(batches(10, 1025, 1024).unwrap(), 2);
        assert_eq!(batches(0, 5, usize::MAX).unwrap(), 1);
        for (epochs, tokens) in [(usize::MAX, 8), (usize::MAX, 1), (usize::MAX / 2, 4096), (1 << 32, 1)] {
            let message = batches(epochs, tokens, 1024).unwrap_err().to_string();
            assert!(message.contains(&epochs.to_string()), "{message}");
        }
    }
}
