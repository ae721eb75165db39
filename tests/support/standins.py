"""Plain mathematics behind the signatures of the flash-attn packages, with their rules about windows, layouts and empty rows.

A stand-in takes what the package takes, refuses what it refuses, and answers in fp64, so that all of an adapter but the GPU
runs on the CPU. The names and their order are facts; `test_flash` compares them with the packages' sources.

Forward walks over blocks of keys as flash-attn 2 and 3 do (softmax.h in csrc/flash_attn/src and in hopper): from last to the
first, and only in blocks that the window or the end of the keys cuts it looks whether a maximum is -inf.
"""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType

import torch

BLOCK = 64  # keys that are looked at together

# What each function takes, in order. A generation is a version of a package whose calls differ from the one before.
WINDOW = "window_size_left window_size_right"
FA2_OPTIONS = f"dropout_p softmax_scale causal {WINDOW} softcap alibi_slopes"
FA2_PACKED = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
FA3_FORWARD = (
    "cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k max_seqlen_q max_seqlen_k page_table kv_batch_idx "
    "leftpad_k rotary_cos rotary_sin seqlens_rotary q_descale k_descale v_descale softmax_scale causal"
)
FA3_MORE = "attention_chunk softcap rotary_interleaved scheduler_metadata num_splits pack_gqa sm_margin"
FA3_BACKWARD = "dout q k v out softmax_lse cu_seqlens_q cu_seqlens_k sequed_q sequed_k max_seqlen_q max_seqlen_k dq dk dv"
FA4_SEQUENCES = "cu_seqlens_q cu_seqlens_k seqused_q seqused_k max_seqlen_q max_seqlen_k"
SIGNATURES = {
    "flash2": {  # 2.8.3.post2
        "_flash_attn_forward": f"q k v {FA2_OPTIONS} return_softmax",
        "_flash_attn_varlen_forward": (
            f"q k v {FA2_PACKED} {FA2_OPTIONS} return_softmax block_table leftpad_k seqused_k zero_tensors"
        ),
        "_flash_attn_backward": f"dout q k v out softmax_lse dq dk dv {FA2_OPTIONS} deterministic rng_state",
        "_flash_attn_varlen_backward": (
            f"dout q k v out softmax_lse dq dk dv {FA2_PACKED} {FA2_OPTIONS} deterministic rng_state zero_tensors"
        ),
    },
    "flash3": {  # hopper/ beside 2.8.3.post2
        "_flash_attn_forward": f"q k v k_new v_new qv out {FA3_FORWARD} window_size {FA3_MORE}",
        "_flash_attn_backward": f"{FA3_BACKWARD} softmax_scale causal window_size softcap deterministic sm_margin",
    },
    "flash3, later": {  # hopper/ of Dao-AILab/flash-attention at 01afd16d
        "_flash_attn_forward": f"q k v k_new v_new qv out_ {FA3_FORWARD} {WINDOW} {FA3_MORE}",
        "_flash_attn_backward": f"{FA3_BACKWARD} softmax_scale is_causal {WINDOW} softcap deterministic sm_margin",
    },
    "flash4": {  # 4.0.0b36
        "_flash_attn_fwd": (
            f"q k v qv {FA4_SEQUENCES} min_seqlen_k page_table softmax_scale causal softcap {WINDOW} learnable_sink tile_mn "
            "mma_pv_is_rs intra_wg_overlap num_threads num_splits pack_gqa _arch score_mod mask_mod block_sparse_tensors "
            "return_lse out lse aux_tensors aux_scalars q_descale k_descale v_descale gather_kv_indices scheduler_metadata "
            "seqlen_k_per_split disable_scheduler_metadata gather_bwd_recompute_p"
        ),
        "_flash_attn_bwd": (
            f"q k v out dout lse softmax_scale causal softcap {WINDOW} m_block_size n_block_size num_threads pack_gqa "
            "num_stages_Q num_stages_dO SdP_swapAB dKV_swapAB dQ_swapAB AtomLayoutMSdP AtomLayoutNdKV AtomLayoutMdQ V_in_regs "
            f"{FA4_SEQUENCES} deterministic dq dk dv score_mod score_mod_bwd mask_mod aux_tensors aux_scalars "
            "block_sparse_tensors dlse learnable_sink"
        ),
    },
}
# Those without a default, which a caller must name.
REQUIRED = {
    ("flash2", "_flash_attn_forward"): f"q k v {FA2_OPTIONS} return_softmax",
    ("flash2", "_flash_attn_varlen_forward"): f"q k v {FA2_PACKED} dropout_p softmax_scale causal",
    ("flash2", "_flash_attn_backward"): f"dout q k v out softmax_lse dq dk dv {FA2_OPTIONS} deterministic",
    ("flash2", "_flash_attn_varlen_backward"): (
        f"dout q k v out softmax_lse dq dk dv {FA2_PACKED} {FA2_OPTIONS} deterministic"
    ),
    ("flash3", "_flash_attn_forward"): f"q k v k_new v_new qv out {FA3_FORWARD}",
    ("flash3", "_flash_attn_backward"): f"{FA3_BACKWARD} softmax_scale causal",
    ("flash3, later", "_flash_attn_forward"): "q k v",
    ("flash3, later", "_flash_attn_backward"): "dout q k v out softmax_lse",
    ("flash4", "_flash_attn_fwd"): "q k v",
    ("flash4", "_flash_attn_bwd"): "q k v out dout lse",
}


def module(generation: str) -> ModuleType:
    """The package as a module of stand-ins. `calls` in it lists the name of every function called."""
    result = ModuleType(generation)
    result.calls = []
    for name, parameters in SIGNATURES[generation].items():
        setattr(result, name, _function(result, generation, name, parameters))
    return result


def _function(result: ModuleType, generation: str, name: str, parameters: str):
    answer = _forward if name.endswith(("forward", "fwd")) else _backward
    required = REQUIRED[generation, name].split()
    signature = ", ".join(p if p in required else f"{p}=None" for p in parameters.split())
    names = ", ".join(f"{p!r}: {p}" for p in parameters.split())
    scope = {"answer": lambda given: answer(generation, given), "calls": result.calls}
    exec(f"def {name}({signature}):\n    calls.append({name!r})\n    return answer({{{names}}})", scope)
    return scope[name]


def _forward(generation: str, given: dict):
    assert generation != "flash4" or given["return_lse"] is True
    assert not given.get("dropout_p") and not given.get("return_softmax")
    q, k, v = (given[name] for name in "qkv")
    _refuse(generation, q, k, v)
    parts = [_attend(generation, given, *part) for part in _sequences(given, q, k, v)]
    if given.get("cu_seqlens_q") is None:
        out, lse = (torch.cat(parts) for parts in zip(*parts, strict=True))
    else:
        out, lse = torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=1)
    return out.to(q.dtype), lse, None, None


def _attend(generation: str, given: dict, q, k, v):
    logits, _ = _logits(generation, given, q, k)
    out, lse = _walk(generation, logits, _hidden(generation, given, *logits.shape[-2:]), _repeat(v, q).transpose(1, 2))
    empty = torch.inf if generation == "flash2" else -torch.inf
    return out.transpose(1, 2), lse.masked_fill(lse == -torch.inf, empty)


def _walk(generation: str, logits, hidden, v):
    """Online softmax over blocks of `BLOCK` keys, the last one first. `hidden`: what the window leaves out of `logits`."""
    keys = logits.shape[-1]
    peak = logits.new_full(logits.shape[:-1], -torch.inf)
    total, out = torch.zeros_like(peak), v.new_zeros(*logits.shape[:-1], v.shape[-1])
    first = True
    for start in reversed(range(0, keys, BLOCK)):
        block = logits[..., start : start + BLOCK]
        cut = hidden[:, start : start + BLOCK].any() or block.shape[-1] < BLOCK or generation == "flash4"
        before, peak = peak, torch.maximum(peak, block.amax(-1))
        above = torch.where(peak == -torch.inf, 0.0, peak) if cut else peak
        shrink = torch.ones_like(peak) if first else torch.exp(before - above)
        # The exponential of a block is always taken against a finite maximum; that of what came before is not.
        weights = torch.exp(block - torch.where(peak == -torch.inf, 0.0, peak).unsqueeze(-1))
        total, out = total * shrink + weights.sum(-1), out * shrink.unsqueeze(-1) + weights @ v[..., start : start + BLOCK, :]
        first = False
    # As the packages do at the end: a sum of 0 or NaN stands for a row without keys.
    empty = (total == 0) | total.isnan()
    lse = torch.where(empty, torch.inf if generation != "flash4" else -torch.inf, peak + total.log())
    lse = torch.where(total == 0, -torch.inf, lse)
    return out / torch.where(empty, 1.0, total).unsqueeze(-1), lse


def _backward(generation: str, given: dict):
    assert not given.get("dropout_p") and given["deterministic"] is False
    q, k, v, out, dout = (given[name] for name in ("q", "k", "v", "out", "dout"))
    lse = given["lse" if generation == "flash4" else "softmax_lse"]
    _refuse(generation, q, k, v, out, dout)
    assert out.shape == dout.shape == (*q.shape[:-1], v.shape[-1]) and lse.is_contiguous()
    packed = given.get("cu_seqlens_q") is not None
    assert lse.shape == ((q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1]))
    by_row = lse.mT if packed else lse.transpose(1, 2)  # to be cut as q is
    grads = [_gradients(generation, given, *part) for part in _sequences(given, q, k, v, dout, out, by_row)]
    dq, dk, dv = (torch.cat([g[0] for g in subset] if packed else list(subset)) for subset in zip(*grads, strict=True))
    if generation == "flash4":
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
    for name, grad in (("dq", dq), ("dk", dk), ("dv", dv)):
        given[name].copy_(grad)
    return None


def _gradients(generation: str, given: dict, q, k, v, dout, out, lse):
    logits, capped = _logits(generation, given, q, k)
    probs = torch.exp(logits - lse.transpose(1, 2).unsqueeze(-1))
    delta = (dout * out).sum(-1).transpose(1, 2).unsqueeze(-1)
    dlogits = probs * (torch.einsum("bqhd,bkhd->bhqk", dout, _repeat(v, q)) - delta)
    if given["softcap"]:
        dlogits = dlogits * (1 - (capped / given["softcap"]) ** 2)
    dq = given["softmax_scale"] * torch.einsum("bhqk,bkhd->bqhd", dlogits, _repeat(k, q))
    dk = given["softmax_scale"] * torch.einsum("bhqk,bqhd->bkhd", dlogits, q)
    dv = torch.einsum("bhqk,bqhd->bkhd", probs, dout)
    groups = (k.shape[2], -1)
    return dq, dk.unflatten(2, groups).sum(3), dv.unflatten(2, groups).sum(3)


def _logits(generation: str, given: dict, q, k):
    logits = given["softmax_scale"] * torch.einsum("bqhd,bkhd->bhqk", q, _repeat(k, q))
    capped = None
    assert given["softmax_scale"] > 0
    if given["softcap"]:
        logits = capped = given["softcap"] * torch.tanh(logits / given["softcap"])
    return logits.masked_fill(_hidden(generation, given, *logits.shape[-2:]), -torch.inf), capped


def _hidden(generation: str, given: dict, rows: int, keys: int):
    """(rows, keys) bool: what the window leaves out."""
    left, right = _sides(generation, given, rows, keys)
    offset = torch.arange(keys) - torch.arange(rows).unsqueeze(1) - (keys - rows)
    hidden = torch.zeros(rows, keys, dtype=torch.bool)
    if left is not None:
        hidden |= offset < -left
    if right is not None:
        hidden |= offset > right
    return hidden


def _sides(generation: str, given: dict, rows: int, keys: int):
    """The window as the package's host code reads it, in its own order; None is unbounded."""
    if "window_size" in given:
        left, right = given["window_size"]
    else:
        left, right = given["window_size_left"], given["window_size_right"]
    causal = given["causal"] if "causal" in given else given["is_causal"]
    assert isinstance(causal, bool)
    if generation == "flash4":
        assert left is None or left >= 0
        return left, 0 if causal else right
    longest_q, longest_k = given.get("max_seqlen_q") or rows, given.get("max_seqlen_k") or keys
    wide_left, wide_right = (longest_k, longest_k) if generation == "flash2" else (longest_k - 1, longest_q - 1)
    left, right = -1 if left >= wide_left else left, -1 if right >= wide_right else right
    right = 0 if causal else right
    if left < 0 and right < 0:
        return None, None
    left, right = wide_left if left < 0 else left, wide_right if right < 0 else right
    return left, right


def _sequences(given: dict, *tensors):
    """The tensors of each sequence, as a batch of one where they are packed."""
    starts_q, starts_k = given.get("cu_seqlens_q"), given.get("cu_seqlens_k")
    if starts_q is None:
        assert starts_k is None
        yield tensors
        return
    assert starts_q.dtype == starts_k.dtype == torch.int32
    starts_q, starts_k = starts_q.tolist(), starts_k.tolist()
    assert given["max_seqlen_q"] == max(b - a for a, b in pairwise(starts_q))
    assert given["max_seqlen_k"] == max(b - a for a, b in pairwise(starts_k))
    for n in range(len(starts_q) - 1):
        cuts = [slice(starts[n], starts[n + 1]) for starts in (starts_q, starts_k)]
        yield [x[cuts[m in (1, 2)]][None] for m, x in enumerate(tensors)]


def _refuse(generation: str, q, k, v, *others) -> None:
    assert q.shape[-1] == k.shape[-1] and (generation == "flash4" or q.shape[-1] == v.shape[-1])
    for x in (q, k, v, *others):
        assert x.stride(-1) == 1 and x.shape[-1] % 8 == 0 and x.dtype == q.dtype
    assert q.shape[-2] % k.shape[-2] == 0


def _repeat(kv, q):
    return kv.repeat_interleave(q.shape[2] // kv.shape[2], dim=2)
