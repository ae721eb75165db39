"""One rank on a clock, standing for all: it waits for what is due, posts, computes, like every rank in `cost`.

Resources are classes here (see `shifts`): the busiest of each class, first come first served. What is posted in one step is
there when the last of it is through, which is when the slowest rank has it. Ranks that share a resource drift apart while they
wait for latencies, and one's message passes while another waits; how far is between not at all and all the way, so half of the
latency is counted as idle time that others use.

Long rounds of equal steps settle into a rhythm. So a few steps are walked until it has settled, one period is measured, and the
rest is one multiplication: time for 100,000 steps is that for twenty.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from ringattn.planner.closed_form.rounds import Post, Round
from ringattn.planner.closed_form.shifts import Axis, Links
from ringattn.planner.cost import MERGE


class Arrival(NamedTuple):
    """What is taken in at one step: the last arrival, bytes of all buffers, bytes of sums that it is added to."""

    arrival: float = 0.0
    nbytes: int = 0
    added: int = 0


class Clock:
    """Walks rounds. `now` is the time, `busy` the seconds each class of resource was occupied, `peak` the most bytes held."""

    def __init__(self, links: Links, kernel_seconds: float, merged: int) -> None:
        """A tile takes `kernel_seconds`, and `merged` bytes of sums get its share."""
        self._links, self._topology = links, links.topology
        self._tile = kernel_seconds + self._topology.launch + MERGE * merged / self._topology.memory
        self.now, self.peak = 0.0, 0
        self.busy: dict[str, float] = defaultdict(float)
        self._free: dict[str, float] = {}  # when each class of resource has let all before through
        self._links_free: dict[tuple[Axis, int], float] = {}  # the same for links that only one pair of ranks uses
        self._step, self._flying = 0, 0
        self._arrivals: dict[int, Arrival] = {}

    def run(self, rounds: Iterable[Round]) -> None:
        """Walk all rounds, then take in whatever is still on its way."""
        for round_ in rounds:
            self._round(round_)
        for step in sorted(self._arrivals):
            self._receive(step)

    def _round(self, round_: Round) -> None:
        period = max((post.lag for post in round_.posts), default=1)
        settle = 2 * period + 2
        times = max(
            0, (round_.count - settle - period) // period - 1
        )  # the last period is walked: the next round sees it as it is
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
            # Every post is one message sent, which is packed, and one received.
            self.now += sum(2 * self._topology.launch + post.nbytes / self._topology.memory for post in round_.posts)
            self._post(round_.posts, n)
            self.peak = max(self.peak, self._flying + round_.held)
            self.now += round_.tiles * self._tile
            self._step += 1

    def _receive(self, step: int) -> None:
        arrival, nbytes, added = self._arrivals.pop(step, Arrival())
        self.now = max(self.now, arrival) + MERGE * added / self._topology.memory
        self._flying -= nbytes

    def _post(self, posts: tuple[Post, ...], n: int) -> None:
        """What is posted in step `n` of a round."""
        loads = [self._links.load(post.axis, post.offset) for post in posts]
        queued: dict[str, float] = defaultdict(float)
        since: dict[str, float] = {}
        for post, load in zip(posts, loads, strict=True):
            for resource, seconds, own in load.shared:
                queued[resource] += post.nbytes * seconds
                since[resource] = self.now - load.latency / 2 * (seconds > own)  # others' messages fill the gap
        for resource, seconds in queued.items():
            self._free[resource] = max(self._free.get(resource, 0.0), since[resource]) + seconds
        for post, load in zip(posts, loads, strict=True):
            through = max((max(self._free[r], self.now + own * post.nbytes) for r, _, own in load.shared), default=0.0)
            if load.alone:
                link = post.axis, (post.offset + n * post.slope) % post.axis.size
                through = self._links_free[link] = max(self._links_free.get(link, 0.0), self.now) + post.nbytes * load.alone
            arrival, nbytes, added = self._arrivals.get(self._step + post.lag, Arrival())
            arrival = max(arrival, through + load.latency)
            self._arrivals[self._step + post.lag] = Arrival(arrival, nbytes + 2 * post.nbytes, added + post.added)
            self._flying += 2 * post.nbytes

    def _state(self) -> tuple[int, float, dict[str, float], dict[int, float]]:
        return self._step, self.now, dict(self._free), {step: arrival.arrival for step, arrival in self._arrivals.items()}

    def _extrapolate(self, before: tuple[int, float, dict[str, float], dict[int, float]], times: int, period: int) -> None:
        """Everything that grew over the last period grows `times` more times."""
        step, now, free, arrival = before
        self._step += times * period
        self.now += times * (self.now - now)
        for resource, then in free.items():
            self._free[resource] += times * (self._free[resource] - then)
        moved = {}
        for number, round_ in self._arrivals.items():
            if number - period in arrival and number - period >= step:  # of this round; what was due later before it stays
                shift = times * (round_.arrival - arrival[number - period])
                moved[number + times * period] = round_._replace(arrival=round_.arrival + shift)
            else:
                moved[number] = round_
        self._arrivals = moved
