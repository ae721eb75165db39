"""From a timeline to a `Schedule`: the clock becomes a row of steps, and what begins in one of them belongs to it.

A step lasts about as long as the largest batch. An input leaves when the timeline sends it, but no more than `lookahead` steps
before it is first read, and is due in the step that reads it. A result leaves in the step after its last tile, straight to the
owner, which takes it in `lookahead` steps later at most: nobody waits for it, and its buffers are soon free again. Within a step,
moves stand in the order in which the timeline begins them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from ringattn.errors import PlanError
from ringattn.schedule.balanced.problem import Assignment, Problem
from ringattn.schedule.balanced.timeline import Timeline, Transfer
from ringattn.schedule.check import peak
from ringattn.schedule.ir import Kind, Move, Room, Schedule, Tile, make

LOOKAHEAD = 4
RESULT = {Kind.Q: Kind.Q_ACC, Kind.KV: Kind.KV_ACC}


def schedule_of(problem: Problem, assignment: Assignment, *, lookahead: int = LOOKAHEAD) -> Schedule:
    """`assignment` as a schedule. More `lookahead` keeps more messages on their way and more buffers full."""
    if lookahead < 1:
        raise PlanError(f"lookahead={lookahead}: at least 1 step; more keeps more links busy and more buffers full")
    timeline = Timeline(problem, problem.ranks(assignment), lookahead)
    step = _steps(problem, timeline)
    end = max(step, default=0) + 2
    tiles = [
        Tile(when, batch.rank, *problem.tiles[tile])
        for batch, when in zip(timeline.batches, step, strict=True)
        for tile in batch.tiles
    ]
    used: dict[tuple[int, int], list[int]] = defaultdict(list)
    for batch, when in zip(timeline.batches, step, strict=True):
        for tile in batch.tiles:
            for line in problem.sides[tile]:
                used[line, batch.rank].append(when)
    moves = []
    for transfer in timeline.transfers:
        moves.append(_move(problem, transfer, transfer.start // timeline.slot, used[transfer.line, transfer.rank], lookahead, end))
    homes = tuple(problem.q_home), tuple(problem.kv_home)
    schedule = make(f"balanced_{problem.objective}", problem.world, tiles, moves, Room(), homes)
    return replace(schedule, room=peak(schedule))


def _steps(problem: Problem, timeline: Timeline) -> list[int]:
    """The step of every batch. What reads a foreign block cannot be in the first."""
    reached, found = [0] * problem.world, []
    for batch in timeline.batches:
        foreign = any(problem.lines[line].home != batch.rank for tile in batch.tiles for line in problem.sides[tile])
        reached[batch.rank] = max(reached[batch.rank], batch.start // timeline.slot, int(foreign))
        found.append(reached[batch.rank])
    return found


def _move(problem: Problem, transfer: Transfer, at: int, used: list[int], lookahead: int, end: int) -> Move:
    line = problem.lines[transfer.line]
    if transfer.home:
        depart = max(used) + 1
        return Move(RESULT[line.kind], line.index, transfer.rank, line.home, depart, min(depart + lookahead, end))
    due = min(used)
    return Move(line.kind, line.index, line.home, transfer.rank, max(0, due - lookahead, min(at, due - 1)), due)
