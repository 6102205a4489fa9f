//! The server side of the control API.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use axum::extract::{DefaultBodyLimit, Path as UrlPath, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use serde::Deserialize;
use tokio::net::UnixListener;

use super::explain::{Asked, Meant};
use super::metrics::metrics;
use super::names;
use super::network;
use super::publishing::Wanted;
use super::trouble;
use super::types::{
    ErrorBody, Explanation, OpenTunnel, Peer, Pinged, Publish, Published, Reach, Reachability,
    Reloaded, Resolved, Service, Status, Trace, Tunnel, route_ids,
};
use crate::config::{EmulatedLink, parse_target};
use crate::engine::event::CommandError;
use crate::engine::types::{NodeId, ServiceName, TunnelId};
use crate::node::{DATABASE, NodeHandle, RequestError, TunnelInfo, TunnelOptions, parse_peer_id};

/// Longest request (bytes): a service with all its metadata and its longest allow list.
const BODY_BYTES_MAX: usize = 64 * 1024;
/// Destinations that are looked at in one go: the node has other things to do in between.
const REACH_AT_ONCE: usize = 64;

/// Why the control API could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The socket cannot be made.
    #[error(
        "cannot open the control socket {path}: {error}; choose a --data-dir whose path is shorter than 90 characters and writable"
    )]
    Socket {
        /// Which.
        path: String,
        /// What the system said.
        error: std::io::Error,
    },
}

/// A running control API. The socket goes away with it.
pub struct Server {
    path: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    /// Serves on `<data-dir>/api.sock`. The node holds the data directory's lock, so a socket
    /// that is there was left by a node that is gone.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn start(handle: NodeHandle) -> Result<Self, ServerError> {
        let path = handle.data_dir().join(super::SOCKET);
        let listener = bind(&path)
            .map_err(|error| ServerError::Socket { path: path.display().to_string(), error })?;
        let task = tokio::spawn(async move {
            let _ = axum::serve(listener, router(handle)).await;
        });
        Ok(Self { path, task })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.path);
    }
}

fn bind(path: &Path) -> std::io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

fn router(handle: NodeHandle) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/reach", get(reachability))
        .route("/v1/peers", get(peers))
        .route("/v1/peers/{node}/ping", post(ping))
        .route("/v1/services", get(services).post(publish))
        .route("/v1/services/{name}", get(resolve).delete(withdraw))
        .route("/v1/services/{name}/delegations", post(names::delegate))
        .route("/v1/services/{name}/owner", post(names::trust))
        .route("/v1/tunnels", get(tunnels).post(open_tunnel))
        .route("/v1/tunnels/{id}", delete(close_tunnel))
        .route("/v1/routes", get(reach))
        .route("/v1/routes/{target}", get(routes))
        .route("/v1/routes/{target}/trace", get(trace))
        .route("/v1/model/reload", post(reload_model))
        .route("/v1/emulation", post(emulate))
        .route("/v1/network", get(network::about))
        .route("/v1/network/members", get(network::members))
        .route("/v1/network/invitations", post(network::invite))
        .route("/v1/network/certificates", post(network::certify))
        .route("/v1/network/revocations", post(network::revoke))
        .route("/v1/network/grants", post(network::grant))
        .route("/metrics", get(metrics))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(handle)
}

/// Any failure, as a status code and one line.
pub(super) struct Failure(StatusCode, String);

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0, Json(ErrorBody { error: self.1 })).into_response()
    }
}

impl From<RequestError> for Failure {
    fn from(error: RequestError) -> Self {
        let code = match &error {
            RequestError::Stopped => StatusCode::SERVICE_UNAVAILABLE,
            RequestError::TimedOut => StatusCode::GATEWAY_TIMEOUT,
            RequestError::Command(
                CommandError::UnknownName(_) | CommandError::NotPublishedHere(_),
            ) => StatusCode::NOT_FOUND,
            RequestError::Command(
                CommandError::Refused(_)
                | CommandError::PublishedHere(_)
                | CommandError::DelegatesToItself(_)
                | CommandError::NotIssuer
                | CommandError::RevokesItself
                | CommandError::NotLetIn(_),
            ) => StatusCode::CONFLICT,
            RequestError::Command(CommandError::Busy(_)) => StatusCode::TOO_MANY_REQUESTS,
            RequestError::Command(_) | RequestError::NoRoute(_) => StatusCode::BAD_GATEWAY,
            RequestError::Tunnel(_) | RequestError::BrokenPath { .. } => StatusCode::BAD_GATEWAY,
            RequestError::UnknownNode(_) | RequestError::UnknownKey(_) => StatusCode::NOT_FOUND,
            RequestError::Path(_)
            | RequestError::NoRelay(_)
            | RequestError::Paths(_)
            | RequestError::FixedPaths
            | RequestError::ReservedPaths
            | RequestError::Rate => StatusCode::BAD_REQUEST,
            RequestError::OwnService(_) | RequestError::Revoked => StatusCode::CONFLICT,
            RequestError::InsufficientBandwidth { .. } => StatusCode::CONFLICT,
            RequestError::ReservationUnanswered(_) => StatusCode::BAD_GATEWAY,
            RequestError::TooManyTunnels => StatusCode::TOO_MANY_REQUESTS,
        };
        Self(code, error.to_string())
    }
}

pub(super) fn wrong(error: impl std::fmt::Display) -> Failure {
    Failure(StatusCode::BAD_REQUEST, error.to_string())
}

pub(super) type Answer<T> = Result<Json<T>, Failure>;

async fn status(State(node): State<NodeHandle>) -> Answer<Status> {
    let socks = node.socks();
    Ok(Json(node.inspect(move |view| Status::of(view, socks)).await?))
}

async fn reachability(State(node): State<NodeHandle>) -> Answer<Reachability> {
    Ok(Json(node.inspect(Reachability::of).await?))
}

async fn peers(State(node): State<NodeHandle>) -> Answer<Vec<Peer>> {
    Ok(Json(node.inspect(Peer::list).await?))
}

async fn ping(State(node): State<NodeHandle>, UrlPath(target): UrlPath<String>) -> Answer<Pinged> {
    let target = parse_node(&target)?;
    if target == node.key().node_id() {
        return Err(Failure(StatusCode::CONFLICT, format!("{target} is this node itself")));
    }
    if !node.inspect(move |view| view.knows(target)).await? {
        return Err(RequestError::UnknownNode(target).into());
    }
    let (route, rtt_us) = node.ping(target).await?;
    let rtt_ms = rtt_us.map(|us| us as f64 / 1e3);
    Ok(Json(Pinged { node: target.to_string(), route: route_ids(&route), rtt_ms }))
}

async fn services(State(node): State<NodeHandle>) -> Answer<Vec<Service>> {
    let list = node.inspect(|view| {
        let services = view.engine.services().registry().list(view.now);
        let services = services.map(|(key, record)| Service::of(&key, record, view));
        let withheld = view.engine.services().withheld();
        services.chain(withheld.map(|(spec, _)| Service::withheld(spec, view))).collect::<Vec<_>>()
    });
    let mut list = list.await?;
    let me = node.key().node_id().to_string();
    for service in list.iter_mut().filter(|service| service.provider == me) {
        let name = service.name.parse().map_err(wrong)?;
        service.target = node.target(&name).map(|target| target.to_string());
    }
    Ok(Json(list))
}

async fn publish(State(node): State<NodeHandle>, Json(body): Json<Publish>) -> Answer<Published> {
    let name: ServiceName = body.name.parse().map_err(wrong)?;
    let before = node.published(&name);
    let (kind, target) = match (&body.to, &before) {
        (Some(to), _) => parse_target(to).map_err(wrong)?,
        (None, Some((spec, target))) => (spec.kind, *target),
        (None, None) => {
            let text = "is not published here yet; say with --to where its connections go";
            return Err(wrong(format!("{name} {text}")));
        }
    };
    let parse = |allow: Vec<String>| allow.iter().map(|text| parse_node(text)).collect();
    let delegation = body.delegation.as_deref().map(names::delegation).transpose()?;
    if let Some(health) = &body.check {
        health.fits(kind).map_err(wrong)?;
    }
    let wanted = Wanted {
        allowed: body.allow.map(parse).transpose()?,
        ttl_s: body.ttl_s,
        objective: body.objective,
        health: body.check,
        delegation,
    };
    let (service, mut kept) = wanted.beside(name.clone(), kind, before.map(|(spec, _)| spec));
    if body.to.is_none() {
        kept.push(format!("its connections go to {}://{target}", kind.as_str()));
    }
    let check = service.health.check.clone();
    let begun = Instant::now();
    let sequence = node.publish(service, target).await?;
    let took_ms = begun.elapsed().as_secs_f64() * 1e3;
    let trouble = trouble::of_target(kind, target, &check).await;
    Ok(Json(Published { name: name.to_string(), sequence, took_ms, kept, trouble }))
}

async fn withdraw(
    State(node): State<NodeHandle>,
    UrlPath(name): UrlPath<String>,
) -> Answer<serde_json::Value> {
    let name: ServiceName = name.parse().map_err(wrong)?;
    node.withdraw(name.clone()).await?;
    Ok(Json(serde_json::json!({ "withdrawn": name })))
}

#[derive(Deserialize)]
struct ResolveQuery {
    #[serde(default)]
    dht: bool,
}

async fn resolve(
    State(node): State<NodeHandle>,
    UrlPath(name): UrlPath<String>,
    Query(query): Query<ResolveQuery>,
) -> Answer<Resolved> {
    let name: ServiceName = name.parse().map_err(wrong)?;
    let begun = Instant::now();
    let (providers, from_gossip) = node.resolve(name, query.dht).await?;
    let took_ms = begun.elapsed().as_secs_f64() * 1e3;
    let look = move |view: &mut crate::node::View<'_>| {
        let of = |(key, record): &_| Service::of(key, record, view);
        providers.iter().map(of).collect()
    };
    Ok(Json(Resolved {
        providers: node.inspect(look).await?,
        source: if from_gossip { "gossip" } else { "dht" }.into(),
        took_ms,
    }))
}

async fn tunnels(State(node): State<NodeHandle>) -> Answer<Vec<Tunnel>> {
    let open = node.tunnels();
    let list = move |view: &mut crate::node::View<'_>| {
        open.iter().map(|info| Tunnel::of(info, view)).collect::<Vec<_>>()
    };
    Ok(Json(node.inspect(list).await?))
}

async fn open_tunnel(
    State(node): State<NodeHandle>,
    Json(body): Json<OpenTunnel>,
) -> Answer<Tunnel> {
    let service: ServiceName = body.service.parse().map_err(wrong)?;
    let listen: SocketAddr = body.listen.parse().map_err(|_| {
        wrong(format!("'{}' is not an address and a port; write 127.0.0.1:9000", body.listen))
    })?;
    let via = body
        .via
        .map(|relays| relays.iter().map(|text| parse_node(text)).collect::<Result<Vec<_>, _>>());
    let OpenTunnel { objective, paths, reserve, .. } = body;
    let options = TunnelOptions { via: via.transpose()?, objective, paths, reserve };
    let (tunnel, _) = node.open_tunnel(service, listen, options).await?;
    let info = node.tunnels().into_iter().find(|info| info.tunnel == tunnel);
    let info = info.ok_or(RequestError::Stopped)?;
    Ok(Json(node.inspect(move |view| Tunnel::of(&info, view)).await?))
}

async fn close_tunnel(
    State(node): State<NodeHandle>,
    UrlPath(id): UrlPath<u16>,
) -> Answer<serde_json::Value> {
    if node.close_tunnel(TunnelId(id)).await? {
        Ok(Json(serde_json::json!({ "closed": id })))
    } else {
        let text = format!("no tunnel {id} is open; see 'meshwise tunnel list'");
        Err(Failure(StatusCode::NOT_FOUND, text))
    }
}

async fn reach(State(node): State<NodeHandle>) -> Answer<Vec<Reach>> {
    let known = node.inspect(Reach::nodes).await?;
    let mut list = Vec::with_capacity(known.len());
    for some in known.chunks(REACH_AT_ONCE) {
        let some = some.to_vec();
        let look = move |view: &mut crate::node::View<'_>| {
            some.into_iter().map(|node| Reach::look(node, view)).collect::<Vec<_>>()
        };
        list.extend(node.inspect(look).await?);
    }
    Ok(Json(list))
}

/// The node that is meant by a name, a node id or a peer id: another one, which is known.
async fn destination_of(node: &NodeHandle, target: &str) -> Result<NodeId, Failure> {
    let destination = match parse_node(target) {
        Ok(node) => node,
        Err(_) => {
            let name: ServiceName = target.parse().map_err(wrong)?;
            let (providers, _) = node.resolve(name.clone(), false).await?;
            let first = providers.first().map(|(key, _)| key.node_id());
            first.ok_or_else(|| RequestError::from(CommandError::UnknownName(name)))?
        }
    };
    let me = node.key().node_id();
    if destination == me {
        let text = format!("{target} is on this node itself; no route leads there");
        return Err(Failure(StatusCode::CONFLICT, text));
    }
    let known = move |view: &mut crate::node::View<'_>| view.knows(destination);
    match node.inspect(known).await? {
        true => Ok(destination),
        false => Err(RequestError::UnknownNode(destination).into()),
    }
}

/// Which tunnel is meant; without a number, one to what was named.
#[derive(Deserialize)]
struct RouteQuery {
    tunnel: Option<u16>,
}

/// What is meant by a target, and by the number of a tunnel there.
async fn meant(node: &NodeHandle, target: &str, number: Option<u16>) -> Result<Meant, Failure> {
    let (name, far_end) = (target.parse::<ServiceName>().ok(), parse_node(target).ok());
    let leads_there = |info: &TunnelInfo| {
        Some(&info.service) == name.as_ref() || Some(info.provider.node_id()) == far_end
    };
    let open: Vec<TunnelInfo> = node.tunnels().into_iter().filter(leads_there).collect();
    let only = number.map(TunnelId);
    let of_tunnel = match only {
        Some(tunnel) => open.iter().find(|info| info.strands.contains(&tunnel)),
        None => open.first(),
    };
    let destination = match (of_tunnel, only) {
        (Some(info), _) => info.provider.node_id(),
        (None, None) => destination_of(node, target).await?,
        (None, Some(TunnelId(number))) => {
            let text =
                format!("no tunnel {number} to {target} is open; see 'meshwise tunnel list'");
            return Err(Failure(StatusCode::NOT_FOUND, text));
        }
    };
    Ok(Meant { destination, open: open.into_iter().map(|info| info.strands).collect(), only })
}

async fn trace(
    State(node): State<NodeHandle>,
    UrlPath(target): UrlPath<String>,
    Query(query): Query<RouteQuery>,
) -> Answer<Trace> {
    let meant = meant(&node, &target, query.tunnel).await?;
    let asked = node.inspect(move |view| Asked::look(&meant, view)).await?;
    let Some(route) = asked.route() else {
        let text = format!("no route to {target} is alive; see 'meshwise route list {target}'");
        return Err(Failure(StatusCode::CONFLICT, text));
    };
    let plane = node.inspect(|view| view.net.plane().clone()).await?;
    let nodes = plane.trace(&route).await;
    let measured = nodes.iter().map(|node| (node.probes, &node.round_trips[..]));
    Ok(Json(Trace::of(&route, measured)))
}

async fn routes(
    State(node): State<NodeHandle>,
    UrlPath(target): UrlPath<String>,
    Query(query): Query<RouteQuery>,
) -> Answer<Explanation> {
    let meant = meant(&node, &target, query.tunnel).await?;
    let asked = node.inspect(move |view| Asked::look(&meant, view)).await?;
    let store = node.data_dir().join(DATABASE);
    let answer = tokio::task::spawn_blocking(move || asked.answer(&store)).await;
    Ok(Json(answer.map_err(|_| RequestError::Stopped)?))
}

async fn reload_model(State(node): State<NodeHandle>) -> Answer<Reloaded> {
    match node.reload_model().await? {
        Ok(version) => Ok(Json(Reloaded { version })),
        Err(error) => Err(Failure(StatusCode::CONFLICT, error)),
    }
}

async fn emulate(
    State(node): State<NodeHandle>,
    Json(body): Json<EmulatedLink>,
) -> Answer<serde_json::Value> {
    let neighbour: NodeId = body.neighbour.parse().map_err(wrong)?;
    body.check().map_err(wrong)?;
    if node.emulate(neighbour, body).await? {
        Ok(Json(serde_json::json!({ "emulating": neighbour.to_string() })))
    } else {
        let text = "this node does not emulate links; start it with [emulation] enabled = true";
        Err(Failure(StatusCode::CONFLICT, text.into()))
    }
}

/// A node id or a peer id.
fn parse_node(text: &str) -> Result<NodeId, Failure> {
    if let Ok(node) = text.parse() {
        return Ok(node);
    }
    parse_peer_id(text).map(|key| key.node_id()).map_err(|_| {
        wrong(format!("'{text}' is neither a node id nor a peer id; see 'meshwise peer list'"))
    })
}
