#!/usr/bin/env bash
# Interoperability: a node of js-libp2p connects to a node of meshwise on loopback, passes identify and
# ping, is told why it may not join, joins with a certificate, and looks a service up in Kademlia. Needs
# Node.js 20 or newer and npm, which fetches what tests/js/package-lock.json names; takes about 15 s.
set -euo pipefail
cd "$(dirname "$0")/.."
program="$(realpath "${1:-target/release/meshwise}")"
[ -x "$program" ] || { echo "no $program; build it with 'cargo build --release'" >&2; exit 1; }
folder=$(mktemp -d)
node_pid=
clean() {
    [ -z "$node_pid" ] || { kill "$node_pid" 2>/dev/null || true; wait "$node_pid" || true; }
    rm -rf "$folder"
}
trap clean EXIT

cp tests/js/package.json tests/js/package-lock.json tests/js/*.mjs "$folder"
(cd "$folder" && npm ci --silent --no-audit --no-fund)
cat >"$folder/meshwise.toml" <<'END'
[network]
listen = ["/ip4/127.0.0.1/tcp/0"]
mdns = false
[entry]
socks = ""
END
"$program" node --config "$folder/meshwise.toml" --data-dir "$folder/data" \
    >"$folder/log" 2>&1 &
node_pid=$!
for _ in $(seq 100); do
    "$program" status --json --data-dir "$folder/data" 2>/dev/null | grep -q /tcp/ && break
    sleep 0.1
done
if ! timeout 60 node "$folder/interop.mjs" "$program" "$folder/data"; then
    cat "$folder/log" >&2
    exit 1
fi
