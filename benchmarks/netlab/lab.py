"""Hosts with real links, on one Linux machine: network namespaces joined by veth, shaped by tc, with real TCP between them.

    mesh     every directed pair of hosts has `mbit` of its own      one htb class per destination at each sender
    switch   every host has a port of `mbit` in and out              tbf at both ends of its cable
    nodes    two halves, each a mesh; between them one uplink        the mesh, and tbf at both ends of the cable between
    rails    two halves, each a mesh; every host has an uplink       one htb class at each end for all of the other half

Nothing leaves the machine: the namespaces have no route out. Needs root and iproute2 (`ip` and `tc`), and says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import AbstractContextManager
from dataclasses import dataclass

from ringattn import Topology

KINDS = ("mesh", "switch", "nodes", "rails")
PACKET = 8192  # bytes: the most that the kernel hands over at once; 64 kB, its own choice, is 10 ms of a link
BURST = "8kb"  # one such packet; less would throttle, more would let bursts pass unshaped: a message may be that short
UNSENT = 16384  # bytes of a connection that may wait for the shaper: what asks for data waits behind no more data than that
LATENCY = 2e-3  # seconds that a message takes beyond its bytes, two processes and a shaper included
GOODPUT = 0.94  # of the rate, what headers, and acknowledgements of what comes the other way, leave for the payload
UPLINK = 1000  # the htb class of all traffic that leaves the node
QUEUE = "5000ms"  # what a port may hold back before it drops: more than all windows together, as links of a machine do


@dataclass
class Lab(AbstractContextManager["Lab"]):
    """`with Lab("mesh", 4, mbit=50) as lab:` makes the hosts and takes them away again. Rates are in Mbit/s, per direction."""

    kind: str
    hosts: int
    mbit: float
    uplink_mbit: float | None = None
    prefix: str = "ra"

    def __enter__(self) -> Lab:
        if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc"))):
            raise SystemExit(
                "netlab makes network namespaces: run it as root, with iproute2 installed (apt-get install iproute2)"
            )
        if self.kind not in KINDS:
            raise SystemExit(f"netlab: kind {self.kind!r}; choose one of {', '.join(KINDS)}")
        if self.kind in ("nodes", "rails") and not self.uplink_mbit:
            raise SystemExit(f"netlab: {self.kind} need a rate for their uplinks")
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._remove()

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def topology(self, flops: float) -> Topology:
        """The links as the planner sees them; `flops` is what one rank computes at."""
        nodes = self.kind in ("nodes", "rails")
        share = max(1.0, self.hosts / (os.cpu_count() or 1))  # hosts on one core
        return Topology(
            f"netlab {self.kind}",
            "nodes" if nodes else self.kind,
            flops,
            link_latency=LATENCY,
            bandwidth=self.mbit * 1e6 / 8 * GOODPUT,
            node_size=self.hosts // 2 if nodes else None,
            uplink_latency=LATENCY,
            uplink_bandwidth=(self.uplink_mbit or 0) * 1e6 / 8 * GOODPUT,
            uplink_shared=self.kind == "nodes",
            launch=2e-4 * share,
            memory=6e9 / share,
        )

    def inside(self, host: int) -> list[str]:
        """Put this before a command to run it on `host`."""
        return ["ip", "netns", "exec", self._host(host)]

    def _host(self, host: int) -> str:
        return f"{self.prefix}-h{host}"

    @property
    def _core(self) -> str:
        return f"{self.prefix}-core"

    def _bridge(self, host: int) -> str:
        return "br1" if self.kind == "nodes" and host >= self.hosts // 2 else "br0"

    def _build(self) -> None:
        self._remove()
        _run("ip netns add", self._core)
        for bridge in ("br0", "br1"):
            self._in_core(f"ip link add {bridge} type bridge")
            self._in_core(f"ip link set {bridge} up")
        if self.kind == "nodes":
            self._in_core("ip link add up0 type veth peer name up1")
            for n in range(2):
                self._in_core(f"ip link set up{n} master br{n} up")
                self._in_core(f"tc qdisc add dev up{n} root tbf rate {self.uplink_mbit}mbit burst {BURST} latency {QUEUE}")
        for host in range(self.hosts):
            self._plug_in(host)

    def _plug_in(self, host: int) -> None:
        name, cable = self._host(host), f"p{host}"
        _run("ip netns add", name)
        _run(f"ip link add {cable} netns {self._core} type veth peer name eth0 netns {name}")
        self._in_core(f"ip link set {cable} gso_max_size {PACKET} master {self._bridge(host)} up")
        on_host = f"ip netns exec {name}"
        _run(f"{on_host} ip address add {self.address(host)}/24 dev eth0")
        _run(f"{on_host} ip link set eth0 gso_max_size {PACKET} up")
        _run(f"{on_host} ip link set lo up")
        # BBR, a default on some machines, mistakes the shaper for a slow path: 2 MB on every link at once took 0.58 s for 0.34.
        _run(f"{on_host} sysctl -q -w net.ipv4.tcp_congestion_control=reno")
        # Or whoever has been idle for long starts slowly: contenders take turns, and a training job is never idle that long.
        _run(f"{on_host} sysctl -q -w net.ipv4.tcp_slow_start_after_idle=0")
        _run(f"{on_host} sysctl -q -w net.ipv4.tcp_limit_output_bytes={UNSENT}")
        if self.kind == "switch":
            shape = f"root tbf rate {self.mbit}mbit burst {BURST} latency {QUEUE}"
            _run(f"{on_host} tc qdisc add dev eth0 {shape}")
            self._in_core(f"tc qdisc add dev {cable} {shape}")
            return
        self._shape(on_host, "eth0", host, "dst")
        if self.kind == "rails":
            self._shape(f"ip netns exec {self._core}", cable, host, "src")

    def _shape(self, where: str, device: str, host: int, end: str) -> None:
        """A class with a rate of its own for every peer, and with rails one for all peers beyond the uplink."""
        _run(f"{where} tc qdisc add dev {device} root handle 1: htb")
        for peer in range(self.hosts):
            apart = self.kind == "rails" and (peer < self.hosts // 2) != (host < self.hosts // 2)
            number = UPLINK if apart else peer + 10
            mbit = self.uplink_mbit if apart else self.mbit
            rate = f"htb rate {mbit}mbit ceil {mbit}mbit burst {BURST} cburst {BURST}"
            _run(f"{where} tc class replace dev {device} parent 1: classid 1:{number} {rate}")
            match = f"protocol ip parent 1: prio 1 u32 match ip {end} {self.address(peer)}/32"
            _run(f"{where} tc filter add dev {device} {match} flowid 1:{number}")

    def _in_core(self, command: str) -> None:
        _run(f"ip netns exec {self._core} {command}")

    def _remove(self) -> None:
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
        for name in listed:
            if name.startswith(f"{self.prefix}-"):
                _run("ip netns delete", name)


def _run(*words: str) -> None:
    ran = subprocess.run(" ".join(words).split(), capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"netlab: `{' '.join(words)}` failed: {ran.stderr.strip()}")
