//! What a service answers alike for a long time, and is asked once a minute.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::error::Result;

/// How long an answer is used.
const MAX_AGE: Duration = Duration::from_secs(60);

/// The last answer, and when it came.
#[derive(Debug)]
pub(super) struct Recent<T>(Mutex<Option<(Instant, T)>>);

impl<T> Default for Recent<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T: Clone> Recent<T> {
    /// The answer of the last minute, or else the one that `ask` gets. Callers at the same time may each ask.
    pub async fn or(&self, ask: impl Future<Output = Result<T>>) -> Result<T> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((_, answer)) = kept.filter(|(at, _)| at.elapsed() < MAX_AGE) {
            return Ok(answer);
        }
        self.renew(ask).await
    }

    /// The answer that `ask` gets now.
    pub async fn renew(&self, ask: impl Future<Output = Result<T>>) -> Result<T> {
        let answer = ask.await?;
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), answer.clone()));
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::super::error::{Error, ErrorKind};
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_used_for_a_minute_and_a_failure_never() {
        let recent = Recent::default();
        let failed = recent.or(async { Err(Error::new("ask", ErrorKind::Unavailable, "away")) }).await;
        assert!(failed.is_err());
        assert_eq!(recent.or(async { Ok(1) }).await.unwrap(), 1);
        tokio::time::advance(MAX_AGE - Duration::from_secs(1)).await;
        assert_eq!(recent.or(async { Ok(2) }).await.unwrap(), 1);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(recent.or(async { Ok(3) }).await.unwrap(), 3);
    }
}
