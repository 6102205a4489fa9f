//! Every decoder of what others send, against arbitrary, mutated, cut and inflated bytes: no panic, no
//! more memory than the bound, nothing opened that nobody signed.
//!
//! CI feeds 20,000 inputs in all. A million to each, before a release:
//! `cargo test --release --test it -- --ignored --nocapture decoders`.

use std::collections::BTreeMap;
use std::process::Command as Program;
use std::time::{Duration, Instant};

use ed25519_dalek::SigningKey;
use meshwise::engine::event::{Input, Output};
use meshwise::engine::forward::{DatagramKind, Header, HeaderView, Receipt, Seen};
use meshwise::engine::measure::LinkQuality;
use meshwise::engine::overlay::delegation::{self, DELEGATION_BYTES_MAX, Delegation};
use meshwise::engine::overlay::membership::{NameGrant, NetworkState, Revocation};
use meshwise::engine::overlay::token::{Certificate, Invite, TOKEN_BYTES_MAX};
use meshwise::engine::overlay::wire::{
    self, GOSSIP_BYTES_MAX, JOIN_BYTES_MAX, JoinRequest, JoinResponse, SYNC_BYTES_MAX,
};
use meshwise::engine::overlay::{
    Author, Credential, GossipMessage, LinkStateAdvertisement, NotLetIn, Objective, PeerAddresses,
    ServiceKind, ServiceRecord, Signed, SyncRequest, SyncResponse, Token,
};
use meshwise::engine::traffic::message;
use meshwise::engine::types::{NodeId, PublicKey, Route, Timestamp, TunnelId};
use meshwise::engine::{Engine, EngineConfig};
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;
use serde::Serialize;
use serde::de::DeserializeOwned;

const NOW: Timestamp = Timestamp(1_760_000_000_000_000);
const SEED: u64 = 5;
/// How many inputs [`alone`] is given, in CI.
const INPUTS: &str = "MESHWISE_DECODER_INPUTS";
const IN_CI: u64 = 20_000;
const IN_ALL: u64 = 1_000_000 * KINDS;
/// Memory that the process may take beyond what it had when all was set up (MiB): the state of one
/// engine, and one input at a time.
const GROWTH_MIB_MAX: u64 = 48;

fn author(byte: u8) -> Author {
    let (key, root) = (SigningKey::from_bytes(&[byte; 32]), SigningKey::from_bytes(&[9; 32]));
    let public = PublicKey(key.verifying_key().to_bytes());
    let credential = Credential::issue(&root, &public, NOW, NOW + Duration::from_secs(86_400));
    Author { key, credential }
}

/// Valid messages, by where they are decoded.
struct Samples {
    signed: Vec<Signed>,
    gossip: Vec<Vec<u8>>,
    bodies: Vec<Vec<u8>>,
    sync: Vec<Vec<u8>>,
    credentials: Vec<Vec<u8>>,
    joins: Vec<Vec<u8>>,
    answers: Vec<Vec<u8>>,
    tokens: Vec<String>,
    delegations: Vec<String>,
    datagrams: Vec<Vec<u8>>,
}

impl Samples {
    fn new() -> Self {
        let (one, root) = (author(1), Author::root(SigningKey::from_bytes(&[9; 32])));
        let key = one.public();
        let quality = LinkQuality {
            rtt_ms: 12.5,
            jitter_ms: 1.0,
            loss: 0.01,
            bandwidth: Some(1e6),
            utilisation: 0.5,
        };
        let links = (0..20).map(|byte| (NodeId([byte; 8]), quality)).collect();
        let said = LinkStateAdvertisement { sequence: NOW.as_micros(), links };
        let record = ServiceRecord {
            delegation: None,
            name: "files.local".parse().unwrap(),
            kind: ServiceKind::Http,
            owner: key,
            metadata: BTreeMap::from([("about".to_owned(), "a text".to_owned())]),
            sequence: 7,
            issued_at: NOW,
            ttl_s: 600,
            objective: Objective::Latency,
            allowed: vec![NodeId([1; 8]), NodeId([2; 8])],
            withdrawn: false,
        };
        let delegated = Delegation {
            name: record.name.clone(),
            provider: author(2).public(),
            expires_at: NOW + Duration::from_secs(3_600),
        };
        let delegated = Signed::seal(&one, &delegated);
        let copy = ServiceRecord { delegation: Some(delegated.clone()), ..record.clone() };
        let copy = Signed::seal(&author(2), &copy);
        let revocation = Revocation { key: author(3).public(), at: NOW };
        let grant = NameGrant { name: record.name.clone(), owner: key, at: NOW };
        let [link_state, service] = [Signed::seal(&one, &said), Signed::seal(&one, &record)];
        let [revoked, granted] = [Signed::seal(&root, &revocation), Signed::seal(&root, &grant)];
        let messages = vec![
            GossipMessage::LinkState(link_state.clone()),
            GossipMessage::Service(service.clone()),
            GossipMessage::Service(copy.clone()),
            GossipMessage::Revocation(revoked.clone()),
            GossipMessage::Grant(granted.clone()),
        ];
        let addresses = vec!["/ip4/192.0.2.1/tcp/4747".to_owned(); 3];
        let peers = vec![PeerAddresses { key, addresses: addresses.clone() }; 4];
        let (name, issuer, root) = ("home".to_owned(), key, root.public());
        let credential = one.credential.clone();
        let expires_at = NOW + Duration::from_secs(60);
        let invite =
            Invite { name: name.clone(), root, issuer, addresses, secret: [7; 16], expires_at };
        let certificate = Certificate { name, root, issuer, key, credential };
        let route = Route::new((1..=4).map(|byte| NodeId([byte; 8])).collect::<Vec<_>>()).unwrap();
        let header = |kind| Header::new(kind, TunnelId(5), 6, 7, route.clone());
        let receipt = Receipt { highest: 10, received: 9, marked: 1, packets: 8 }.encode();
        Self {
            gossip: messages.iter().map(wire::encode).collect(),
            bodies: vec![wire::encode(&said), wire::encode(&record), wire::encode(&grant)],
            sync: vec![
                wire::encode(&SyncResponse { peers, messages }),
                wire::encode(&SyncRequest { have: vec![[7; 8]; 20] }),
            ],
            credentials: vec![wire::encode(&one.credential), wire::encode(&service)],
            joins: vec![
                wire::encode(&JoinRequest::Redeem([7; 16])),
                wire::encode(&JoinRequest::Renew),
            ],
            answers: vec![
                wire::encode::<JoinResponse>(&Ok(one.credential.clone())),
                wire::encode::<JoinResponse>(&Err(NotLetIn::Expired)),
            ],
            tokens: vec![
                Token::Invite(invite).to_string(),
                Token::Certificate(certificate).to_string(),
            ],
            delegations: vec![delegation::to_text(&delegated), delegation::to_text(&service)],
            datagrams: vec![
                header(DatagramKind::Data).encode(&[1; 100]),
                header(DatagramKind::Receipt).encode(&receipt),
                header(DatagramKind::Reserve).encode(&message::encode_reserve(1_000)),
                receipt.to_vec(),
                message::Answer::Granted { position: 3 }.encode().to_vec(),
            ],
            signed: vec![link_state, service, copy, delegated, revoked, granted],
        }
    }
}

/// Makes inputs.
struct Maker(Pcg64Mcg);

impl Maker {
    fn up_to(&mut self, end: usize) -> usize {
        self.0.random_range(0..=end)
    }

    fn arbitrary(&mut self, longest: usize) -> Vec<u8> {
        (0..self.up_to(longest)).map(|_| self.0.random()).collect()
    }

    /// From a valid message, or from nothing.
    fn bytes(&mut self, valid: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = valid.choose(&mut self.0).unwrap().clone();
        match self.up_to(7) {
            0 => self.arbitrary(600),
            1 => {
                bytes.truncate(self.up_to(bytes.len()));
                bytes
            }
            2 => [bytes, self.arbitrary(20)].concat(),
            // The head of one, the tail of another.
            3 => {
                let other = valid.choose(&mut self.0).unwrap();
                let (head, tail) = (self.up_to(bytes.len()), self.up_to(other.len()));
                [&bytes[..head], &other[tail..]].concat()
            }
            // A length or number that is far too large.
            4 => {
                let at = self.up_to(bytes.len());
                let digits = self.up_to(9);
                let number = [vec![0xff; digits], vec![self.0.random_range(0..0x80)]].concat();
                let replaced = (at + self.up_to(2)).min(bytes.len());
                bytes.splice(at..replaced, number);
                bytes
            }
            // One part over and over.
            5 => {
                let (from, length) = (self.up_to(bytes.len()), self.up_to(40));
                let part = bytes[from..(from + length).min(bytes.len())].to_vec();
                bytes.splice(from..from, part.repeat(self.up_to(30)));
                bytes
            }
            _ => {
                for _ in 0..=self.up_to(3) {
                    let at = self.up_to(bytes.len().saturating_sub(1));
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte ^= 1 << self.0.random_range(0..8);
                    }
                }
                bytes
            }
        }
    }

    fn text(&mut self, valid: &[String]) -> String {
        let valid: Vec<Vec<u8>> = valid.iter().map(|text| text.as_bytes().to_vec()).collect();
        String::from_utf8_lossy(&self.bytes(&valid)).into_owned()
    }
}

/// Decodes; what comes out was in the bytes, so it is no longer than they are when encoded again.
fn round_trip<T: Serialize + DeserializeOwned>(bytes: &[u8], limit: usize) -> Option<T> {
    let decoded = wire::decode::<T>(bytes, limit).ok()?;
    let again = wire::encode(&decoded).len();
    assert!(again <= bytes.len(), "{again} bytes out of {}: {bytes:?}", bytes.len());
    Some(decoded)
}

/// Opens something signed as everything that it could be; only what somebody has signed opens.
fn open(signed: &Signed, valid: &[Signed]) {
    let opens = [
        signed.open::<LinkStateAdvertisement>().is_ok(),
        signed.open::<ServiceRecord>().is_ok(),
        signed.open::<Revocation>().is_ok(),
        signed.open::<NameGrant>().is_ok(),
        signed.open::<Delegation>().is_ok(),
    ];
    let was_said = |known: &Signed| known.body == signed.body && known.key == signed.key;
    assert!(!opens.contains(&true) || valid.iter().any(was_said), "{signed:?}");
}

fn engine() -> Engine {
    let key = SigningKey::from_bytes(&[2; 32]);
    let root = SigningKey::from_bytes(&[9; 32]);
    let public = PublicKey(key.verifying_key().to_bytes());
    let network = NetworkState::found(&root, "home", &public, NOW);
    Engine::new(EngineConfig { root: Some(root), ..EngineConfig::new(key, network) }, NOW)
}

/// Hands it to the engine as the network would, and returns how long what it says is (bytes).
fn hand(engine: &mut Engine, input: Input) -> usize {
    engine.handle(NOW, input);
    let outputs = std::iter::from_fn(|| engine.poll_output());
    let length = |output| match output {
        Output::JoinAnswer { bytes, .. } | Output::SyncResponse { bytes, .. } => bytes.len(),
        Output::Publish(bytes) => bytes.len(),
        _ => 0,
    };
    outputs.map(length).sum()
}

/// Peak sizes of this process (MiB): of its address space and of its memory.
fn peaks() -> [u64; 2] {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
    };
    [field("VmPeak:"), field("VmHWM:")]
}

fn feed(inputs: u64) {
    let (samples, mut maker) = (Samples::new(), Maker(Pcg64Mcg::seed_from_u64(SEED)));
    let mut engine = engine();
    let from = author(1).public();
    let (begun, before) = (Instant::now(), peaks());
    let mut decoded = 0_u64;
    for number in 0..inputs {
        decoded += u64::from(match number % KINDS {
            0 => {
                let bytes = maker.bytes(&samples.gossip);
                let message = round_trip::<GossipMessage>(&bytes, GOSSIP_BYTES_MAX);
                if let Some(
                    GossipMessage::LinkState(signed)
                    | GossipMessage::Service(signed)
                    | GossipMessage::Revocation(signed)
                    | GossipMessage::Grant(signed),
                ) = &message
                {
                    open(signed, &samples.signed);
                }
                // From another peer each time: one that sends only this would not be heard for long.
                let peer = NodeId(number.to_be_bytes());
                hand(&mut engine, Input::Gossip { token: number, from: peer, bytes });
                message.is_some()
            }
            1 => {
                let bytes = maker.bytes(&samples.bodies);
                let said = round_trip::<LinkStateAdvertisement>(&bytes, GOSSIP_BYTES_MAX);
                let record = round_trip::<ServiceRecord>(&bytes, GOSSIP_BYTES_MAX);
                round_trip::<NameGrant>(&bytes, GOSSIP_BYTES_MAX);
                round_trip::<Revocation>(&bytes, GOSSIP_BYTES_MAX);
                said.is_some() || record.is_some()
            }
            2 => {
                let bytes = maker.bytes(&samples.sync);
                let answer = SyncResponse::from_bytes(&bytes);
                if let Ok(answer) = &answer {
                    assert!(wire::encode(answer).len() <= bytes.len());
                }
                round_trip::<SyncResponse>(&bytes, SYNC_BYTES_MAX);
                round_trip::<SyncRequest>(&bytes, SYNC_BYTES_MAX);
                let (peer, token) = (NodeId(number.to_be_bytes()), number);
                let asked = Input::SyncRequested { token, from: peer, bytes: bytes.clone() };
                hand(&mut engine, asked);
                hand(&mut engine, Input::SyncReceived { from: from.node_id(), bytes });
                answer.is_ok()
            }
            3 => {
                let bytes = maker.bytes(&samples.credentials);
                let signed = round_trip::<Signed>(&bytes, GOSSIP_BYTES_MAX);
                signed.iter().for_each(|signed| open(signed, &samples.signed));
                let records = vec![bytes.clone()];
                hand(&mut engine, Input::DhtFound { request: number, records });
                let credential = round_trip::<Credential>(&bytes, GOSSIP_BYTES_MAX);
                if let Some(credential) = &credential {
                    let judged = engine.membership().roster().check(&from, credential, NOW);
                    let is_ours = author(1).credential == *credential;
                    assert!(judged.is_err() || is_ours, "{credential:?}");
                }
                signed.is_some() || credential.is_some()
            }
            4 => {
                let bytes = maker.bytes(&samples.joins);
                let request = round_trip::<JoinRequest>(&bytes, JOIN_BYTES_MAX);
                let said = hand(&mut engine, Input::JoinAsked { token: number, from, bytes });
                assert!(said <= JOIN_BYTES_MAX, "an answer of {said} bytes");
                request.is_some()
            }
            5 => {
                let bytes = maker.bytes(&samples.answers);
                let answer = round_trip::<JoinResponse>(&bytes, JOIN_BYTES_MAX);
                hand(&mut engine, Input::RenewalReceived { from: from.node_id(), bytes });
                answer.is_some()
            }
            6 => {
                let text = maker.text(&samples.tokens);
                let token = text.parse::<Token>();
                if let Ok(token) = &token {
                    assert!(token.to_string().len() <= text.len().min(TOKEN_BYTES_MAX));
                }
                token.is_ok()
            }
            7 => {
                let bytes = maker.bytes(&samples.datagrams);
                let (header, view) = (Header::decode(&bytes), HeaderView::parse(&bytes));
                assert_eq!(header.is_ok(), view.is_ok());
                if let Ok((header, payload)) = &header {
                    assert_eq!(header.encode(payload), bytes);
                }
                let payload = header.as_ref().map_or(&bytes[..], |(_, payload)| payload);
                let reserve = message::decode_reserve(payload).is_ok();
                let answer = message::Answer::decode(payload).is_ok();
                let receipt = Receipt::decode(payload).is_some() | Seen::decode(payload).is_some();
                header.is_ok() || reserve || answer || receipt
            }
            8 => {
                let text = maker.text(&samples.delegations);
                let read = delegation::from_text(&text);
                if let Ok((signed, _)) = &read {
                    open(signed, &samples.signed);
                    assert!(wire::encode(signed).len() <= DELEGATION_BYTES_MAX);
                }
                read.is_ok()
            }
            #[cfg(feature = "node")]
            9 => node::admission(&mut maker, &author(1).credential),
            #[cfg(feature = "node")]
            _ => node::control(&mut maker),
            #[cfg(not(feature = "node"))]
            _ => unreachable!("there are no other kinds"),
        });
    }
    let (after, took) = (peaks(), begun.elapsed());
    println!(
        "{inputs} inputs in {took:.1?}, {decoded} decoded; peak of the address space {} MiB, then \
         {}, of the memory {} MiB, then {}",
        before[0], after[0], before[1], after[1]
    );
    assert!(decoded > inputs / 20 && decoded < inputs * 19 / 20, "{decoded}: too dull");
    for (before, after) in before.into_iter().zip(after) {
        assert!(after <= before + GROWTH_MIB_MAX, "{before} MiB, then {after}");
    }
}

#[cfg(feature = "node")]
const KINDS: u64 = 11;
#[cfg(not(feature = "node"))]
const KINDS: u64 = 9;

/// In a process of its own, so that nothing else counts against its memory.
#[test]
#[ignore = "a million inputs; see the head of this file"]
fn alone() {
    let told = std::env::var(INPUTS).ok();
    feed(told.map_or(IN_ALL, |told| told.parse().unwrap()));
}

#[test]
fn no_decoder_panics_or_takes_more_memory_than_its_bound() {
    let output = Program::new(std::env::current_exe().unwrap())
        .args(["--exact", "decoders::alone", "--ignored", "--nocapture", "--test-threads=1"])
        .env(INPUTS, IN_CI.to_string())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{errors}");
}

/// What only a real node decodes.
#[cfg(feature = "node")]
mod node {
    use meshwise::api::types::{
        Certify, Delegate, Grant, Invite, OpenTunnel, Publish, Revoke, Trust,
    };
    use meshwise::config::EmulatedLink;
    use meshwise::net::admission::exchange::Frame;

    use super::{Credential, DeserializeOwned, Maker, RngExt, Serialize, wire};

    /// One step of admission.
    pub(super) fn admission(maker: &mut Maker, credential: &Credential) -> bool {
        let frames = [
            Frame::Hello(credential.clone()),
            Frame::Welcome(credential.clone()),
            Frame::Refused("no".repeat(50)),
            Frame::Ready,
        ];
        let bytes = maker.bytes(&frames.map(|frame| wire::encode(&frame)));
        let frame = Frame::decode(&bytes);
        if let Ok(frame) = &frame {
            assert!(wire::encode(frame).len() <= bytes.len());
        }
        frame.is_ok()
    }

    const BODIES: [&str; 7] = [
        r#"{"name":"a.local","to":"tcp://127.0.0.1:80","allow":["0011223344556677"],"ttl_s":60,"objective":"latency"}"#,
        r#"{"service":"a.local","listen":"127.0.0.1:0","via":["0011223344556677"],"objective":null,"paths":2,"reserve":100000}"#,
        r#"{"uses":3,"expires_s":3600,"addresses":["/ip4/192.0.2.1/tcp/4747"]}"#,
        r#"{"peer":"12D3KooWQ8bN6mJmJmJmJmJmJmJmJmJmJmJmJmJmJmJmJmJmJmJm"}"#,
        r#"{"name":"a.local","peer":"0011223344556677"}"#,
        r#"{"neighbour":"0011223344556677","delay_ms":5.0,"loss":0.1}"#,
        r#"{"a":[{"b":[1,2.5e300,-7,true,null,"\u0041"]}]}"#,
    ];

    /// A body of the control API.
    pub(super) fn control(maker: &mut Maker) -> bool {
        let body = match maker.up_to(20) {
            // Deeper than any stack.
            0 => {
                let part = ["[", "{\"name\":", "[{\"a\":"][maker.0.random_range(0..3)];
                part.repeat(maker.up_to(10_000)).into_bytes()
            }
            _ => maker.bytes(&BODIES.map(|body| body.as_bytes().to_vec())),
        };
        let _ = serde_json::from_slice::<serde_json::Value>(&body);
        let results = [
            json::<Publish>(&body),
            json::<OpenTunnel>(&body),
            json::<Invite>(&body),
            json::<Certify>(&body),
            json::<Revoke>(&body),
            json::<Grant>(&body),
            json::<Delegate>(&body),
            json::<Trust>(&body),
            json::<EmulatedLink>(&body),
        ];
        results.contains(&true)
    }

    /// What is left out has a default, so that it may grow by those.
    const DEFAULTS_BYTES: usize = 256;

    fn json<T: Serialize + DeserializeOwned>(body: &[u8]) -> bool {
        let Ok(decoded) = serde_json::from_slice::<T>(body) else { return false };
        let again = serde_json::to_vec(&decoded).unwrap().len();
        assert!(again <= 2 * body.len() + DEFAULTS_BYTES, "{again} bytes of {}", body.len());
        true
    }
}
