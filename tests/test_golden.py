"""Today's schedules, plans, outputs, merges, files and logs are those that tests/golden/ stores.

Texts and digests are compared exactly. Outputs are compared bit for bit where this machine's arithmetic is that of the machine
which wrote them, by a fingerprint, and within rounding everywhere. `tests/support/golden_cases.py` says how to write the files
anew.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import golden_cases
import pytest
import torch
from golden_cases import CONFIG, STORED, fingerprint, trained

from ringattn import load_topology
from ringattn.checkpoint import damage, load
from ringattn.schedule import parse

# By dtype, relative to the largest element. fp32: kernels of other processors sum in another order, some dozen roundings of
# 6e-8 each, and an error in lse goes into every gradient. bf16: one rounding is 4e-3, and partial results are rounded twice.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def stored(name: str) -> Any:
    return json.loads((STORED / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def same_arithmetic() -> bool:
    return bool(stored("outputs")["fingerprint"] == fingerprint())


@pytest.mark.parametrize("name", ["schedules", "plans", "priced", "topologies"])
def test_texts_digests_and_prices_are_the_stored_ones(name: str) -> None:
    differences = list(_differences(stored(name), _as_json(golden_cases.EVERYTHING[name]()), same_bits=True))
    assert not differences, "\n".join(differences)


def test_stored_schedule_texts_can_be_read() -> None:
    texts = [lines for lines in stored("schedules").values() if isinstance(lines, list) and "" not in lines]
    assert len(texts) > 20
    for lines in texts:
        assert str(parse("\n".join(lines))).splitlines() == lines


def test_outputs_and_gradients_are_the_stored_ones(same_arithmetic: bool) -> None:
    differences = list(_differences(stored("outputs")["cases"], _as_json(golden_cases.outputs()), same_bits=same_arithmetic))
    assert not differences, "\n".join(differences)


def test_events_checkpoints_and_merges_of_a_job_are_the_stored_ones(same_arithmetic: bool) -> None:
    differences = list(_differences(stored("job"), _as_json(golden_cases.job_results()), same_bits=same_arithmetic))
    assert not differences, "\n".join(differences)


def test_the_stored_checkpoint_can_be_loaded(tmp_path: Path, same_arithmetic: bool) -> None:
    folder = shutil.copytree(STORED / "checkpoint", tmp_path / "checkpoint")
    expected, _ = trained()
    random = torch.get_rng_state()
    (checkpoint,) = folder.iterdir()
    assert damage(checkpoint) is None
    model, optimizer = trained()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.manual_seed(0)
    assert load(checkpoint, model, optimizer, config=CONFIG) == 3
    assert torch.equal(torch.get_rng_state(), random)
    for loaded, trained_here in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(loaded, trained_here, **({"rtol": 0, "atol": 0} if same_arithmetic else {}))
    assert all(state["step"] == 1 for state in optimizer.state.values())


def test_stored_topology_files_can_be_read(tmp_path: Path) -> None:
    for name, topology in {**golden_cases.PRESETS, "measured": golden_cases.MEASURED}.items():
        (tmp_path / name).write_text("\n".join(stored("topologies")[name]) + "\n")
        assert load_topology(tmp_path / name) == topology


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _differences(old: Any, new: Any, *, same_bits: bool, at: str = "") -> Any:
    """Where `new` is not `old`, in words. Numbers under "values" may differ by rounding; digests of tensors must be equal where
    `same_bits`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            if name not in old or name not in new:
                yield f"{at}: {name!r} is {'new' if name in new else 'missing'}"
            elif name == "values":
                yield from _apart(old, new, at)
            elif name != "sha256" or same_bits:
                yield from _differences(old[name], new[name], same_bits=same_bits, at=f"{at}/{name}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for n, pair in enumerate(zip(old, new, strict=True)):
            yield from _differences(*pair, same_bits=same_bits, at=f"{at}[{n}]")
    elif old != new:
        yield f"{at}: {new!r}, was {old!r}"


def _apart(old: dict[str, Any], new: dict[str, Any], at: str) -> Any:
    tolerance = TOLERANCE[old["dtype"]] * max(1.0, old["values"][-1])
    expected, actual = (torch.tensor(summary["values"], dtype=torch.float64) for summary in (old, new))
    same = torch.isclose(actual, expected, rtol=0, atol=tolerance)
    if not same.all():
        yield f"{at}: values {new['values']}, were {old['values']}"
