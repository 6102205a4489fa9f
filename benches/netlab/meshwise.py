"""meshwise as netlab's drivers want it: one node a namespace, links over TCP, no setting but addresses.

meshwise carries connections to named services, not IP packets. So the first node of the lab (S) opens tunnels to
what a driver measures: iperf3 on TCP port 5201, and an echo of UDP messages for what the drivers call ping (`bin/ping`
beside this file, which has to come before the system's in PATH). A node's address is one of loopback on S, where
these tunnels listen. Option: program (path of meshwise; default: the one in PATH)."""
import json, os, shutil, subprocess, time
from systems import System, out

IPERF, ECHO = 5201, 7
PROGRAM = os.environ.get("MESHWISE", "meshwise")
PATIENCE = 60   # seconds that a service may take to be found


class Adapter(System):
    @classmethod
    def version(cls):
        return out(PROGRAM, "--version").strip()

    def start(self, node):
        self.program = self.options.get("program", PROGRAM)
        d = self.data(node)
        if not getattr(self, "members", False):
            self.members = True
            self.found()
        tcp = lambda n: f"/ip4/{self.lab.ip(n)}/tcp/4747"
        dial = [tcp(b) for a, b in self.links if a == node]
        with open(f"{d}/meshwise.toml", "w") as f:
            f.write(f"[network]\nlisten = {json.dumps([tcp(node)])}\nbootstrap = {json.dumps(dial)}\nmdns = false\n[entry]\nsocks = \"\"\n")
        self.spawn(node, [self.program, "node", "--config", f"{d}/meshwise.toml", "--data-dir", d])

    def found(self):
        """Makes all nodes members of one network, over loopback and before the lab counts: in it, most of them cannot
        reach the one that lets them in."""
        source, *others = self.lab.nodes
        for node in (source, *others):
            shutil.rmtree(self.data(node), ignore_errors=True)
            os.makedirs(self.data(node))
        issuer = subprocess.Popen([self.program, "node", "--data-dir", self.data(source), "--listen", "/ip4/127.0.0.1/tcp/0",
                                   "--no-mdns", "--socks", ""], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        said = lambda node, *words: out(self.program, *words, "--data-dir", self.data(node), check=True)
        try:
            until = time.time() + PATIENCE
            while True:
                try:
                    token = json.loads(said(source, "network", "invite", "--uses", str(len(others)), "--json"))["token"]
                    break
                except Exception:
                    if time.time() > until:
                        raise
                    time.sleep(0.2)
            for node in others:
                said(node, "network", "join", token)
        finally:
            issuer.terminate()
            issuer.wait()

    def data(self, node):
        return os.path.join(self.dir, node)

    def address(self, node):
        """Publishes on `node` and opens the tunnels of S, the first time."""
        a, b, c, d = self.lab.ip(node).split(".")
        address = f"127.{b}.{c}.{d}"
        self.open = getattr(self, "open", set())
        if node not in self.open:
            self.open.add(node)
            # Not one of `procs`, which are the nodes of the system.
            self.lab.popen(node, ["ping", "--serve", f"127.0.0.1:{ECHO}"])
            source = next(iter(self.lab.nodes))
            for kind, name, port in (("tcp", "iperf", IPERF), ("udp", "echo", ECHO)):
                name = f"{name}-{node.lower()}.local"
                # A check would be the one connection that the driver's iperf3 serves.
                self.say(node, "service", "publish", name, "--to", f"{kind}://127.0.0.1:{port}", "--check", "none")
                self.say(source, "tunnel", "open", name, "--listen", f"{address}:{port}")
        return address

    def say(self, node, *words):
        """A command to a node, again until it succeeds: names take a moment to get around."""
        until = time.time() + PATIENCE
        while True:
            try:
                return self.lab.run(node, [self.program, *words, "--data-dir", self.data(node)])
            except RuntimeError:
                if time.time() > until:
                    raise
                time.sleep(0.2)
