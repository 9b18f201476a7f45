//! Long work seen from outside: progress, and a request to stop.

use tokio::sync::watch;

use crate::error::{Error, Result};

/// What long work tells as it goes. Every method may be left as it is.
pub trait Progress: Send + Sync {
    /// Is told that the work begins: `layers` layers of `bytes` bytes in all.
    fn started(&self, layers: usize, bytes: u64) {
        let _ = (layers, bytes);
    }
    /// Is told which layer is at work.
    fn layer(&self, name: &str) {
        let _ = name;
    }
    /// Is told that a layer of `bytes` bytes is done; `skipped` where what the store had was used.
    fn layer_done(&self, bytes: u64, skipped: bool) {
        let _ = (bytes, skipped);
    }
    /// Is told that the work is a training, which begins: `epochs` times `steps` steps.
    fn training_started(&self, epochs: usize, steps: usize) {
        let _ = (epochs, steps);
    }
    /// Is told that a step of a training is done.
    fn step_done(&self) {}
    /// Is told that the work is done or given up.
    fn finished(&self) {}
}

/// A [`Progress`] that says nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {}

/// A request to stop, shared between the work and whoever asks.
#[derive(Debug, Clone)]
pub struct Cancel {
    requested: watch::Sender<bool>,
}

impl Default for Cancel {
    fn default() -> Self {
        Cancel { requested: watch::Sender::new(false) }
    }
}

impl Cancel {
    /// Returns a request that nobody has made yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the work to stop.
    pub fn cancel(&self) {
        self.requested.send_replace(true);
    }

    /// Returns whether somebody has asked.
    pub fn is_cancelled(&self) -> bool {
        *self.requested.borrow()
    }

    /// Returns when somebody asks.
    pub async fn cancelled(&self) {
        // `self` holds the sender, so waiting cannot fail.
        let _ = self.requested.subscribe().wait_for(|asked| *asked).await;
    }

    /// Returns what `waited` gives, unless somebody asks before: then it is dropped.
    pub(crate) async fn unless<T>(&self, waited: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            biased;
            () = self.cancelled() => Err(Error::Cancelled),
            done = waited => done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waiting_ends_when_somebody_asks() {
        let cancel = Cancel::new();
        assert_eq!(cancel.unless(async { Ok(3) }).await.unwrap(), 3);
        let waiter = tokio::spawn({
            let cancel = cancel.clone();
            async move { cancel.unless(std::future::pending::<Result<()>>()).await }
        });
        tokio::task::yield_now().await;
        cancel.cancel();
        assert!(matches!(waiter.await.unwrap(), Err(Error::Cancelled)));
        assert!(matches!(cancel.unless(async { Ok(3) }).await, Err(Error::Cancelled)));
    }
}
