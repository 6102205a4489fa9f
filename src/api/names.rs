//! The control API's part about to whom names belong, and on whose behalf they are published.

use std::time::Duration;

use axum::Json;
use axum::extract::{Path as UrlPath, State};

use super::network::key_of;
use super::server::{Answer, Failure, wrong};
use super::types::{DELEGATION_S_MAX, Delegate, Delegated, Trust, Trusted};
use crate::engine::overlay::Signed;
use crate::engine::overlay::delegation::from_text;
use crate::engine::types::ServiceName;
use crate::node::{NodeHandle, peer_id_text};

pub(super) async fn delegate(
    State(node): State<NodeHandle>,
    UrlPath(name): UrlPath<String>,
    Json(body): Json<Delegate>,
) -> Answer<Delegated> {
    let name: ServiceName = name.parse().map_err(wrong)?;
    let provider = key_of(&node, &body.peer).await?;
    if body.expires_s > DELEGATION_S_MAX {
        return Err(wrong(format!("a delegation lasts {DELEGATION_S_MAX} s at most")));
    }
    let lifetime = Duration::from_secs(body.expires_s);
    let (delegation, expires_at) = node.delegate(name.clone(), provider, lifetime).await?;
    Ok(Json(Delegated {
        name: name.to_string(),
        provider: provider.node_id().to_string(),
        expires_us: expires_at.as_micros(),
        delegation,
    }))
}

pub(super) async fn trust(
    State(node): State<NodeHandle>,
    UrlPath(name): UrlPath<String>,
    Json(body): Json<Trust>,
) -> Answer<Trusted> {
    let name: ServiceName = name.parse().map_err(wrong)?;
    let owner = key_of(&node, &body.owner).await?;
    node.trust(name.clone(), owner).await?;
    Ok(Json(Trusted {
        name: name.to_string(),
        owner: owner.node_id().to_string(),
        owner_peer_id: peer_id_text(&owner),
    }))
}

/// Reads a delegation's text.
pub(super) fn delegation(text: &str) -> Result<Signed, Failure> {
    from_text(text).map(|(signed, _)| signed).map_err(wrong)
}
