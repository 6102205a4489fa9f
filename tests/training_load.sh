#!/usr/bin/env bash
# What training costs the traffic: the latency of HTTP requests through a tunnel over one relay,
# (1) idle and (2) while a model is trained next to it as the node's schedule does it, in a child
# process (`model train --background`: Linux's idle class where `chrt` is installed, else the lowest
# priority), over and over on a store of nine simulated hours. The goal is a ratio of the two p99s of at most 1.5 on two cores.
#
#   bash tests/training_load.sh [PROGRAM]        default: target/release/meshwise
#
# Three nodes, an HTTP server and a client on loopback; all of it, the training too, on the first
# two cores that it may use. Eight phases of 8 s in the order i t t i i t t i, so that a drift of
# the machine weighs on both conditions alike; 40 requests of 1 KiB a second over 4 kept-alive
# connections, through the tunnel and, for comparison, straight to the server. The samples of a
# condition are pooled; the interval is the middle 95 % of a bootstrap over blocks of one second.
# Prints a table, and one line of JSON last. A figure of a busy machine says little: "busy cores"
# counts everything that ran, and other work shows in it when idle.
#
# Takes about 90 s. Needs curl and python3 (standard library only). Ends only what it started. The
# exit code is 0 when it could measure, whatever the ratio; `policy` is the class that the kernel says
# the training was in. Variables of the environment reach the
# training, so `POLARS_MAX_THREADS=1 bash tests/training_load.sh` tries that.
set -euo pipefail
cd "$(dirname "$0")/.."
program="${1:-target/release/meshwise}"
die() { echo "$*" >&2; exit 1; }
[ -x "$program" ] || die "no $program; build it with 'cargo build --release'"
for tool in curl python3; do
    command -v "$tool" >/dev/null || die "no $tool; install it, this script measures with it"
done
seconds=8 order="idle training training idle idle training training idle"
folder=$(mktemp -d) pids=()
clean() {
    [ "${#pids[@]}" -eq 0 ] || { kill "${pids[@]}" 2>/dev/null || true; wait; }
    rm -rf "$folder"
}
trap clean EXIT
trap 'exit 1' INT TERM HUP
ask() { local node="$1"; shift; timeout 10 "$program" "$@" --json --data-dir "$folder/$node"; }
# Reads one value of a JSON document: field NAME[.NAME...] <DOCUMENT
field() { python3 -c 'import json, sys
value = json.load(sys.stdin)
for name in sys.argv[1].split("."):
    value = value[int(name) if isinstance(value, list) else name]
print(value)' "$1"; }

cat >"$folder/serve.py" <<'PYTHON'
"""Sends back the body of each POST."""
import http.server, sys

class Echo(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    disable_nagle_algorithm = True

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
with open(sys.argv[1], "w") as file:
    print(server.server_port, file=file)
server.serve_forever()
PYTHON

cat >"$folder/measure.py" <<'PYTHON'
"""One phase. Appends one document: the latencies (ms) by second and path, and the busy cores."""
import http.client, json, os, socket, sys, threading, time

condition, seconds, tunnel, direct, out = sys.argv[1:]
seconds, rate, warm_up, connections, body = int(seconds), 40, 1, 4, b"x" * 1024

def connect(address):
    host, port = address.rsplit(":", 1)
    connection = http.client.HTTPConnection(host, int(port), timeout=5)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection

def run(address, first, samples, errors):
    try:
        open_ones = [connect(address) for _ in range(connections)]
        for number in range(rate * (warm_up + seconds)):
            due = first + number / rate
            wait = due - time.perf_counter()
            if wait > 0:
                time.sleep(wait)
            # A request that had to wait for the one before counts from when it was due.
            begun = time.perf_counter() if wait > 0 else due
            one = open_ones[number % connections]
            one.request("POST", "/", body)
            answer = one.getresponse()
            echoed = answer.read()
            ms = 1000 * (time.perf_counter() - begun)
            assert answer.status == 200 and echoed == body, f"status {answer.status}"
            second = number // rate - warm_up
            if second >= 0:
                samples[second].append(round(ms, 4))
    except Exception as error:
        errors.append(f"{address}: {error!r}")

def busy_ticks():
    cores, busy = {f"cpu{core}" for core in os.sched_getaffinity(0)}, 0
    for line in open("/proc/stat"):
        name, *ticks = line.split()
        if name in cores:
            ticks = [int(tick) for tick in ticks[:8]]
            busy += sum(ticks) - ticks[3] - ticks[4]
    return busy

first, errors, threads = time.perf_counter() + 0.2, [], []
paths = {"tunnel": [[] for _ in range(seconds)], "direct": [[] for _ in range(seconds)]}
for path, address, offset in [("tunnel", tunnel, 0), ("direct", direct, 0.5 / rate)]:
    threads.append(threading.Thread(target=run, args=(address, first + offset, paths[path], errors)))
    threads[-1].start()
time.sleep(first + warm_up - time.perf_counter())
before, since = busy_ticks(), time.perf_counter()
for thread in threads:
    thread.join()
busy = (busy_ticks() - before) / os.sysconf("SC_CLK_TCK") / (time.perf_counter() - since)
if errors:
    sys.exit("\n".join(errors))
with open(out, "a") as file:
    print(json.dumps({"condition": condition, "busy_cores": busy, **paths}), file=file)
PYTHON

cat >"$folder/report.py" <<'PYTHON'
"""The table and the line of JSON."""
import json, os, random, sys

samples, trainings, load = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
policy = sys.argv[4] or "unknown"
phases = [json.loads(line) for line in open(samples)]
chance = random.Random(0)

def quantile(blocks, share):
    pool = sorted(ms for block in blocks for ms in block)
    return pool[min(len(pool) - 1, int(share * len(pool)))]

result = {"trainings": trainings, "policy": policy, "load_before": load, "cores": len(os.sched_getaffinity(0))}
conditions = ["idle", "training"]
for condition in conditions:
    busy = [phase["busy_cores"] for phase in phases if phase["condition"] == condition]
    result[f"busy_cores_{condition}"] = round(sum(busy) / len(busy), 2)
row = "{:<8} {:<10} {:>9} {:>8} {:>8} {:>8} {:>8} {:>11}".format
print(row("PATH", "CONDITION", "REQUESTS", "P50 MS", "P90 MS", "P99 MS", "MAX MS", "BUSY CORES"))
for path in ["tunnel", "direct"]:
    blocks = {c: [b for p in phases if p["condition"] == c for b in p[path]] for c in conditions}
    figures = result[path] = {}
    for condition, of in blocks.items():
        p50, p90, p99, most = (quantile(of, share) for share in (0.5, 0.9, 0.99, 1))
        count = sum(map(len, of))
        figures[condition] = {"n": count, "p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "max_ms": most}
        texts = [f"{ms:.2f}" for ms in (p50, p90, p99, most)]
        print(row(path, condition, count, *texts, f"{result[f'busy_cores_{condition}']:.2f}"))
    ratio = lambda of, share: quantile(of["training"], share) / quantile(of["idle"], share)
    drawn = sorted(
        ratio({c: chance.choices(of, k=len(of)) for c, of in blocks.items()}, 0.99) for _ in range(1000))
    figures["ratio_p50"] = round(ratio(blocks, 0.5), 3)
    figures["ratio_p99"] = round(ratio(blocks, 0.99), 3)
    figures["ratio_p99_interval"] = [round(drawn[25], 3), round(drawn[974], 3)]
    low, high = figures["ratio_p99_interval"]
    print(f"{path:<8} training / idle: p50 {figures['ratio_p50']:.2f}, "
          f"p99 {figures['ratio_p99']:.2f} (95 % interval {low:.2f} to {high:.2f})")
result["quiet"] = result["busy_cores_idle"] < 0.5
result["within_goal"] = result["tunnel"]["ratio_p99"] <= 1.5
if not result["quiet"]:
    print("the machine was busy with other work: these figures say little, measure again")
print(json.dumps(result))
PYTHON

# Two cores for this shell and all that it starts.
python3 -c 'import os, sys
pid = int(sys.argv[1])
os.sched_setaffinity(pid, sorted(os.sched_getaffinity(pid))[:2])' $$
read -r load _ </proc/loadavg

echo "simulating nine hours to train on ..."
timeout 60 "$program" data sample --hours 9 --seed 7 --out "$folder/out" --keep "$folder/store" \
    >/dev/null 2>"$folder/sample.log" || { cat "$folder/sample.log" >&2; die "no store to train on"; }

python3 "$folder/serve.py" "$folder/port" &
pids+=("$!")
start() { # NAME [TOKEN]
    local name="$1" join=()
    [ "$#" -eq 1 ] || join=(--join -)
    mkdir "$folder/$name"
    # No training of its own.
    printf '[learning]\nretrain_s = 0\n' >"$folder/$name/meshwise.toml"
    "$program" node --config "$folder/$name/meshwise.toml" --data-dir "$folder/$name" --no-mdns \
        --listen /ip4/127.0.0.1/tcp/0 --socks "" ${join[@]+"${join[@]}"} <<<"${2:-}" \
        >/dev/null 2>"$folder/$name.log" &
    pids+=("$!")
}
# Waits until a node knows all three: joined NAME LINKS
joined() {
    local _
    for _ in $(seq 100); do
        if ask "$1" status 2>/dev/null | python3 -c 'import json, sys
status = json.load(sys.stdin)
sys.exit(not status["listening"] or status["links_up"] < int(sys.argv[1]))' "$2" 2>/dev/null; then
            return
        fi
        sleep 0.1
    done
    cat "$folder"/*.log >&2
    die "the nodes did not join within 10 s"
}
start relay
joined relay 0
token=$(timeout 10 "$program" network invite --uses 2 --data-dir "$folder/relay")
start source "$token"
start target "$token"
for name in relay source target; do joined "$name" 2; done
server="127.0.0.1:$(cat "$folder/port")"
ask target service publish echo.local --to "tcp://$server" >/dev/null
relay=$(ask relay status | field node)
for attempt in $(seq 50); do
    opened=$(ask source tunnel open echo.local --via "$relay" 2>"$folder/open.log") && break
    [ "$attempt" -lt 50 ] || { cat "$folder/open.log" >&2; die "no tunnel within 50 attempts"; }
    sleep 0.1
done
tunnel=$(field listen <<<"$opened")
[ "$(curl -fsS --max-time 10 --data ping "http://$tunnel/")" = ping ] || die "no echo through the tunnel"
carried() { ask relay status | field forwarded.bytes; }
before=$(carried)

# Trains until it is ended; each time a first model, so that each writes one.
train() {
    trap 'kill -KILL $(jobs -p) 2>/dev/null || true; wait 2>/dev/null; exit 0' TERM
    while rm -rf "$folder/store/models"; do
        "$program" model train --background --data-dir "$folder/store" \
            </dev/null >/dev/null 2>"$folder/train.log" &
        if [ ! -s "$folder/policy" ]; then
            sleep 0.2
            chrt --pid "$!" 2>/dev/null | sed -n 's/.*policy: //p' >"$folder/policy" || true
        fi
        wait "$!" || exit 1
        echo >>"$folder/trainings"
    done
}
: >"$folder/trainings"
number=0
for condition in $order; do
    number=$((number + 1))
    echo "phase $number of 8: $condition"
    if [ "$condition" = training ]; then
        train &
        trainer="$!"
        pids+=("$trainer")
    fi
    # Not in the foreground, where it would hold up the end of this script.
    python3 "$folder/measure.py" "$condition" "$seconds" "$tunnel" "$server" "$folder/samples" &
    pids+=("$!")
    wait "$!" || die "a request failed"
    unset 'pids[-1]'
    if [ "$condition" = training ]; then
        kill "$trainer" 2>/dev/null && wait "$trainer" || { cat "$folder/train.log" >&2; die "the training failed"; }
        unset 'pids[-1]'
    fi
done
[ $(($(carried) - before)) -ge $((number * seconds * 40 * 2048)) ] || die "the relay did not carry it all"
trainings=$(wc -l <"$folder/trainings")
[ "$trainings" -gt 0 ] || echo "no training was completed within a phase; only its beginning was measured"
python3 "$folder/report.py" "$folder/samples" "$trainings" "$load" \
    "$(cat "$folder/policy" 2>/dev/null)"
