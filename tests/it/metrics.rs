//! What a monitoring system reads, by curl.

use meshwise::api::MetricsServer;
use meshwise::engine::types::ServiceName;
use meshwise::node::{Identity, TunnelOptions};

use crate::support::{config, eventually, listening, service, start};

async fn read(address: std::net::SocketAddr, path: &str) -> (bool, String) {
    let url = format!("http://{address}{path}");
    let curl = tokio::process::Command::new("curl").args(["-sf", "-m", "20", &url]).output().await;
    let output = curl.unwrap();
    (output.status.success(), String::from_utf8(output.stdout).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_monitoring_system_reads_what_a_node_counts_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let dir = |name: &str| folder.path().join(name);
    let first = start(&dir("first"), &Identity::generate(), config(vec![])).await;
    let node = start(&dir("node"), &Identity::generate(), config(listening(&first).await)).await;
    let server = MetricsServer::start(node.handle().clone(), "127.0.0.1:0").await.unwrap();
    let address = server.address();
    let neighbour = format!("{{neighbour=\"{}\"}}", first.handle().key().node_id());
    eventually("the link is measured", || async {
        read(address, "/metrics").await.1.contains("meshwise_link_round_trip_seconds{")
    })
    .await;
    let name: ServiceName = "a.local".parse().unwrap();
    first.handle().publish(service("a.local"), "127.0.0.1:9".parse().unwrap()).await.unwrap();
    eventually("the service is known", || async {
        node.handle().resolve(name.clone(), false).await.is_ok()
    })
    .await;
    let any = "127.0.0.1:0".parse().unwrap();
    let (tunnel, _) = node.handle().open_tunnel(name, any, TunnelOptions::default()).await.unwrap();
    let (_, text) = read(address, "/metrics").await;
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name} in {text}")).parse::<f64>().unwrap()
    };
    assert_eq!(value("meshwise_links_up"), 1.0);
    let rtt_s = value(&format!("meshwise_link_round_trip_seconds{neighbour}"));
    assert!((1e-6..1.0).contains(&rtt_s), "{rtt_s}");
    assert!(value(&format!("meshwise_link_datagrams_total{neighbour}")) > 0.0);
    let path = format!("{{tunnel=\"{tunnel}\",service=\"a.local\",path=\"{tunnel}\"}}");
    let rtt_s = value(&format!("meshwise_tunnel_round_trip_seconds{path}"));
    assert!((1e-6..10.0).contains(&rtt_s), "{rtt_s}");
    assert!(value(&format!("meshwise_tunnel_window_bytes{path}")) > 0.0);
    assert!(value("meshwise_control_messages_total{kind=\"sync\",way=\"heard\"}") > 0.0);
    assert!(
        text.contains("# TYPE meshwise_forwarded_bytes counter\n") && text.ends_with("# EOF\n")
    );
    assert!(!read(address, "/v1/status").await.0, "the control API stays on its socket");
    let taken = MetricsServer::start(node.handle().clone(), &address.to_string()).await;
    assert!(taken.is_err_and(|error| error.to_string().contains(&address.to_string())));
    drop(server);
    node.stop().await;
    first.stop().await;
}
