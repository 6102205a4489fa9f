//! How a name is looked up: in this node's own registry, else in the DHT.

use std::collections::BTreeMap;

use super::{Outputs, Services, event};
use crate::engine::event::{Answer, CommandError, Output, RequestId};
use crate::engine::lookups::Question;
use crate::engine::measure::EventKind;
use crate::engine::overlay::membership::Membership;
use crate::engine::overlay::registry::{self, RecordError};
use crate::engine::overlay::wire::{self, GOSSIP_BYTES_MAX, Signed};
use crate::engine::route::OverlayGraph;
use crate::engine::types::{ServiceName, Timestamp};

impl Services {
    pub(in crate::engine) fn resolve(
        &mut self,
        request: RequestId,
        name: ServiceName,
        from_dht: bool,
        graph: &OverlayGraph,
        now: Timestamp,
        outputs: &mut Outputs,
    ) {
        let known = self.providers(&name, graph, now);
        if !from_dht && !known.is_empty() {
            outputs.push_back(event(EventKind::Lookup, &name, now, now, true));
            let answer = Ok(Answer::Resolved { providers: known, from_gossip: true });
            outputs.push_back(Output::Answer { request, answer });
        } else if !from_dht && self.lookups.is_absent(&name, now) {
            outputs.push_back(event(EventKind::Lookup, &name, now, now, false));
            let answer = Err(CommandError::UnknownName(name));
            outputs.push_back(Output::Answer { request, answer });
        } else if self.lookups.is_full() {
            let error = CommandError::Busy("the look-ups under way");
            outputs.push_back(Output::Answer { request, answer: Err(error) });
        } else if self.lookups.ask(request, (name.clone(), from_dht), now) {
            outputs.push_back(Output::DhtGet { request, name });
        }
    }

    pub(in crate::engine) fn found(
        &mut self,
        search: RequestId,
        records: &[Vec<u8>],
        membership: &mut Membership,
        graph: &OverlayGraph,
        now: Timestamp,
        outputs: &mut Outputs,
    ) {
        let Some(question) = self.lookups.question(search).cloned() else { return };
        // Only what the DHT itself delivered counts as found there.
        let mut providers = BTreeMap::new();
        let mut foreign = None;
        for bytes in records {
            let Ok(signed) = wire::decode::<Signed>(bytes, GOSSIP_BYTES_MAX) else { continue };
            let verified = registry::verify(&signed, membership.roster(), now);
            let Some((record, _)) = verified.ok().filter(|(record, _)| record.name == question.0)
            else {
                continue;
            };
            match self.registry.accept(&signed, membership, now) {
                Ok(_) | Err(RecordError::Stale { .. }) => {
                    let mut living = self.registry.resolve(&record.name, now);
                    if let Some((_, newest)) = living.find(|(key, _)| *key == signed.key) {
                        providers.insert(signed.key, newest.clone());
                    }
                }
                Err(error) if error.is_foreign() && !record.withdrawn => foreign = Some(error),
                Err(_) => {}
            }
        }
        if providers.is_empty() {
            if self.lookups.retry(&question, now) {
                return;
            }
            let error = match foreign {
                Some(error) => CommandError::Refused(error),
                None => CommandError::UnknownName(question.0.clone()),
            };
            return self.not_found(&question, &error, now, outputs);
        }
        let providers = self.usable(&question.0, providers.into_iter(), graph, now);
        self.end(&question, &Ok(Answer::Resolved { providers, from_gossip: false }), now, outputs);
    }

    pub(super) fn not_found(
        &mut self,
        question: &Question,
        error: &CommandError,
        now: Timestamp,
        outputs: &mut Outputs,
    ) {
        if matches!(error, CommandError::UnknownName(_)) {
            self.lookups.set_absent(question.0.clone(), now);
        }
        self.end(question, &Err(error.clone()), now, outputs);
    }

    /// Answers all who wait for a question.
    fn end(
        &mut self,
        question: &Question,
        answer: &Result<Answer, CommandError>,
        now: Timestamp,
        outputs: &mut Outputs,
    ) {
        let Some(waiting) = self.lookups.end(question) else { return };
        for (request, started_at) in waiting.requests {
            outputs.push_back(event(
                EventKind::Lookup,
                &question.0,
                started_at,
                now,
                answer.is_ok(),
            ));
            outputs.push_back(Output::Answer { request, answer: answer.clone() });
        }
    }

    /// Gossip brought what somebody waits for.
    pub(super) fn answer_known(
        &mut self,
        name: &ServiceName,
        graph: &OverlayGraph,
        now: Timestamp,
        outputs: &mut Outputs,
    ) {
        let question = (name.clone(), false);
        let providers = self.providers(name, graph, now);
        if !providers.is_empty() {
            let answer = Ok(Answer::Resolved { providers, from_gossip: true });
            self.end(&question, &answer, now, outputs);
        }
    }
}
