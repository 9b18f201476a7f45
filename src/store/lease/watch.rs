//! Others, watched for signs of life.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What whoever waits has seen of others, by their names.
pub struct Watch {
    life: Duration,
    seen: BTreeMap<String, Other>,
}

struct Other {
    sign: String,
    since: Instant,
    has_moved: bool,
}

impl Watch {
    /// Returns one that takes for dead whoever gives the same sign for longer than `life`.
    pub fn new(life: Duration) -> Self {
        Watch { life, seen: BTreeMap::new() }
    }

    /// Notes a sign of somebody, and returns whether it has been the same for too long.
    pub fn is_dead(&mut self, who: &str, sign: &str) -> bool {
        let now = Instant::now();
        let new = || Other { sign: sign.to_owned(), since: now, has_moved: false };
        let other = self.seen.entry(who.to_owned()).or_insert_with(new);
        if other.sign != sign {
            *other = Other { has_moved: true, ..new() };
        }
        now - other.since > self.life
    }

    /// Returns whether somebody has given another sign since it was first seen.
    pub fn has_moved(&self, who: &str) -> bool {
        self.seen.get(who).is_some_and(|other| other.has_moved)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_gives_the_same_sign_for_too_long_is_dead() {
        let mut watch = Watch::new(Duration::from_millis(30));
        assert!(!watch.is_dead("a", "1") && !watch.is_dead("b", "1") && !watch.has_moved("a"));
        std::thread::sleep(Duration::from_millis(40));
        assert!(watch.is_dead("a", "1") && !watch.is_dead("b", "2"));
        assert!(watch.has_moved("b") && !watch.has_moved("a") && !watch.has_moved("c"));
    }
}
