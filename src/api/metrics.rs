//! What a node counts and measures, as OpenMetrics text: for Prometheus and whatever else reads that.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Metric, Registry, Unit};

use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::server::Failure;
use super::types::{EndToEnd, Peer, Status, Told, Tunnel};
use crate::node::{NodeHandle, View};

/// Connections that are served at one time; others wait.
const CONNECTIONS_MAX: usize = 8;
/// How long one may take, its request and the answer.
const CONNECTION_TIME: Duration = Duration::from_secs(10);

/// The address for metrics cannot be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot serve metrics on {address}: {error}; set metrics in the section [entry] to another address, or to \"\" for none"
)]
pub struct MetricsError {
    address: String,
    error: std::io::Error,
}

/// Serves `/metrics`, and nothing else, to whoever can connect to this address, until it is dropped.
pub struct MetricsServer {
    address: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl MetricsServer {
    /// Binds `address`.
    ///
    /// # Errors
    /// [`MetricsError`].
    pub async fn start(node: NodeHandle, address: &str) -> Result<Self, MetricsError> {
        let wrong = |error| MetricsError { address: address.to_owned(), error };
        let listener = TcpListener::bind(address).await.map_err(wrong)?;
        let bound = listener.local_addr().map_err(wrong)?;
        if !bound.ip().is_loopback() {
            tracing::warn!("whoever can connect to {bound} reads the metrics of this node");
        }
        let router = Router::new().route("/metrics", get(metrics)).with_state(node);
        Ok(Self { address: bound, task: tokio::spawn(serve(listener, router)) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: TcpListener, router: Router) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    while let Ok(place) = places.clone().acquire_owned().await {
        while connections.try_join_next().is_some() {}
        let Ok((stream, _)) = listener.accept().await else {
            // As when there are too many open files.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let service = TowerToHyperService::new(router.clone());
        connections.spawn(async move {
            let mut server = http1::Builder::new();
            let served = server.keep_alive(false).serve_connection(TokioIo::new(stream), service);
            let _ = tokio::time::timeout(CONNECTION_TIME, served).await;
            drop(place);
        });
    }
}

/// `GET /metrics`
pub(super) async fn metrics(State(node): State<NodeHandle>) -> Result<Figures, Failure> {
    let (socks, open) = (node.socks(), node.tunnels());
    let look = move |view: &mut View<'_>| Figures {
        status: Status::of(view, socks),
        peers: Peer::list(view),
        tunnels: open.iter().map(|info| Tunnel::of(info, view)).collect(),
    };
    Ok(node.inspect(look).await?)
}

/// Labels and a value, of each series of a metric.
type Series<T> = Vec<(Vec<(&'static str, String)>, T)>;

/// Numbers that go up and down.
#[derive(Debug)]
struct Gauges(Series<f64>);

/// Numbers that only grow while the node runs.
#[derive(Debug)]
struct Counters(Series<u64>);

impl EncodeMetric for Gauges {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(labels, value)| match &labels[..] {
            [] => encoder.encode_gauge(value),
            _ => encoder.encode_family(labels)?.encode_gauge(value),
        })
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Gauge
    }
}

impl EncodeMetric for Counters {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(labels, value)| match &labels[..] {
            [] => encoder.encode_counter::<NoLabelSet, _, u64>(value, None),
            _ => encoder.encode_family(labels)?.encode_counter::<NoLabelSet, _, u64>(value, None),
        })
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Counter
    }
}

/// What is told of a node at one moment.
pub(super) struct Figures {
    status: Status,
    peers: Vec<Peer>,
    tunnels: Vec<Tunnel>,
}

impl IntoResponse for Figures {
    fn into_response(self) -> Response {
        let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        ([(CONTENT_TYPE, kind)], self.text()).into_response()
    }
}

fn one<T>(value: T) -> Series<T> {
    vec![(Vec::new(), value)]
}

impl Figures {
    fn text(&self) -> String {
        let mut registry = Registry::with_prefix("meshwise");
        self.node(&mut registry);
        self.links(&mut registry);
        self.tunnels(&mut registry);
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &registry);
        text
    }

    fn node(&self, registry: &mut Registry) {
        let status = &self.status;
        let about =
            [("node", &status.node), ("version", &status.version), ("decides", &status.model)];
        let about = about.map(|(label, value)| (label, value.clone())).to_vec();
        gauge(registry, "node", "What it is and what decides; always 1", vec![(about, 1.0)]);
        seconds(registry, "uptime", "Time since the start", one(status.uptime_s));
        gauge(registry, "peers", "Connected peers", one(status.peers as f64));
        gauge(registry, "links_up", "Links that carry traffic", one(status.links_up as f64));
        let known = status.nodes_known as f64;
        gauge(registry, "nodes_known", "Nodes whose advertisements are known", one(known));
        let quantiles = status.route_calculation_us;
        let took = [("0.5", quantiles.p50), ("0.99", quantiles.p99)];
        let took = took.into_iter().filter_map(|(quantile, us)| {
            Some((vec![("quantile", quantile.to_owned())], us? / 1e6))
        });
        seconds(registry, "route_calculation", "Time for a route decision", took.collect());
        let learning = &status.learning;
        let live =
            [("champion", &learning.champion_live), ("challenger", &learning.challenger_live)];
        let errors = live.into_iter().filter_map(|(role, live)| Some((role, (*live)?)));
        let errors = errors.flat_map(|(role, live)| {
            [("model", live.model_ln), ("moving-average", live.moving_average_ln)]
                .map(|(by, ln)| (vec![("role", role.to_owned()), ("by", by.to_owned())], ln))
        });
        let help =
            "Mean absolute error of forecasts since the model decides or is in shadow, ln(ms)";
        gauge(registry, "forecast_error_ln", help, errors.collect());
        let failures = status.model_failures;
        counter(registry, "model_failures", "Forecasts of the model that failed", one(failures));
        let forwarded = status.forwarded;
        let help = "Datagrams passed on for others";
        counter(registry, "forwarded_datagrams", help, one(forwarded.datagrams));
        counter(registry, "forwarded_bytes", "Bytes passed on for others", one(forwarded.bytes));
        let control = &status.control;
        let told = [
            ("gossip", "heard", control.gossip_heard),
            ("gossip", "said", control.gossip_said),
            ("sync", "heard", control.sync_heard),
            ("sync", "said", control.sync_said),
        ];
        let told = |value: fn(Told) -> u64| {
            let labelled = told.map(|(kind, way, told)| {
                (vec![("kind", kind.to_owned()), ("way", way.to_owned())], value(told))
            });
            labelled.to_vec()
        };
        counter(registry, "control_messages", "Control messages", told(|told| told.messages));
        counter(registry, "control_bytes", "Bytes of control messages", told(|told| told.bytes));
        let dropped = status.dropped.iter();
        let dropped = dropped.map(|(why, count)| (vec![("reason", why.clone())], *count)).collect();
        counter(registry, "dropped", "Messages and datagrams dropped", dropped);
        let help = "Rows that did not fit the queue to the database";
        counter(registry, "samples_dropped", help, one(status.samples_dropped));
    }

    fn links(&self, registry: &mut Registry) {
        let quality = |value: fn(&crate::engine::measure::LinkQuality) -> f64| {
            let known = self.peers.iter().filter_map(|peer| Some((peer, peer.quality.as_ref()?)));
            known.map(|(peer, quality)| (of(&peer.node), value(quality))).collect::<Vec<_>>()
        };
        let of_link = "link_round_trip";
        seconds(registry, of_link, "Smoothed round-trip time", quality(|q| q.rtt_ms / 1e3));
        seconds(registry, "link_jitter", "Smoothed jitter", quality(|q| q.jitter_ms / 1e3));
        gauge(registry, "link_loss", "Share of probes lost, 0 to 1", quality(|q| q.loss));
        let links = &self.status.links;
        let waits = links.iter().filter_map(|l| Some((of(&l.neighbour), l.queue_ms.p95? / 1e3)));
        let help = "95th percentile of the wait in the queue of a link, of 10 to 20 s";
        seconds(registry, "link_queue_p95", help, waits.collect());
        let count = |value: fn(&super::types::Link) -> u64| {
            links.iter().map(|link| (of(&link.neighbour), value(link))).collect::<Vec<_>>()
        };
        let help = "Datagrams sent since the link is up";
        counter(registry, "link_datagrams", help, count(|link| link.sent));
        counter(registry, "link_marked", "Datagrams marked as they waited", count(|l| l.marked));
        counter(
            registry,
            "link_dropped",
            "Datagrams dropped as too much waited",
            count(|l| l.dropped),
        );
    }

    fn tunnels(&self, registry: &mut Registry) {
        let labels = |tunnel: &Tunnel| {
            vec![("tunnel", tunnel.tunnel.to_string()), ("service", tunnel.service.clone())]
        };
        let gauges = |value: fn(&Tunnel) -> f64| {
            self.tunnels.iter().map(|tunnel| (labels(tunnel), value(tunnel))).collect::<Vec<_>>()
        };
        let counts = |value: fn(&Tunnel) -> u64| {
            self.tunnels.iter().map(|tunnel| (labels(tunnel), value(tunnel))).collect::<Vec<_>>()
        };
        let help = "Whether any route to the provider is alive, 0 or 1";
        gauge(registry, "tunnel_reachable", help, gauges(|t| f64::from(u8::from(t.reachable))));
        let help = "Connections and UDP flows that are open";
        gauge(registry, "tunnel_connections", help, gauges(|t| t.open_connections as f64));
        let help = "Changes of the route, the first choice included";
        counter(registry, "tunnel_route_changes", help, counts(|t| t.route_changes.into()));
        counter(registry, "tunnel_sent_bytes", "Bytes sent", counts(|t| t.sent_bytes));
        counter(registry, "tunnel_received_bytes", "Bytes received", counts(|t| t.received_bytes));
        let paths = |value: fn(&EndToEnd) -> f64| {
            let of = |tunnel| {
                let path = move |end: &EndToEnd| {
                    let path = ("path", end.tunnel.to_string());
                    (labels(tunnel).into_iter().chain([path]).collect(), value(end))
                };
                tunnel.ends.iter().map(path)
            };
            self.tunnels.iter().flat_map(of).collect::<Vec<(Vec<_>, f64)>>()
        };
        let help = "RTT from end to end as QUIC smooths it, queues and both ends included";
        seconds(registry, "tunnel_round_trip", help, paths(|end| end.rtt_ms / 1e3));
        let help = "Bytes that the congestion controller lets be under way";
        gauge(registry, "tunnel_window_bytes", help, paths(|end| end.window_bytes as f64));
    }
}

fn of(neighbour: &str) -> Vec<(&'static str, String)> {
    vec![("neighbour", neighbour.to_owned())]
}

fn gauge(registry: &mut Registry, name: &str, help: &str, series: Series<f64>) {
    add(registry, name, help, None, Gauges(series));
}

fn seconds(registry: &mut Registry, name: &str, help: &str, series: Series<f64>) {
    add(registry, name, help, Some(Unit::Seconds), Gauges(series));
}

fn counter(registry: &mut Registry, name: &str, help: &str, series: Series<u64>) {
    add(registry, name, help, None, Counters(series));
}

fn add(registry: &mut Registry, name: &str, help: &str, unit: Option<Unit>, metric: impl Metric) {
    match unit {
        Some(unit) => registry.register_with_unit(name, help, unit, metric),
        None => registry.register(name, help, metric),
    }
}
