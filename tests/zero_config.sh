#!/usr/bin/env bash
# Zero configuration: two nodes without any setting, in two network namespaces joined by a virtual
# cable, find each other by multicast DNS. Needs root; uses only the namespaces that it makes, ends
# the nodes that it starts, and gives up after 20 s.
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
number=0
for space in "$a" "$b"; do
    number=$((number + 1))
    ip -n "$space" addr add "10.77.0.$number/24" dev cable
    ip -n "$space" link set lo up
    ip -n "$space" link set cable up
    ip -n "$space" route add default dev cable
    ip netns exec "$space" "$program" node --data-dir "$folder/$number" >/dev/null 2>"$folder/$number.log" &
    pids+=("$!")
done
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
