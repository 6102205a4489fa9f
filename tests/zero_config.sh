#!/usr/bin/env bash
# Zero configuration: two nodes without any setting, in two network namespaces joined by a virtual
# cable. The first founds a network, the second joins it by an invitation; then both are started anew,
# the first under another address than the one in the invitation, and find each other by multicast DNS. Needs
# root; uses only the namespaces that it makes, ends the nodes that it starts, and gives up after 20 s.
set -euo pipefail
cd "$(dirname "$0")/.."
program="${1:-target/release/meshwise}"
[ -x "$program" ] || { echo "no $program; build it with 'cargo build --release'" >&2; exit 1; }
a="mw-a-$$" b="mw-b-$$" pids=()
folder=$(mktemp -d)
clean() {
    [ "${#pids[@]}" -eq 0 ] || { kill "${pids[@]}" 2>/dev/null || true; wait; }
    ip netns del "$a" 2>/dev/null || true
    ip netns del "$b" 2>/dev/null || true
    rm -rf "$folder"
}
trap clean EXIT

ip netns add "$a"
ip netns add "$b"
ip -n "$a" link add cable type veth peer name cable netns "$b"
for space in "$a" "$b"; do
    ip -n "$space" link set lo up
    ip -n "$space" link set cable up
    ip -n "$space" route add default dev cable
done
ip -n "$a" addr add 10.77.0.1/24 dev cable
ip -n "$b" addr add 10.77.0.2/24 dev cable

start() { # NAMESPACE NUMBER
    ip netns exec "$1" "$program" node --data-dir "$folder/$2" >/dev/null 2>>"$folder/$2.log" &
    pids+=("$!")
}
start "$a" 1
for _ in $(seq 100); do
    "$program" status --json --data-dir "$folder/1" 2>/dev/null | grep -q 10.77.0.1 && break
    sleep 0.1
done
"$program" network invite --data-dir "$folder/1" |
    ip netns exec "$b" "$program" network join - --data-dir "$folder/2"
kill "${pids[0]}" && wait "${pids[0]}" && pids=()
# What the second remembers of the first leads nowhere now: only multicast DNS is left.
ip -n "$a" addr del 10.77.0.1/24 dev cable
ip -n "$a" addr add 10.77.0.3/24 dev cable
ip -n "$a" route replace default dev cable
start "$a" 1
start "$b" 2
for tenth in $(seq 200); do
    peers=$("$program" peer list --json --data-dir "$folder/1" 2>/dev/null || true)
    if grep -q '"link": "up"' <<<"$peers"; then
        echo "found each other after $((tenth / 10)).$((tenth % 10)) s"
        exit 0
    fi
    sleep 0.1
done
echo "they did not find each other within 20 s" >&2
cat "$folder"/*.log >&2
exit 1
