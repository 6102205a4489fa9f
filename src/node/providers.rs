//! Which provider of a name a new connection goes to.
//!
//! The providers of a name are all the same to the program that asks, and a connection takes the
//! first that accepts it. They are tried in order of their [`Standing`], the next one as soon as one
//! has failed or has not accepted within [`NEXT_AFTER`], as RFC 8305 does with the addresses of a
//! host. What is under way with the others is dropped: none has seen a byte of the program's yet.

use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;

/// How long a provider may take to accept before the next one is asked too (RFC 8305, section 8).
pub(super) const NEXT_AFTER: Duration = Duration::from_millis(250);

/// What is known of a provider, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Standing {
    /// It is this node itself.
    Here,
    /// It has accepted connections, and a route to it is alive.
    InUse,
    /// Nothing speaks against it.
    Fresh,
    /// It failed a short time ago, or no links lead to it.
    Doubtful,
}

/// Puts providers in order: by standing, then the one first that accepted last; equals stay as they
/// are.
pub(super) fn order<P>(mut providers: Vec<(P, Standing, Option<Instant>)>) -> Vec<P> {
    providers
        .sort_by_key(|(_, standing, accepted_at)| (*standing, std::cmp::Reverse(*accepted_at)));
    providers.into_iter().map(|(provider, ..)| provider).collect()
}

/// Tries providers in this order and returns what the first success brought.
///
/// # Errors
/// All failures, in the order in which they came.
pub(super) async fn first<P, T, E, W>(
    providers: impl IntoIterator<Item = P>,
    mut attempt: impl FnMut(P) -> W,
) -> Result<T, Vec<E>>
where
    W: Future<Output = Result<T, E>>,
{
    let mut others = providers.into_iter().fuse();
    let (mut under_way, mut failures) = (FuturesUnordered::new(), Vec::new());
    loop {
        match others.next() {
            Some(provider) => under_way.push(attempt(provider)),
            None if under_way.is_empty() => return Err(failures),
            None => {}
        }
        tokio::select! {
            biased;
            Some(result) = under_way.next() => match result {
                Ok(success) => return Ok(success),
                Err(failure) => failures.push(failure),
            },
            () = tokio::time::sleep(NEXT_AFTER) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_known_to_work_comes_first() {
        let (early, late) = (Instant::now(), Instant::now() + Duration::from_secs(1));
        let providers = vec![
            ("failed", Standing::Doubtful, Some(late)),
            ("new", Standing::Fresh, None),
            ("also new", Standing::Fresh, None),
            ("used", Standing::InUse, Some(early)),
            ("used last", Standing::InUse, Some(late)),
            ("this node", Standing::Here, None),
        ];
        let expected = ["this node", "used last", "used", "new", "also new", "failed"];
        assert_eq!(order(providers), expected);
    }

    /// What becomes of an attempt.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Fate {
        Accepts,
        Fails,
        /// Says nothing.
        Silent,
    }

    /// The provider that was taken, or all failures, and who was asked.
    async fn tried(fates: &[Fate]) -> (Result<usize, Vec<usize>>, Vec<usize>) {
        let mut asked = Vec::new();
        let result = first(fates.iter().copied().enumerate(), |(index, fate)| {
            asked.push(index);
            async move {
                match fate {
                    Fate::Accepts => Ok(index),
                    Fate::Fails => Err(index),
                    Fate::Silent => std::future::pending().await,
                }
            }
        });
        let result = result.await;
        (result, asked)
    }

    #[tokio::test]
    async fn the_next_one_is_asked_at_a_failure_or_after_a_silence() {
        use Fate::{Accepts, Fails, Silent};
        assert_eq!(tried(&[Accepts, Accepts]).await, (Ok(0), vec![0]), "nobody else is troubled");
        assert_eq!(tried(&[Fails, Fails, Accepts]).await, (Ok(2), vec![0, 1, 2]));
        assert_eq!(tried(&[Silent, Silent, Accepts]).await, (Ok(2), vec![0, 1, 2]));
        assert_eq!(tried(&[Fails, Fails]).await, (Err(vec![0, 1]), vec![0, 1]));
        assert_eq!(tried(&[]).await, (Err(vec![]), vec![]));
    }

    #[tokio::test]
    async fn a_slow_provider_is_still_taken_when_the_next_one_fails() {
        let slow = async {
            tokio::time::sleep(3 * NEXT_AFTER).await;
            Ok("slow")
        };
        let fails = async { Err("refused") };
        let attempts: [std::pin::Pin<Box<dyn Future<Output = _>>>; 2] =
            [Box::pin(slow), Box::pin(fails)];
        assert_eq!(first(attempts, |attempt| attempt).await, Ok("slow"));
    }
}
