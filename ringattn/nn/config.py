"""Defines the numbers that describe a decoder, and validates them. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from ringattn._validation import MOST, as_finite_float, short_repr
from ringattn.errors import InputError


@dataclass(frozen=True)
class DecoderConfig:
    """Hyperparameters of a Llama-shaped decoder.

    vocab_size: tokens; 256 for bytes.         dim: width of the residual stream.
    layers: blocks of attention and MLP.       hidden_dim: width inside the SwiGLU MLP.
    heads, kv_heads, head_dim: of the attention; heads must be a multiple of kv_heads, head_dim even (rotary rotates pairs).
    rope_theta: base of the rotary frequencies. norm_eps: added to the mean square in RMSNorm.

    Raises `InputError` for an invalid number.
    """

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_dim: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "layers", "heads", "kv_heads", "head_dim", "hidden_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= MOST:
                raise InputError(f"{name}={short_repr(value)}: must be a whole number of 1 or more, up to {MOST:,}")
        for name in ("rope_theta", "norm_eps"):
            if (as_finite_float(getattr(self, name)) or 0) <= 0:
                raise InputError(f"{name}={short_repr(getattr(self, name))}: must be positive")
        if self.heads % self.kv_heads:
            raise InputError(
                f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}; all KV heads serve as many query heads"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim={self.head_dim}: must be even, since the rotary embedding rotates pairs of channels")

    @property
    def parameters(self) -> int:
        """The number of parameters of a `Decoder` with this config, without building it."""
        attention = 2 * self.dim * (self.heads + self.kv_heads) * self.head_dim
        block = attention + 3 * self.dim * self.hidden_dim + 2 * self.dim
        return self.vocab_size * self.dim + self.layers * block + self.dim
