//! Whether services work: when each is checked, and what its checks say.
//!
//! - A service is checked at its provider ([`Vantage::Local`]) and, more seldom, through the tunnels
//!   of those that use it ([`Vantage::EndToEnd`]). The two are watched apart.
//! - The next check is due an interval after the last one ended; while a service is
//!   [`Health::Suspect`], a [`QUICKER`]th of it. Somebody's bad experience brings it forward, up to
//!   [`HURRY`] after the last.
//! - The first failure makes a service suspect, [`HealthPolicy::failures`] in a row make it
//!   [`Health::Down`]. One success clears a suspicion; a service that was down is suspect first and
//!   up after [`SUCCESSES`] in a row, so that one that flaps is not trusted at once.
//! - A check that nobody answers within [`ABANDONED`] has failed: whoever carried it out is gone.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::engine::overlay::ServiceKind;
use crate::engine::types::{NodeId, ServiceName, Timestamp};

/// Services that are watched at one time: all that a node may publish, and three times as many that it
/// uses.
pub const WATCHED_MAX: usize = 1_024;
/// How much sooner a suspect service is checked again.
pub const QUICKER: u32 = 5;
/// Shortest time between two checks of a service.
pub const SOONEST: Duration = Duration::from_millis(200);
/// Shortest time between a check and one that a bad experience brings forward: many may have it.
pub const HURRY: Duration = Duration::from_secs(1);
/// Successes in a row after which a service that was down is up.
pub const SUCCESSES: u32 = 2;
/// When a check counts as failed although nobody said so: later than any of them may take.
pub const ABANDONED: Duration = Duration::from_secs(60);
/// The default of [`HealthPolicy::interval_ms`].
pub const INTERVAL_MS: u64 = 5_000;
/// The default of [`HealthPolicy::failures`].
pub const FAILURES: u32 = 3;
/// How often a service is checked through a tunnel: each check opens a connection to its target.
pub const END_TO_END_INTERVAL: Duration = Duration::from_secs(30);
/// Longest interval: an hour (ms).
const INTERVAL_MS_MAX: u64 = 3_600_000;
/// Most failures that may be asked for.
const FAILURES_MAX: u32 = 100;
/// Longest path, expected text or command (bytes).
const TEXT_BYTES_MAX: usize = 4_096;
/// Weight of the newest response time in the smoothed one, as TCP has it (RFC 6298).
const SMOOTHING: f64 = 0.125;

/// How a service is checked at its provider. Files and the control API have it as text; it never
/// leaves the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HealthCheck {
    /// Not at all.
    None,
    /// Its target accepts a connection.
    Tcp,
    /// Its target answers a request.
    Http {
        /// What is asked for; begins with a slash.
        path: String,
        /// The status that is right; any from 200 to 399 when it is not given.
        #[serde(default)]
        status: Option<u16>,
        /// What the body has to contain.
        #[serde(default)]
        contains: Option<String>,
    },
    /// A command of the shell ends with 0.
    Command(String),
}

/// How a service is checked, how often, and how many failures it takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HealthPolicy {
    /// How.
    pub check: HealthCheck,
    /// Time between two checks (ms), 200 to an hour.
    pub interval_ms: u64,
    /// Failures in a row after which it is down, 1 to 100.
    pub failures: u32,
}

impl HealthPolicy {
    /// What is done when nobody says how.
    pub fn of_kind(kind: ServiceKind) -> Self {
        let check = match kind {
            ServiceKind::Tcp | ServiceKind::Http => HealthCheck::Tcp,
            ServiceKind::Udp => HealthCheck::None,
        };
        Self { check, interval_ms: INTERVAL_MS, failures: FAILURES }
    }

    /// Checks the bounds, and that a service of this kind can be checked so.
    ///
    /// # Errors
    /// One line: what is wrong, and what to write.
    pub fn fits(&self, kind: ServiceKind) -> Result<(), String> {
        let least = SOONEST.as_millis() as u64;
        if !(least..=INTERVAL_MS_MAX).contains(&self.interval_ms) {
            let ms = self.interval_ms;
            return Err(format!("a check every {ms} ms is impossible; choose 200ms to 1h"));
        }
        if !(1..=FAILURES_MAX).contains(&self.failures) {
            let failures = self.failures;
            return Err(format!(
                "{failures} failures are no threshold; choose 1 to {FAILURES_MAX}"
            ));
        }
        let short = |text: &str| (1..=TEXT_BYTES_MAX).contains(&text.len());
        let printable = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
        match &self.check {
            HealthCheck::Tcp | HealthCheck::Http { .. } if kind == ServiceKind::Udp => {
                Err("a UDP service accepts no connection; check it by cmd:... or none".into())
            }
            HealthCheck::Http { path, .. } if !path.starts_with('/') || !printable(path) => {
                Err(format!("'{path}' is no path; write http:/ or http:/health"))
            }
            HealthCheck::Http { status: Some(status), .. } if !(100..=599).contains(status) => {
                Err(format!("{status} is no status of HTTP; write 100 to 599"))
            }
            HealthCheck::Http { path, contains, .. }
                if !short(path) || !contains.as_deref().is_none_or(short) =>
            {
                Err(format!("the path and the text have 1 to {TEXT_BYTES_MAX} bytes"))
            }
            HealthCheck::Command(command) if !short(command.trim()) => {
                Err(format!("the command has 1 to {TEXT_BYTES_MAX} bytes"))
            }
            _ => Ok(()),
        }
    }
}

/// From where a service is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Vantage {
    /// At its provider.
    Local,
    /// Through a tunnel of this node.
    EndToEnd,
}

impl Vantage {
    /// The name used in the store and the control API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::EndToEnd => "end-to-end",
        }
    }
}

/// What is known of a service, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Health {
    /// Its last check succeeded.
    Up,
    /// It fails, or does no longer, and it is not sure yet.
    Suspect,
    /// It does not work.
    Down,
}

impl Health {
    /// The name used by the control API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Suspect => "suspect",
            Self::Down => "down",
        }
    }
}

/// Why a check failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckFailure {
    /// Nothing answered in time.
    TimedOut,
    /// Nothing accepts connections there.
    Refused,
    /// The connection broke, or what came is no HTTP.
    Broken,
    /// Another status than expected.
    Status,
    /// The body does not contain what it should.
    Body,
    /// The command could not be run, or ended with another code than 0.
    Command,
    /// No route to the provider, or it does not answer.
    Unreachable,
    /// The provider does not let this node use it.
    NotAllowed,
}

impl CheckFailure {
    /// The name used in the store and the control API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TimedOut => "timed-out",
            Self::Refused => "refused",
            Self::Broken => "broken",
            Self::Status => "status",
            Self::Body => "body",
            Self::Command => "command",
            Self::Unreachable => "unreachable",
            Self::NotAllowed => "not-allowed",
        }
    }
}

/// What is checked, and from where.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Subject {
    /// The service.
    pub name: ServiceName,
    /// Who provides it.
    pub provider: NodeId,
    /// From where.
    pub vantage: Vantage,
}

/// What the checks of a service say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Checked {
    /// How it is.
    pub health: Health,
    /// Smoothed time that a check takes (ms); `None` before the first success.
    pub response_ms: Option<f64>,
    /// Why the last check failed; `None` when it succeeded.
    pub failure: Option<CheckFailure>,
    /// When the last check ended.
    pub at: Timestamp,
    /// Since when it has this health.
    pub since: Timestamp,
}

/// A check that ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    /// What was checked.
    pub subject: Subject,
    /// When it began.
    pub began_at: Timestamp,
    /// What is known now.
    pub now: Checked,
    /// Whether its health is another than before; also by the first check.
    pub changed: bool,
}

#[derive(Clone, Debug)]
struct Watched {
    interval: Duration,
    threshold: u32,
    due_at: Timestamp,
    /// The check under way, and when it began.
    under_way: Option<(u64, Timestamp)>,
    failures: u32,
    /// Successes in a row, and how many it needs until it is up.
    successes: u32,
    needed: u32,
    known: Option<Checked>,
}

/// Watches services. See the module documentation for the rule.
#[derive(Clone, Debug, Default)]
pub struct ServiceMonitor {
    watched: BTreeMap<Subject, Watched>,
    checks: BTreeMap<u64, Subject>,
    next_check: u64,
}

impl ServiceMonitor {
    /// Watches a service from now on; what is known of one that is watched already stays. Returns
    /// false when [`WATCHED_MAX`] others are.
    pub fn watch(
        &mut self,
        subject: Subject,
        interval: Duration,
        threshold: u32,
        now: Timestamp,
    ) -> bool {
        if let Some(watched) = self.watched.get_mut(&subject) {
            (watched.interval, watched.threshold) = (interval, threshold);
            watched.due_at = watched.due_at.min(now + interval);
            return true;
        }
        if self.watched.len() >= WATCHED_MAX {
            return false;
        }
        let watched = Watched {
            interval,
            threshold,
            due_at: now,
            under_way: None,
            failures: 0,
            successes: 0,
            needed: 1,
            known: None,
        };
        self.watched.insert(subject, watched);
        true
    }

    /// No longer watches a service, and forgets it.
    pub fn unwatch(&mut self, subject: &Subject) {
        let watched = self.watched.remove(subject);
        if let Some((check, _)) = watched.and_then(|watched| watched.under_way) {
            self.checks.remove(&check);
        }
    }

    /// What is watched.
    pub fn subjects(&self) -> impl Iterator<Item = &Subject> + '_ {
        self.watched.keys()
    }

    /// What is known of a service; `None` before its first check has ended.
    pub fn known(&self, subject: &Subject) -> Option<&Checked> {
        self.watched.get(subject)?.known.as_ref()
    }

    /// Somebody had a bad experience: checks soon.
    pub fn hurry(&mut self, subject: &Subject, now: Timestamp) {
        if let Some(watched) = self.watched.get_mut(subject) {
            let soonest = watched.known.map_or(now, |known| now.max(known.at + HURRY));
            watched.due_at = watched.due_at.min(soonest);
        }
    }

    /// The checks that are due, which begin now, with the number under which each is to be answered.
    pub fn take_due(&mut self, now: Timestamp) -> Vec<(u64, Subject)> {
        let mut due = Vec::new();
        for (subject, watched) in &mut self.watched {
            if watched.under_way.is_none() && watched.due_at <= now {
                self.next_check += 1;
                watched.under_way = Some((self.next_check, now));
                self.checks.insert(self.next_check, subject.clone());
                due.push((self.next_check, subject.clone()));
            }
        }
        due
    }

    /// Checks that nobody answered.
    pub fn take_abandoned(&self, now: Timestamp) -> Vec<u64> {
        let under_way = self.watched.values().filter_map(|watched| watched.under_way);
        under_way.filter(|(_, at)| *at + ABANDONED <= now).map(|(check, _)| check).collect()
    }

    /// A check ended: the time that it took (µs), or why it failed. `None` when nobody waits for it
    /// any more.
    pub fn checked(
        &mut self,
        check: u64,
        result: Result<u64, CheckFailure>,
        now: Timestamp,
    ) -> Option<Ended> {
        let subject = self.checks.remove(&check)?;
        let watched = self.watched.get_mut(&subject)?;
        let (_, began_at) = watched.under_way.take()?;
        let before = watched.known;
        let health = match result {
            Ok(_) => {
                watched.failures = 0;
                watched.successes = watched.successes.saturating_add(1);
                if watched.successes >= watched.needed {
                    watched.needed = 1;
                    Health::Up
                } else {
                    Health::Suspect
                }
            }
            Err(_) => {
                watched.failures = watched.failures.saturating_add(1);
                watched.successes = 0;
                let was_down = before.is_some_and(|known| known.health == Health::Down);
                if was_down || watched.failures >= watched.threshold {
                    watched.needed = SUCCESSES;
                    Health::Down
                } else {
                    Health::Suspect
                }
            }
        };
        let mean = before.and_then(|known| known.response_ms);
        let newest = result.ok().map(|took_us| took_us as f64 / 1e3);
        let response_ms = match (mean, newest) {
            (Some(mean), Some(newest)) => Some(mean + SMOOTHING * (newest - mean)),
            (mean, newest) => newest.or(mean),
        };
        let changed = before.is_none_or(|known| known.health != health);
        let since = before.filter(|_| !changed).map_or(now, |known| known.since);
        let known = Checked { health, response_ms, failure: result.err(), at: now, since };
        watched.known = Some(known);
        let wait = match health {
            Health::Suspect => (watched.interval / QUICKER).max(SOONEST),
            Health::Up | Health::Down => watched.interval,
        };
        watched.due_at = now + wait;
        Some(Ended { subject, began_at, now: known, changed })
    }

    /// When something is due next.
    pub fn next_timeout(&self) -> Option<Timestamp> {
        let at = |watched: &Watched| match watched.under_way {
            Some((_, at)) => at + ABANDONED,
            None => watched.due_at,
        };
        self.watched.values().map(at).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(5);

    fn at(ms: u64) -> Timestamp {
        Timestamp(1_000_000_000 + ms * 1_000)
    }

    fn subject(index: usize) -> Subject {
        let name = format!("{index}.local").parse().unwrap();
        Subject { name, provider: NodeId([1; 8]), vantage: Vantage::Local }
    }

    /// A monitor of one service, and when its next check is due.
    struct One(ServiceMonitor, Timestamp);

    impl One {
        fn new() -> Self {
            let mut monitor = ServiceMonitor::default();
            assert!(monitor.watch(subject(0), INTERVAL, 3, at(0)));
            Self(monitor, at(0))
        }

        /// Runs the next check when it is due. Returns the health, and after how many ms the next one
        /// follows.
        fn check(&mut self, result: Result<u64, CheckFailure>) -> (Health, u64) {
            let Self(monitor, now) = self;
            assert_eq!(monitor.next_timeout(), Some(*now));
            let due = monitor.take_due(*now);
            assert_eq!(due.len(), 1);
            assert!(monitor.take_due(*now).is_empty(), "one at a time");
            let ended = monitor.checked(due[0].0, result, *now).unwrap();
            assert_eq!(monitor.checked(due[0].0, result, *now), None, "said twice");
            let next = monitor.next_timeout().unwrap();
            let wait = next.since(*now).as_millis() as u64;
            *now = next;
            (ended.now.health, wait)
        }
    }

    const FAILS: Result<u64, CheckFailure> = Err(CheckFailure::Refused);

    #[test]
    fn failures_make_it_suspect_then_down_and_it_comes_back_in_two_steps() {
        let mut one = One::new();
        assert_eq!(one.check(Ok(1_000)), (Health::Up, 5_000));
        assert_eq!(one.check(FAILS), (Health::Suspect, 1_000));
        assert_eq!(one.check(Ok(1_000)), (Health::Up, 5_000), "one success clears it");
        assert_eq!(one.check(FAILS), (Health::Suspect, 1_000));
        assert_eq!(one.check(FAILS), (Health::Suspect, 1_000));
        assert_eq!(one.check(FAILS), (Health::Down, 5_000));
        assert_eq!(one.check(FAILS), (Health::Down, 5_000));
        assert_eq!(one.check(Ok(1_000)), (Health::Suspect, 1_000));
        assert_eq!(one.check(FAILS), (Health::Suspect, 1_000), "it flaps");
        assert_eq!(one.check(Ok(1_000)), (Health::Suspect, 1_000));
        assert_eq!(one.check(Ok(1_000)), (Health::Up, 5_000));
    }

    #[test]
    fn the_response_time_is_smoothed_and_failures_leave_it() {
        let mut one = One::new();
        one.check(FAILS);
        assert_eq!(one.0.known(&subject(0)).unwrap().response_ms, None);
        one.check(Ok(8_000));
        one.check(Ok(16_000));
        assert_eq!(one.0.known(&subject(0)).unwrap().response_ms, Some(9.0));
        one.check(FAILS);
        let known = *one.0.known(&subject(0)).unwrap();
        assert_eq!((known.response_ms, known.failure), (Some(9.0), Some(CheckFailure::Refused)));
    }

    #[test]
    fn a_bad_experience_brings_the_check_forward_but_never_many() {
        let mut one = One::new();
        one.check(Ok(1));
        let (mut monitor, checked_at) = (one.0, at(0));
        monitor.hurry(&subject(0), checked_at);
        assert_eq!(monitor.next_timeout(), Some(checked_at + HURRY));
        monitor.hurry(&subject(0), checked_at + INTERVAL / 2);
        assert_eq!(monitor.next_timeout(), Some(checked_at + HURRY), "not later");
        monitor.hurry(&subject(1), checked_at);
    }

    #[test]
    fn what_is_watched_is_bounded_and_an_unanswered_check_has_failed() {
        let mut monitor = ServiceMonitor::default();
        for index in 0..WATCHED_MAX {
            assert!(monitor.watch(subject(index), INTERVAL, 3, at(0)));
        }
        assert!(!monitor.watch(subject(WATCHED_MAX), INTERVAL, 3, at(0)));
        assert!(monitor.watch(subject(0), 2 * INTERVAL, 3, at(0)), "again");
        let due = monitor.take_due(at(0));
        assert_eq!(due.len(), WATCHED_MAX);
        for index in 1..WATCHED_MAX {
            monitor.unwatch(&subject(index));
        }
        assert_eq!(monitor.checked(due[1].0, Ok(1), at(1)), None, "no longer watched");
        assert!(monitor.checks.len() <= 1 && monitor.subjects().eq([&subject(0)]));
        let left = monitor.next_timeout().unwrap();
        assert_eq!(left, at(0) + ABANDONED);
        let late = monitor.take_abandoned(left);
        assert_eq!(late.len(), 1);
        let ended = monitor.checked(late[0], Err(CheckFailure::TimedOut), left).unwrap();
        assert!(ended.changed && ended.now.health == Health::Suspect);
        assert_eq!((ended.began_at, ended.now.since), (at(0), left));
    }

    #[test]
    fn policies_out_of_bounds_are_refused_with_what_to_write() {
        let tcp = HealthPolicy::of_kind(ServiceKind::Tcp);
        assert_eq!(tcp.fits(ServiceKind::Http), Ok(()));
        assert!(tcp.fits(ServiceKind::Udp).unwrap_err().contains("UDP"));
        assert_eq!(HealthPolicy::of_kind(ServiceKind::Udp).fits(ServiceKind::Udp), Ok(()));
        let http = |path: &str, status, contains: Option<&str>| HealthCheck::Http {
            path: path.into(),
            status,
            contains: contains.map(Into::into),
        };
        let policy = |check| HealthPolicy { check, ..tcp.clone() };
        assert_eq!(policy(http("/a", Some(204), Some("ok"))).fits(ServiceKind::Http), Ok(()));
        for wrong in [
            policy(http("a", None, None)),
            policy(http("/a b", None, None)),
            policy(http("/", Some(99), None)),
            policy(http("/", None, Some(""))),
            policy(http("/", None, Some(&"a".repeat(5_000)))),
            policy(HealthCheck::Command(" ".into())),
            HealthPolicy { interval_ms: 1, ..tcp.clone() },
            HealthPolicy { failures: 0, ..tcp.clone() },
        ] {
            assert!(wrong.fits(ServiceKind::Http).is_err(), "{wrong:?}");
        }
    }
}
