//! Which token follows: the likeliest, or one that is drawn.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// How the next token is chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// What logits are divided by; at 0 the likeliest token is taken.
    pub temperature: f32,
    /// Only so many of the likeliest tokens are drawn from; 0 for all.
    pub top_k: usize,
    /// Only the likeliest tokens that have this share together are drawn from; 1 for all.
    pub top_p: f32,
    /// Of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

/// Draws tokens one after another.
#[derive(Debug)]
pub struct Sampler {
    settings: Sampling,
    random: ChaCha8Rng,
}

impl Sampler {
    /// Returns a sampler whose draws are those of the seed.
    pub fn new(settings: Sampling) -> Self {
        let random = ChaCha8Rng::seed_from_u64(settings.seed);
        Sampler { settings, random }
    }

    /// Chooses a token by its logits, of which there is one at least.
    pub fn choose(&mut self, logits: &[f32]) -> u32 {
        let Sampling { temperature, top_k, top_p, .. } = self.settings;
        if temperature <= 0.0 {
            return likeliest(logits);
        }
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let logit = |token: u32| logits[token as usize];
        order.sort_by(|a, b| logit(*b).total_cmp(&logit(*a)));
        if top_k > 0 {
            order.truncate(top_k);
        }
        let most = order.first().map_or(0.0, |token| logit(*token));
        let mut shares: Vec<f64> =
            order.iter().map(|token| f64::from((logit(*token) - most) / temperature).exp()).collect();
        let mut sum: f64 = shares.iter().sum();
        if top_p < 1.0 {
            let mut before = 0.0;
            let kept = shares.iter().take_while(|share| {
                let keeps = before < f64::from(top_p) * sum;
                before += **share;
                keeps
            });
            let kept = kept.count().max(1);
            shares.truncate(kept);
            sum = shares.iter().sum();
        }
        // 53 random bits in 0 … 1.
        let drawn = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * sum;
        let mut before = 0.0;
        let place = shares.iter().position(|share| {
            before += share;
            drawn < before
        });
        order[place.unwrap_or(shares.len() - 1)]
    }
}

/// The token of the largest logit, the first of several.
pub fn likeliest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_have_the_shares_of_the_logits() {
        let logits = [0.0, 2f32.ln(), 5f32.ln(), f32::NEG_INFINITY];
        assert_eq!(Sampler::new(Sampling::default()).choose(&logits), 2);
        let count = |settings: Sampling| {
            let mut sampler = Sampler::new(settings);
            let mut counts = [0; 4];
            (0..8000).for_each(|_| counts[sampler.choose(&logits) as usize] += 1);
            counts
        };
        let all = Sampling { temperature: 1.0, seed: 7, ..Sampling::default() };
        let counts = count(all.clone());
        for (count, share) in counts.iter().zip([1, 2, 5, 0]) {
            assert!((count - share * 1000i32).abs() < 150, "{counts:?}");
        }
        assert_eq!(count(all.clone()), counts);
        assert_eq!(count(Sampling { top_k: 1, ..all.clone() }), [0, 0, 8000, 0]);
        // 5/8 are above a half, but not above 0.7.
        assert_eq!(count(Sampling { top_p: 0.5, ..all.clone() }), [0, 0, 8000, 0]);
        let two = count(Sampling { top_p: 0.7, ..all });
        assert!(two[0] == 0 && two[1] > 2000, "{two:?}");
    }
}
