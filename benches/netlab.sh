#!/usr/bin/env bash
# meshwise and other overlays side by side in netlab, an emulator of networks in namespaces:
#   - throughput of one TCP stream of iperf3 over two relays (S-R1-R2-T, 1 ms a link, no rate limit), all systems
#     in turn, so many rounds; beside each, iperf3 straight from S to T in the same lab;
#   - on a diamond (60 and 90 ms), meshwise only: the outage after a silent cut of the link in use, with 20 messages
#     a second, and the time until a link that got 100 ms slower is left.
#
#   cargo build --release
#   sudo bash benches/netlab.sh PATH_OF_NETLAB
#
# "relay" is no overlay but what bounds those that forward in user space: a socat in each of the two relays, which copies
# bytes of TCP connections and does nothing else.
#
# By hand, as root. Needs Python 3, iproute2, iperf3, a built netlab, and whichever of yggdrasil, tincd, babeld, socat is
# to be measured in PATH. Everything runs in namespaces that netlab makes and deletes; each test is bounded, and ends its
# processes with it. Nothing is written into the checkout. On few cores it is a figure of CPU and scheduling: compare
# within one run only.
#
# Settings by environment: MESHWISE (the program), NETLAB (its program), SYSTEMS ("meshwise yggdrasil tinc babeld relay"),
# ROUNDS (3), STREAM_S (10), REPS of each diamond test (3; 0 for none), SETTLE_S (5), NETLAB_NICE (0: like all others),
# RESULTS (a folder that keeps all results as JSON), SCENARIO (throughput on another line, a path).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
checkout=${1:?usage: bash benches/netlab.sh PATH_OF_NETLAB}
export MESHWISE=${MESHWISE:-$here/../target/release/meshwise}
export NETLAB=${NETLAB:-$checkout/target/release/netlab}
export NETLAB_NICE=${NETLAB_NICE:-0}
systems=${SYSTEMS:-meshwise yggdrasil tinc babeld relay}
rounds=${ROUNDS:-3} stream_s=${STREAM_S:-10} reps=${REPS:-3} settle_s=${SETTLE_S:-5}

fail() { echo "netlab.sh: $1" >&2; exit 1; }
[ "$(id -u)" = 0 ] || fail "needs root, for network namespaces"
[ -x "$NETLAB" ] || fail "no $NETLAB; build netlab with 'cargo build --release', or set NETLAB"
[ -x "$MESHWISE" ] || fail "no $MESHWISE; run 'cargo build --release', or set MESHWISE"
command -v iperf3 > /dev/null || fail "iperf3 is not installed"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$checkout/drivers" "$checkout/scenarios" "$work/"
chmod -R u+w "$work"
cp "$here"/netlab/{meshwise,relay}.py "$work/drivers/systems/"
export NETLAB_WORK=$work/labs PYTHONDONTWRITEBYTECODE=1

# driver SYSTEM SECONDS ARGUMENTS...: a driver of netlab, ended after so many seconds; its lab ends with it. Again, up to
# three times in all, when iperf3 gave up at the start: version 3.12 takes a message that arrives in two pieces for an error.
driver() {
    local system=$1 seconds=$2 path=$PATH
    shift 2
    [ "$system" = meshwise ] && path=$here/netlab/bin:$PATH
    for try in 1 2 3; do
        [ "$try" = 1 ] || echo "  iperf3 gave up at the start, again" >&2
        PATH=$path timeout --kill-after=10 "$seconds" python3 "$@" --system "$system" --idle 0 --settle "$settle_s" \
            > "$work/log" 2>&1 && return
        grep -q "unable to receive control message" "$work/log" || break
    done
    tail -5 "$work/log" >&2
    echo "  $system failed: $1" >&2
}

present=()
for system in $systems; do
    case $system in
        tinc) program=tincd ;;
        relay) program=socat ;;
        *) program=$system ;;
    esac
    if [ "$system" = meshwise ] || command -v "$program" > /dev/null; then
        present+=("$system")
    else
        echo "$system is not installed: left out" >&2
    fi
done
for round in $(seq "$rounds"); do
    for system in "${present[@]}"; do
        echo "round $round of $rounds: $system" >&2
        driver "$system" $((240 + 3 * stream_s)) "$work/drivers/throughput.py" --reps 1 --seconds "$stream_s" \
            --tag "${system}_$round" ${SCENARIO:+--scenario "$SCENARIO"}
    done
done
if [ "$reps" -gt 0 ]; then
    echo "diamond, $reps repetitions of each test: meshwise" >&2
    driver meshwise $((reps * 240)) "$work/drivers/diamond.py" --reps "$reps" --phase 5 --limit 60 --stable 8 --watch 20
fi
[ -n "${RESULTS:-}" ] && mkdir -p "$RESULTS" && cp -r "$work/results/." "$RESULTS/"
python3 "$here/netlab/table.py" "$work/results" "${present[@]}"
