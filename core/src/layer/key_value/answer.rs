//! The keys that queries use: the same for hits, outputs and gradients.

use ndarray::{Array2, ArrayView1, ArrayView2, Axis};
use rayon::prelude::*;

use super::config::SearchSettings;
use super::layer::Core;
use super::limit::{Ranking, Sides};
use super::search::{Certificate, Hit, Scored, SelectLimit, rank_value};
use crate::index::ContributionRange;
use crate::linalg::{dot_f64, matmul_nt};

/// Scores are recomputed from float keys down to this share below the threshold.
const REFINED_WITHIN: f32 = 0.5;

/// Number of scores from which several threads share the work.
const PARALLEL_SCORES_FROM: usize = 1 << 12;

/// Number of queries whose scores a thread keeps at a time: a few MiB.
const ANSWERED_AT_ONCE: usize = 256;

/// The keys that one query uses, and how far off their output may be.
pub struct Answer {
    /// The keys that the query uses, in no order.
    pub hits: Vec<Hit>,
    /// The ranking value that a key had to reach.
    pub threshold: f32,
    /// A bound on ‖ŷ − y‖ / ‖y‖; none where the index did not score every key.
    pub bound: Option<f64>,
}

impl Core {
    /// Returns the answers to centred queries `[batch, in]`. Threads share them, each from scores to hits.
    pub fn answers(&self, centred: ArrayView2<f32>, settings: &SearchSettings, limit: SelectLimit) -> Vec<Answer> {
        let (batch, keys) = (centred.nrows(), self.scales.len());
        if batch == 1 || batch * keys < PARALLEL_SCORES_FROM {
            return self.answers_here(centred, settings, limit);
        }
        let each = batch.div_ceil(rayon::current_num_threads()).min(ANSWERED_AT_ONCE);
        let shares: Vec<_> = centred.axis_chunks_iter(Axis(0), each).collect();
        let answers: Vec<_> = shares.into_par_iter().map(|x| self.answers_here(x, settings, limit)).collect();
        answers.into_iter().flatten().collect()
    }

    fn answers_here(&self, centred: ArrayView2<f32>, settings: &SearchSettings, limit: SelectLimit) -> Vec<Answer> {
        if let Some(range) = self.range(settings, limit) {
            return centred.rows().into_iter().map(|x| self.proposed(x, range, settings, limit)).collect();
        }
        let scores = self.scores(centred, settings, limit);
        let answers = scores.rows().into_iter().zip(centred.rows()).map(|(scores, x)| {
            let scores = scores.to_slice().expect("a fresh array is contiguous");
            let contributions = self.contributions(scores);
            let certificate = self.certificate(x, &contributions, self.config.key_error);
            let scored = Scored { scores, contributions: &contributions };
            let (keys, threshold) = scored.select(settings, limit, Some(&certificate));
            let bound = certificate.bound(certificate.dropped(&contributions, &keys));
            Answer { hits: scored.hits(&keys), threshold, bound }
        });
        answers.collect()
    }

    /// Returns the range of contributions to ask the index for; `None` where it has to score every key.
    fn range(&self, settings: &SearchSettings, limit: SelectLimit) -> Option<ContributionRange> {
        match (limit, settings.ranking) {
            (SelectLimit::Threshold(least), Ranking::Contribution)
                if !self.config.settings.backend.scores_every_key() =>
            {
                Some(ContributionRange { least, two_sided: settings.sides == Sides::Both })
            }
            _ => None,
        }
    }

    /// Returns the answer among the keys that the index proposes.
    fn proposed(
        &self,
        x: ArrayView1<f32>,
        range: ContributionRange,
        settings: &SearchSettings,
        limit: SelectLimit,
    ) -> Answer {
        let index = self.index.as_search_index();
        let keys = index.candidates(x, range).unwrap_or_else(|| (0..self.scales.len() as u32).collect());
        let mut scores = index.scores_of(x, &keys);
        if let Some(floats) = &self.float_keys {
            let near = refined_from(range.least);
            for (score, &key) in scores.iter_mut().zip(&keys) {
                if rank_value(*score, self.scales[key as usize], settings.ranking, settings.sides) >= near {
                    *score = floats.row(key as usize).dot(&x);
                }
            }
        }
        let contributions: Vec<f32> = scores.iter().zip(&keys).map(|(s, &key)| s * self.scales[key as usize]).collect();
        let scored = Scored { scores: &scores, contributions: &contributions };
        let (indices, threshold) = scored.select(settings, limit, None);
        let mut hits = scored.hits(&indices);
        hits.iter_mut().for_each(|hit| hit.key = keys[hit.key as usize]);
        Answer { hits, threshold, bound: None }
    }

    /// Returns the scores of centred queries `[batch, in]` with every key. Those near the threshold or above are computed from
    /// float keys, where there are any.
    fn scores(&self, centred: ArrayView2<f32>, settings: &SearchSettings, limit: SelectLimit) -> Array2<f32> {
        let mut scores = self.index.as_search_index().scores(centred);
        let (Some(keys), SelectLimit::Threshold(threshold)) = (&self.float_keys, limit) else { return scores };
        let near = refined_from(threshold);
        for (x, mut scores) in centred.rows().into_iter().zip(scores.rows_mut()) {
            for ((score, &scale), key) in scores.iter_mut().zip(&self.scales).zip(keys.rows()) {
                if rank_value(*score, scale, settings.ranking, settings.sides) >= near {
                    *score = key.dot(&x);
                }
            }
        }
        scores
    }

    /// Returns the contributions `[batch, keys]` of every key, from float keys where there are any, and the bound on the error of
    /// each row's sum.
    pub fn every_contribution(&self, centred: ArrayView2<f32>) -> (Array2<f32>, Vec<Option<f64>>) {
        let (mut all, key_error) = match &self.float_keys {
            Some(keys) => (matmul_nt(centred, keys.view()), 0.0),
            None => (self.index.as_search_index().scores(centred), self.config.key_error),
        };
        all *= &ArrayView1::from(&self.scales);
        let bounds = all.rows().into_iter().zip(centred.rows()).map(|(contributions, x)| {
            let contributions = contributions.to_slice().expect("a fresh array is contiguous");
            self.certificate(x, contributions, key_error).bound(0.0)
        });
        let bounds = bounds.collect();
        (all, bounds)
    }

    /// Returns c_i = s_i · score_i.
    fn contributions(&self, scores: &[f32]) -> Vec<f32> {
        scores.iter().zip(&self.scales).map(|(score, scale)| score * scale).collect()
    }

    fn certificate(&self, centred: ArrayView1<f32>, contributions: &[f32], key_error: f64) -> Certificate {
        let distance = self.index.rows().length(centred);
        let truncated = match self.config.truncation {
            0.0 => 0.0,
            norm => norm * centred.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt(),
        };
        // ‖W μ + Σ c_i u_i‖² for orthonormal u_i.
        let contributed = dot_f64(contributions, contributions);
        let crossed = dot_f64(contributions, self.values_on_mean());
        let contributed_norm = contributed.sqrt();
        let values = self.config.value_error * contributed_norm;
        // ⟨u_i, W μ⟩ is known of rounded values only.
        let terms = self.mean_output_norm + contributed_norm;
        let rounding = self.config.rounding * distance
            + f64::from(f32::EPSILON) * (2.0 * self.mean_output_norm + contributed_norm);
        let squared = self.mean_output_norm.powi(2) + contributed + 2.0 * (crossed - values * self.mean_output_norm);
        // Where the terms cancel, what is left of the squares may be their rounding: (‖a‖ + r)² − ‖a‖² of terms of this length.
        let squared = squared - rounding * (2.0 * terms + rounding);
        Certificate {
            norm: squared.max(0.0).sqrt(),
            contributed,
            truncated,
            rounded: key_error * distance,
            values,
            rounding,
        }
    }
}

fn refined_from(threshold: f32) -> f32 {
    threshold - REFINED_WITHIN * threshold.abs()
}
