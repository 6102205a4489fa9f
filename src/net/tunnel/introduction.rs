//! Why a provider believes that its caller belongs to the network. The caller may be many hops away,
//! so that nobody near the provider has admitted it: it shows its credential itself.
//!
//! The first thing on a tunnel's connection is a stream of one direction, from the caller, that holds
//! its credential (postcard). The provider serves nothing before it has judged that, and judges anew
//! when the roster changes and every [`MEMBERS_CHECK`](crate::net::MEMBERS_CHECK). The caller does not
//! wait for the verdict: it is not asked to, and a bad one ends the connection with its text.

use std::time::Duration;

use quinn::{Connection, ConnectionError, VarInt};

use crate::engine::overlay::wire;
use crate::engine::overlay::{Credential, NotMember};
use crate::engine::types::PublicKey;
use crate::net::{Members, now};

/// Longest encoding of a credential (bytes): two times of at most 10 and a signature of 65.
const CREDENTIAL_BYTES_MAX: usize = 128;
/// How long a caller may take to show it.
const SHOW_TIMEOUT: Duration = Duration::from_secs(10);
/// The code with which the connection of a stranger ends.
const NOT_MEMBER: u32 = 4;

/// Shows this node's credential on a new connection.
pub(super) async fn show(connection: &Connection, members: &Members) -> Result<(), String> {
    let credential = wire::encode(&members.load().credential);
    let mut stream = connection.open_uni().await.map_err(|error| error.to_string())?;
    stream.write_all(&credential).await.map_err(|error| error.to_string())?;
    stream.finish().map_err(|error| error.to_string())
}

/// A caller that has shown its credential.
pub(super) struct Caller {
    key: PublicKey,
    credential: Credential,
}

impl Caller {
    /// Waits for the credential and judges it.
    pub(super) async fn introduced(
        connection: &Connection,
        key: PublicKey,
        members: &Members,
    ) -> Result<Self, NotMember> {
        let showing = async {
            let mut stream = connection.accept_uni().await.ok()?;
            let bytes = stream.read_to_end(CREDENTIAL_BYTES_MAX).await.ok()?;
            wire::decode(&bytes, CREDENTIAL_BYTES_MAX).ok()
        };
        let shown = tokio::time::timeout(SHOW_TIMEOUT, showing).await.ok().flatten();
        let caller = Self { key, credential: shown.unwrap_or_default() };
        caller.judge(members).map(|()| caller)
    }

    /// Whether it belongs to the network now.
    pub(super) fn judge(&self, members: &Members) -> Result<(), NotMember> {
        members.load().check(&self.key, &self.credential, now())
    }
}

/// Ends the connection of a stranger and says why.
pub(super) fn refuse(connection: &Connection, why: NotMember) {
    connection.close(VarInt::from_u32(NOT_MEMBER), why.to_string().as_bytes());
}

/// What a provider said that takes this node for a stranger.
pub(super) fn refused(error: &ConnectionError) -> Option<String> {
    match error {
        ConnectionError::ApplicationClosed(close)
            if close.error_code == VarInt::from_u32(NOT_MEMBER) =>
        {
            Some(String::from_utf8_lossy(&close.reason).into_owned())
        }
        _ => None,
    }
}
