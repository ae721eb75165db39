"""From a timeline to a `Schedule`: the clock becomes a row of steps, and what begins in one of them belongs to it.

A step lasts about half as long as the largest batch. An input leaves a little before the timeline sends it, since real links
may be slower, but no more than `lookahead` steps before it is first read, and is due in the step that reads it. A result leaves
in the step after its last tile, straight to the owner, which takes it in `lookahead` steps later at most: late enough that
nobody waits for it, and early enough that its buffers are soon free again. Within a step, moves stand in the order in which the
timeline begins them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from ringattn.errors import PlanError
from ringattn.schedule.balanced.problem import Assignment, Problem
from ringattn.schedule.balanced.timeline import Timeline, Transfer
from ringattn.schedule.check import peak
from ringattn.schedule.ir import Kind, Move, Room, Schedule, Tile, make

AHEAD = 2  # steps that an input leaves before the timeline sends it
LOOKAHEAD = {"total": 8, "port": 8, "link": 16}  # where every pair of ranks has a link, many are used, and each is slow
RESULT = {Kind.Q: Kind.Q_ACC, Kind.KV: Kind.KV_ACC}


def schedule_of(problem: Problem, assignment: Assignment, *, lookahead: int | None = None) -> Schedule:
    """`assignment` as a schedule. More `lookahead` keeps more messages on their way and more buffers full."""
    lookahead = LOOKAHEAD[problem.objective] if lookahead is None else lookahead
    if lookahead < 1:
        raise PlanError(f"lookahead={lookahead}: at least 1 step; more keeps more links busy and more buffers full")
    timeline = Timeline(problem, problem.ranks(assignment), lookahead)
    when = _steps(problem, timeline)
    tiles, read = [], defaultdict(list)
    for step, batch in zip(when, timeline.batches, strict=True):
        for tile in batch.tiles:
            tiles.append(Tile(step, batch.rank, *problem.tiles[tile]))
            for line in problem.sides[tile]:
                read[line, batch.rank].append(step)
    end = max(when, default=0) + 2
    moves = [
        _result(problem, transfer, read[transfer.line, transfer.rank], lookahead, end)
        if transfer.home
        else _input(problem, transfer, read[transfer.line, transfer.rank], lookahead, transfer.start // timeline.step)
        for transfer in timeline.transfers
    ]
    homes = tuple(problem.q_home), tuple(problem.kv_home)
    schedule = make(f"balanced_{problem.objective}", problem.world, tiles, moves, Room(), homes)
    return replace(schedule, room=peak(schedule))


def _steps(problem: Problem, timeline: Timeline) -> list[int]:
    """The step of every batch. What reads a foreign block cannot be in the first."""
    reached, found = [0] * problem.world, []
    for batch in timeline.batches:
        foreign = any(problem.lines[line].home != batch.rank for tile in batch.tiles for line in problem.sides[tile])
        reached[batch.rank] = max(reached[batch.rank], batch.start // timeline.step, int(foreign))
        found.append(reached[batch.rank])
    return found


def _input(problem: Problem, transfer: Transfer, read: list[int], lookahead: int, planned: int) -> Move:
    line, due = problem.lines[transfer.line], min(read)
    depart = max(0, due - lookahead, min(planned - AHEAD, due - 1))
    return Move(line.kind, line.index, line.home, transfer.rank, depart, due)


def _result(problem: Problem, transfer: Transfer, read: list[int], lookahead: int, end: int) -> Move:
    line, depart = problem.lines[transfer.line], max(read) + 1
    return Move(RESULT[line.kind], line.index, transfer.rank, line.home, depart, min(depart + lookahead, end))
