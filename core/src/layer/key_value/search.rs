//! Selects the keys that a query uses, and bounds the error of leaving the others out.

use serde::Serialize;

use super::config::SearchSettings;
use super::limit::{Limit, Ranking, Sides};

/// A key that a query uses.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Hit {
    /// The key's number.
    pub key: u32,
    /// ⟨κ, x − μ⟩, which has unit variance over the inputs.
    pub score: f32,
    /// s·score: how far the key's value vector, of unit length, moves the output.
    pub contribution: f32,
}

/// The keys that one query uses.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct QueryHits {
    /// The ranking value that a key had to reach.
    pub threshold: f32,
    /// A bound on ‖ŷ − y‖ / ‖y‖ for this query, bias left out; absent where no finite bound can be given.
    pub certified_error: Option<f64>,
    /// The keys, highest ranked first.
    pub hits: Vec<Hit>,
}

/// Bound on the rounding of a difference of two sums of some thousand f64 squares, relative to the larger.
const DIFFERENCE: f64 = 1e-13;

/// What the scores of a query say of its output without computing it: its length, and bounds on each source of error.
pub struct Certificate {
    /// ‖y‖ over the stored components.
    pub norm: f64,
    /// Σ c_i² over all keys.
    pub contributed: f64,
    /// Bound on the length of what a truncated factorisation lost.
    pub truncated: f64,
    /// Bound on the error that rounded keys cause.
    pub rounded: f64,
    /// Bound on the error that rounded values cause.
    pub values: f64,
    /// Bound on the error of f32 arithmetic.
    pub rounding: f64,
}

impl Certificate {
    /// Returns the bound on the relative error when components of squared length `dropped` are left out.
    pub fn bound(&self, dropped: f64) -> Option<f64> {
        let error = (dropped + self.truncated * self.truncated).sqrt() + self.fixed();
        let least = self.least();
        (least > 0.0).then(|| error / least)
    }

    /// Returns Σ c_i² over the keys that are not in `kept`, with a bound on the rounding of the difference added.
    pub fn dropped(&self, contributions: &[f32], kept: &[u32]) -> f64 {
        let kept: f64 = kept.iter().map(|&k| f64::from(contributions[k as usize]).powi(2)).sum();
        (self.contributed - kept).max(0.0) + self.contributed * DIFFERENCE
    }

    /// Returns the squared length that may be left out while the bound stays within `max_error`.
    fn budget(&self, max_error: f64) -> f64 {
        let error = max_error * self.least() - self.fixed();
        if error > self.truncated { error * error - self.truncated * self.truncated } else { 0.0 }
    }

    /// Bound on the errors that do not depend on which keys are left out.
    fn fixed(&self) -> f64 {
        self.rounded + self.values + self.rounding
    }

    /// Lower bound on ‖y‖.
    fn least(&self) -> f64 {
        self.norm - self.truncated - self.rounded - self.rounding
    }
}

/// One query's scores and contributions of keys, `[keys]` each.
pub struct Scored<'a> {
    /// ⟨κ, x − μ⟩.
    pub scores: &'a [f32],
    /// s · score.
    pub contributions: &'a [f32],
}

impl Scored<'_> {
    /// The values that keys are ranked by, with their signs.
    fn ranked(&self, ranking: Ranking) -> &[f32] {
        match ranking {
            Ranking::Contribution => self.contributions,
            Ranking::Score => self.scores,
        }
    }

    /// Returns the indices of the keys that the query uses, in no order, and the ranking value that they had to reach.
    pub fn select(
        &self,
        settings: &SearchSettings,
        limit: SelectLimit,
        certificate: Option<&Certificate>,
    ) -> (Vec<u32>, f32) {
        let values = self.ranked(settings.ranking);
        let rank = |key: u32| signed(values[key as usize], settings.sides);
        let (mut chosen, mut threshold) = match limit {
            SelectLimit::Threshold(t) => (
                match settings.sides {
                    Sides::Both => at_least(values, t, f32::abs),
                    Sides::Positive => at_least(values, t, |v| v),
                },
                t,
            ),
            SelectLimit::MaxError(max_error) => {
                let mut order: Vec<u32> = (0..values.len() as u32).collect();
                order.sort_unstable_by(|&a, &b| rank(a).total_cmp(&rank(b)));
                // Without a certificate no error can be promised: nothing may be left out.
                let budget = certificate.map_or(0.0, |certificate| certificate.budget(max_error));
                let mut dropped = 0.0;
                let first = order
                    .iter()
                    .position(|&k| {
                        dropped += f64::from(self.contributions[k as usize]).powi(2);
                        dropped > budget
                    })
                    .unwrap_or(order.len());
                // Where no key has to be used, the threshold is just above the highest.
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
        (chosen, threshold)
    }

    /// Returns the hits of keys by their indices.
    pub fn hits(&self, keys: &[u32]) -> Vec<Hit> {
        let hit =
            |&key: &u32| Hit { key, score: self.scores[key as usize], contribution: self.contributions[key as usize] };
        keys.iter().map(hit).collect()
    }
}

/// Sorts hits, highest ranked first.
pub fn rank_hits(hits: &mut [Hit], settings: &SearchSettings) {
    let rank = |hit: &Hit| {
        let value = if settings.ranking == Ranking::Contribution { hit.contribution } else { hit.score };
        signed(value, settings.sides)
    };
    hits.sort_by(|a, b| rank(b).total_cmp(&rank(a)).then(a.key.cmp(&b.key)));
}

/// Returns the value that a key is ranked by.
pub fn rank_value(score: f32, scale: f32, ranking: Ranking, sides: Sides) -> f32 {
    signed(if ranking == Ranking::Contribution { score * scale } else { score }, sides)
}

fn signed(value: f32, sides: Sides) -> f32 {
    match sides {
        Sides::Both => value.abs(),
        Sides::Positive => value,
    }
}

/// Returns the indices of values that reach `t`. Each index is written, and overwritten by the next unless its value reaches
/// `t`: there is no branch to mispredict.
fn at_least(values: &[f32], t: f32, rank: impl Fn(f32) -> f32) -> Vec<u32> {
    let mut indices = vec![0u32; values.len()];
    let mut found = 0;
    for (index, &value) in values.iter().enumerate() {
        indices[found] = index as u32;
        found += usize::from(rank(value) >= t);
    }
    indices.truncate(found);
    indices
}

/// A [`Limit`] whose expected number of keys has become a threshold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum SelectLimit {
    /// See [`Limit::Threshold`].
    Threshold(f32),
    /// See [`Limit::MaxError`].
    MaxError(f64),
}

impl SelectLimit {
    /// Returns `limit` with `threshold_for` of its expected number of keys.
    pub fn resolve(limit: Limit, threshold_for: impl FnOnce(f64) -> f32) -> Self {
        match limit {
            Limit::Keys(k) => SelectLimit::Threshold(threshold_for(k)),
            Limit::Threshold(t) => SelectLimit::Threshold(t),
            Limit::MaxError(e) => SelectLimit::MaxError(e),
        }
    }
}
