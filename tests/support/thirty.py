"""Thirty things that go wrong, what is asked of ringattn then, and the report of how many of them its tests have shown.

A test that shows a case is marked `case(number)`. At the end of a run that had such tests a table says, for each case, what was
seen and how long it took: from the fault to the end of the last survivor where that is what counts (the test records
"seconds"), else what the longest of its tests took. `--cases-report FILE` writes the table as Markdown.
"""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

DEADLINE = 5.0  # seconds that a rank waits for another, in these tests


@dataclass
class Case:
    """What happens, what is asked, and the seconds in which it is asked."""

    what: str
    asked: str
    within: float | None = None
    passed: int = 0
    bad: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    longest: float = 0.0

    @property
    def observed(self) -> str:
        return f"{self.bad[0]} ({len(self.bad)})" if self.bad else f"passed ({self.passed})" if self.passed else "not run"

    @property
    def time(self) -> str:
        return f"{max(self.seconds):.1f}" if self.seconds else f"{self.longest:.1f} (test)" if self.passed else ""


def cases() -> dict[int, Case]:
    """All thirty, as of docs/reliability.md."""
    named, stall = "all end and name the rank", DEADLINE + 3
    listed = (
        Case("SIGKILL in forward", named, 3),
        Case("SIGKILL in backward", named, 3),
        Case("SIGKILL in an all-to-all, and while gradients are summed", named, 3),
        Case("SIGKILL of rank 0, which hosts the store", "all end and name rank 0 or the store", stall),
        Case("SIGSTOP, with and without torchrun", "all others end and name it as stalled; it is killed", DEADLINE + 10),
        Case("an exception in a rank, torch.OutOfMemoryError too", "its text on all", 3),
        Case("a memory limit (RLIMIT_AS)", "its text on all", 3),
        Case("rows differ on one rank", "error with both shapes on every rank"),
        Case("dtype differs, with as many bytes", "the same"),
        Case("heads, mask, scale, schedule, plan's dtype differ", "error that names the field and both values on every rank"),
        Case("a call skipped on one rank, layers in another order", "the same"),
        Case("strided, transposed, expanded q, k, v", "the bits of contiguous ones"),
        Case("lengths that do not divide, shorter than ranks, of 1; empty shards", "1e-12 of dense attention in fp64"),
        Case("rows, blocks and whole shards that see nothing", "out 0, lse -inf, gradients 0, no NaN"),
        Case("NaN and infinities on one rank", "in every row that sees them, on no rank before; named with check_finite"),
        Case("logits of 10,000", "no overflow, as in fp64"),
        Case("any heads over any KV heads on 1 to 8 ranks", "right, forward and backward"),
        Case("wrong environment: ranks, port, interface", "one line with the cure", 15),
        Case("a rank that never starts", "its number, within the timeout"),
        Case("transformers: padding, packed documents, no position_ids", "exact or refused"),
        Case("DeepSpeed ZeRO 0 to 3", "gradient 1 within 1e-5"),
        Case("SIGKILL under torchrun --max-restarts", "the same bits, each step once; resumed within 10 s", 10),
        Case("SIGKILL while a checkpoint is written", "the one before is whole, and goes on bit by bit"),
        Case("a full disk", "error, nothing that is saved is lost", 3),
        Case("a checkpoint cut short or with a changed bit", "its file named, the one before used"),
        Case("another number of ranks", "refused unless asked for; then equal up to rounding"),
        Case("SIGTERM", "checkpoint after the step, status 0 on all ranks", DEADLINE + 5),
        Case("random delays", "the same bits"),
        Case("metrics, or a journal, that cannot be written", "training goes on, one warning"),
        Case("two jobs on one host", "no clash"),
    )
    return dict(enumerate(listed, start=1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Numbers travel with each test's report, from the process that runs it to the one that counts."""
    for item in items:
        item.user_properties += [("case", n) for mark in item.iter_markers("case") for n in mark.args]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    actual = cases()
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            properties = getattr(report, "user_properties", [])
            for case in (actual[n] for name, n in properties if name == "case"):
                if outcome == "passed":
                    case.passed += 1
                    case.longest = max(case.longest, report.duration)
                    case.seconds += [seconds for name, seconds in properties if name == "seconds"]
                else:
                    case.bad.append(outcome)
    printed = [case for case in actual.values() if case.passed or case.bad]
    if not printed:
        return
    total = f"{sum(bool(case.passed and not case.bad) for case in printed)} of {len(actual)} cases passed"
    rows = [(str(n), case.what, case.asked, f"{case.within or ''}", case.observed, case.time) for n, case in actual.items()]
    head = ("", "case", "asked", "within s", "seen (tests)", "seconds")
    terminalreporter.section(total)
    for number, what, _, within, observed, seconds in (row for row in rows if row[4] != "not run"):
        terminalreporter.write_line(
            f"{number:>3} {what[:66]:66} {observed:14} {seconds:>14}{f'  of {within}' if within else ''}"
        )
    path = terminalreporter.config.getoption("--cases-report")
    if path:
        lines = [f"**{total}**", "", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))]
        Path(path).write_text("\n".join(lines) + "\n")
