//! What a service is published with: what was asked for, and for what was left out, what the name was
//! published with before. An allow list that silently became "everybody" would be the worst of it.

use std::collections::BTreeMap;

use crate::engine::event::ServiceSpec;
use crate::engine::measure::HealthPolicy;
use crate::engine::overlay::{Objective, ServiceKind, Signed};
use crate::engine::types::{NodeId, ServiceName};

/// Time to live of a record that nobody chose (s).
pub const TTL_S: u32 = 600;

/// What was asked for; the rest is left out.
#[derive(Clone, Debug, Default)]
pub(super) struct Wanted {
    pub(super) allowed: Option<Vec<NodeId>>,
    pub(super) ttl_s: Option<u32>,
    pub(super) objective: Option<Objective>,
    pub(super) health: Option<HealthPolicy>,
    pub(super) delegation: Option<Signed>,
}

impl Wanted {
    /// The service to be published, and in words what is as it was `before`, where that is not what a new
    /// name would get.
    pub(super) fn beside(
        self,
        name: ServiceName,
        kind: ServiceKind,
        before: Option<ServiceSpec>,
    ) -> (ServiceSpec, Vec<String>) {
        let usual = ServiceSpec {
            name,
            kind,
            metadata: BTreeMap::new(),
            allowed: Vec::new(),
            ttl_s: TTL_S,
            objective: Objective::default(),
            delegation: None,
            health: HealthPolicy::of_kind(kind),
        };
        let mut base = before.unwrap_or_else(|| usual.clone());
        base.kind = kind;
        if base.health.fits(kind).is_err() {
            base.health = usual.health.clone();
        }
        let mut kept = Vec::new();
        if self.allowed.is_none() && base.allowed != usual.allowed {
            let nodes: Vec<String> = base.allowed.iter().map(ToString::to_string).collect();
            kept.push(format!("only {} may connect", nodes.join(" ")));
        }
        if self.ttl_s.is_none() && base.ttl_s != usual.ttl_s {
            kept.push(format!("time to live {} s", base.ttl_s));
        }
        if self.objective.is_none() && base.objective != usual.objective {
            kept.push(format!("objective {}", base.objective));
        }
        if self.health.is_none() && base.health != usual.health {
            kept.push("the check".into());
        }
        if self.delegation.is_none() && base.delegation.is_some() {
            kept.push("the delegation".into());
        }
        let service = ServiceSpec {
            allowed: self.allowed.unwrap_or(base.allowed),
            ttl_s: self.ttl_s.unwrap_or(base.ttl_s),
            objective: self.objective.unwrap_or(base.objective),
            health: self.health.unwrap_or(base.health),
            delegation: self.delegation.or(base.delegation),
            metadata: base.metadata,
            ..usual
        };
        (service, kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::measure::HealthCheck;

    #[test]
    fn what_is_left_out_is_as_it_was_and_said() {
        let name: ServiceName = "a.local".parse().unwrap();
        let (new, kept) = Wanted::default().beside(name.clone(), ServiceKind::Tcp, None);
        assert_eq!((new.ttl_s, new.objective, kept.len()), (TTL_S, Objective::default(), 0));
        let wanted = Wanted {
            allowed: Some(vec![NodeId([7; 8])]),
            objective: Some(Objective::Latency),
            health: Some(HealthPolicy { failures: 9, ..HealthPolicy::of_kind(ServiceKind::Tcp) }),
            ..Wanted::default()
        };
        let (first, kept) = wanted.beside(name.clone(), ServiceKind::Tcp, Some(new));
        assert!(kept.is_empty());
        let again = Wanted { ttl_s: Some(60), ..Wanted::default() };
        let (second, kept) = again.beside(name.clone(), ServiceKind::Tcp, Some(first.clone()));
        assert_eq!(second, ServiceSpec { ttl_s: 60, ..first.clone() });
        assert_eq!(kept.len(), 3, "{kept:?}");
        let all = Wanted { allowed: Some(Vec::new()), ..Wanted::default() };
        let (third, kept) = all.beside(name.clone(), ServiceKind::Udp, Some(first));
        assert!(third.allowed.is_empty(), "everybody, because it was said");
        assert_eq!(third.health.check, HealthCheck::None, "no check of TCP for UDP");
        assert_eq!(kept, ["objective latency"]);
    }
}
