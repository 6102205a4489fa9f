//! `meshwise network`

use std::io::{IsTerminal, Read};
use std::path::Path;
use std::time::Duration;

use super::{Context, output};
use crate::api::ClientError;
use crate::api::types::{
    Certified, Certify, Grant, Granted, Invite, Invited, Members, Network, Revoke, Revoked,
};
use crate::engine::overlay::issuer::INVITATION_LIFETIME_MAX;
use crate::engine::overlay::token::{TOKEN_BYTES_MAX, Token, TokenError};
use crate::node::network::{DEFAULT_NAME, Network as Files};
use crate::node::{Joined, create_network, join_network, peer_id_text};

/// Found a network, let nodes in, put nodes out.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// Found a network. Its root key stays in the data directory: only this node lets others in.
    Create {
        /// A name for people: lower-case letters, digits and hyphens.
        #[arg(long, default_value = DEFAULT_NAME)]
        name: String,
    },
    /// Invite nodes: prints a token, which is a secret, to be given to `network join`.
    Invite {
        /// How many nodes it lets in.
        #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000))]
        uses: u32,
        /// How long it lasts, such as 30m, 24h or 7days; at most 30 days.
        #[arg(long, value_name = "TIME", default_value = "24h", value_parser = lifetime)]
        expires: Duration,
        /// Where this node can be reached besides where it listens, for example through a router;
        /// may be given several times.
        #[arg(long, value_name = "MULTIADDRESS")]
        address: Vec<String>,
    },
    /// Join a network, while no node runs on the data directory.
    Join {
        /// What `network invite` or `network certify` has printed; `-` reads it from standard input.
        token: String,
    },
    /// List the members: all on the node with the root key, elsewhere those that were seen.
    Members,
    /// Let a node in whose peer id is known: prints a token for it.
    Certify {
        /// Its peer id; `network show` prints it there.
        peer: String,
    },
    /// Put a node out, for good.
    Revoke {
        /// Its peer id, or its node id from `network members`.
        peer: String,
    },
    /// Give the name of a service to an owner, whoever used it first.
    Grant {
        /// The name, for example byronwade.local.
        name: String,
        /// Peer id of the owner, or its node id from `network members`.
        peer: String,
    },
    /// Show which network this node belongs to, and until when.
    Show,
}

pub(super) async fn run(verb: Verb, context: &Context) -> anyhow::Result<()> {
    match verb {
        Verb::Create { name } => create(&name, context),
        Verb::Invite { uses, expires, address } => {
            let body = Invite { uses, expires_s: expires.as_secs(), addresses: address };
            let invited: Invited = context.client().post("/v1/network/invitations", &body).await?;
            if context.json {
                return output::json(&invited);
            }
            output::print(&invited.token)?;
            invitation(&invited);
            Ok(())
        }
        Verb::Join { token } => {
            let joined = join(&token, &context.data_dir).await?;
            if context.json {
                return output::json(&about_joined(&joined));
            }
            output::print(&said(&joined))?;
            eprintln!("start it with 'meshwise node{}'", context.where_flag());
            Ok(())
        }
        Verb::Members => members(context).await,
        Verb::Certify { peer } => {
            let body = Certify { peer };
            let certified: Certified =
                context.client().post("/v1/network/certificates", &body).await?;
            if context.json {
                return output::json(&certified);
            }
            output::print(&certified.token)?;
            eprintln!(
                "for {} only, until {}; there, while no node runs, type:\n  meshwise network join {}",
                certified.peer_id,
                output::time(certified.expires_us),
                certified.token
            );
            Ok(())
        }
        Verb::Revoke { peer } => {
            let body = Revoke { peer };
            let revoked: Revoked = context.client().post("/v1/network/revocations", &body).await?;
            if context.json {
                return output::json(&revoked);
            }
            output::print(&format!("revoked {}, for good", revoked.node))
        }
        Verb::Grant { name, peer } => {
            let body = Grant { name, peer };
            let granted: Granted = context.client().post("/v1/network/grants", &body).await?;
            if context.json {
                return output::json(&granted);
            }
            output::print(&format!("{} belongs to {} from now on", granted.name, granted.node))
        }
        Verb::Show => show(context).await,
    }
}

/// Joins by a token, or by the one on standard input when it is `-`.
pub(super) async fn join(token: &str, data_dir: &Path) -> anyhow::Result<Joined> {
    let token: Token = if token == "-" { from_input()?.parse()? } else { token.parse()? };
    Ok(join_network(data_dir, &token).await?)
}

/// What joining came to, in words.
pub(super) fn said(joined: &Joined) -> String {
    let (name, root) = (&joined.state.name, joined.state.root.node_id());
    match (joined.already, &joined.set_aside) {
        (true, _) => format!("this node belongs to the network '{name}' (root {root}) already"),
        (_, None) => format!("joined the network '{name}' (root {root})"),
        (_, Some(own)) => format!(
            "joined the network '{name}' (root {root}); the files of its own network '{own}' were renamed"
        ),
    }
}

fn about_joined(joined: &Joined) -> serde_json::Value {
    serde_json::json!({
        "network": joined.state.name,
        "root": joined.state.root.node_id().to_string(),
        "already": joined.already,
        "set_aside": joined.set_aside,
        "expires_us": joined.state.credential.expires_at.as_micros(),
    })
}

fn from_input() -> anyhow::Result<String> {
    let mut text = String::new();
    let longest = TOKEN_BYTES_MAX as u64 + 64;
    let read = std::io::stdin().lock().take(longest).read_to_string(&mut text);
    read.map_err(|_| TokenError::Kind)?;
    if text.trim().is_empty() {
        anyhow::bail!(
            "there is no token on standard input; is the file empty that 'meshwise network invite' was \
             to write? Run that again, on a node that is in the network"
        );
    }
    Ok(text)
}

fn create(name: &str, context: &Context) -> anyhow::Result<()> {
    let (identity, network) = create_network(&context.data_dir, name)?;
    let root = network.state.root.node_id().to_string();
    if context.json {
        let (node, peer_id) = (identity.node_id().to_string(), identity.public_key());
        return output::json(&serde_json::json!({
            "network": name, "root": root, "node": node, "peer_id": peer_id_text(&peer_id),
        }));
    }
    output::print(&format!("founded the network '{name}' (root {root})"))?;
    let flag = context.where_flag();
    eprintln!(
        "start it with 'meshwise node{flag}', then let others in with 'meshwise network invite{flag}'"
    );
    Ok(())
}

/// What to do with a token.
fn invitation(invited: &Invited) {
    let nodes =
        if invited.uses == 1 { "one node".into() } else { format!("{} nodes", invited.uses) };
    let until = output::time(invited.expires_us);
    // What is written elsewhere is not to be read on the screen too.
    let token = if std::io::stdout().is_terminal() { &invited.token } else { "- < TOKEN_FILE" };
    eprintln!("lets in {nodes} until {until}; at the other node type:");
    eprintln!("  meshwise node --join {token}");
    let is_near = |address: &String| address.starts_with("/ip4/127.") || address.contains("/::1/");
    if invited.addresses.iter().all(is_near) {
        eprintln!("this node listens on loopback only: that works on this machine alone");
    }
}

async fn members(context: &Context) -> anyhow::Result<()> {
    let found: Members = context.client().get("/v1/network/members").await?;
    if context.json {
        return output::json(&found);
    }
    let columns = ["node", "peer id", "since", "expires", "connected", "revoked"];
    let mut table = output::table(&columns);
    let time = |us: Option<u64>| us.map_or_else(|| "-".into(), output::time);
    for member in &found.members {
        let connected = match (member.this, member.connected) {
            (true, _) => "this node",
            (_, true) => "yes",
            _ => "no",
        };
        table.add_row([
            member.node.clone(),
            member.peer_id.clone(),
            time(member.since_us),
            time(member.expires_us),
            connected.into(),
            if member.revoked { "revoked" } else { "no" }.into(),
        ]);
    }
    eprintln!(
        "{}",
        match found.complete {
            true => "all that were let in; this node holds the root key",
            false => "those that this node has seen; all are known where the root key is",
        }
    );
    output::rows(&table, "")
}

async fn show(context: &Context) -> anyhow::Result<()> {
    let identity = || crate::node::Identity::load_or_create(&context.data_dir);
    let network = match context.client().get("/v1/network").await {
        Ok(network) => network,
        Err(ClientError::NoNode { data_dir }) => match Files::load(&context.data_dir)? {
            Some(files) => Network::of(&files, &identity()?.public_key()),
            None => anyhow::bail!(
                "{data_dir} belongs to no network; found one with 'meshwise network create', or join \
                 one with 'meshwise network join'"
            ),
        },
        Err(error) => return Err(error.into()),
    };
    let identity = identity()?;
    let peer_id = peer_id_text(&identity.public_key());
    if context.json {
        let mut about = serde_json::to_value(&network)?;
        about["node"] = identity.node_id().to_string().into();
        about["peer_id"] = peer_id.into();
        return output::json(&about);
    }
    let mut table = output::table(&["", ""]);
    let mut row = |name: &str, value: String| {
        table.add_row([name.to_owned(), value]);
    };
    row("network", network.name.clone());
    row("root", network.root.clone());
    row("this node", format!("{} ({peer_id})", identity.node_id()));
    row("belongs until", until(&network));
    let issuer = match network.holds_root_key {
        true => "this node, which holds the root key".into(),
        false => format!("{} ({})", network.issuer, network.issuer_peer_id),
    };
    row("issuer", issuer);
    if let Some(seen) = network.members_seen {
        row("members seen", seen.to_string());
    }
    output::rows(&table, "")
}

/// When a node's credential ends.
pub(super) fn until(network: &Network) -> String {
    let time = output::time(network.expires_us);
    if network.revoked {
        return "REVOKED by the root of the network, for good; see 'meshwise doctor'".into();
    }
    match network.expires_us <= super::champion::now_us() {
        true => format!("{time}: it is over; join again with a new invitation"),
        false => time,
    }
}

fn lifetime(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text)
        .map_err(|_| format!("'{text}' is not a time; write for example 30m, 24h or 7days"))?;
    if time < Duration::from_secs(1) || time > INVITATION_LIFETIME_MAX {
        return Err("an invitation lasts between 1 s and 30 days".into());
    }
    Ok(time)
}
