"""Prints what netlab.sh measured: table.py FOLDER_OF_RESULTS SYSTEM..."""
import glob, json, statistics, sys

folder, systems = sys.argv[1], sys.argv[2:]


def load(pattern):
    return [json.load(open(path)) for path in sorted(glob.glob(f"{folder}/{pattern}"))]


def spread(xs, digits=0):
    if not xs:
        return "-"
    return f"{statistics.median(xs):,.{digits}f} ({min(xs):,.{digits}f}-{max(xs):,.{digits}f})"


rows = []
for system in systems:
    runs = [run for result in load(f"throughput_{system}_[0-9]*.json") for run in result["runs"]]
    of = lambda what: [run["mbit"] for run in runs if run["what"] == what]
    overlay, direct = of("overlay"), of("direct_1ms")
    share = [f"{a / b:.2f}" for a, b in [(statistics.median(overlay or [0]), statistics.median(direct or [0]))] if b]
    cores = [sum(v for k, v in run["cpu_cores"].items() if k != "netlab") for run in runs if run["what"] == "overlay"]
    # The emulator has one thread, which carries every packet: what it would carry if it had a core all the time.
    whole = [run["mbit"] / run["cpu_cores"]["netlab"] for run in runs if run["what"] == "overlay" and run["cpu_cores"]["netlab"]]
    rows.append((statistics.median(overlay or [0]), [system, spread(overlay), spread(direct), *(share or ["-"]), spread(cores, 2), spread(whole), str(len(overlay))]))
rows.sort(key=lambda row: -row[0])
head = ["over 2 relays", "Mbit/s: median (range)", "straight", "share", "cores of all nodes", "Mbit/s a core of the emulator", "n"]
table = [head] + [row for _, row in rows]
widths = [max(len(row[i]) for row in table) for i in range(len(head))]
for row in table:
    print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
best = max((rate for rate, row in rows if row[0] not in ("meshwise", "relay")), default=None)
ours = next((rate for rate, row in rows if row[0] == "meshwise"), None)
if best and ours:
    print(f"meshwise has {ours / best:.2f} of the fastest other one")
bound = next((rate for rate, row in rows if row[0] == "relay"), None)
if bound and ours:
    print(f"meshwise has {ours / bound:.2f} of what plain relays of TCP connections carry")
for test, key, what in (("failover", "outage_s", "outage after a silent cut, s"), ("degrade", "moved_after_s", "left the link that got 100 ms slower after, s")):
    for result in load(f"diamond_{test}_meshwise.json"):
        found = [r[key] for r in result["reps"] if r.get(key) is not None]
        print(f"diamond: {what}: {spread(found, 2)}, n={len(found)} of {len(result['reps'])}")
        for r in result["reps"]:
            if "error" in r or "suspect" in r:
                print(f"  repetition {r['rep']}: {r.get('error') or r.get('suspect')}")
