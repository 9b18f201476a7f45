//! What is renewed on a thread of its own until it is dropped, and ended there.

use std::sync::mpsc::{Sender as Done, channel};
use std::time::Duration;

use tokio::sync::oneshot;

use super::keeper::keeper;
use crate::error::Result;

/// How long the end is waited for: what has not ended by then is taken for dead later.
const ENDING: Duration = Duration::from_secs(2);

/// What is renewed and ended.
pub trait Renew: Send + 'static {
    /// Renews it; `false` where there is nothing left to renew, and nothing to end.
    fn renew(&mut self) -> impl Future<Output = bool> + Send;

    /// Ends it.
    fn end(self) -> impl Future<Output = ()> + Send;
}

/// Something that is renewed, until this is dropped.
#[derive(Debug)]
pub struct Renewed {
    stop: Option<oneshot::Sender<Done<()>>>,
}

impl Renewed {
    /// Renews something again and again.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn begin(every: Duration, mut what: impl Renew) -> Result<Self> {
        let (stop, mut stopped) = oneshot::channel::<Done<()>>();
        keeper()?.spawn(async move {
            loop {
                tokio::select! {
                    done = &mut stopped => {
                        what.end().await;
                        return done.is_ok_and(|done| done.send(()).is_ok());
                    }
                    () = tokio::time::sleep(every) => {}
                }
                if !what.renew().await {
                    return false;
                }
            }
        });
        Ok(Renewed { stop: Some(stop) })
    }
}

impl Drop for Renewed {
    fn drop(&mut self) {
        let Some(stop) = self.stop.take() else { return };
        let (done, ended) = channel();
        // Waited for, since a process that ends now would leave others to wait until its time has run out. Where nothing is renewed any
        // more, nothing has to end.
        if stop.send(done).is_ok() {
            let _ = ended.recv_timeout(ENDING);
        }
    }
}
