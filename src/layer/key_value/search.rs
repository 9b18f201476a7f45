//! Which keys a query uses, and what leaving the others out costs.

use ndarray::ArrayView1;
use serde::Serialize;

use super::config::{Limit, SearchSettings};
use super::threshold::rank_value;

/// A key that a query uses.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Hit {
    pub key: u32,
    /// ⟨κ, x − μ⟩, of unit variance over the inputs.
    pub score: f32,
    /// s·score: how far the key's value vector, of unit length, moves the output.
    pub contribution: f32,
}

/// The answer to one query.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct QueryHits {
    /// The rank value that a key had to reach.
    pub threshold: f32,
    /// A bound on ‖ŷ − y‖ / ‖y‖ for this query, bias left out; absent where no finite bound can be given.
    pub certified_error: Option<f64>,
    /// Highest ranked first.
    pub hits: Vec<Hit>,
}

/// What is known of an output without computing it: all of it follows from the scores.
pub struct Certificate {
    /// ‖y‖ over the stored components.
    pub norm: f64,
    /// Bound on the part that a truncated factorisation lost.
    pub truncated: f64,
    /// Bound on what rounded keys put into the contributions.
    pub rounded: f64,
    /// Bound on what rounded values put into their sum.
    pub values: f64,
    /// What f32 arithmetic may add.
    pub rounding: f64,
}

impl Certificate {
    /// The bound on the relative error when components of squared length `dropped` are left out.
    pub fn bound(&self, dropped: f64) -> Option<f64> {
        let error = (dropped + self.truncated * self.truncated).sqrt() + self.fixed();
        let least = self.least();
        (least > 0.0).then(|| error / least)
    }

    /// The squared length that may be left out while the bound stays within `max_error`.
    fn budget(&self, max_error: f64) -> f64 {
        let error = max_error * self.least() - self.fixed();
        if error > self.truncated { error * error - self.truncated * self.truncated } else { 0.0 }
    }

    /// What every answer may be off by, whatever is left out.
    fn fixed(&self) -> f64 {
        self.rounded + self.values + self.rounding
    }

    /// The least that ‖y‖ can be.
    fn least(&self) -> f64 {
        self.norm - self.truncated - self.rounded - self.rounding
    }
}

/// Picks the keys of one query from its scores, unordered, and gives the threshold in force.
pub fn select(
    scores: ArrayView1<f32>,
    scales: &[f32],
    settings: &SearchSettings,
    limit: SelectLimit,
    certificate: &Certificate,
) -> (Vec<Hit>, f32) {
    let hit = |key: usize| Hit { key: key as u32, score: scores[key], contribution: scores[key] * scales[key] };
    let rank = |key: usize| rank_value(scores[key], scales[key], settings.ranking, settings.sides);
    let (mut chosen, mut threshold): (Vec<usize>, f32) = match limit {
        SelectLimit::Threshold(t) => ((0..scales.len()).filter(|&k| rank(k) >= t).collect(), t),
        SelectLimit::MaxError(max_error) => {
            let mut order: Vec<usize> = (0..scales.len()).collect();
            order.sort_unstable_by(|&a, &b| rank(a).total_cmp(&rank(b)));
            let budget = certificate.budget(max_error);
            let mut dropped = 0.0;
            let first = order
                .iter()
                .position(|&k| {
                    dropped += f64::from(scores[k] * scales[k]).powi(2);
                    dropped > budget
                })
                .unwrap_or(order.len());
            // Where nothing has to be used, just above the highest.
            let none = || order.last().map_or(0.0, |&k| rank(k).next_up());
            let threshold = order.get(first).map_or_else(none, |&k| rank(k));
            (order.split_off(first), threshold)
        }
    };
    if let Some(capacity) = settings.max_ids_capacity
        && chosen.len() > capacity
    {
        chosen.select_nth_unstable_by(capacity - 1, |&a, &b| rank(b).total_cmp(&rank(a)));
        threshold = rank(chosen[capacity - 1]);
        chosen.truncate(capacity);
    }
    (chosen.into_iter().map(hit).collect(), threshold)
}

/// A [`Limit`] with K already turned into a threshold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum SelectLimit {
    Threshold(f32),
    MaxError(f64),
}

impl SelectLimit {
    /// Resolves `limit`, asking `threshold_for` what K comes to.
    pub fn resolve(limit: Limit, threshold_for: impl FnOnce(f64) -> f32) -> Self {
        match limit {
            Limit::Keys(k) => SelectLimit::Threshold(threshold_for(k)),
            Limit::Threshold(t) => SelectLimit::Threshold(t),
            Limit::MaxError(e) => SelectLimit::MaxError(e),
        }
    }
}
