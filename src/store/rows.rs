//! From the engine's values to rows of the store.

use rusqlite::{Connection, ErrorCode, params};
use serde::Serialize;

use super::{choices, decisions, peers, service_probes};
use crate::engine::measure::Sample;
use crate::engine::overlay::KnownPeer;
use crate::engine::predict::KnownChoice;
use crate::engine::route::Decision;

/// One value waiting to be written.
pub(super) enum Row {
    /// An observation.
    Sample(Sample),
    /// A choice of route, and how long it took to make (µs).
    Decision(Box<Decision>, u64),
    /// A choice that became known.
    Choice(Box<KnownChoice>),
    /// Who is connected.
    Peers(Vec<KnownPeer>),
}

/// Inserts all rows in one transaction and returns the errors of the rows that the schema
/// refused; those are skipped, because no later attempt would go better.
///
/// # Errors
/// Anything that a later attempt may survive (full disk, lock); then no row is written.
pub(super) fn insert(
    connection: &mut Connection,
    rows: &[Row],
) -> rusqlite::Result<Vec<rusqlite::Error>> {
    let transaction = connection.transaction()?;
    let mut refused = Vec::new();
    for row in rows {
        let written = match row {
            Row::Sample(sample) => insert_sample(&transaction, sample),
            Row::Decision(decision, calculation_us) => {
                insert_decision(&transaction, decision, *calculation_us)
            }
            Row::Choice(choice) => choices::keep(&transaction, choice).map(drop),
            Row::Peers(known) => peers::keep(&transaction, known),
        };
        match written {
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::ConstraintViolation) => {
                refused.push(error);
            }
            written => written?,
        }
    }
    transaction.commit()?;
    Ok(refused)
}

fn insert_sample(connection: &Connection, sample: &Sample) -> rusqlite::Result<()> {
    match sample {
        Sample::Probe { kind, route, sent_at, done_at, rtt_us } => {
            let sql = "INSERT INTO probe (kind, route, hops, sent_us, done_us, rtt_us)
                       VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
            connection.prepare_cached(sql)?.execute(params![
                kind.as_str(),
                route.to_string(),
                integer(route.hop_count() as u64),
                integer(sent_at.as_micros()),
                integer(done_at.as_micros()),
                rtt_us.map(integer),
            ])
        }
        Sample::LinkState { at, origin, neighbour, quality } => {
            let sql = "INSERT INTO link_state
                       (at_us, origin, neighbour, rtt_ms, jitter_ms, loss, bandwidth, utilisation)
                       VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
            connection.prepare_cached(sql)?.execute(params![
                integer(at.as_micros()),
                origin.to_string(),
                neighbour.to_string(),
                quality.map(|q| q.rtt_ms),
                quality.map(|q| q.jitter_ms),
                quality.map(|q| q.loss),
                quality.and_then(|q| q.bandwidth),
                quality.map(|q| q.utilisation),
            ])
        }
        Sample::Slice { at, neighbour, report } => {
            let sql = "INSERT INTO slice (at_us, neighbour, sent_bytes, sent_datagrams,
                       dropped_datagrams, busy_us, duration_us)
                       VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";
            connection.prepare_cached(sql)?.execute(params![
                integer(at.as_micros()),
                neighbour.to_string(),
                integer(report.sent_bytes),
                integer(report.sent_datagrams),
                integer(report.dropped_datagrams),
                integer(report.busy_us),
                integer(report.duration_us),
            ])
        }
        Sample::RouteSlice { at, tunnel, report } => {
            let sql = "INSERT INTO route_slice (at_us, tunnel, route, route_id, sent_datagrams,
                       received_datagrams, sent_bytes, marked_datagrams, rtt_us, back_sent,
                       back_received, duration_us)
                       VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)";
            connection.prepare_cached(sql)?.execute(params![
                integer(at.as_micros()),
                tunnel.0,
                report.route.to_string(),
                report.route_id,
                integer(report.sent),
                integer(report.received),
                integer(report.bytes),
                integer(report.marked),
                report.rtt_us.map(integer),
                integer(report.back_sent),
                integer(report.back_received),
                integer(report.duration_us),
            ])
        }
        Sample::ServiceProbe { subject, started_at, done_at, result } => {
            service_probes::keep(connection, subject, (*started_at, *done_at), *result)
        }
        Sample::Event { kind, subject, started_at, done_at, succeeded } => {
            let sql = "INSERT INTO event (kind, subject, started_us, done_us, succeeded)
                       VALUES (?1, ?2, ?3, ?4, ?5)";
            connection.prepare_cached(sql)?.execute(params![
                kind.as_str(),
                subject,
                integer(started_at.as_micros()),
                integer(done_at.as_micros()),
                succeeded,
            ])
        }
    }
    .map(|_| ())
}

fn insert_decision(
    connection: &Connection,
    decision: &Decision,
    calculation_us: u64,
) -> rusqlite::Result<()> {
    let chosen = decision.chosen.and_then(|index| decision.candidates.get(index));
    let destination = decision.destination.to_string();
    let at_us = integer(decision.at.as_micros());
    let keeps_features = decisions::keeps_features(connection, decision)?;
    let sql = "INSERT INTO decision (at_us, tunnel, destination, reason, changed, model_version,
               propensity, chosen_route, calculation_us, challenger_version, rule)
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)";
    connection.prepare_cached(sql)?.execute(params![
        at_us,
        decision.tunnel.map(|tunnel| tunnel.0),
        destination,
        decision.reason.as_str(),
        decision.changed,
        decision.model_version,
        decision.propensity(),
        chosen.map(|candidate| candidate.route.to_string()),
        integer(calculation_us),
        decision.challenger_version,
        text(&decision.ranking)?,
    ])?;
    let id = connection.last_insert_rowid();
    let sql = "INSERT INTO candidate (decision_id, rank, route, alive, chosen, score,
               baseline_score, predicted_ms, predicted_low_ms, predicted_high_ms,
               moving_average_ms, last_value_ms, features, challenger_ms, propensity,
               bound_ms)
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16)";
    let mut statement = connection.prepare_cached(sql)?;
    for (rank, candidate) in decision.candidates.iter().enumerate() {
        let forecast = &candidate.forecast;
        let interval_ms = forecast.learned().and_then(|prediction| prediction.interval_ms);
        statement.execute(params![
            id,
            integer(rank as u64),
            candidate.route.to_string(),
            candidate.alive,
            decision.chosen == Some(rank),
            candidate.score,
            candidate.baseline_score,
            forecast.learned().map(|prediction| prediction.latency_ms),
            interval_ms.map(|(low, _)| low),
            interval_ms.map(|(_, high)| high),
            forecast.moving_average.map(|prediction| prediction.latency_ms),
            forecast.last_value.map(|prediction| prediction.latency_ms),
            if keeps_features { features_text(&forecast.features) } else { "[]".into() },
            forecast.challenger.map(|prediction| prediction.latency_ms),
            candidate.propensity,
            candidate.bound_ms,
        ])?;
    }
    Ok(())
}

/// The features as a JSON array in schema order, each number in its shortest exact form.
fn features_text(features: &[f64]) -> String {
    serde_json::to_string(features).unwrap_or_else(|_| "[]".into())
}

/// JSON.
pub(super) fn text(value: &impl Serialize) -> rusqlite::Result<String> {
    let wrong = |error: serde_json::Error| rusqlite::Error::ToSqlConversionFailure(error.into());
    serde_json::to_string(value).map_err(wrong)
}

/// SQLite's integers are signed; nothing that is counted here comes near the limit.
pub(super) fn integer(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
