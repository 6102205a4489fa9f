//! What is known at once to be wrong with a service that is published or used; it may work later, so that
//! nothing is refused because of it.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;

use crate::engine::measure::{Health, HealthCheck};
use crate::engine::overlay::{ServiceKind, ServiceRecord};
use crate::engine::types::{PublicKey, ServiceName};
use crate::node::View;

/// How long a target is waited for; most refuse at once.
const TARGET_TIMEOUT: Duration = Duration::from_millis(250);

/// What is wrong with the target of a service, where its check is to connect there anyway.
pub(super) async fn of_target(
    kind: ServiceKind,
    target: SocketAddr,
    check: &HealthCheck,
) -> Option<String> {
    if !matches!(check, HealthCheck::Tcp | HealthCheck::Http { .. }) {
        return None;
    }
    let connected = tokio::time::timeout(TARGET_TIMEOUT, TcpStream::connect(target)).await;
    let refused =
        matches!(connected, Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused);
    refused.then(|| format!("nothing accepts at {}://{target} yet", kind.as_str()))
}

/// What keeps this node from using a service; `None` when one of its providers may do.
pub(super) fn of_service(name: &ServiceName, view: &View<'_>) -> Option<String> {
    let services = view.engine.services();
    let of = |(key, record): (PublicKey, &ServiceRecord)| {
        let health = services.health(name, key.node_id(), view.now).map(|known| known.health);
        if !record.allowed.is_empty() && !record.allowed.contains(&view.engine.me()) {
            return Some(format!("this node may not connect to {name}"));
        }
        (health == Some(Health::Down)).then(|| format!("{name} is down"))
    };
    let troubles: Option<Vec<String>> =
        services.registry().resolve(name, view.now).map(of).collect();
    troubles?.into_iter().next()
}
