//! The local addresses of tunnels for TCP that may change their provider (`meshwise tunnel open` without
//! a fixed path or a reservation).
//!
//! While a single provider is known and its tunnel sound, a connection becomes a stream of that tunnel at
//! once: what the program says travels with the stream's first packet. When there are several, the
//! provider is chosen for each connection as the proxy does, and the program's first byte waits until
//! one has accepted. When the provider of the door's only tunnel is lost or down, a tunnel to another one
//! is opened ahead of the next connection.
//!
//! A door is known by the number of its first tunnel, and by that of each that it has now.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::entrance::{Connected, Entrance, Provider, SWEEP, WATCH};
use super::handle::{NodeHandle, RequestError};
use super::tunnels::TunnelOptions;
use crate::engine::types::{ServiceName, TunnelId};
use crate::net::tunnel::{STREAMS_MAX, TunnelError};

/// The doors of a node.
#[derive(Default)]
pub(super) struct Doors(Mutex<BTreeMap<TunnelId, Open>>);

struct Open {
    entrance: Arc<Entrance>,
    /// Ends it.
    _stop: DropGuard,
}

/// Closes all doors of a node when it is dropped: they hold handles of the node.
pub(super) struct CloseDoors(pub(super) Arc<Doors>);

impl Drop for CloseDoors {
    fn drop(&mut self) {
        self.0.close_all();
    }
}

/// A door that accepts no connections yet.
pub(super) struct Door {
    node: NodeHandle,
    name: ServiceName,
    listener: TcpListener,
    address: SocketAddr,
    entrance: Arc<Entrance>,
    /// The providers that would be used now.
    providers: Mutex<Vec<Provider>>,
}

impl Doors {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<TunnelId, Open>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the door with this tunnel away, or the one that had it first, unless the number is that of
    /// another tunnel now. Returns its tunnels.
    pub(super) fn close(&self, tunnel: TunnelId, is_open: bool) -> Option<Vec<TunnelId>> {
        let mut doors = self.lock();
        let has = |door: &Open| door.entrance.tunnels().contains(&tunnel);
        let found = doors.iter().find(|(_, door)| has(door)).map(|(number, _)| *number);
        let number = found.or((!is_open).then_some(tunnel))?;
        let door = doors.remove(&number)?;
        Some(door.entrance.tunnels())
    }

    /// Takes all of them away.
    pub(super) fn close_all(&self) {
        // Outside of the lock: what they hold may hold the last of this.
        let doors = std::mem::take(&mut *self.lock());
        drop(doors);
    }
}

impl Door {
    /// Takes the address.
    ///
    /// # Errors
    /// [`TunnelError::Listen`].
    pub(super) async fn bind(
        node: NodeHandle,
        name: ServiceName,
        address: SocketAddr,
        options: TunnelOptions,
    ) -> Result<Self, RequestError> {
        let wrong = |error| TunnelError::Listen { address, error };
        let listener = TcpListener::bind(address).await.map_err(wrong)?;
        let address = listener.local_addr().map_err(wrong)?;
        let entrance = Arc::new(Entrance::new(node.clone(), options, Some(address)));
        Ok(Self { node, name, listener, address, entrance, providers: Mutex::default() })
    }

    /// Opens its first tunnel.
    ///
    /// # Errors
    /// [`RequestError`].
    pub(super) async fn begin(&self, provider: Provider) -> Result<TunnelId, RequestError> {
        let tunnel = self.entrance.begin(&self.name, provider.clone()).await?;
        *self.providers() = vec![provider];
        Ok(tunnel)
    }

    /// Accepts connections from now on, until it is closed. Returns where.
    pub(super) fn open(self, number: TunnelId) -> SocketAddr {
        let (node, address) = (self.node.clone(), self.address);
        let stop = CancellationToken::new();
        let open = Open { entrance: self.entrance.clone(), _stop: stop.clone().drop_guard() };
        node.doors.lock().insert(number, open);
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = self.run() => {}
            }
        });
        address
    }

    fn providers(&self) -> std::sync::MutexGuard<'_, Vec<Provider>> {
        self.providers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run(self) {
        let door = Arc::new(self);
        tokio::select! {
            () = door.clone().accept() => {}
            () = door.watch() => {}
        }
    }

    async fn accept(self: Arc<Self>) {
        // As many as a tunnel carries; further ones wait in the system's queue.
        let places = Arc::new(Semaphore::new(STREAMS_MAX as usize));
        let mut connections = JoinSet::new();
        loop {
            let accepting = async {
                let place = places.clone().acquire_owned().await.ok();
                self.listener.accept().await.map(|(tcp, _)| (tcp, place))
            };
            tokio::select! {
                Some(_) = connections.join_next() => {}
                accepted = accepting => match accepted {
                    Ok((tcp, place)) => {
                        let door = self.clone();
                        connections.spawn(async move {
                            let _place = place;
                            door.carry(tcp).await;
                        });
                    }
                    // Out of file descriptors, mostly: others have to close some first.
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            }
        }
    }

    async fn carry(&self, mut tcp: TcpStream) {
        let _ = tcp.set_nodelay(true);
        let providers = self.providers().clone();
        if let [(key, _)] = &providers[..]
            && let Some(tunnel) = self.entrance.sound_tunnel(&self.name, key.node_id())
        {
            let carried = async { self.node.stream(tunnel).await?.carry(tcp).await };
            if let Err(why) = carried.await {
                self.entrance.failed(&self.name, key.node_id(), why);
            }
            return;
        }
        match self.entrance.connect_to(&self.name, providers).await {
            Ok(Connected::Tunnel(stream)) => {
                if let Err(why) = stream.carry(tcp).await {
                    self.node.tunnels.failed(&self.name, why.as_str());
                }
            }
            Ok(Connected::Here(mut target)) => {
                let _ = tokio::io::copy_bidirectional(&mut tcp, &mut target).await;
            }
            Err(refusal) => {
                self.node.tunnels.failed(&self.name, refusal.as_str());
                // An end would pass for an empty answer.
                let _ = tcp.set_zero_linger();
            }
        }
    }

    /// Follows who provides the service, until the node stops.
    async fn watch(&self) {
        let mut tick = tokio::time::interval(WATCH);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut swept_at = Instant::now();
        loop {
            tick.tick().await;
            let Ok(known) = self.node.known_providers(&self.name).await else { return };
            // Of a name that is gone the last ones are kept: they may come back.
            if !known.is_empty() {
                self.providers().clone_from(&known);
            }
            let sound = |(key, _): &Provider| {
                let node = key.node_id();
                *key == self.node.key() || self.entrance.sound_tunnel(&self.name, node).is_some()
            };
            let others = known.len() > 1 || !self.has_tunnel_to(&known);
            if others && !known.iter().any(sound) {
                let _ = self.entrance.open_to_any(&self.name, known).await;
            }
            if self.entrance.watch().await.is_err() {
                return;
            }
            if swept_at.elapsed() >= SWEEP {
                swept_at = Instant::now();
                self.entrance.sweep();
            }
        }
    }

    /// Whether it has a tunnel to one of these providers, sound or not.
    fn has_tunnel_to(&self, providers: &[Provider]) -> bool {
        providers.iter().any(|(key, _)| self.entrance.has_tunnel(&self.name, key.node_id()))
    }
}
