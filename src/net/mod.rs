//! The network: everything that knows libp2p and quinn. It decides nothing.
//!
//! - [`identity`]: the node's key, and peer ids.
//! - [`swarm`]: connections, identify, Kademlia ([`dht`]), gossip, synchronisation, mDNS.
//! - [`tls`]: how links and tunnels are encrypted.
//! - [`admission`], [`gate`] and [`join`]: who is let in, what is spoken with others, and how a
//!   stranger becomes a member.
//! - [`reach`]: what is known of how this node is reached; [`firewall`] refuses what the emulation
//!   says cannot be reached.
//! - [`link`] and [`lanes`]: bounded queues to neighbours, and the libp2p streams behind them;
//!   [`emulation`] can slow them down.
//! - [`plane`]: the data plane: what arrives on a lane is passed on, taken or dropped, and counted
//!   ([`counters`]); [`flows`]
//!   knows each tunnel's far end, [`sending`] keeps what may be lost with a route, [`watch`] leaves
//!   routes that fell silent, [`copies`] doubles what must not be lost, [`reservations`] asks and answers for bandwidth that is set aside.
//! - [`overlay_socket`] and [`tunnel`]: end-to-end QUIC over the overlay, and TCP over that.
//! - [`control`] counts what is said and heard by gossip and synchronisation.
//!
//! What happens becomes an [`Input`] for the engine; what the engine
//! wants done comes in through [`Net::carry_out`].

mod address;
pub mod admission;
mod behaviour;
pub mod control;
pub mod copies;
pub mod counters;
pub mod dht;
pub mod emulation;
pub mod firewall;
pub mod flows;
pub mod gate;
pub mod identity;
pub mod join;
pub mod lanes;
pub mod link;
pub mod overlay_socket;
mod pace;
pub mod plane;
mod probes;
pub mod reach;
pub mod reservations;
pub mod sending;
pub mod swarm;
pub mod tls;
mod tries;
pub mod tunnel;
pub mod watch;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use tokio::sync::mpsc;

use crate::config::Config;
use crate::engine::event::{Input, Output};
use crate::engine::measure::LinkReport;
use crate::engine::overlay::Roster;
use crate::engine::types::{NodeId, Timestamp};

use identity::Identity;
use plane::DataPlane;
pub use swarm::check_addresses;
use tunnel::Tunnels;

/// Events that may wait for the engine; beyond, the network waits.
pub const EVENTS_MAX: usize = 4_096;
/// Commands that may wait for the network; beyond, they are dropped and counted.
pub const COMMANDS_MAX: usize = 4_096;
/// Length of a slice: how often the data plane's counters become samples.
pub const SLICE: Duration = Duration::from_secs(10);

/// How often peers and callers are judged anew, because credentials end by themselves.
pub const MEMBERS_CHECK: Duration = Duration::from_secs(60);

/// Who belongs to the network, as the engine last said.
pub type Members = Arc<ArcSwap<Roster>>;

/// The time, as credentials and records have it.
fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(since.as_micros() as u64)
}

/// Why the network could not start.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The identity file is unusable.
    #[error(transparent)]
    Identity(#[from] identity::IdentityError),
    /// Not a multiaddress.
    #[error("'{0}' is not a multiaddress; write for example /ip4/127.0.0.1/tcp/4747")]
    Address(String),
    /// The port is taken, or the address is not of this machine.
    #[error("cannot listen on {address}: {reason}; choose another with --listen")]
    Listen {
        /// Where.
        address: String,
        /// What the system said.
        reason: String,
    },
    /// A bootstrap address that cannot work.
    #[error("cannot join through {address}: {why}; write for example /ip4/192.168.1.2/tcp/4747")]
    Bootstrap {
        /// Which.
        address: String,
        /// Why.
        why: &'static str,
    },
    /// Anything else while building.
    #[error("cannot start the network: {0}")]
    Build(String),
}

/// A running network. Dropping it stops everything.
pub struct Net {
    commands: mpsc::Sender<Output>,
    members: Members,
    plane: Arc<DataPlane>,
    tunnels: Arc<Tunnels>,
    listening: swarm::Listening,
    reach: reach::SharedReach,
    control: Arc<control::Control>,
    tasks: tokio_util::task::TaskTracker,
    stop: tokio_util::sync::CancellationToken,
    /// Ends the tasks also when nobody calls [`Net::stop`].
    _guard: tokio_util::sync::DropGuard,
}

impl Net {
    /// Starts listening. What happens from now on arrives at the receiver.
    ///
    /// # Errors
    /// [`NetError`].
    pub async fn start(
        config: &Config,
        identity: &Identity,
        roster: Arc<Roster>,
    ) -> Result<(Self, mpsc::Receiver<Input>), NetError> {
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let tasks = tokio_util::task::TaskTracker::new();
        let stop = tokio_util::sync::CancellationToken::new();
        let guard = stop.clone().drop_guard();
        let plane = Arc::new(
            DataPlane::new(identity.node_id(), events.clone()).with_relay_rate(config.relay.rate),
        );
        let emulator = emulation::Emulator::start(&config.emulation).map_err(NetError::Build)?;
        let only = emulation::Emulator::neighbours(&config.emulation).map_err(NetError::Build)?;
        plane.set_emulator(emulator, only);
        tasks.spawn(watch::run(plane.clone(), stop.clone()));
        let members: Members = Arc::new(ArcSwap::new(roster));
        let tunnels = Tunnels::start(identity, members.clone(), plane.clone(), &tasks, &stop)
            .map_err(|error| NetError::Build(error.to_string()))?;
        let (commands, command_receiver) = mpsc::channel(COMMANDS_MAX);
        let reach = reach::SharedReach::default();
        let said = Arc::<control::Control>::default();
        let listening = swarm::start(swarm::Start {
            config,
            identity,
            members: members.clone(),
            plane: plane.clone(),
            reach: reach.clone(),
            control: said.clone(),
            events,
            commands: command_receiver,
            tasks: &tasks,
            stop: &stop,
        })
        .await?;
        tasks.close();
        Ok((
            Self {
                commands,
                members,
                plane,
                tunnels,
                listening,
                reach,
                control: said,
                tasks,
                stop,
                _guard: guard,
            },
            receiver,
        ))
    }

    /// Does what the engine wants done. Outputs that are not about the network are
    /// ignored.
    pub fn carry_out(&self, output: Output) {
        match output {
            Output::SendProbe { id, route } => self.plane.send_probe(id, &route),
            Output::Roster(roster) => {
                self.members.store(roster.clone());
                self.tunnels.members_changed();
                self.command(Output::Roster(roster));
            }
            Output::Forwarding(snapshot) => self.plane.set_snapshot(snapshot),
            other => self.command(other),
        }
    }

    fn command(&self, command: Output) {
        if self.commands.try_send(command).is_err() {
            self.plane.counters().count("command-queue-full");
        }
    }

    /// Where this node listens, as multiaddresses with its peer id.
    pub fn listening(&self) -> Vec<String> {
        let listening = self.listening.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        listening.iter().cloned().collect()
    }

    /// What is known of how this node is reached.
    pub fn reach(&self) -> reach::Reach {
        self.reach.lock().clone()
    }

    /// What was said and heard by gossip and synchronisation.
    pub fn control(&self) -> &control::Control {
        &self.control
    }

    /// The data plane, for its counters.
    pub fn plane(&self) -> &Arc<DataPlane> {
        &self.plane
    }

    /// The tunnels.
    pub fn tunnels(&self) -> &Arc<Tunnels> {
        &self.tunnels
    }

    /// What each link counted since the last call.
    pub fn take_slice(&self) -> Vec<(NodeId, LinkReport)> {
        self.plane.take_slice()
    }

    /// Stops everything and waits for it, at most 5 s.
    pub async fn stop(self) {
        let leaving = tokio::time::sleep(tunnel::GOODBYE);
        self.tunnels.close().await;
        // Also without tunnels: withdrawals wait in the swarm's queue.
        leaving.await;
        self.stop.cancel();
        let _ = tokio::time::timeout(Duration::from_secs(5), self.tasks.wait()).await;
    }
}
