"""Implements the decoder: embedding, blocks of attention and SwiGLU, final norm, tied head; each rank runs its own rows.

Only attention combines rows, so only attention communicates. Modules are named as in Llama's published weights
(`layers.0.self_attn.q_proj`), so a bias-free, tied Llama loads with `load_state_dict`. No dropout and no KV cache: the decoder
is for training and scoring, not for generation.

Touvron et al. 2023, https://arxiv.org/abs/2302.13971; GQA: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245;
SwiGLU: Shazeer 2020, https://arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from ringattn._validation import error_message, flag, instance
from ringattn.comm.consistency import agree
from ringattn.comm.process_group import Group, group_and_rank
from ringattn.errors import InputError
from ringattn.execution.attention import attention
from ringattn.execution.checks import as_strided_tensor, check_tokens, resolve_group
from ringattn.execution.sharding import positions
from ringattn.nn.config import DecoderConfig
from ringattn.nn.loss import IGNORE, NUMBERS, check_targets, mean_over, summed
from ringattn.nn.rotary import apply_rotary, rotary
from ringattn.plan.plan import Plan

A_CONFIG = "give a DecoderConfig"
NO_TARGETS = object()  # unlike None, which a caller may pass by mistake
LOGIT_ROWS = 1024  # rows whose logits exist at once in `Decoder.loss`


class SelfAttention(nn.Module):
    """Grouped-query self-attention over a sharded sequence."""

    def __init__(self, config: DecoderConfig) -> None:
        instance("config", config, DecoderConfig, InputError, A_CONFIG)
        super().__init__()
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.q_proj = nn.Linear(config.dim, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.dim, bias=False)

    def forward(
        self, x: Tensor, positions: Tensor, plan: Plan, group: Group | None = None, key_bias: Tensor | None = None
    ) -> Tensor:
        """x: (batch, rows, dim), this rank's rows; positions: int64 (rows,) or (batch, rows), their global positions; key_bias:
        as for `attention`. Returns the shape of x."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = rotary(positions, self.head_dim, self.rope_theta)
        out = attention(apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v, plan, key_bias=key_bias, group=group)
        y: Tensor = self.o_proj(out.flatten(-2))
        return y


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        instance("config", config, DecoderConfig, InputError, A_CONFIG)
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., dim). Returns the same shape."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Block(nn.Module):
    """Attention and MLP, each on normed input and added to the residual stream."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, positions: Tensor, plan: Plan, group: Group | None = None, key_bias: Tensor | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), positions, plan, group, key_bias)
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


class BlockArgs(NamedTuple):
    """The arguments of a decoder pass that its blocks need."""

    tokens: Tensor
    plan: Plan
    group: Group | None
    checkpoint: bool
    positions: Tensor
    key_bias: Tensor | None = None

    def __call__(self, blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
        args = (self.positions, self.plan, self.group, self.key_bias)
        for block in blocks:
            x = recomputed(block, x, *args, use_reentrant=False) if self.checkpoint else block(x, *args)
        return x


class Decoder(nn.Module):
    """A Llama-shaped language model on a sharded sequence; parameters are replicated.

    With a plan for one rank it is the single-process model. New parameters are drawn from torch's global generator: set the
    same seed on all ranks.
    """

    def __init__(self, config: DecoderConfig) -> None:
        instance("config", config, DecoderConfig, InputError, A_CONFIG)
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises matrices to keep the variance, scaled by 1/sqrt(2 layers) if they add to the residual stream (GPT-2)."""
        # Small, since it is also the head: the initial loss is log(vocab_size).
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        for name, p in self.layers.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=(p.shape[1] * (2 * self.config.layers if residual else 1)) ** -0.5)

    def forward(self, tokens: Tensor, plan: Plan, group: Group | None = None, *, checkpoint: bool = False) -> Tensor:
        """Logits (batch, rows, vocab_size) for this rank's rows.

        Args:
            tokens: int64 (batch, rows), this rank's shard of the sequence: `shard(tokens, plan)`.
            plan: from `make_plan` with this model's heads, kv_heads and head_dim; the same on every rank.
            group: the process group or 1-D DeviceMesh whose ranks hold the sequence; the default group by default.
            checkpoint: keep only each block's input and compute the block again in backward, its communication included.

        Raises:
            InputError: tokens do not fit the plan. Raised on every rank.
        """
        logits: Tensor = F.linear(self._hidden(tokens, plan, group, checkpoint), self.embed_tokens.weight)
        return logits

    def loss(
        self, tokens: Tensor, targets: Tensor, plan: Plan, group: Group | None = None, *, checkpoint: bool = False
    ) -> Tensor:
        """Computes `cross_entropy(self(tokens, plan, group), targets, group)` without all logits of the shard in memory.

        targets: int64 (batch, rows), shifted before sharding. Logits of 1,024 rows exist at once; backward recomputes them.

        Raises:
            InputError: tokens or targets do not fit the plan. Raised on every rank.
        """
        hidden = self._hidden(tokens, plan, group, checkpoint, targets).flatten(0, 1)
        process_group, _ = group_and_rank(group, plan.world)
        parts = [
            recomputed(self._summed_loss, h, t, use_reentrant=False)
            for h, t in zip(hidden.split(LOGIT_ROWS), targets.flatten().split(LOGIT_ROWS), strict=True)
        ]
        return mean_over(torch.stack(parts).sum(), (targets != IGNORE).sum(), process_group)

    def _summed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return summed(F.linear(hidden, self.embed_tokens.weight), targets)

    def _hidden(
        self, tokens: Tensor, plan: Plan, group: Group | None, checkpoint: bool, targets: object = NO_TARGETS
    ) -> Tensor:
        process_group, rank = resolve_group(plan, group)
        problem = error_message(lambda: self._check(tokens, plan, rank, checkpoint, targets))
        agree(process_group, {"call": "Decoder", "plan": plan.digest}, problem, details=plan.describe)
        block_args = BlockArgs(tokens, plan, group, checkpoint, positions(plan, rank).to(tokens.device))
        normed: Tensor = self.norm(self._blocks(self.embed_tokens(tokens), block_args))
        return normed

    def _check(self, tokens: Tensor, plan: Plan, rank: int, checkpoint: bool, targets: object) -> None:
        """Raises `InputError` for arguments that do not fit the plan or the model."""
        flag("checkpoint", checkpoint, InputError)
        if as_strided_tensor("tokens", tokens).ndim != 2 or tokens.shape[1] != plan.rows(rank):
            raise InputError(
                f"tokens has shape {tuple(tokens.shape)}, the plan gives rank {rank} {plan.rows(rank)} rows: "
                "pass (batch, rows) as shard(tokens, plan) returns it"
            )
        device = self.embed_tokens.weight.device
        if tokens.dtype not in NUMBERS or tokens.device != device:
            raise InputError(f"tokens: {tokens.dtype} on {tokens.device}; give int64 on {device}, the model's device")
        check_tokens("tokens", tokens, self.config.vocab_size)
        if targets is NO_TARGETS:
            return
        target_ids = as_strided_tensor("targets", targets)
        if target_ids.shape != tokens.shape:
            raise InputError(
                f"targets has shape {tuple(target_ids.shape)} and tokens {tuple(tokens.shape)}: shard both with the same plan"
            )
        check_targets(target_ids, self.config.vocab_size, device)

    def _blocks(self, x: Tensor, block_args: BlockArgs) -> Tensor:
        """Runs all blocks."""
        return block_args(self.layers, x)
