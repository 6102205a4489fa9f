//! What `meshwise status` says of the words under which a node counts drops and what went wrong: most
//! are no fault, and a word alone does not tell.

/// What a word of the counters means; `None` of one that needs no more words.
pub(super) fn meaning(why: &str) -> Option<&'static str> {
    MEANINGS.iter().find(|(word, _)| *word == why).map(|(_, meaning)| *meaning)
}

/// In alphabetical order.
const MEANINGS: &[(&str, &str)] = &[
    ("admission-foreign", "a node of another network answered where this one looked for its own"),
    ("broken-not-believed", "a relay said that a route is broken, and could not know"),
    ("command-queue-full", "the node did not keep up with itself"),
    ("event-queue-full", "the node did not keep up with what its data plane told it"),
    ("forged", "wrong tag: somebody on the way changed or made it"),
    ("gossip-queue-full", "more gossip than the node could take"),
    ("inbound-queue-full", "tunnels that end here did not keep up; QUIC sends again"),
    ("malformed", "no datagram of this version"),
    ("misaddressed", "its route says that it belongs elsewhere"),
    ("no-link", "the next node of its route is no neighbour (any more)"),
    ("no-route", "a tunnel had something to send and no route"),
    ("not-for-this-node", "of a tunnel that is not open"),
    ("probe-rate", "probes beyond what is answered to one neighbour"),
    ("relay-rate", "beyond what the settings let one neighbour have passed on ([relay] rate)"),
    ("replayed", "it was here before"),
    ("resend-queue-full", "more was under way on a lost route than is kept"),
    ("route-left-too-early", "a route that was left as silent was only slow"),
    ("route-silent", "no loss: a route in use fell silent and was left"),
    ("route-starves", "no loss: a route in use answered, delivered nothing and was left"),
    ("socks-malformed", "a program spoke no SOCKS5 to the proxy; with curl: --proxy socks5h://"),
    ("stream-stalled", "a program did not read what came for it"),
    ("too-many-lanes", "a neighbour opened more than it may"),
    ("too-many-tunnels", "more callers than this node serves"),
    ("udp-too-large", "a UDP payload that fits no packet of its tunnel"),
    ("unasked-probe-answer", "it came too late, or over another way"),
    ("unproved-queue-full", "more packets that prove nothing than may wait: a flood of handshakes"),
    ("untagged", "without a tag, where one is needed"),
    ("wrong-neighbour", "who sent it is not the node before this one on its route"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_are_in_order_and_each_has_one_meaning() {
        assert!(MEANINGS.is_sorted_by(|(one, _), (next, _)| one < next));
        assert!(meaning("route-silent").unwrap().starts_with("no loss"));
        assert_eq!(meaning("a word of a later version"), None);
    }
}
