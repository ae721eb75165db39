"""Bad values for layers, token merging, checkpoints and the overlap measurement, as in `test_fuzz`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import each_alone, several, two_at_once
from hypothesis import given
from hypothesis import strategies as st

from ringattn import full, make_plan
from ringattn.checkpoint import store as checkpoint
from ringattn.checkpoint.async_save import Saver
from ringattn.execution.overlap import overlap
from ringattn.merging import (
    DeleteGate,
    LayerCost,
    Merge,
    RateController,
    bipartite,
    delete,
    gather_rows,
    grid,
    segments,
    shorten,
    similar,
    windows,
)
from ringattn.nn import (
    MLP,
    Decoder,
    DecoderConfig,
    Merging,
    MergingDecoder,
    SelfAttention,
    apply_rotary,
    cross_entropy,
    reduce_gradients,
    rotary,
    shift_labels,
)
from ringattn.sequence.layout import contiguous

CONFIG = DecoderConfig(vocab_size=17, dim=8, layers=2, heads=2, kv_heads=1, head_dim=4, hidden_dim=8)
PLAN = make_plan(13, world=1, heads=2, kv_heads=1, head_dim=4, schedule="ring")
OPEN = make_plan(13, world=1, heads=2, kv_heads=1, head_dim=4, schedule="ring", mask=full())
TOKENS = torch.arange(26).view(2, 13) % 17
TARGETS = shift_labels(TOKENS)
LAYOUT, METRIC, FLAGS = contiguous(13, 1), torch.randn(2, 13, 4), torch.arange(26).view(2, 13) % 3 == 0
SHORT = shorten(windows(13, 2, batch=2), PLAN, schedule="ring")
MATCH = dict(
    metric=METRIC, layout=LAYOUT, remove=0.5, threshold=0.1, protected=FLAGS, scorer="energy", margin=0.5, seed=0, layer=0
)
MERGING = dict(policy="similar", first=0, last=1, factor=2, window=4, remove=0.5, threshold=0.5, scorer="alternate", ends=(1,))
MERGING |= dict(how="mean", size_bias=True, protect=1, layout="auto", bucket=4, schedule="ring", topology="cpu", seed=0)


def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIG)


def merging(**given: Any) -> None:
    MergingDecoder(CONFIG, Merging(**given)).loss(TOKENS, TARGETS, PLAN)


STATE = (trained := model(), torch.optim.AdamW(trained.parameters()))
STORED = dict(model=STATE[0], optimizer=STATE[1], config={"dim": 8})


def saved(directory: Any, config: Any, keep: Any, timeout: Any, **state: Any) -> None:
    saver = Saver(directory, config=config, keep=keep, timeout=timeout)
    saver.save(**state)
    saver.finish()


WRITING = ("save", "load", "resume", "damage", "latest", "Saver")
# Of each function, arguments that are fine; {tmp} stands for a directory.
FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "DecoderConfig": (DecoderConfig, dict(CONFIG.__dict__)),
    "Decoder": (Decoder, dict(config=CONFIG)),
    "SelfAttention": (SelfAttention, dict(config=CONFIG)),
    "MLP": (MLP, dict(config=CONFIG)),
    "Decoder()": (model(), dict(tokens=TOKENS, plan=PLAN, group=None, checkpoint=False)),
    "Decoder.loss": (model().loss, dict(tokens=TOKENS, targets=TARGETS, plan=PLAN, group=None, checkpoint=False)),
    "MergingDecoder": (MergingDecoder, dict(config=CONFIG, merging=Merging("windows", 0, 1))),
    "Merging": (merging, MERGING),
    "cross_entropy": (
        cross_entropy,
        dict(logits=torch.zeros(2, 13, 17), targets=TARGETS, group=None, ignore_index=-100, averaged_over=1),
    ),
    "shift_labels": (shift_labels, dict(tokens=TOKENS, ignore_index=-100)),
    "reduce_gradients": (reduce_gradients, dict(parameters=list(model().parameters()), group=None)),
    "rotary": (rotary, dict(positions=torch.arange(13), head_dim=4, theta=1e4)),
    "apply_rotary": (apply_rotary, dict(x=torch.zeros(2, 13, 2, 4), cos=torch.zeros(13, 2), sin=torch.zeros(13, 2))),
    "DeleteGate": (DeleteGate, dict(dim=8, scale=10.0)),
    "DeleteGate()": (DeleteGate(4), dict(x=METRIC)),
    "DeleteGate.keeps": (DeleteGate(4).keeps, dict(g=METRIC)),
    "RateController": (RateController, dict(target=0.5, kp=0.5, ki=1e-5, smooth=0.0)),
    "RateController()": (RateController(0.5), dict(deleted=torch.zeros(()))),
    "LayerCost": (LayerCost, dict(layers=1, batch=1, dim=8, row_flops=0.0)),
    "Merge.of": (Merge.of, dict(labels=torch.arange(13), decided=torch.arange(13), sees_all="")),
    "Merge.then": (windows(13, 2).then, dict(after=windows(7, 2))),
    "windows": (windows, dict(seq_len=13, factor=2, protected=FLAGS[0], cu_seqlens=(0, 4, 13), batch=2, device="cpu")),
    "segments": (segments, dict(ends=FLAGS, lookahead=1)),
    "grid": (grid, dict(height=4, width=3, by=(2, 2), batch=2, device="cpu")),
    "gather_rows": (gather_rows, dict(flags=FLAGS, layout=LAYOUT, group=None)),
    "delete": (delete, dict(keep=FLAGS, layout=LAYOUT, group=None)),
    "similar": (similar, MATCH | dict(window=4, cu_seqlens=(0, 4, 13), group=None)),
    "bipartite": (bipartite, MATCH | dict(schedule="ring", group=None)),
    "shorten": (
        shorten,
        dict(
            merge=windows(13, 2),
            plan=OPEN,
            group=None,
            layout="auto",
            bucket=1,
            cost=LayerCost(),
            schedule="ring",
            topology="cpu",
        ),
    ),
    "Short.merge": (SHORT.merge, dict(x=METRIC, how="mean", weights=torch.ones(2, 13))),
    "Short.unmerge": (SHORT.unmerge, dict(y=torch.zeros(2, 7, 4))),
    "overlap": (overlap, dict(plan=PLAN, batch=1, group=None, backward=False, repeats=1)),
    "save": (checkpoint.save, dict(directory="{tmp}", step=3, keep=1) | STORED),
    "load": (checkpoint.load, dict(checkpoint="{tmp}/step_00000003", any_world=False) | STORED),
    "resume": (checkpoint.resume, dict(directory="{tmp}", any_world=False) | STORED),
    "damage": (checkpoint.damage, dict(checkpoint="{tmp}/step_00000003")),
    "latest": (checkpoint.latest, dict(directory="{tmp}")),
    "Saver": (
        saved,
        dict(directory="saved", config={"dim": 8}, step=3, keep=1, timeout=60.0, model=STATE[0], optimizer=STATE[1]),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_argument_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, fine = FUNCTIONS[name]
    if name in WRITING:
        checkpoint.save(tmp_path, 3, *STATE, config={"dim": 8})
    each_alone(name, call, {n: v.format(tmp=tmp_path) if isinstance(v, str) else v for n, v in fine.items()})


@given(st.data())
def test_two_arguments_at_once(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([name for name in several(FUNCTIONS) if name not in WRITING]))
    two_at_once(data, *FUNCTIONS[name])
