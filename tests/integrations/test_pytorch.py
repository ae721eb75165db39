"""FSDP2 and DDP over replicas x sequence, and FSDP2 over sequence x tensor parallel, against one process with all batches.

In fp64, but the model's norms and rotary tables are fp32: 8 units of its rounding are allowed, as in test_transformers; a
gradient summed where it is averaged is off by a factor.
"""

import contextlib
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from spawn import run_ranks
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForCausalLM

from ringattn.integrations.transformers.attention_interface import register, shard_batch
from ringattn.nn import cross_entropy, shift_labels

pytestmark = pytest.mark.slow

CLOSE = 8 * torch.finfo(torch.float32).eps
LENGTH, STEPS, REPLICAS = 37, 10, 2


def model_of(attention: str, heads: int = 9, kv_heads: int = 3) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = dict(vocab_size=61, hidden_size=36, intermediate_size=48, num_hidden_layers=2)
    config = AutoConfig.for_model("llama", **shape, num_attention_heads=heads, num_key_value_heads=kv_heads)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).double()


def text(step: int, micro: int) -> Tensor:
    """(replicas, LENGTH)."""
    return torch.randint(0, 61, (REPLICAS, LENGTH), generator=torch.Generator().manual_seed(100 * step + micro))


def labels_of(ids: Tensor, micro: int) -> Tensor:
    """Micro-batches with 36 and 5 targets a sequence, so that the mean of their means is not the mean."""
    labels = ids.clone()
    labels[:, : 32 * micro] = -100
    return labels


def one_process(accumulated: int) -> tuple[list[float], Tensor]:
    """Losses of all micro-batches, parts of the mean of their step, and the parameters in the end."""
    model = model_of("eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(STEPS):
        count = sum(int((shift_labels(labels_of(text(step, m), m)) != -100).sum()) for m in range(accumulated))
        for micro in range(accumulated):
            ids = text(step, micro)
            targets = shift_labels(labels_of(ids, micro)).flatten()
            loss = F.cross_entropy(model(ids, use_cache=False).logits.flatten(0, 1), targets, reduction="sum") / count
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


def sharded(model: torch.nn.Module, everyone: DeviceMesh) -> torch.nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, mesh=everyone)
    return fully_shard(model, mesh=everyone)


def trained(rank: int, kind: str, accumulated: int) -> tuple[float, float, bool]:
    """How far losses and final parameters are from those of one process, and whether a checkpoint comes back as it was."""
    register()
    mesh = init_device_mesh("cpu", (REPLICAS, 2), mesh_dim_names=("data", "sequence"))
    everyone = mesh["data", "sequence"]._flatten("everyone")
    model = model_of("ringattn")
    config = model.config
    if kind == "recomputed":
        model.gradient_checkpointing_enable()
        model.train()
    model = DistributedDataParallel(model) if kind == "ddp" else sharded(model, everyone)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    replica, losses = mesh["data"].get_local_rank(), []
    for step in range(STEPS):
        batches = [text(step, micro)[replica : replica + 1] for micro in range(accumulated)]
        batches = [{"input_ids": ids, "labels": labels_of(ids, micro)} for micro, ids in enumerate(batches)]
        cut = [shard_batch(batch, config, mesh["sequence"], dtype=torch.float64, topology="cpu") for batch in batches]
        count = torch.stack([(targets != -100).sum() for _, targets in cut]).sum()
        dist.all_reduce(count)
        for micro, (inputs, targets) in enumerate(cut):
            last = micro == accumulated - 1
            if kind != "ddp":
                model.set_requires_gradient_sync(last)
            with model.no_sync() if kind == "ddp" and not last else contextlib.nullcontext():
                logits = model(**inputs).logits
                loss = cross_entropy(logits, targets, everyone, averaged_over=everyone.size(), num_items=count)
                loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    wanted, meant = one_process(accumulated)
    apart = max(abs(a / b - 1) for a, b in zip(losses, wanted, strict=True))
    got = torch.cat([whole(p).flatten() for p in model.parameters()])
    return apart, ((got - meant).norm() / meant.norm()).item(), kind == "ddp" or reloaded(model, optimizer, everyone)


def whole(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach()


def reloaded(model: torch.nn.Module, optimizer: torch.optim.Optimizer, everyone: DeviceMesh) -> bool:
    """Saved, loaded into another model with another optimizer: the same bits."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(states, checkpoint_id=folder[0])
    other = sharded(model_of("ringattn"), everyone)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    again = torch.optim.SGD(other.parameters(), lr=0.5, momentum=0.9)
    loaded = dict(zip(("model", "optimizer"), get_state_dict(other, again), strict=True))
    dcp.load(loaded, checkpoint_id=folder[0])
    set_state_dict(other, again, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    return all(torch.equal(whole(a), whole(b)) for a, b in zip(model.parameters(), other.parameters(), strict=True)) and all(
        torch.equal(whole(optimizer.state[a]["momentum_buffer"]), whole(again.state[b]["momentum_buffer"]))
        for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize(("kind", "accumulated"), [("fsdp", 1), ("recomputed", 2), ("ddp", 2)])
def test_losses_and_parameters_are_those_of_one_process(kind: str, accumulated: int) -> None:
    for apart, off, same in run_ranks(4, trained, kind, accumulated):
        assert apart < CLOSE
        assert off < CLOSE
        assert same


COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWS = ("self_attn.o_proj", "mlp.down_proj")


def trained_with_tensor_parallel(rank: int) -> tuple[float, float]:
    """One sequence on two ranks, the layers on two; how far losses and parameters are from those of one process."""
    register()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sequence", "tensor"))
    model, alone = model_of("ringattn", 6, 2), model_of("eager", 6, 2)
    for layer in model.model.layers:
        plan = dict.fromkeys(COLUMNS, ColwiseParallel()) | dict.fromkeys(ROWS, RowwiseParallel())
        parallelize_module(layer, mesh["tensor"], plan)
    model = sharded(model, mesh["sequence"])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, alone)]
    apart = 0.0
    for step in range(STEPS):
        ids = text(step, 0)[:1]
        batch = {"input_ids": ids, "labels": ids}
        inputs, targets = shard_batch(batch, model.config, mesh["sequence"], dtype=torch.float64, topology="cpu")
        loss = cross_entropy(model(**inputs).logits, targets, mesh["sequence"], averaged_over=2)
        meant = F.cross_entropy(alone(ids, use_cache=False).logits.flatten(0, 1), shift_labels(ids).flatten())
        for value, optimizer in zip((loss, meant), optimizers, strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        apart = max(apart, abs(loss.item() / meant.item() - 1))
    got, wanted = (torch.cat([whole(p).flatten() for p in m.parameters()]) for m in (model, alone))
    return apart, ((got - wanted).norm() / wanted.norm()).item()


def test_tensor_parallel_beside_it_trains_as_one_process() -> None:
    for apart, off in run_ranks(4, trained_with_tensor_parallel):
        assert apart < CLOSE
        assert off < CLOSE
