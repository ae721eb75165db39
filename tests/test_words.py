"""Names that had to be learned before the code could be read, and that must not come back.

`GONE` may not be a name anywhere in Python files; `DEFINED` may be local variables, where they are plain English or a word of
the field, but not the name of a module, class or function of the library. Exceptions stand below with their reasons.
"""

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(p for folder in ("ringattn", "launch", "benchmarks", "docs", "tests") for p in (ROOT / folder).rglob("*.py"))

GONE = {
    "Lane": "HeadGroup",
    "lane": "head_group",
    "lanes": "head_groups",
    "make_lanes": "make_head_groups",
    "Piece": "Segment",
    "piece": "segment",
    "pieces": "segments",
    "Room": "BufferLimits",
    "q_home": "q_owner",
    "kv_home": "kv_owner",
    "q_rest": "q_resident",
    "kv_rest": "kv_resident",
    "due": "arrival",
    "take_in": "receive",
    "unship": "from_wire",
    "ghost": "shape_only",
    "straight_home": "return_to_owner",
    "ride_home": "accumulate_along",
    "complaint": "error_message",
    "shown": "short_repr",
    "cure": "hint",
    "said": "message",
    "told": "messages",
    "obstacle": "unsupported_reason",
    "seen": "visible, or mask_empty_rows",
    "stand_in": "surrogate_out",
    "widen": "pad_head_dim",
    "transferring": "comm_errors",
    "Notices": "HealthStore",
    "Farewell": "SigtermHandler",
    "farewell": "sigterm",
    "blame": "diagnosis",
    "board": "watchdog",
    "Board": "Watchdog",
    "Pay": "LayerCost",
    "Ask": "MatchArgs",
    "Home": "OwnerMap",
    "Short": "MergedSequence",
    "Seen": "MaskInfo, VisibleGpus",
    "Gathered": "ShardCache",
    "Through": "BlockArgs",
    "found": "what was found",
    "made": "what was made",
    "one": "the noun",
    "some": "the noun",
}
DEFINED = {
    "Work": "TileBatch",
    "home": "owner",
    "rest": "resident",
    "rounds": "rounds_on_wire",
    "called": "pass_name",
    "keep": "reuse_inputs",
    "facts": "describe",
    "whole": "as_int",
    "real": "as_finite_float",
    "dense": "as_strided_tensor",
    "meet": "resolve_group",
    "held": "resident",
    "units": "fixed_point",
    "chance": "counter_rng",
    "tell": "gather_rows",
    "ledger": "objective",
    "walk": "local_search",
}
EXCEPTIONS = {
    ("ringattn/faults/sigterm.py", "said"): "a field of event logs, whose format stays as it is",
    ("ringattn/planner/closed_form/rounds.py", "rounds"): "rounds of a schedule, the word of collective algorithms",
    ("ringattn/planner/closed_form/family.py", "rounds"): "rounds of a schedule, the word of collective algorithms",
}


def names(source: str) -> set[str]:
    return {token.string for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.NAME}


def defined(path: Path, source: str) -> Iterator[str]:
    """Names of the module itself and of its functions, classes and methods."""
    yield path.parent.name if path.name == "__init__.py" else path.stem
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_name_needs_a_dictionary(path: Path) -> None:
    source, where = path.read_text(), str(path.relative_to(ROOT))
    old = names(source) & GONE.keys()
    if where.startswith("ringattn/"):
        old |= set(defined(path, source)) & DEFINED.keys()
    old = {name for name in old if (where, name) not in EXCEPTIONS}
    assert not old, {name: GONE.get(name) or DEFINED[name] for name in old}


def test_exceptions_are_still_needed() -> None:
    for where, name in EXCEPTIONS:
        source = (ROOT / where).read_text()
        assert name in names(source) | set(defined(ROOT / where, source)), (where, name)
