"""Judges one case: what one process computes against what the ranks computed, or why they refused."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from conformance.batches import IGNORE
from conformance.double import Double
from ringattn import InputError, PlanError
from ringattn.integrations.transformers import shard_batch
from ringattn.nn import cross_entropy, reduce_gradients, shift_labels

# Both sides compute the same sums in fp64, only in another order. Through the few layers of a tiny model, gradients of loss and
# weights near 1 included, that is some 1e-13; 1e-9 leaves four digits for cancellation, and one key too many or too few among
# 37, or a position that is off by one, is 1e-4 or more.
BOUND = 1e-9
SMALL = 1e-3  # a gradient below this part of the largest is compared as if it were that: of keys' biases it is zero in theory


@dataclass
class Result:
    """What one rank, or one process, came to. kind: "ran", "refused" or "failed"."""

    kind: str
    text: str = ""
    loss: float = float("nan")
    grads: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Outcome:
    """What became of a case. kind: "exact", "refused", "third", or "none" where one process cannot do it either, "note"."""

    kind: str
    text: str = ""
    loss_error: float = float("nan")
    grad_error: float = float("nan")
    where: str = ""


def one_process(model: PreTrainedModel, batch: dict[str, Any]) -> Result:
    """The whole batch in this process: loss over all targets, gradients of all weights, and the model's own loss."""
    try:
        with Double():
            inputs = dict(batch)
            targets = targets_of(model, inputs.pop("labels"), inputs)
            logits = model(**inputs, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE)
            loss.backward()
        return Result("ran", "", loss.item(), gradients(model))
    except Exception as error:
        return Result("failed", described(error))
    finally:
        model.zero_grad(set_to_none=True)


def own_loss(model: PreTrainedModel, batch: dict[str, Any]) -> float:
    """What the model itself makes of `labels`, NaN where it cannot."""
    try:
        with Double(), torch.no_grad():
            return float(model(**batch, use_cache=False).loss)
    except Exception:
        return float("nan")


def targets_of(model: PreTrainedModel, labels: Tensor, inputs: dict[str, Any]) -> Tensor:
    """What each row of logits is compared with."""
    if model.config.is_encoder_decoder:
        return labels
    shifted = shift_labels(labels, IGNORE)
    if inputs.get("attention_mask") is None:
        return shifted
    mask = inputs["attention_mask"].repeat_interleave(len(labels) // len(inputs["attention_mask"]), 0)
    return shifted.masked_fill(mask == 0, IGNORE)


def on_this_rank(model: PreTrainedModel, batch: dict[str, Any], layout: str) -> Result:
    """This rank's part: the loss over all ranks, and gradients summed over them."""
    try:
        with Double():
            inputs, targets = shard_batch(batch, model.config, schedule="ring", layout=layout, dtype=torch.float64)
            assert targets is not None, "every batch has labels"
            loss = cross_entropy(model(**inputs).logits, targets)
            loss.backward()
            reduce_gradients(model.parameters())
        return Result("ran", "", loss.item(), grads=gradients(model) if dist.get_rank() == 0 else {})
    except (InputError, PlanError) as error:
        return Result("refused", str(error).removeprefix("on every rank: "))
    except Exception as error:
        return Result("failed", described(error))
    finally:
        model.zero_grad(set_to_none=True)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """By name, zeros where there are none."""
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained}


def described(error: BaseException) -> str:
    """The class, the text and the innermost place of an error."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = "/".join(frame.filename.split("/")[-2:])
    return f"{type(error).__name__}: {str(error).strip()[:400]} ({place}:{frame.lineno})"


def judged(whole: Result, ranks: list[Result]) -> Outcome:
    """The outcome of all ranks' results against that of one process."""
    kinds = {result.kind for result in ranks}
    texts = sorted({result.text for result in ranks})
    if len(kinds) > 1:
        words = "; ".join(f"rank {n} {result.kind} {result.text}" for n, result in enumerate(ranks))
        return Outcome("third", f"ranks disagree: {words}")
    if kinds == {"refused"}:
        return Outcome("refused", texts[0])
    if whole.kind != "ran":
        same = kinds == {"failed"}
        return Outcome("none", whole.text) if same else Outcome("third", f"ran, where one process fails: {whole.text}")
    if kinds == {"failed"}:  # one that fails leaves the others waiting: its own error says more than theirs
        return Outcome("third", "; ".join(sorted(texts, key=lambda text: text.startswith("CommError"))))
    return compared(whole, ranks)


def compared(whole: Result, ranks: list[Result]) -> Outcome:
    """How far loss and the worst gradient are from those of one process. NaN is far."""
    loss_error = max(abs(result.loss / whole.loss - 1) for result in ranks)
    most = max((grad.norm().item() for grad in whole.grads.values()), default=0.0)
    errors = {
        name: ((ranks[0].grads[name] - grad).norm() / max(grad.norm().item(), SMALL * most)).item()
        for name, grad in whole.grads.items()
    }
    where = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    exact = loss_error < BOUND and all(error < BOUND for error in errors.values())
    text = "" if exact else f"loss off by {loss_error:.1e}, gradient of {where} by {errors[where]:.1e}"
    return Outcome("exact" if exact else "third", text, loss_error, errors[where], where)
