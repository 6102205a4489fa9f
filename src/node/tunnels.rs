//! How tunnels are opened and closed: resolve the name, bind a route for each strand, connect.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::doors::Door;
use super::handle::{NodeHandle, Request, RequestError};
use super::providers::{Standing, order};
use super::{TunnelInfo, View};
use crate::config::PATHS_MAX;
use crate::engine::event::CommandError;
use crate::engine::overlay::{Objective, ServiceKind, ServiceRecord};
use crate::engine::route::{Reservation, ReservationState};
use crate::engine::traffic::message::RATE_MAX;
use crate::engine::types::{NodeId, PublicKey, Route, ServiceName, TunnelId};
use crate::net::tunnel::{GOODBYE, NewTunnel, StreamError, TunnelStream};

/// How long a tunnel waits for a first route: a new neighbour's advertisement is on its way.
const ROUTE_TIMEOUT: Duration = Duration::from_secs(5);
/// The same for a fixed path: one of its links may be new, and no other route is to be found.
const PATH_TIMEOUT: Duration = Duration::from_secs(2);
/// How long it waits for its reservation: the data plane gives up sooner, also on all of
/// [`RESERVE_TRIES`](crate::engine::route::router::RESERVE_TRIES) routes.
const RESERVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Paths of a tunnel for much data that does not say how many.
const THROUGHPUT_PATHS: usize = 2;

/// How a tunnel is to travel; by default as its service wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TunnelOptions {
    /// The relays of a fixed path; otherwise routes are chosen.
    pub via: Option<Vec<NodeId>>,
    /// What it wants from its routes, instead of what the service's record says.
    pub objective: Option<Objective>,
    /// How many routes it uses at one time, 1 to [`PATHS_MAX`], or as many as there are; by default 1
    /// over a fixed path, 2 or more for throughput, else what the settings say.
    pub paths: Option<usize>,
    /// Bandwidth to be set aside for it on its route, in each direction (bytes/s), 1 to
    /// [`RATE_MAX`]; such a tunnel has one path.
    pub reserve: Option<u64>,
}

impl TunnelOptions {
    fn paths(&self, objective: Objective, default: usize) -> Result<usize, RequestError> {
        match (self.paths, &self.via) {
            _ if self.reserve.is_some_and(|rate| !(1..=RATE_MAX).contains(&rate)) => {
                Err(RequestError::Rate)
            }
            (Some(paths), _) if !(1..=PATHS_MAX).contains(&paths) => {
                Err(RequestError::Paths(paths))
            }
            (Some(2..), Some(_)) => Err(RequestError::FixedPaths),
            (Some(2..), _) if self.reserve.is_some() => Err(RequestError::ReservedPaths),
            (Some(paths), _) => Ok(paths),
            (None, Some(_)) => Ok(1),
            (None, None) if self.reserve.is_some() => Ok(1),
            (None, None) if objective == Objective::Throughput => Ok(default.max(THROUGHPUT_PATHS)),
            (None, None) => Ok(default),
        }
    }
}

/// Where a tunnel's connections come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum At {
    /// Accepted by the tunnel itself on this address.
    Listen(SocketAddr),
    /// From a door of the node on this address.
    Door(SocketAddr),
    /// The node's proxy.
    Nowhere,
}

/// Strands that are bound but not open yet. Unbinds them when opening fails, or when whoever asked
/// goes away.
struct Bound {
    strands: Vec<TunnelId>,
    requests: mpsc::Sender<Request>,
}

impl Drop for Bound {
    fn drop(&mut self) {
        let strands = std::mem::take(&mut self.strands);
        if !strands.is_empty() {
            let requests = self.requests.clone();
            tokio::spawn(async move {
                for strand in strands {
                    let _ = requests.send(Request::Unbind(strand)).await;
                }
            });
        }
    }
}

impl NodeHandle {
    /// Opens a tunnel to a service and accepts its connections on `listen`. Of several providers it
    /// takes the first that can be reached. A tunnel for UDP, over a fixed path or with a reservation
    /// stays with it; of any other each connection takes the provider that is best then (`doors`).
    ///
    /// # Errors
    /// [`RequestError`]; nothing stays open.
    pub async fn open_tunnel(
        &self,
        name: ServiceName,
        listen: SocketAddr,
        options: TunnelOptions,
    ) -> Result<(TunnelId, SocketAddr), RequestError> {
        let is_out = |view: &mut View<'_>| {
            let engine = &view.engine;
            engine.membership().roster().is_revoked(&engine.key())
        };
        if self.inspect(is_out).await? {
            return Err(RequestError::Revoked);
        }
        let (providers, _) = self.resolve(name.clone(), false).await?;
        if providers.iter().any(|(provider, _)| *provider == self.me) {
            return Err(RequestError::OwnService(name));
        }
        let nodes = providers.iter().map(|(provider, _)| provider.node_id()).collect();
        let sound = self.sound(&name, nodes).await?;
        let is_udp = providers.iter().all(|(_, record)| record.kind == ServiceKind::Udp);
        let stays = is_udp || options.via.is_some() || options.reserve.is_some();
        let known = providers.into_iter().map(|provider| {
            let is_sound = sound.contains(&provider.0.node_id());
            let standing = if is_sound { Standing::Fresh } else { Standing::Doubtful };
            (provider, standing, None)
        });
        let providers = order(known.collect());
        let door = match stays {
            true => None,
            false => Some(Door::bind(self.clone(), name.clone(), listen, options.clone()).await?),
        };
        let mut failure = None;
        for provider in providers {
            let opened = match &door {
                Some(door) => door.begin(provider).await.map(|tunnel| (tunnel, None)),
                None => {
                    self.open_to(name.clone(), provider, At::Listen(listen), options.clone()).await
                }
            };
            match opened {
                Ok((tunnel, address)) => {
                    let address = door.map_or(address, |door| Some(door.open(tunnel)));
                    return Ok((tunnel, address.unwrap_or(listen)));
                }
                Err(error) if error.is_of_the_provider() => {
                    failure.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        Err(failure.unwrap_or(CommandError::UnknownName(name).into()))
    }

    /// Opens a tunnel to one provider of a service. Returns where its connections are accepted.
    pub(super) async fn open_to(
        &self,
        name: ServiceName,
        (provider, record): (PublicKey, ServiceRecord),
        at: At,
        options: TunnelOptions,
    ) -> Result<(TunnelId, Option<SocketAddr>), RequestError> {
        let destination = provider.node_id();
        let objective = options.objective.unwrap_or(record.objective);
        let paths = options.paths(objective, self.paths)?;
        let reserve = options.reserve;
        let forced = match options.via {
            Some(relays) => Some(self.fixed_path(relays, destination).await?),
            None => None,
        };
        let mut bound = Bound { strands: Vec::new(), requests: self.requests.clone() };
        for _ in 0..paths {
            let (reply, answer) = oneshot::channel();
            let beside = bound.strands.first().copied();
            let forced = forced.clone();
            let bind = Request::Bind { destination, forced, objective, beside, reserve, reply };
            self.send(bind).await?;
            let strand = answer.await.map_err(|_| RequestError::Stopped)?;
            bound.strands.push(strand.ok_or(RequestError::TooManyTunnels)?);
        }
        let tunnel = bound.strands[0];
        self.wait_for_route(tunnel, destination, forced).await?;
        let strands = bound.strands.clone();
        let (listen, door) = match at {
            At::Listen(address) => (Some(address), None),
            At::Door(address) => (None, Some(address)),
            At::Nowhere => (None, None),
        };
        let new = NewTunnel { strands, provider, service: name, kind: record.kind, listen, door };
        let listen = self.tunnels.open(new).await?;
        bound.strands.clear();
        if reserve.is_some()
            && let Err(error) = self.wait_for_reservation(tunnel, destination).await
        {
            self.close_strands(tunnel).await?;
            return Err(error);
        }
        Ok((tunnel, listen))
    }

    /// The two ends have shaken hands: the nodes of the route are being asked.
    async fn wait_for_reservation(&self, tunnel: TunnelId, to: NodeId) -> Result<(), RequestError> {
        let deadline = tokio::time::Instant::now() + RESERVE_TIMEOUT;
        loop {
            let state = self.inspect(move |view| view.engine.reservation(tunnel)).await?;
            let Some(Reservation { rate, state }) = state else {
                return Err(RequestError::Stopped);
            };
            match state {
                ReservationState::Granted => return Ok(()),
                ReservationState::Refused(Some(bottleneck)) => {
                    return Err(RequestError::InsufficientBandwidth { to, rate, bottleneck });
                }
                ReservationState::Pending if tokio::time::Instant::now() < deadline => {}
                ReservationState::Pending | ReservationState::Refused(None) => {
                    return Err(RequestError::ReservationUnanswered(to));
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn fixed_path(&self, relays: Vec<NodeId>, to: NodeId) -> Result<Route, RequestError> {
        for relay in &relays {
            let relay = *relay;
            if relay == to || relay == self.me.node_id() {
                return Err(RequestError::NoRelay(relay));
            }
            if !self.inspect(move |view| view.knows(relay)).await? {
                return Err(RequestError::UnknownNode(relay));
            }
        }
        let nodes = std::iter::once(self.me.node_id()).chain(relays).chain([to]);
        Ok(Route::new(nodes.collect::<Vec<_>>())?)
    }

    async fn wait_for_route(
        &self,
        tunnel: TunnelId,
        to: NodeId,
        forced: Option<Route>,
    ) -> Result<(), RequestError> {
        let timeout = if forced.is_some() { PATH_TIMEOUT } else { ROUTE_TIMEOUT };
        let deadline = tokio::time::Instant::now() + timeout;
        loop {
            let routed = move |view: &mut View<'_>| {
                let mut tunnels = view.engine.tunnels();
                tunnels.any(|(id, destination)| id == tunnel && destination.current.is_some())
            };
            if self.inspect(routed).await? {
                return Ok(());
            }
            if tokio::time::Instant::now() >= deadline {
                let Some(path) = forced else { return Err(RequestError::NoRoute(to)) };
                let broken = move |view: &mut View<'_>| {
                    path.links().find(|(from, to)| !view.engine.graph().is_link(*from, *to))
                };
                let broken = self.inspect(broken).await?;
                let broken = broken.map(|(from, to)| RequestError::BrokenPath { from, to });
                return Err(broken.unwrap_or(RequestError::NoRoute(to)));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Closes a tunnel, with its local address. Returns whether it was open.
    ///
    /// # Errors
    /// [`RequestError::Stopped`].
    pub async fn close_tunnel(&self, tunnel: TunnelId) -> Result<bool, RequestError> {
        let is_open = self.tunnels().iter().any(|info| info.tunnel == tunnel);
        let Some(tunnels) = self.doors.close(tunnel, is_open) else {
            return self.close_strands(tunnel).await;
        };
        let closing = tunnels.into_iter().map(|tunnel| self.close_strands(tunnel));
        futures::future::try_join_all(closing).await?;
        Ok(true)
    }

    /// Closes the connections of a tunnel. Returns whether it was open.
    ///
    /// # Errors
    /// [`RequestError::Stopped`].
    pub(super) async fn close_strands(&self, tunnel: TunnelId) -> Result<bool, RequestError> {
        let Some(strands) = self.tunnels.close_one(tunnel) else { return Ok(false) };
        // The good-bye still needs the route.
        tokio::time::sleep(GOODBYE).await;
        for strand in strands {
            self.send(Request::Unbind(strand)).await?;
        }
        Ok(true)
    }

    /// The tunnels of this node.
    pub fn tunnels(&self) -> Vec<TunnelInfo> {
        self.tunnels.list()
    }

    /// Opens a stream through a tunnel.
    ///
    /// # Errors
    /// [`StreamError`].
    pub(super) async fn stream(&self, tunnel: TunnelId) -> Result<TunnelStream, StreamError> {
        self.tunnels.stream(tunnel).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_many_paths_a_tunnel_has() {
        let paths = |via: bool, paths, objective, default| {
            let via = via.then(Vec::new);
            let options = TunnelOptions { via, paths, ..TunnelOptions::default() };
            options.paths(objective, default).map_err(|error| error.to_string())
        };
        let (balanced, throughput) = (Objective::Balanced, Objective::Throughput);
        assert_eq!(paths(false, None, balanced, 1), Ok(1));
        assert_eq!(paths(false, None, balanced, 3), Ok(3), "the settings");
        assert_eq!(paths(false, None, throughput, 1), Ok(2));
        assert_eq!(paths(false, None, throughput, 4), Ok(4));
        assert_eq!(paths(false, Some(1), throughput, 4), Ok(1), "what was asked for");
        assert_eq!(paths(true, None, throughput, 4), Ok(1), "a fixed path is one");
        assert_eq!(paths(true, Some(1), balanced, 1), Ok(1));
        assert!(paths(true, Some(2), balanced, 1).unwrap_err().contains("--via"));
        let reserved = |paths, reserve| {
            let options = TunnelOptions { paths, reserve: Some(reserve), ..Default::default() };
            options.paths(throughput, 4).map_err(|error| error.to_string())
        };
        assert_eq!((reserved(None, 1), reserved(Some(1), RATE_MAX)), (Ok(1), Ok(1)));
        assert!(reserved(Some(2), 1).unwrap_err().contains("--reserve"));
        for wrong in [0, RATE_MAX + 1] {
            assert!(reserved(None, wrong).unwrap_err().contains("Gbit/s"));
        }
        for wrong in [0, PATHS_MAX + 1] {
            let error = paths(false, Some(wrong), balanced, 1).unwrap_err();
            assert!(error.contains(&wrong.to_string()), "{error}");
        }
    }
}
