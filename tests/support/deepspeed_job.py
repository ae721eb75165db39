"""What the ranks of test_deepspeed.py run: KIND OUT [SEQUENCE_PARALLEL_SIZE], rank 0 writes what was found."""

import json
import os
import sys
import tempfile

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.sequence import layer as theirs
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from ringattn import InputError, causal
from ringattn.integrations.deepspeed import DistributedAttention, register_with_transformers, sequence_parallel, sp_loss

LENGTH, STEPS = 37, 20
SHAPE = dict(vocab_size=61, hidden_size=36, intermediate_size=48, num_hidden_layers=2, num_attention_heads=9)


def model_of() -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SHAPE, num_key_value_heads=3)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def data(replicas: int, step: int) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(step)
    ids = torch.randint(1, 61, (replicas, LENGTH), generator=source)
    return {
        "input_ids": ids,
        "position_ids": torch.arange(LENGTH).expand(replicas, -1),
        "shift_labels": F.pad(ids[:, 1:], (0, 1), value=-100),
    }


def part(batch: dict[str, torch.Tensor], mpu: object) -> dict[str, torch.Tensor]:
    """This rank's: its replica's sequence, its part of it. The last part is shorter."""
    entry, rank = slice(mpu.get_data_parallel_rank(), mpu.get_data_parallel_rank() + 1), mpu.get_sequence_parallel_rank()
    return {name: x[entry].tensor_split(mpu.get_sequence_parallel_world_size(), dim=1)[rank] for name, x in batch.items()}


def alone(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {name: x for name, x in batch.items() if name != "shift_labels"}
    logits = model(**inputs, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())


def one_process(replicas: int) -> tuple[list[torch.Tensor], list[float], list[torch.Tensor]]:
    """The first gradients, the losses of all steps, the parameters at the end."""
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses, first = [], []
    for step in range(STEPS):
        loss = alone(model, data(replicas, step))
        loss.backward()
        first = first or [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return first, losses, [p.detach() for p in model.parameters()]


def engine_of(stage: int, mpu: object, model: torch.nn.Module | None = None, **more: object) -> object:
    model = model or model_of()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
    }
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config | more, mpu=mpu)[0]


def loss_of(engine: object, own: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {name: x for name, x in own.items() if name != "shift_labels"}
    return sp_loss(engine(**inputs, use_cache=False).logits, own["shift_labels"], engine)


def stages(sp: int) -> dict[str, list[float]]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    replicas = dist.get_world_size() // sp
    wanted, losses, _ = one_process(replicas)
    mpu = register_with_transformers(model_of(), "sdpa", sp, 1)
    actual = {}
    for stage in range(4):
        engine = engine_of(stage, mpu)
        apart, grads = 0.0, []
        for step in range(STEPS):
            loss = loss_of(engine, part(data(replicas, step), mpu))
            engine.backward(loss)
            grads = grads or [safe_get_full_grad(p).clone() for p in engine.module.parameters()]
            engine.step()
            apart = max(apart, abs(loss.item() / losses[step] - 1))
        got, meant = (torch.cat([g.flatten() for g in gs]) for gs in (grads, wanted))
        off = max(((g - m).norm() / m.norm()).item() for g, m in zip(grads, wanted, strict=True))
        folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(folder)
        engine.save_checkpoint(folder[0], tag="end")
        other = engine_of(stage, mpu)
        other.load_checkpoint(folder[0], tag="end")
        pairs = zip(engine.module.parameters(), other.module.parameters(), strict=True)
        again = (
            max((safe_get_full_fp32_param(a) - safe_get_full_fp32_param(b)).abs().max().item() for a, b in pairs)
            if stage
            else max((a - b).abs().max().item() for a, b in pairs)
        )
        actual[str(stage)] = [(got @ meant / (meant @ meant)).item(), off, apart, again]
    return actual


def batches() -> dict[str, float]:
    plain = data(1, 0)
    tokens = torch.ones(1, LENGTH, dtype=torch.long)
    tokens[:, :7] = 0
    cases = {
        "plain": plain,
        "packed": plain | {"position_ids": torch.cat([torch.arange(n) for n in (5, 20, 12)])[None]},
        "padded": plain
        | {
            "attention_mask": tokens,
            "position_ids": (tokens.cumsum(1) - 1).clamp(min=0),
            "shift_labels": plain["shift_labels"].masked_fill(tokens == 0, -100),
        },
    }
    wanted, model = {}, model_of()
    for name, batch in cases.items():
        alone(model, batch).backward()
        wanted[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
    mpu = register_with_transformers(model, "sdpa", 3, 1, disable_in_eval=True)
    engine = engine_of(1, mpu, model)
    from deepspeed.utils import safe_get_full_grad

    actual = {}
    for name, batch in cases.items():
        engine.backward(loss_of(engine, part(batch, mpu)))
        got = torch.cat([safe_get_full_grad(p).flatten() for p in engine.module.parameters()])
        actual[name] = ((got - wanted[name]).norm() / wanted[name].norm()).item()
        engine.optimizer.zero_grad()
        engine.module.zero_grad()
    engine.eval()
    with torch.no_grad():
        actual["whole in eval"] = abs(alone(engine.module, plain).item() / alone(model_of().eval(), plain).item() - 1)
    return actual


def adapter() -> dict[str, float]:
    """Batches cut by DeepSpeed's own adapter, layers recomputed in backward: each loss, and the gradient of all summed."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPDataLoaderAdapter
    from deepspeed.utils import safe_get_full_grad
    from torch.utils.data import DataLoader

    world, rank, length = dist.get_world_size(), dist.get_rank(), 36
    ids = torch.randint(1, 61, (2 * world, length), generator=torch.Generator().manual_seed(5))
    texts = [{"input_ids": x, "position_ids": torch.arange(length), "labels": x} for x in ids]
    model = model_of()
    wanted = [alone(model, shifted(x[None])) for x in ids]
    sum(wanted).backward()
    meant = torch.cat([p.grad.flatten() for p in model.parameters()]) / len(wanted)
    model.zero_grad()
    mpu = register_with_transformers(model, "sdpa", world, 1)
    model.gradient_checkpointing_enable()
    engine = engine_of(2, mpu, model, gradient_accumulation_steps=len(wanted))
    engine.train()
    place = (mpu.get_sequence_parallel_rank(), mpu.get_sequence_parallel_group(), world)
    loader = UlyssesSPDataLoaderAdapter(DataLoader(texts[rank::world], batch_size=1), *place, engine.device)
    losses = []
    for batch in loader:
        losses.append(loss_of(engine, batch))
        engine.backward(losses[-1])
        if len(losses) == len(wanted):
            got = torch.cat([safe_get_full_grad(p).flatten() for p in engine.module.parameters()])
        engine.step()
    apart = max(abs(a.item() / b.item() - 1) for a, b in zip(losses, wanted, strict=True))
    return {"losses": apart, "gradient": ((got - meant).norm() / meant.norm()).item()}


def shifted(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "shift_labels": F.pad(ids[:, 1:], (0, 1), value=-100)}


class Local(torch.nn.Module):
    """What a user of theirs would write."""

    causal, softmax_scale = True, 0.3

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2)


def layer() -> dict[str, float]:
    """Both layers on the same shards, with a batch first; and ours with the sequence first against ours."""
    rank, group = dist.get_rank(), dist.group.WORLD
    source = torch.Generator().manual_seed(rank)
    shapes = [(2, 12, 4, 16), (2, 12, 2, 16), (2, 12, 2, 16)]
    qkv = [torch.randn(*shape, generator=source, requires_grad=True) for shape in shapes]
    ours, other = DistributedAttention(Local(), group, gather_idx=1), theirs.DistributedAttention(Local(), group, gather_idx=1)
    actual, kept = {}, []
    angles = torch.arange(24.0)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
    tables = tuple(torch.cat([f(angles)] * 2, dim=-1)[None, :, None] for f in (torch.cos, torch.sin))
    for module in (ours, other):
        out = module(*qkv, 0)
        kept.append([out, *torch.autograd.grad(out.square().sum(), qkv)])
    for name, mine, meant in zip(("out", "dq", "dk", "dv"), *kept, strict=True):
        actual[name] = ((mine - meant).norm() / meant.norm()).item()
    first = DistributedAttention(causal(), group)
    turned = first(*(x.transpose(0, 1) for x in qkv), 1, tables)
    whole = [_whole(x) for x in qkv]
    q, k = (theirs.apply_rotary_pos_emb(x.transpose(0, 1), *(t.permute(1, 0, 2, 3) for t in tables)) for x in whole[:2])
    meant = F.scaled_dot_product_attention(
        *(x.permute(1, 2, 0, 3) for x in (q, k, whole[2].transpose(0, 1))), is_causal=True, enable_gqa=True
    ).permute(2, 0, 1, 3)[rank * 12 : rank * 12 + 12]
    actual["rotary, sequence first"] = ((turned - meant).norm() / meant.norm()).item()
    return actual


def _whole(x: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts, dim=1)


def refusals() -> list[str]:
    from deepspeed.utils import groups

    model = model_of().eval()
    messages = []

    def expect(call: object) -> None:
        try:
            call()
        except InputError as error:
            messages.append(str(error))
        else:
            messages.append("nothing")

    other = model_of()
    other.config._attn_implementation = "flash_attention_2"
    mpu = register_with_transformers(model, "sdpa", 2, 1)
    own = part(data(1, 0), mpu)
    expect(lambda: model(own["input_ids"]))
    expect(lambda: register_with_transformers(other, "sdpa", 2, 1))
    other.config._attn_implementation = "eager"
    expect(lambda: register_with_transformers(other, "eager", 2, 1))
    expect(lambda: model(own["input_ids"].expand(2, -1), position_ids=own["position_ids"]))
    expect(lambda: DistributedAttention(torch.nn.Identity(), dist.group.WORLD))
    expect(lambda: DistributedAttention(causal(), dist.group.WORLD, sp_stream=object()))
    x = torch.zeros(5, 1, 4, 16)
    expect(lambda: DistributedAttention(causal(), dist.group.WORLD)(x, x, x, 1 - dist.get_rank()))  # wrong on one rank
    expect(lambda: sequence_parallel(3))
    engine = engine_of(0, None)
    logits = torch.zeros(1, 3, 61)
    expect(lambda: sp_loss(logits, torch.zeros(1, 3, dtype=torch.long), engine))
    names = ("input_ids", "position_ids")
    inputs = {name: own[name] for name in names}
    rewards = AutoModelForSequenceClassification.from_config(model.config, attn_implementation="sdpa").eval()
    balance = AutoConfig.for_model("mixtral", **SHAPE, num_key_value_heads=3, num_local_experts=2, output_router_logits=True)
    experts = AutoModelForCausalLM.from_config(balance, attn_implementation="sdpa").eval()
    register_with_transformers(rewards, "sdpa", 2, 1)  # a second time, as for another model
    expect(lambda: model(**inputs))
    expect(lambda: model.model(**inputs, output_hidden_states=True))
    expect(lambda: rewards(**inputs))
    expect(lambda: model(**inputs, labels=own["shift_labels"]))
    expect(lambda: model(**inputs, logits_to_keep=4))
    expect(lambda: model(**inputs, logits_to_keep=18))  # all of rank 1's rows, and not all of rank 0's
    expect(lambda: register_with_transformers(experts, "sdpa", 2, 1))
    balance.output_router_logits = False
    register_with_transformers(experts, "sdpa", 2, 1)
    expect(lambda: experts(**inputs, output_router_logits=True))
    expect(lambda: experts(**inputs))
    groups.mesh_device = object()  # as mesh_param leaves it
    expect(lambda: model(own["input_ids"], position_ids=own["position_ids"] + 0))
    return messages


if __name__ == "__main__":
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    result = {"stages": stages, "batches": batches, "adapter": adapter, "layer": layer, "refusals": refusals}[sys.argv[1]](
        *map(int, sys.argv[3:])
    )
    if dist.get_rank() == 0:
        with open(sys.argv[2], "w") as file:
            json.dump(result, file)
    dist.barrier()
    dist.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may still let go of tensors, which aborts an interpreter that shuts down meanwhile
