//! A simulated mesh with services in which nodes come and go, and what must hold in it. Shared by the
//! tests of CI and by `benches/churn.rs`, which plays it at full size.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use meshwise::engine::Intervals;
use meshwise::engine::event::{Answer, Command, RequestId, ServiceSpec};
use meshwise::engine::measure::HealthPolicy;
use meshwise::engine::overlay::registry::CLOCK_SKEW;
use meshwise::engine::overlay::{Delegation, Objective, ServiceKind, Signed};
use meshwise::engine::route::PathPolicy;
use meshwise::engine::types::{MAX_ROUTE_HOPS, NodeId, PublicKey, ServiceName, Timestamp};
use meshwise::sim::{LinkModel, Space, World};
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

pub const START: Timestamp = Timestamp(1_760_000_000_000_000);
/// The first nodes, by which the others join.
pub const BOOTSTRAP: usize = 3;
/// Time to live of records (s).
pub const TTL_S: u32 = 150;
/// A newcomer, and a service that is new, may take so long until they count.
pub const NEW: Duration = Duration::from_secs(2);
/// No living service is out of reach of a living node for longer: a silent neighbour is missed after
/// three probes and their time-outs, and the news of it needs a moment.
pub const UNREACHABLE_MAX: Duration = Duration::from_secs(10);
/// A service that was withdrawn is gone everywhere after this.
pub const WITHDRAWN_MAX: Duration = Duration::from_secs(2);
/// A service whose node vanished is gone everywhere after this.
pub const EXPIRED_MAX: Duration = Duration::from_secs(TTL_S as u64 + 10).saturating_add(CLOCK_SKEW);
/// Links of a node: not fewer than this for longer than [`FEW_LINKS_MAX`].
pub const LINKS_MIN: usize = 3;
/// See [`LINKS_MIN`].
pub const FEW_LINKS_MAX: Duration = Duration::from_secs(20);
/// Never more than this: twice the target of a restless mesh, and what a node makes itself.
pub const LINKS_MAX: usize = 2 * 12 + 2;

/// How a node leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaves {
    /// Withdraws its services and closes its connections.
    Orderly,
    /// Its connections are closed by its operating system.
    Killed,
    /// Without a word.
    Vanished,
}

/// A name and who serves it.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    pub provider: usize,
    pub since: Timestamp,
}

/// Look-ups and what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Lookups {
    /// Of living services.
    pub made: u64,
    /// Those whose answer named the living provider.
    pub found: u64,
}

pub struct Mesh {
    pub world: World,
    pub random: Pcg64Mcg,
    /// Running nodes, since when.
    pub running: BTreeMap<usize, Timestamp>,
    by_id: BTreeMap<NodeId, usize>,
    /// Living services.
    pub offers: BTreeMap<ServiceName, Offer>,
    /// Those that were withdrawn by nodes that stay.
    withdrawn: BTreeSet<ServiceName>,
    /// Ordered pairs of nodes of which one had no route to the other when they were looked at last.
    without_route: BTreeSet<(usize, usize)>,
    /// Those of nodes that left, and when nobody may name them any more.
    gone: BTreeMap<ServiceName, Timestamp>,
    out_of_reach: BTreeMap<(usize, ServiceName), Timestamp>,
    few_links: BTreeMap<usize, Timestamp>,
    asked: Vec<(usize, RequestId, ServiceName)>,
    next_request: RequestId,
    published: usize,
    /// What did not hold.
    pub wrong: Vec<String>,
    /// Longest time for which a living service was out of reach of a node.
    pub worst_reach: Duration,
}

impl Mesh {
    /// Nodes that join by the first ones, each service on a node of its own, a minute after all that.
    pub fn new(seed: u64, nodes: usize, services: usize) -> Self {
        let space = Space { nearest_ms: 2.0, side_ms: 40.0, jitter_ms: 0.3, seed };
        Self::laid_out(space, seed, nodes, services)
    }

    /// The same in another space.
    pub fn laid_out(space: Space, seed: u64, nodes: usize, services: usize) -> Self {
        let mut world = World::new(seed, START);
        world.lay_out(space);
        world.stay_lean();
        let mut mesh = Self {
            world,
            random: Pcg64Mcg::seed_from_u64(seed),
            running: BTreeMap::new(),
            by_id: BTreeMap::new(),
            offers: BTreeMap::new(),
            withdrawn: BTreeSet::new(),
            without_route: BTreeSet::new(),
            gone: BTreeMap::new(),
            out_of_reach: BTreeMap::new(),
            few_links: BTreeMap::new(),
            asked: Vec::new(),
            next_request: 0,
            published: 0,
            wrong: Vec::new(),
            worst_reach: Duration::ZERO,
        };
        let all: Vec<usize> = (0..BOOTSTRAP.max(nodes / 40)).collect();
        for index in 0..nodes {
            let before: Vec<usize> = all.iter().copied().filter(|other| *other < index).collect();
            let by: Vec<usize> = before.sample(&mut mesh.random, BOOTSTRAP).copied().collect();
            mesh.join(&by);
            mesh.world.run_for(Duration::from_millis(50));
        }
        let providers: Vec<usize> = (0..nodes).collect();
        let providers: Vec<usize> = providers.sample(&mut mesh.random, services).copied().collect();
        providers.into_iter().for_each(|provider| mesh.publish(provider));
        mesh.world.run_for(Duration::from_secs(60));
        mesh
    }

    /// A new node.
    pub fn join(&mut self, by: &[usize]) -> usize {
        let index = self.world.add_node(by, PathPolicy::default(), Intervals::default());
        self.by_id.insert(self.world.id(index), index);
        self.running.insert(index, self.world.now());
        index
    }

    /// A node offers a new service.
    pub fn publish(&mut self, provider: usize) {
        self.published += 1;
        let name = format!("service-{}.local", self.published);
        let name: ServiceName = name.parse().expect("a name");
        self.publish_as(provider, name);
    }

    /// A node offers a service under this name.
    pub fn publish_as(&mut self, provider: usize, name: ServiceName) {
        self.send_publish(provider, name.clone(), None);
        let since = self.world.now();
        self.offers.insert(name, Offer { provider, since });
    }

    fn send_publish(&mut self, provider: usize, name: ServiceName, delegation: Option<Signed>) {
        let service = ServiceSpec {
            delegation,
            name,
            kind: ServiceKind::Tcp,
            metadata: BTreeMap::new(),
            allowed: vec![],
            ttl_s: TTL_S,
            objective: Objective::Balanced,
            health: HealthPolicy::of_kind(ServiceKind::Tcp),
        };
        let request = self.request();
        self.world.command(provider, Command::Publish { request, service });
    }

    fn request(&mut self) -> RequestId {
        self.next_request += 1;
        self.next_request
    }

    /// A node leaves, with its services.
    pub fn leave(&mut self, node: usize, how: Leaves) {
        let now = self.world.now();
        let own = self.offers.iter().filter(|(_, offer)| offer.provider == node);
        let own: Vec<ServiceName> = own.map(|(name, _)| name.clone()).collect();
        for name in own {
            self.offers.remove(&name);
            let request = self.request();
            let bound = if how == Leaves::Orderly {
                self.world.command(node, Command::Withdraw { request, name: name.clone() });
                WITHDRAWN_MAX
            } else {
                EXPIRED_MAX
            };
            self.gone.insert(name, now + bound);
        }
        if how == Leaves::Orderly {
            // As a node does that is stopped: what it said last still leaves.
            self.world.run_for(Duration::from_millis(100));
        }
        match how {
            Leaves::Vanished => self.world.vanish(node),
            _ => self.world.kill(node),
        }
        self.running.remove(&node);
        self.few_links.remove(&node);
        self.out_of_reach.retain(|(from, _), _| *from != node);
    }

    /// A node that left starts again and knows its former peers.
    pub fn restart(&mut self, node: usize) {
        self.world.restart(node);
        self.running.insert(node, self.world.now());
    }

    pub fn any_running(&mut self) -> usize {
        let running: Vec<usize> = self.running.keys().copied().collect();
        *running.choose(&mut self.random).expect("somebody is running")
    }

    /// Three nodes to join by: those of the beginning that are left, or any.
    pub fn ways_in(&mut self) -> Vec<usize> {
        let running: Vec<usize> = self.running.keys().copied().take(40).collect();
        running.sample(&mut self.random, BOOTSTRAP).copied().collect()
    }

    /// A running node asks for a living service; [`Mesh::count`] sees what it found.
    pub fn look_up(&mut self, from_dht: bool) {
        let now = self.world.now();
        let old = |since: Timestamp| now.since(since) >= NEW;
        let askers = self.running.iter().filter(|(_, since)| old(**since));
        let askers: Vec<usize> = askers.map(|(node, _)| *node).collect();
        let names = self.offers.iter().filter(|(_, offer)| old(offer.since));
        let names: Vec<ServiceName> = names.map(|(name, _)| name.clone()).collect();
        let asker = askers.choose(&mut self.random).copied();
        let name = names.choose(&mut self.random).cloned();
        if let (Some(asker), Some(name)) = (asker, name) {
            let request = self.request();
            let command = Command::Resolve { request, name: name.clone(), from_dht };
            self.world.command(asker, command);
            self.asked.push((asker, request, name));
        }
    }

    /// What became of the look-ups so far. Those whose asker or provider left meanwhile do not count.
    pub fn count(&mut self, lookups: &mut Lookups) {
        for (asker, request, name) in std::mem::take(&mut self.asked) {
            let Some(offer) = self.offers.get(&name) else { continue };
            if !self.running.contains_key(&asker) {
                continue;
            }
            lookups.made += 1;
            let provider = self.world.id(offer.provider);
            let names = |key: &PublicKey| key.node_id() == provider;
            match self.world.answer(asker, request) {
                Some(Ok(Answer::Resolved { providers, .. }))
                    if providers.iter().any(|(key, _)| names(key)) =>
                {
                    lookups.found += 1;
                }
                other => {
                    let answer = other.map(|answer| answer.is_ok());
                    self.wrong.push(format!("{asker} did not find {name}: {answer:?}"));
                }
            }
        }
    }

    /// The nodes to which a node's cheapest route leads and works, itself included: the cheapest of at
    /// most so many hops, or where there is none, of as many as a route may have.
    pub fn reached(&mut self, from: usize) -> BTreeSet<usize> {
        let hops = PathPolicy::default().max_hops;
        let topology = self.world.topology(from);
        let Some(start) = topology.index(self.world.id(from)) else { return [from].into() };
        let index: Vec<usize> = topology.nodes.iter().map(|id| self.by_id[id]).collect();
        let size = index.len();
        // Bellman-Ford by number of links: cost, and whether all links of the cheapest way work.
        let mut best = vec![(f64::INFINITY, false); size];
        best[start as usize] = (0.0, true);
        let mut fringe = vec![start];
        let mut short = best.clone();
        for hop in 1..=MAX_ROUTE_HOPS {
            let before = best.clone();
            let mut next = Vec::new();
            for at in std::mem::take(&mut fringe) {
                let (cost, works) = before[at as usize];
                for edge in &topology.edges[at as usize] {
                    let there = edge.to as usize;
                    if cost + edge.cost_ms < best[there].0 {
                        let (a, b) = (index[at as usize], index[there]);
                        let is_there = self.world.carries(a, b);
                        best[there] = (cost + edge.cost_ms, works && is_there);
                        next.push(edge.to);
                    }
                }
            }
            next.sort_unstable();
            next.dedup();
            fringe = next;
            if hop == hops {
                short.clone_from(&best);
            }
        }
        let works = |at: &usize| if short[*at].0.is_finite() { short[*at].1 } else { best[*at].1 };
        (0..size).filter(works).map(|at| index[at]).collect()
    }

    /// Whether the route that a node would take to another one leads over nodes and links that work.
    pub fn has_a_route(&mut self, from: usize, to: usize) -> bool {
        if from == to {
            return true;
        }
        let Some(route) = self.world.would_take(from, to) else { return false };
        let nodes: Vec<usize> = route.nodes().iter().map(|id| self.by_id[id]).collect();
        nodes.windows(2).all(|link| self.world.carries(link[0], link[1]))
    }

    /// Whether this is so for every ordered pair of running nodes.
    pub fn every_pair_has_a_route(&mut self) -> bool {
        let running: Vec<usize> = self.running.keys().copied().collect();
        let pairs = running.iter().flat_map(|from| running.iter().map(move |to| (*from, *to)));
        let mut pairs: Vec<(usize, usize)> = pairs.collect();
        // The pairs that had none the last time are the likeliest to have none now.
        pairs.sort_by_key(|pair| !self.without_route.contains(pair));
        let first = pairs.into_iter().find(|(from, to)| !self.has_a_route(*from, *to));
        self.without_route.extend(first);
        first.is_none()
    }

    /// Whether every running node resolves every living service, and none that was withdrawn.
    pub fn resolves_everywhere(&self) -> bool {
        self.running.keys().all(|node| {
            let mut living = self.offers.iter();
            let registry = self.world.engine(*node).services().registry();
            let gone =
                |name: &ServiceName| registry.resolve(name, self.world.now()).next().is_none();
            living.all(|(name, offer)| self.names(*node, name, offer.provider))
                && self.withdrawn.iter().all(gone)
        })
    }

    /// A service is withdrawn, and its node goes on.
    pub fn withdraw(&mut self, name: &ServiceName) {
        let Some(offer) = self.offers.remove(name) else { return };
        let request = self.request();
        self.world.command(offer.provider, Command::Withdraw { request, name: name.clone() });
        self.withdrawn.insert(name.clone());
    }

    /// A node provides a name that belongs to another one, or to itself.
    fn replicate(&mut self, name: &ServiceName, owner: usize, provider: usize) {
        let key = self.world.author(provider).public();
        let expires_at = self.world.now() + Duration::from_secs(365 * 86_400);
        let delegation = Delegation { name: name.clone(), provider: key, expires_at };
        let delegation = Signed::seal(&self.world.author(owner), &delegation);
        self.send_publish(provider, name.clone(), (owner != provider).then_some(delegation));
    }

    fn names(&self, node: usize, name: &ServiceName, provider: usize) -> bool {
        let registry = self.world.engine(node).services().registry();
        let provider = self.world.id(provider);
        registry.resolve(name, self.world.now()).any(|(key, _)| key.node_id() == provider)
    }

    /// Looks at everything that must hold.
    pub fn check(&mut self) {
        let now = self.world.now();
        let mut wrong: Vec<String> = self.world.breaches().to_vec();
        let running: Vec<(usize, Timestamp)> = self.running.iter().map(|(n, s)| (*n, *s)).collect();
        let mut still = BTreeMap::new();
        for (node, since) in running {
            let reached = self.reached(node);
            for (name, offer) in &self.offers {
                if reached.contains(&offer.provider) && self.names(node, name, offer.provider) {
                    continue;
                }
                let key = (node, name.clone());
                let begun = self.out_of_reach.get(&key).copied();
                let begun = begun.unwrap_or(now).max(since).max(offer.since);
                let lasts = now.since(begun);
                self.worst_reach = self.worst_reach.max(lasts);
                if lasts > UNREACHABLE_MAX {
                    wrong.push(format!("{name} is out of reach of {node} for {lasts:?}"));
                }
                still.insert(key, begun);
            }
            let engine = self.world.engine(node);
            for (name, until) in &self.gone {
                let named = engine.services().registry().resolve(name, now).next().is_some();
                if named && now > *until {
                    wrong.push(format!("{node} still names {name}"));
                }
            }
            let links = engine.links().count();
            if links > LINKS_MAX {
                wrong.push(format!("{node} has {links} links"));
            }
            let few = links < LINKS_MIN.min(self.running.len() - 1);
            let begun = few.then(|| self.few_links.get(&node).copied().unwrap_or(now));
            match begun {
                None => drop(self.few_links.remove(&node)),
                Some(begun) if now.since(begun) > FEW_LINKS_MAX => {
                    wrong.push(format!("{node} has only {links} links"));
                }
                Some(begun) => drop(self.few_links.insert(node, begun)),
            }
        }
        self.out_of_reach = still;
        let at = now.since(START).as_secs();
        self.wrong.extend(wrong.into_iter().map(|what| format!("{at} s: {what}")));
    }

    /// Lets time pass in steps of half a second until something holds, at most so long. Returns how long
    /// that took.
    pub fn until(
        &mut self,
        limit: Duration,
        mut holds: impl FnMut(&mut Self) -> bool,
    ) -> Option<Duration> {
        let begun = self.world.now();
        while !holds(self) {
            if self.world.now().since(begun) >= limit {
                return None;
            }
            self.world.run_for(Duration::from_millis(500));
        }
        Some(self.world.now().since(begun))
    }
}

/// What a mesh does under churn.
#[derive(Clone, Debug, PartialEq)]
pub struct Churned {
    pub left: usize,
    pub lookups: Lookups,
    pub worst_reach: Duration,
    pub wrong: Vec<String>,
}

/// For so many seconds a share of the nodes leaves in an hour, one newcomer for each; a third each in
/// order, killed and without a word. Newcomers offer as many services as were lost. Look-ups go on all
/// the time, every other one in the DHT. The invariants are looked at every `check_every` seconds.
pub fn churn(
    mesh: &mut Mesh,
    per_hour: f64,
    for_s: u64,
    lookups: u64,
    check_every: u64,
) -> Churned {
    let services = mesh.offers.len();
    let (mut left, mut counted) = (0, Lookups::default());
    let mut made = 0;
    for second in 0..for_s {
        let due = mesh.running.len() as f64 * per_hour / 3_600.0;
        let leaves = due as usize + usize::from(mesh.random.random::<f64>() < due.fract());
        for _ in 0..leaves {
            let how = [Leaves::Orderly, Leaves::Killed, Leaves::Vanished];
            let how = *how.choose(&mut mesh.random).expect("three ways");
            let node = mesh.any_running();
            mesh.leave(node, how);
            let by = mesh.ways_in();
            let newcomer = mesh.join(&by);
            if mesh.offers.len() < services {
                mesh.publish(newcomer);
            }
            left += 1;
        }
        while made * for_s < lookups * (second + 1) {
            mesh.look_up(made % 2 == 0);
            made += 1;
        }
        mesh.world.run_for(Duration::from_secs(1));
        mesh.count(&mut counted);
        if second % check_every == 0 {
            mesh.check();
        }
    }
    // Nobody comes or goes any more: all must agree.
    mesh.world.run_for(Duration::from_secs(10));
    let registries: BTreeSet<Vec<(ServiceName, u64)>> = mesh
        .running
        .keys()
        .map(|node| {
            let registry = mesh.world.engine(*node).services().registry();
            let records = registry.list(mesh.world.now());
            records.map(|(_, record)| (record.name.clone(), record.sequence)).collect()
        })
        .collect();
    if registries.len() != 1 {
        mesh.wrong.push(format!("there are {} different registries", registries.len()));
    }
    let (worst_reach, wrong) = (mesh.worst_reach, mesh.wrong.clone());
    Churned { left, lookups: counted, worst_reach, wrong }
}

/// How long it took until everything was well again; `None` when it did not get well in time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Recovered {
    pub services: Option<Duration>,
    pub routes: Option<Duration>,
}

impl Recovered {
    /// Looks every half second, for at most so long.
    pub fn watch(mesh: &mut Mesh, limit: Duration) -> Self {
        let begun = mesh.world.now();
        let (mut services, mut routes) = (None, None);
        mesh.until(limit, |mesh| {
            let after = mesh.world.now().since(begun);
            if services.is_none() && mesh.resolves_everywhere() {
                services = Some(after);
            }
            if routes.is_none() && mesh.every_pair_has_a_route() {
                routes = Some(after);
            }
            services.is_some() && routes.is_some()
        });
        Self { services, routes }
    }
}

/// Half of the nodes are cut off for so long, both halves publish and withdraw meanwhile, and then the cut is
/// healed.
pub fn part_and_heal(mesh: &mut Mesh, cut: Duration) -> Recovered {
    let all: Vec<usize> = mesh.running.keys().copied().collect();
    let half: BTreeSet<usize> = all.sample(&mut mesh.random, all.len() / 2).copied().collect();
    mesh.world.part(half.clone());
    mesh.world.run_for(cut / 2);
    for side in [true, false] {
        let is_here = |node: &usize| half.contains(node) == side;
        let here: Vec<usize> = mesh.running.keys().copied().filter(is_here).collect();
        for node in here.sample(&mut mesh.random, 2).copied().collect::<Vec<_>>() {
            mesh.publish(node);
        }
        let of_here = mesh.offers.iter().filter(|(_, offer)| is_here(&offer.provider));
        let of_here: Vec<ServiceName> = of_here.map(|(name, _)| name.clone()).collect();
        if let Some(name) = of_here.choose(&mut mesh.random).cloned() {
            mesh.withdraw(&name);
        }
    }
    mesh.world.run_for(cut / 2);
    mesh.world.heal();
    Recovered::watch(mesh, Duration::from_secs(600))
}

/// The root revokes a node while a fifth of the others is cut off, and the cut is healed later. Returns how
/// long it took until all that could hear of it had, and how long after the healing until all had.
pub fn revoke(mesh: &mut Mesh) -> (Option<Duration>, Option<Duration>) {
    const ROOT: usize = 0;
    let others: Vec<usize> = mesh.running.keys().copied().filter(|node| *node != ROOT).collect();
    let count = others.len() / 5 + 1;
    let mut chosen: Vec<usize> = others.sample(&mut mesh.random, count).copied().collect();
    let revoked = chosen.pop().expect("a fifth and one more");
    let cut_off: BTreeSet<usize> = chosen.into_iter().collect();
    let key = mesh.world.author(revoked).public();
    mesh.world.part(cut_off.clone());
    let request = mesh.request();
    mesh.world.command(ROOT, Command::Revoke { request, key });
    let knows = |mesh: &Mesh, node: usize| {
        let engine = mesh.world.engine(node);
        engine.membership().roster().is_revoked(&key)
            && !engine.peers().contains_key(&key.node_id())
    };
    let heard = mesh.until(Duration::from_secs(60), |mesh| {
        let mut reached = others.iter().filter(|node| **node != revoked && !cut_off.contains(node));
        reached.all(|node| knows(mesh, *node))
    });
    mesh.world.run_for(Duration::from_secs(30));
    if let Some(node) = cut_off.iter().find(|node| knows(mesh, **node)) {
        mesh.wrong.push(format!("{node} was cut off and knows"));
    }
    mesh.world.heal();
    let all = mesh.until(Duration::from_secs(600), |mesh| {
        others.iter().filter(|node| **node != revoked).all(|node| knows(mesh, *node))
    });
    (heard, all)
}

/// What each node sends of gossip and synchronisation in a second, by kind: messages and bytes.
pub type Sent = BTreeMap<&'static str, (f64, f64)>;

/// What a mesh sends in so many seconds, a node and second, while `change` is done each second.
pub fn sent(mesh: &mut Mesh, for_s: u64, mut change: impl FnMut(&mut Mesh, u64)) -> Sent {
    let before = mesh.world.control().clone();
    for second in 0..for_s {
        change(mesh, second);
        mesh.world.run_for(Duration::from_secs(1));
    }
    let nodes_s = mesh.running.len() as f64 * for_s as f64;
    let sent = mesh.world.control().since(&before);
    let each = |(kind, told): (_, meshwise::sim::Told)| {
        (kind, (told.messages as f64 / nodes_s, told.bytes as f64 / nodes_s))
    };
    sent.kinds().map(each).collect()
}

/// One link between two linked nodes gets slower and quicker again, for ten seconds each: what changes
/// from probe to probe is noise, and nobody is told.
pub fn swing(mesh: &mut Mesh, second: u64) {
    let neighbour = mesh.world.engine(BOOTSTRAP).links().next().map(|(node, ..)| node);
    let Some(link) = neighbour.and_then(|node| mesh.by_id.get(&node).copied()) else { return };
    let delay_ms = if (second / 10).is_multiple_of(2) { 10.0 } else { 30.0 };
    mesh.world.set_link(BOOTSTRAP, link, LinkModel::delay(delay_ms));
}

/// All nodes are killed at once and start again within five seconds, with the peers they knew and the
/// services they had.
pub fn restart_all(mesh: &mut Mesh) -> Recovered {
    let offers = mesh.offers.clone();
    let all: Vec<usize> = mesh.running.keys().copied().collect();
    for node in &all {
        mesh.world.vanish(*node);
    }
    mesh.world.run_for(Duration::from_secs(5));
    for node in &all {
        mesh.restart(*node);
        mesh.world.run_for(Duration::from_secs_f64(5.0 / all.len() as f64));
    }
    for (name, offer) in offers {
        mesh.publish_as(offer.provider, name);
    }
    Recovered::watch(mesh, Duration::from_secs(600))
}

/// This share of the nodes vanishes at once.
pub fn lose(mesh: &mut Mesh, share: f64) -> Recovered {
    let all: Vec<usize> = mesh.running.keys().copied().collect();
    let count = (all.len() as f64 * share) as usize;
    let lost: Vec<usize> = all.sample(&mut mesh.random, count).copied().collect();
    lost.into_iter().for_each(|node| mesh.leave(node, Leaves::Vanished));
    Recovered::watch(mesh, Duration::from_secs(600))
}

/// The nodes of the beginning vanish, and so many newcomers come that know two of them and one other
/// node. Returns how long each took until it could resolve every service.
pub fn join_without_the_first(mesh: &mut Mesh, newcomers: usize) -> Vec<Option<Duration>> {
    for node in 0..BOOTSTRAP {
        mesh.leave(node, Leaves::Vanished);
    }
    mesh.world.run_for(Duration::from_secs(15));
    let mut took = Vec::new();
    for _ in 0..newcomers {
        let other = mesh.any_running();
        let index = mesh.join(&[0, 1, other]);
        let begun = mesh.world.now();
        let mut joined = None;
        while joined.is_none() && mesh.world.now().since(begun) < Duration::from_secs(60) {
            mesh.world.run_for(Duration::from_millis(50));
            let mut offers = mesh.offers.iter();
            if offers.all(|(name, offer)| mesh.names(index, name, offer.provider)) {
                joined = Some(mesh.world.now().since(begun));
            }
        }
        took.push(joined);
    }
    took
}

/// How much of the time a service with two replicas could be used.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Availability {
    /// Looks from random nodes.
    pub looks: u64,
    /// Those at which at least one replica lived.
    pub possible: u64,
    /// Those that found a living replica, with a route that works.
    pub served: u64,
}

/// A service with two replicas of one name in a small mesh, of which a share of the nodes leaves in an hour
/// and is back a minute later, the providers too. A random node looks every ten seconds: whom the name
/// leads to, and whether the route there works.
pub fn availability(mesh: &mut Mesh, per_hour: f64, hours: u64) -> Availability {
    const AWAY: Duration = Duration::from_secs(60);
    const LOOK: Duration = Duration::from_secs(10);
    let name: ServiceName = "replicated.local".parse().expect("a name");
    let nodes: Vec<usize> = mesh.running.keys().copied().collect();
    let replicas: Vec<usize> = nodes.sample(&mut mesh.random, 2).copied().collect();
    let owner = replicas[0];
    replicas.iter().for_each(|provider| mesh.replicate(&name, owner, *provider));
    mesh.world.run_for(Duration::from_secs(10));
    let mut away: BTreeMap<usize, Timestamp> = BTreeMap::new();
    let mut tally = Availability::default();
    for _ in 0..hours * 360 {
        let due = mesh.running.len() as f64 * per_hour * LOOK.as_secs_f64() / 3_600.0;
        if mesh.random.random::<f64>() < due {
            let how = [Leaves::Orderly, Leaves::Killed, Leaves::Vanished];
            let how = *how.choose(&mut mesh.random).expect("three ways");
            let node = mesh.any_running();
            if how == Leaves::Orderly && replicas.contains(&node) {
                let request = mesh.request();
                mesh.world.command(node, Command::Withdraw { request, name: name.clone() });
            }
            mesh.leave(node, how);
            away.insert(node, mesh.world.now() + AWAY);
        }
        let now = mesh.world.now();
        let back: Vec<usize> =
            away.iter().filter(|(_, at)| **at <= now).map(|(node, _)| *node).collect();
        for node in back {
            away.remove(&node);
            mesh.restart(node);
            if replicas.contains(&node) {
                mesh.replicate(&name, owner, node);
            }
        }
        let wait = mesh.random.random_range(0.0..1.0) * LOOK.as_secs_f64();
        mesh.world.run_for(Duration::from_secs_f64(wait));
        let now = mesh.world.now();
        let old = mesh.running.iter().filter(|(_, since)| now.since(**since) >= NEW);
        let old: Vec<usize> = old.map(|(node, _)| *node).collect();
        if let Some(asker) = old.choose(&mut mesh.random).copied() {
            let possible = replicas.iter().any(|provider| mesh.running.contains_key(provider));
            let engine = mesh.world.engine(asker);
            let named = engine.services().providers(&name, engine.graph(), now);
            let named: Vec<usize> =
                named.iter().map(|(key, _)| mesh.by_id[&key.node_id()]).collect();
            let served = named.into_iter().any(|provider| {
                mesh.running.contains_key(&provider) && mesh.has_a_route(asker, provider)
            });
            tally.looks += 1;
            tally.possible += u64::from(possible);
            tally.served += u64::from(served);
        }
        mesh.world.run_for(LOOK - Duration::from_secs_f64(wait));
    }
    tally
}
