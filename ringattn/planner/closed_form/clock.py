"""Simulates one rank on a clock, standing for all: it waits for arrivals, posts and computes, like every rank in `cost`.

Resources are classes here (see `shifts`): the busiest of each class, served in order. The messages of one step arrive when the
last of them is complete, which is when the slowest rank has its own. Ranks that share a resource drift apart while they wait
for latencies, so that the message of one passes while another waits; the extent is between not at all and completely, so half
of the latency is counted as idle time that others use.

Long rounds of equal steps become periodic. So a few steps are simulated until they have, one period is measured, and the rest
is one multiplication: 100,000 steps take the time of twenty.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from ringattn.planner.closed_form.rounds import Post, Round
from ringattn.planner.closed_form.shifts import Axis, Links
from ringattn.planner.cost import MERGE


class Arrival(NamedTuple):
    """What is received at one step: time of the last arrival, bytes of all buffers, bytes of sums that it is added to."""

    arrival: float = 0.0
    nbytes: int = 0
    added: int = 0


class Clock:
    """Runs rounds. `now` is the time, `busy` the seconds each class of resource was occupied, `peak` the most bytes held."""

    def __init__(self, links: Links, kernel_seconds: float, merged: int) -> None:
        """A tile takes `kernel_seconds`, and its result is added to `merged` bytes of sums."""
        self._links, self._topology = links, links.topology
        self._tile = kernel_seconds + self._topology.launch + MERGE * merged / self._topology.memory
        self.now, self.peak = 0.0, 0
        self.busy: dict[str, float] = defaultdict(float)
        self._free: dict[str, float] = {}  # when each class of resource is free
        self._links_free: dict[tuple[Axis, int], float] = {}  # the same for links of a single pair of ranks
        self._step, self._in_flight = 0, 0
        self._arrivals: dict[int, Arrival] = {}

    def run(self, rounds: Iterable[Round]) -> None:
        """Runs all rounds, then receives the messages still in flight."""
        for round_ in rounds:
            self._round(round_)
        for step in sorted(self._arrivals):
            self._receive(step)

    def _round(self, round_: Round) -> None:
        period = max((post.lag for post in round_.posts), default=1)
        settle = 2 * period + 2
        # The last period is simulated, so that the next round starts from its exact state.
        times = max(0, (round_.count - settle - period) // period - 1)
        if times > 1:
            self._simulate(round_, range(settle))
            before = self._state()
            self._simulate(round_, range(settle, settle + period))
            self._extrapolate(before, times, period)
            self._simulate(round_, range(settle + period + times * period, round_.count))
        else:
            self._simulate(round_, range(round_.count))
        for post in round_.posts:
            for resource, seconds, _ in self._links.load(post.axis, post.offset).shared:
                self.busy[resource] += round_.count * post.nbytes * seconds

    def _simulate(self, round_: Round, steps: range) -> None:
        for n in steps:
            self._receive(self._step)
            # Every post is one message sent, which is packed first, and one received.
            self.now += sum(2 * self._topology.launch + post.nbytes / self._topology.memory for post in round_.posts)
            self._post(round_.posts, n)
            self.peak = max(self.peak, self._in_flight + round_.buffer_bytes)
            self.now += round_.tiles * self._tile
            self._step += 1

    def _receive(self, step: int) -> None:
        arrival, nbytes, added = self._arrivals.pop(step, Arrival())
        self.now = max(self.now, arrival) + MERGE * added / self._topology.memory
        self._in_flight -= nbytes

    def _post(self, posts: tuple[Post, ...], n: int) -> None:
        """Posts the messages of step `n` of a round."""
        loads = [self._links.load(post.axis, post.offset) for post in posts]
        queued: dict[str, float] = defaultdict(float)
        since: dict[str, float] = {}
        for post, load in zip(posts, loads, strict=True):
            for resource, seconds, own in load.shared:
                queued[resource] += post.nbytes * seconds
                since[resource] = self.now - load.latency / 2 * (seconds > own)  # messages of other ranks fill the gap
        for resource, seconds in queued.items():
            self._free[resource] = max(self._free.get(resource, 0.0), since[resource]) + seconds
        for post, load in zip(posts, loads, strict=True):
            end = max((max(self._free[r], self.now + own * post.nbytes) for r, _, own in load.shared), default=0.0)
            if load.alone:
                link = post.axis, (post.offset + n * post.slope) % post.axis.size
                end = self._links_free[link] = max(self._links_free.get(link, 0.0), self.now) + post.nbytes * load.alone
            arrival, nbytes, added = self._arrivals.get(self._step + post.lag, Arrival())
            arrival = max(arrival, end + load.latency)
            self._arrivals[self._step + post.lag] = Arrival(arrival, nbytes + 2 * post.nbytes, added + post.added)
            self._in_flight += 2 * post.nbytes

    def _state(self) -> tuple[int, float, dict[str, float], dict[int, float]]:
        return self._step, self.now, dict(self._free), {step: arrival.arrival for step, arrival in self._arrivals.items()}

    def _extrapolate(self, before: tuple[int, float, dict[str, float], dict[int, float]], times: int, period: int) -> None:
        """Everything that grew over the last period grows `times` more times."""
        step, now, free, arrival = before
        self._step += times * period
        self.now += times * (self.now - now)
        for resource, then in free.items():
            self._free[resource] += times * (self._free[resource] - then)
        shifted = {}
        for number, item in self._arrivals.items():
            if number - period in arrival and number - period >= step:  # of this round; arrivals of earlier rounds stay
                shift = times * (item.arrival - arrival[number - period])
                shifted[number + times * period] = item._replace(arrival=item.arrival + shift)
            else:
                shifted[number] = item
        self._arrivals = shifted
