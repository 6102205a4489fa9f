"""What bounds any overlay that forwards in user space over TCP links: one socat in each relay of the line, which copies
bytes and does nothing else. No framing, no encryption, no routing, nothing at the ends. Its throughput only: S reaches T
at the address of the first relay."""
from systems import System, out

IPERF = 5201


class Adapter(System):
    @classmethod
    def version(cls):
        return next(line for line in out("socat", "-V").splitlines() if "version" in line).strip()

    def start(self, node):
        onwards = [b for a, b in self.links if a == node]
        if node == next(iter(self.lab.nodes)) or not onwards:
            return
        self.spawn(node, ["socat", "-b", "65536", f"TCP-LISTEN:{IPERF},fork,reuseaddr,nodelay",
                          f"TCP:{self.lab.ip(onwards[0])}:{IPERF},nodelay"])

    def address(self, node):
        return self.lab.ip(next(b for a, b in self.links if a == next(iter(self.lab.nodes))))
