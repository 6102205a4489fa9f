//! Stands in for the network side of joining until it is merged.

use super::Identity;
use crate::engine::overlay::membership::Credential;
use crate::engine::overlay::token::Invite;

/// Why an invitation was not redeemed.
#[derive(Debug, thiserror::Error)]
#[error("this build cannot redeem invitations over the network")]
pub struct JoinError;

/// Redeems an invitation at its issuer.
///
/// # Errors
/// [`JoinError`], always.
pub async fn join(_identity: &Identity, _invite: &Invite) -> Result<Credential, JoinError> {
    Err(JoinError)
}
