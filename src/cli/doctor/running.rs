//! What the running node knows of itself.

use super::Check;
use crate::api::types::{Reachability, Status};
use crate::engine::overlay::registry::CLOCK_SKEW;

/// Difference to the members' clocks that is worth a word (ms): more than an advertisement may be
/// old when a neighbour passes it on.
const CLOCK_AHEAD_MS: f64 = 60_000.0;
/// What to do about nodes of another network.
const JOIN: &str = "stop this node and join that network: 'meshwise node --join TOKEN', with a token of \
                    'meshwise network invite' there";

/// Everything.
pub(super) fn all(status: &Status, reach: &Reachability) -> Vec<Check> {
    let mut checks = vec![node(status), store(status), model(status)];
    checks.extend(reach.bootstrap.iter().map(|address| match address.answered {
        Some(true) => Check::ok("bootstrap address", format!("{} answers", address.address)),
        None => Check::note("bootstrap address", format!("{} is being tried", address.address)),
        Some(false) if address.foreign => {
            let found = format!("{} is of another network", address.address);
            Check::warning("bootstrap address", found, JOIN)
        }
        Some(false) => {
            let why = address.error.as_deref().unwrap_or("no answer");
            Check::warning(
                "bootstrap address",
                format!("{} does not answer: {why}", address.address),
                "see that the node there runs, and that no firewall is in between",
            )
        }
    }));
    checks.extend([peers(status, reach), clock(status, reach), reachable(status, reach)]);
    checks.extend([gateway(reach), local_search(reach)]);
    checks
}

fn node(status: &Status) -> Check {
    let up = std::time::Duration::from_secs(status.uptime_s as u64);
    let up = humantime::format_duration(up);
    Check::ok("node", format!("{} runs for {up} and answers", status.node))
}

fn store(status: &Status) -> Check {
    match &status.store_error {
        Some(error) => Check::broken(
            "database",
            format!("it takes no rows, or did not: {error}"),
            "see that there is room on the disk, and that the file is this user's",
        ),
        None => {
            Check::ok("database", format!("takes rows; {} were dropped", status.samples_dropped))
        }
    }
}

fn model(status: &Status) -> Check {
    match &status.model_error {
        Some(error) => Check::warning(
            "model",
            error.clone(),
            "see 'meshwise model list' and 'meshwise model rollback'",
        ),
        None => Check::ok("model", format!("{} decides", status.model)),
    }
}

fn peers(status: &Status, reach: &Reachability) -> Check {
    let found = format!(
        "{} connected, {} of them over another member only; {} links up",
        status.peers,
        reach.relayed.len(),
        status.links_up
    );
    if status.peers == 0 && reach.bootstrap.is_empty() {
        return Check::note("peers", "none: nobody else is in this network, or nobody is found");
    }
    if status.peers == 0 {
        let refused = |word: &str| status.dropped.get(word).copied().unwrap_or_default() > 0;
        let advice = if refused("admission-foreign") {
            JOIN
        } else if refused("admission-refused-by-peer") {
            "the nodes there refuse this one: see its membership above"
        } else {
            "see the bootstrap addresses above"
        };
        return Check::broken("peers", "connected with nobody", advice);
    }
    if status.links_up == 0 {
        return Check::warning(
            "peers",
            found,
            "wait a moment; without a link no traffic is carried",
        );
    }
    Check::ok("peers", found)
}

fn clock(status: &Status, reach: &Reachability) -> Check {
    let advice = "set the clocks of the nodes by NTP";
    let refused = reach.advertisements_refused;
    let Some(ahead_ms) = reach.clock_ahead_ms else {
        return match status.peers > 0 && refused > 0 {
            true => Check::broken(
                "clock",
                format!(
                    "none of what members say is taken, {refused} times: clocks may differ by more than {} min",
                    CLOCK_SKEW.as_secs() / 60
                ),
                advice,
            ),
            false => Check::note("clock", "not compared: no other member was heard yet"),
        };
    };
    let side = if ahead_ms >= 0.0 { "ahead of" } else { "behind" };
    let found = format!(
        "at most {:.1} s {side} the median of {} members",
        ahead_ms.abs() / 1e3,
        reach.clock_members
    );
    if ahead_ms.abs() > CLOCK_SKEW.as_secs_f64() * 1e3 {
        Check::broken("clock", found, advice)
    } else if ahead_ms.abs() > CLOCK_AHEAD_MS {
        Check::warning("clock", found, advice)
    } else {
        Check::ok("clock", found)
    }
}

fn reachable(status: &Status, reach: &Reachability) -> Check {
    const WHAT: &str = "reachable";
    let circuits = status.listening.iter().filter(|at| at.contains("/p2p-circuit")).count();
    let open = reach.tested.iter().filter(|tested| tested.reachable).count();
    let tested = reach.tested.len();
    if !reach.nat {
        return Check::note(
            WHAT,
            "not tested: network.nat is off, or the node listens on loopback only",
        );
    }
    if tested == 0 {
        return Check::note(WHAT, "not tested: no member that this node has dialled did so yet");
    }
    if open > 0 {
        return Check::ok(WHAT, format!("members could reach {open} of {tested} addresses"));
    }
    let why = reach.tested.iter().find_map(|tested| tested.error.as_deref()).unwrap_or("no answer");
    let advice = "forward the listening port on the router, or switch UPnP on there";
    let found = match circuits {
        0 => format!("members could reach none of {tested} addresses ({why})"),
        _ => format!(
            "members could reach none of {tested} addresses ({why}), but over {circuits} other members"
        ),
    };
    Check::warning(WHAT, found, advice)
}

fn gateway(reach: &Reachability) -> Check {
    const WHAT: &str = "port mapping";
    match reach.gateway.as_str() {
        "maps" => Check::ok(WHAT, format!("the gateway maps {}", reach.mapped.join(", "))),
        "searching" => Check::note(WHAT, "searching for a gateway"),
        "not-routable" => Check::note(WHAT, "the gateway is itself behind another one"),
        "none" => Check::note(WHAT, "no gateway that speaks UPnP was found"),
        _ => Check::note(WHAT, "off"),
    }
}

fn local_search(reach: &Reachability) -> Check {
    match reach.mdns {
        true => Check::ok("local search", "nodes on the local network are found by multicast DNS"),
        false => Check::note("local search", "off, or the node listens on loopback only"),
    }
}
