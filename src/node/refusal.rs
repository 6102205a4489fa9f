//! Why a connection of a local program reaches no provider.

use super::handle::RequestError;
use crate::engine::event::CommandError;
use crate::net::tunnel::StreamError;

/// Why a connection reaches nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Anything else.
    Failure,
    /// Its kind of service takes no connections.
    NoConnections,
    /// This node may not use it.
    NotAllowed,
    /// No route, or the provider does not answer.
    NoRoute,
    /// Nobody provides it.
    UnknownName,
    /// Its target does not answer.
    Refused,
}

impl Refusal {
    /// A word for counters and the log.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Failure => "entry-failed",
            Self::NoConnections => "entry-no-connections",
            Self::NotAllowed => "entry-not-allowed",
            Self::NoRoute => "entry-no-route",
            Self::UnknownName => "entry-unknown-name",
            Self::Refused => "entry-refused",
        }
    }
}

impl From<&RequestError> for Refusal {
    fn from(error: &RequestError) -> Self {
        match error {
            RequestError::Command(CommandError::UnknownName(_)) => Self::UnknownName,
            RequestError::NoRoute(_) | RequestError::Tunnel(_) => Self::NoRoute,
            _ => Self::Failure,
        }
    }
}

impl From<StreamError> for Refusal {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::NoRoute | StreamError::Unreachable => Self::NoRoute,
            StreamError::UnknownService => Self::UnknownName,
            StreamError::NotAllowed => Self::NotAllowed,
            StreamError::TargetUnreachable => Self::Refused,
            _ => Self::Failure,
        }
    }
}

/// What a provider answered says more than that another one did not.
pub(super) fn most_telling(refusals: Vec<Refusal>) -> Refusal {
    let telling = |refusal: &Refusal| match refusal {
        Refusal::NoRoute => 0,
        Refusal::Failure => 1,
        _ => 2,
    };
    refusals.into_iter().max_by_key(telling).unwrap_or(Refusal::Failure)
}
