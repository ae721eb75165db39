"""Failures where waiting returns at once, as with NCCL: the rank that failed is named, not those that wait behind it."""

import json
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_faults
import torch
import torch.distributed as dist
from spawn import run_ranks
from thirty import DEADLINE

from ringattn import attention, make_plan, shard
from ringattn.comm import collectives, p2p
from ringattn.faults import event_log, pending, watchdog
from ringattn.faults.pending import PendingTransfers, Posted

pytestmark = pytest.mark.slow

ATTEMPTS = 3  # a machine that runs other tests beside may hold the beats of a healthy process back for seconds
CUDA = torch.device("cuda", 0)


class Work:
    """A handle whose completion the test sets."""

    def __init__(self, complete: bool = False) -> None:
        self.complete, self.queries = complete, 0

    def is_completed(self) -> bool:
        self.queries += 1
        return self.complete

    def wait(self) -> bool:
        return True


@pytest.fixture
def group() -> Iterator[Any]:
    """A group that gives up after 30 s, in place of NCCL's."""
    backend = SimpleNamespace(options=SimpleNamespace(_timeout=timedelta(seconds=30)))
    yield SimpleNamespace(_get_backend=lambda device: backend)


@pytest.fixture
def safe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "_queries_are_safe", lambda device: True)


@pytest.mark.usefixtures("safe")
def test_the_oldest_that_is_not_complete_is_what_the_gpu_waits_for(group: Any) -> None:
    transfers, works, ended = PendingTransfers(), [Work() for _ in range(3)], []
    assert transfers.oldest() is None and transfers.seconds() == 0
    for n, work in enumerate(works):
        transfers.add((f"transfer {n}",), [Work(complete=True), work], group, CUDA, lambda n=n: ended.append(n))
    works[1].complete = True  # before the first
    for first in (0, 0):
        oldest = transfers.oldest()
        assert oldest is not None and oldest.doing == (f"transfer {first}",) and not ended
    time.sleep(0.02)
    assert transfers.seconds() >= 0.02
    works[0].complete = True
    oldest = transfers.oldest()
    assert oldest is not None and oldest.doing == ("transfer 2",) and ended == [0, 1] and transfers.seconds() < 0.02
    works[2].complete = True
    assert transfers.oldest() is None and ended == [0, 1, 2]


@pytest.mark.usefixtures("safe")
def test_it_is_given_up_before_the_backend_would_end_the_process(group: Any) -> None:
    now = time.monotonic()
    posted = Posted(("forward",), [Work()], group, CUDA, now, None)
    assert posted.deadline == now + 25
    group._get_backend(CUDA).options._timeout = timedelta(seconds=4)  # as a training loop may after its first steps
    assert posted.deadline == now + 2


@pytest.mark.usefixtures("safe")
def test_nothing_is_asked_while_a_graph_is_captured(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    transfers, before, within, after = PendingTransfers(), Work(), Work(), Work()
    transfers.add(("before",), [before], group, CUDA)
    monkeypatch.setattr(pending, "capturing", lambda device: True)
    transfers.add(("within",), [within], group, CUDA)
    assert transfers.oldest() is None and transfers.seconds() == 0 and not before.queries
    monkeypatch.setattr(pending, "capturing", lambda device: False)
    before.complete = True
    transfers.add(("after",), [after], group, CUDA)
    oldest = transfers.oldest()
    assert oldest is not None and oldest.doing == ("after",) and not within.queries, "what was captured has not run"


def test_where_asking_could_break_a_capture_nothing_is_asked(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "_queries_are_safe", lambda device: False)
    transfers, work = PendingTransfers(), Work()
    for _ in range(2):
        transfers.add(("forward",), [work], group, CUDA)
        assert transfers.oldest() is None
    assert not work.queries and not transfers._posted


def test_the_watching_thread_asks_in_its_own_capture_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    queries: list[object] = []

    class Runtime:
        @staticmethod
        def cudaThreadExchangeStreamCaptureMode(mode: Any) -> int:
            queries.append(mode._obj.value)
            return 0

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "set_device", queries.append)
    monkeypatch.setattr(pending.ctypes, "CDLL", lambda name: queries.append(name) or Runtime)
    assert pending._queries_are_safe(CUDA)
    assert queries == [CUDA, "libcudart.so.13", pending.THREAD_LOCAL]
    monkeypatch.setattr(pending.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert not pending._queries_are_safe(CUDA)


@pytest.mark.parametrize(
    "words",
    [
        "NCCL communicator was aborted on rank 1. Original reason for failure was: watchdog timeout",
        "NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited or there was a network error, NCCL version 2.28.9\n"
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
        "[Rank 2] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3, OpType=COALESCED) ran for 120001 ms",
        "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key '0'",
        "[127.0.0.1]:1 Connection closed by peer",
    ],
)
def test_errors_that_another_rank_has_caused_are_recognized_by_their_text(words: str) -> None:
    assert watchdog._caused_by_lost_peer(dist.DistBackendError(words))
    assert not watchdog._caused_by_lost_peer(ValueError(words)) and not watchdog._caused_by_lost_peer(
        RuntimeError("CUDA error: out of")
    )


def test_collectives_of_gpus_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    followed, tensor, event = [], SimpleNamespace(device=CUDA), SimpleNamespace(query=lambda: False)
    monkeypatch.setattr(collectives, "follow", lambda works, group, device: followed.append((works, device)))
    monkeypatch.setattr(collectives, "record_event", lambda device: event)
    for name in ("all_reduce", "all_gather"):
        monkeypatch.setattr(dist, name, lambda *tensors, group: None)
    collectives.all_reduce(tensor, None)
    assert not followed, "there is no watchdog"
    monkeypatch.setattr(collectives, "watchdog", lambda: watchdog)
    collectives.all_reduce(tensor, None)
    collectives.all_gather([tensor], tensor, None)
    assert followed == [([pending.StreamEvent(event)], CUDA)] * 2 and not followed[0][0][0].is_completed()


@pytest.mark.timeout(60 * ATTEMPTS)
@pytest.mark.parametrize(
    ("kind", "words", "within"),
    [
        # Two seconds until a rank looks for a dead one, a beat to do so, and a second and a half to read it from another.
        ("kill", ("has died", "its last heartbeat was"), 7.0),
        ("stop", ("has stalled",), DEADLINE + 3),
        ("sleep", ("has not come", "outside of transfers"), DEADLINE + 3),
        ("raise", ("failed", "MemoryError: no room for k"), 5.0),
    ],
)
def test_the_rank_that_failed_is_named_by_ranks_that_run_ahead(
    kind: str, words: tuple[str, ...], within: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_faults, "JOB", str(Path(__file__).parents[1] / "support" / "behind_job.py"))
    wrong = ["not tried"]
    for _ in range(ATTEMPTS):
        if wrong:
            (tmp_path / "fault").unlink(missing_ok=True)
            seconds, errors = test_faults.alone(kind, 2, tmp_path / "fault", test_faults.PLAIN)
            wrong = [problem for rank, err in errors.items() for problem in missing_error(rank, err, words)]
            wrong += [f"{seconds:.1f} s"] if seconds > within else []
    assert not wrong, wrong


def missing_error(rank: int, err: str, words: tuple[str, ...]) -> list[str]:
    """The stderr of a rank if it lacks the expected error; else nothing."""
    line = next((line for line in err.splitlines() if "will not end" in line), "")
    _, _, blamed = line.partition("will not end")
    good = (
        line.startswith(f"rank {rank}: in forward (token_ring") and "waiting for " in line,
        "rank 2 (" in blamed and all(word in blamed for word in words),
        not any(f"rank {other} (" in blamed for other in (0, 1, 3)),  # which wait, and are healthy
    )
    return [] if all(good) else [err]


class Event:
    """An event that a stream has reached a quarter of a second after the previous event."""

    count = 0

    def __init__(self) -> None:
        Event.count += 1
        self.number = Event.count

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        return 250.0 * (end.number - self.number)


def logs_of_asynchronous_passes(rank: int, folder: Path) -> None:
    """Passes whose transfers a stream waits for: their lines come from the watching thread."""
    event_log.begin(folder)
    watchdog.watch()
    p2p.waits_on_stream = lambda tensor: True
    p2p.record_event = lambda device, timed: Event()
    plan = make_plan(37, world=2, heads=2, head_dim=8, schedule="token_ring", topology="cpu")
    q = shard(torch.randn(1, 37, 2, 8), plan).requires_grad_()
    attention(q, q, q, plan).sum().backward()
    time.sleep(4 * watchdog.BEAT)


def test_a_pass_on_a_gpu_is_a_line_of_its_own_seconds(tmp_path: Path) -> None:
    run_ranks(2, logs_of_asynchronous_passes, tmp_path)
    for rank in range(2):
        _, *lines = [json.loads(line) for line in (tmp_path / f"rank{rank:05d}.jsonl").read_text().splitlines()]
        assert [line["name"].split()[0] for line in lines] == ["forward", "backward"]
        for line in lines:
            assert line["seconds"] == 0.25 and line["host_seconds"] > 0 and line["bytes_sent"] > 0
            assert not {"waited", "longest", "longest_seconds"} & set(line), "the host has waited for nothing"
