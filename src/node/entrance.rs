//! How connections of local programs reach a provider of a name: one tunnel to each that is used, shared
//! by all connections, and for each connection the first provider that accepts it.
//!
//! The providers are tried in the order of their standing (`providers`). A tunnel whose provider cannot
//! be reached any more, or says that its service is down, is closed when another provider is there: the
//! programs that use it begin anew, and better at once than after QUIC's time-out. A tunnel that carried
//! nothing for [`TUNNEL_IDLE`] is closed too. A door (`doors`) keeps its last tunnel.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;

use super::View;
use super::handle::{NodeHandle, RequestError};
use super::providers::{Standing, first, order};
use super::refusal::{Refusal, most_telling};
use super::tunnels::{At, TunnelOptions};
use crate::engine::measure::Health;
use crate::engine::overlay::{ServiceKind, ServiceRecord};
use crate::engine::types::{NodeId, PublicKey, ServiceName, TunnelId};
use crate::net::tunnel::{StreamError, TunnelStream};

/// How long the target of a service of this node may take to accept a connection.
const TARGET_TIMEOUT: Duration = Duration::from_secs(5);
/// A tunnel that carried nothing for this long is closed.
const TUNNEL_IDLE: Duration = Duration::from_secs(600);
/// How often to look for such tunnels.
pub(super) const SWEEP: Duration = Duration::from_secs(30);
/// How long a tunnel that did not come up speaks for the next connections.
const FAILURE_SPEAKS: Duration = Duration::from_secs(1);
/// How often to look whether providers can still be reached.
pub(super) const WATCH: Duration = Duration::from_millis(250);
/// After how long without a route to a provider its connections are ended, when there is another.
const LOST_FOR: Duration = Duration::from_secs(1);
/// For how long a provider that failed is tried after the others.
const DOUBT: Duration = Duration::from_secs(10);

/// What the connections to one provider of a name share.
#[derive(Default)]
struct Shared {
    known: Mutex<Known>,
    /// Held while the tunnel is being opened.
    opening: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Known {
    tunnel: Option<TunnelId>,
    /// Why there is none.
    failed: Option<(Instant, Refusal)>,
    used_at: Option<Instant>,
    accepted_at: Option<Instant>,
    /// When a connection failed, and none was accepted since.
    doubted_at: Option<Instant>,
    /// Since when no route to it is alive.
    lost_at: Option<Instant>,
    /// Others provide the same, as it was when a connection was made last.
    has_others: bool,
}

impl Shared {
    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A provider and its record.
pub(super) type Provider = (PublicKey, ServiceRecord);

/// A connection to a provider.
pub(super) enum Connected {
    /// Through a tunnel.
    Tunnel(Box<TunnelStream>),
    /// The service is this node's own.
    Here(TcpStream),
}

/// See the module documentation.
pub(super) struct Entrance {
    node: NodeHandle,
    options: TunnelOptions,
    /// Where a door accepts connections; `None` for the proxy.
    door: Option<SocketAddr>,
    shared: Mutex<BTreeMap<(ServiceName, NodeId), Arc<Shared>>>,
}

impl Entrance {
    /// The one of the proxy, or of the door on this address.
    pub(super) fn new(node: NodeHandle, options: TunnelOptions, door: Option<SocketAddr>) -> Self {
        Self { node, options, door, shared: Mutex::default() }
    }

    /// Connects to whichever of the providers accepts first.
    pub(super) async fn connect_to(
        &self,
        name: &ServiceName,
        providers: Vec<Provider>,
    ) -> Result<Connected, Refusal> {
        let providers = self.in_order(name, providers).await?;
        let connected = first(providers, |provider| self.connect_one(name, provider)).await;
        connected.map_err(most_telling)
    }

    /// Opens a tunnel to whichever of the providers can be reached first.
    pub(super) async fn open_to_any(
        &self,
        name: &ServiceName,
        providers: Vec<Provider>,
    ) -> Result<TunnelId, Refusal> {
        let providers = self.in_order(name, providers).await?;
        let opened = first(providers, |provider| async {
            let shared = self.shared_with(name, provider.0.node_id());
            self.tunnel_to(name, &shared, provider).await
        });
        opened.await.map_err(most_telling)
    }

    /// Opens the first tunnel, to this provider.
    ///
    /// # Errors
    /// [`RequestError`]; nothing stays open.
    pub(super) async fn begin(
        &self,
        name: &ServiceName,
        provider: Provider,
    ) -> Result<TunnelId, RequestError> {
        let shared = self.shared_with(name, provider.0.node_id());
        let (tunnel, _) = self.open(name, provider).await?;
        let mut known = shared.known();
        (known.tunnel, known.used_at) = (Some(tunnel), Some(Instant::now()));
        Ok(tunnel)
    }

    async fn open(
        &self,
        name: &ServiceName,
        provider: Provider,
    ) -> Result<(TunnelId, Option<SocketAddr>), RequestError> {
        let at = self.door.map_or(At::Nowhere, At::Door);
        self.node.open_to(name.clone(), provider, at, self.options.clone()).await
    }

    /// The tunnels that it has.
    pub(super) fn tunnels(&self) -> Vec<TunnelId> {
        let all = self.lock();
        all.values().filter_map(|shared| shared.known().tunnel).collect()
    }

    /// The tunnel to a provider, unless there is none or something speaks against it.
    pub(super) fn sound_tunnel(&self, name: &ServiceName, node: NodeId) -> Option<TunnelId> {
        let shared = self.lock().get(&(name.clone(), node)).cloned()?;
        let known = shared.known();
        known.tunnel.filter(|tunnel| self.node.tunnels.is_reachable(*tunnel))
    }

    /// Whether there is a tunnel to a provider.
    pub(super) fn has_tunnel(&self, name: &ServiceName, node: NodeId) -> bool {
        let all = self.lock();
        all.get(&(name.clone(), node)).is_some_and(|shared| shared.known().tunnel.is_some())
    }

    /// A stream to a provider failed.
    pub(super) fn failed(&self, name: &ServiceName, node: NodeId, why: StreamError) {
        self.node.tunnels.failed(name, why.as_str());
        match why {
            StreamError::TargetUnreachable
            | StreamError::UnknownService
            | StreamError::NoRoute
            | StreamError::Unreachable
            | StreamError::Lost => self.node.doubt(name.clone(), node),
            _ => {}
        }
    }

    async fn in_order(
        &self,
        name: &ServiceName,
        providers: Vec<Provider>,
    ) -> Result<Vec<Provider>, Refusal> {
        let able = |(_, record): &Provider| record.kind != ServiceKind::Udp;
        let providers: Vec<Provider> = providers.into_iter().filter(able).collect();
        let has_others = match providers.len() {
            0 => return Err(Refusal::NoConnections),
            count => count > 1,
        };
        let nodes: Vec<NodeId> = providers.iter().map(|(key, _)| key.node_id()).collect();
        let sound = match has_others {
            true => self.node.sound(name, nodes).await.map_err(|error| Refusal::from(&error))?,
            false => nodes,
        };
        let known = providers.into_iter().map(|provider| {
            let node = provider.0.node_id();
            let shared = self.shared_with(name, node);
            let mut known = shared.known();
            known.has_others = has_others;
            let doubted = known.doubted_at.is_some_and(|at| at.elapsed() < DOUBT);
            let reachable = |tunnel| self.node.tunnels.is_reachable(tunnel);
            let standing = match known.tunnel {
                _ if doubted || !sound.contains(&node) => Standing::Doubtful,
                _ if provider.0 == self.node.key() => Standing::Here,
                Some(tunnel) if reachable(tunnel) => Standing::InUse,
                None => Standing::Fresh,
                Some(_) => Standing::Doubtful,
            };
            (provider, standing, known.accepted_at)
        });
        Ok(order(known.collect()))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<(ServiceName, NodeId), Arc<Shared>>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shared_with(&self, name: &ServiceName, node: NodeId) -> Arc<Shared> {
        self.lock().entry((name.clone(), node)).or_default().clone()
    }

    async fn connect_one(
        &self,
        name: &ServiceName,
        provider: Provider,
    ) -> Result<Connected, Refusal> {
        let node = provider.0.node_id();
        let shared = self.shared_with(name, node);
        let begun = Instant::now();
        let connected = match provider.0 == self.node.key() {
            true => self.connect_here(name).await,
            false => self.connect_over(name, &shared, provider).await,
        };
        let (took_ms, accepted) = (begun.elapsed().as_millis(), connected.is_ok());
        tracing::debug!(%name, %node, took_ms, accepted, "connection");
        let mut known = shared.known();
        let now = Some(Instant::now());
        match connected {
            Ok(_) => (known.accepted_at, known.doubted_at) = (now, None),
            Err(_) => known.doubted_at = now,
        }
        connected
    }

    async fn connect_here(&self, name: &ServiceName) -> Result<Connected, Refusal> {
        let target = self.node.target(name).ok_or(Refusal::UnknownName)?;
        let connecting = tokio::time::timeout(TARGET_TIMEOUT, TcpStream::connect(target));
        match connecting.await {
            Ok(Ok(connected)) => Ok(Connected::Here(connected)),
            _ => {
                self.node.doubt(name.clone(), self.node.key().node_id());
                Err(Refusal::Refused)
            }
        }
    }

    async fn connect_over(
        &self,
        name: &ServiceName,
        shared: &Shared,
        provider: Provider,
    ) -> Result<Connected, Refusal> {
        let node = provider.0.node_id();
        for again in [true, false] {
            let tunnel = self.tunnel_to(name, shared, provider.clone()).await?;
            let opened = async {
                let mut stream = self.node.stream(tunnel).await?;
                stream.accepted().await?;
                Ok(stream)
            };
            match opened.await {
                Ok(stream) => return Ok(Connected::Tunnel(Box::new(stream))),
                // Closed since, by a person or because it was idle, or its provider was restarted.
                Err(StreamError::Closed | StreamError::Lost) if again => {}
                Err(error) => {
                    self.failed(name, node, error);
                    return Err(error.into());
                }
            }
        }
        Err(Refusal::Failure)
    }

    /// The tunnel to a provider, opened when there is none.
    async fn tunnel_to(
        &self,
        name: &ServiceName,
        shared: &Shared,
        provider: Provider,
    ) -> Result<TunnelId, Refusal> {
        let _opening = shared.opening.lock().await;
        {
            let mut known = shared.known();
            let open = self.node.tunnels();
            let tunnel = known.tunnel;
            if let Some(tunnel) = tunnel.filter(|id| open.iter().any(|info| info.tunnel == *id)) {
                known.used_at = Some(Instant::now());
                return Ok(tunnel);
            }
            known.tunnel = None;
            // Those who waited for the same failure do not each try again.
            if let Some((at, refusal)) = known.failed
                && at.elapsed() < FAILURE_SPEAKS
            {
                return Err(refusal);
            }
        }
        let (node, begun) = (provider.0.node_id(), Instant::now());
        let opened = self.open(name, provider).await;
        let mut known = shared.known();
        let now = Instant::now();
        match opened {
            Ok((tunnel, _)) => {
                let took_ms = (now - begun).as_millis();
                tracing::debug!(%name, %node, %tunnel, took_ms, "tunnel opened");
                known.tunnel = Some(tunnel);
                (known.used_at, known.failed, known.lost_at) = (Some(now), None, None);
                Ok(tunnel)
            }
            Err(error) => {
                tracing::warn!("{node} cannot be reached for {name}: {error}");
                let refusal = Refusal::from(&error);
                known.failed = Some((now, refusal));
                Err(refusal)
            }
        }
    }

    fn close_soon(&self, tunnel: TunnelId) {
        let node = self.node.clone();
        tokio::spawn(async move {
            let _ = node.close_strands(tunnel).await;
        });
    }

    /// Closes tunnels to providers that cannot be reached, or are down, while others provide the same.
    ///
    /// # Errors
    /// [`RequestError::Stopped`].
    pub(super) async fn watch(&self) -> Result<(), RequestError> {
        let used: Vec<(ServiceName, NodeId)> = {
            let all = self.lock();
            let used = all.iter().filter(|(_, shared)| shared.known().tunnel.is_some());
            used.map(|(key, _)| key.clone()).collect()
        };
        if used.is_empty() {
            return Ok(());
        }
        let look = |view: &mut View<'_>| {
            let (services, graph, now) = (view.engine.services(), view.engine.graph(), view.now);
            let look = |(name, node): (ServiceName, NodeId)| {
                let health = services.health(&name, node, now).map(|known| known.health);
                let others = services.providers(&name, graph, now);
                // Where none works, all are named, this one too: then none is better.
                let is_named = others.iter().any(|(key, _)| key.node_id() == node);
                let has_others = others.iter().any(|(key, _)| key.node_id() != node);
                let has_better = !others.is_empty() && !is_named;
                ((name, node), (health == Some(Health::Down) && has_better, has_others))
            };
            used.into_iter().map(look).collect::<BTreeMap<_, _>>()
        };
        let seen = self.node.inspect(look).await?;
        let mut count = self.tunnels().len();
        for ((name, provider), shared) in self.lock().iter() {
            let mut known = shared.known();
            let Some(tunnel) = known.tunnel else { continue };
            let key = (name.clone(), *provider);
            let (is_down, has_others) = seen.get(&key).copied().unwrap_or_default();
            if self.node.tunnels.is_reachable(tunnel) {
                known.lost_at = None;
            } else {
                known.lost_at.get_or_insert_with(Instant::now);
            }
            let is_lost = known.lost_at.is_some_and(|at| at.elapsed() >= LOST_FOR);
            let is_spare = self.door.is_none() || count > 1;
            let is_lost = is_lost && (has_others || known.has_others);
            if (is_down || is_lost) && is_spare {
                let why = if is_down { "down" } else { "lost" };
                tracing::warn!(
                    "{name} at {provider} is {why}, others provide it too: closing its tunnel"
                );
                (known.tunnel, known.lost_at) = (None, None);
                count -= 1;
                self.close_soon(tunnel);
            }
        }
        Ok(())
    }

    /// Closes tunnels that are idle, and forgets providers without one.
    pub(super) fn sweep(&self) {
        let open = self.node.tunnels();
        let mut count = self.tunnels().len();
        let mut all = self.lock();
        all.retain(|_, shared| {
            // Somebody has it, or is about to take it: it is in use.
            if Arc::strong_count(shared) > 1 {
                return true;
            }
            let mut known = shared.known();
            let Some(tunnel) = known.tunnel else {
                return known.doubted_at.is_some_and(|at| at.elapsed() < DOUBT);
            };
            let Some(info) = open.iter().find(|info| info.tunnel == tunnel) else { return false };
            if info.open > 0 {
                known.used_at = Some(Instant::now());
            }
            let is_spare = self.door.is_none() || count > 1;
            let idle = is_spare && known.used_at.is_none_or(|at| at.elapsed() >= TUNNEL_IDLE);
            if idle {
                count -= 1;
                self.close_soon(tunnel);
            }
            !idle
        });
    }
}

impl NodeHandle {
    /// Those of the providers of a name that links lead to, or that are this node, and that nothing is
    /// said against.
    pub(super) async fn sound(
        &self,
        name: &ServiceName,
        nodes: Vec<NodeId>,
    ) -> Result<Vec<NodeId>, RequestError> {
        let (name, me) = (name.clone(), self.me.node_id());
        let look = move |view: &mut View<'_>| {
            let up = |node: NodeId| {
                let health = view.engine.services().health(&name, node, view.now);
                health.is_none_or(|known| known.health == Health::Up)
            };
            let sound = |node: &NodeId| (*node == me || view.is_reached(*node)) && up(*node);
            nodes.into_iter().filter(sound).collect()
        };
        self.inspect(look).await
    }

    /// The providers of a name that this node would use now, as far as it has heard of them.
    pub(super) async fn known_providers(
        &self,
        name: &ServiceName,
    ) -> Result<Vec<Provider>, RequestError> {
        let name = name.clone();
        let look = move |view: &mut View<'_>| {
            view.engine.services().providers(&name, view.engine.graph(), view.now)
        };
        self.inspect(look).await
    }
}

#[cfg(test)]
mod tests;
