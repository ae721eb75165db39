"""What a kernel is: attention of one block of queries to one block of keys on one device, over a list of pieces.

    forward(Operands(q, k, v, bias), pieces, options)                             -> Partial(out, lse)
    backward(Operands(q, k, v, bias), Rows(dout, lse, delta), pieces, options)    -> Grads(dq, dk, dv, dbias)

A kernel knows neither ranks nor masks nor schedules. Subclasses compute one piece; this module walks the list.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.mask import Band
from ringattn.partial import Partial, accum_dtype, merge_, nothing
from ringattn.pieces import Piece


class Options(NamedTuple):
    """What changes the logits, the same for every tile."""

    scale: float
    softcap: float | None = None  # logits = softcap * tanh(scale * q @ k / softcap) + bias


class Operands(NamedTuple):
    """What attends to what. heads is a multiple of kv_heads; v may have another head_dim than q and k."""

    q: Tensor  # (batch, heads, rows, head_dim)
    k: Tensor  # (batch, kv_heads, keys, head_dim)
    v: Tensor  # (batch, kv_heads, keys, head_dim)
    bias: Tensor | None  # (batch, kv_heads or 1, keys), added to the scaled logits

    def cut(self, piece: Piece) -> Operands:
        keys = slice(piece.k_start, piece.k_stop)
        bias = None if self.bias is None else self.bias[:, :, keys]
        return Operands(self.q[:, :, piece.q_start : piece.q_stop], self.k[:, :, keys], self.v[:, :, keys], bias)


class Rows(NamedTuple):
    """What backward knows of each whole row, which is all that one block of its keys needs to find its share."""

    dout: Tensor  # (batch, heads, rows, head_dim)
    lse: Tensor  # (batch, heads, rows); +inf where a row sees no key at all, so that its probabilities are exactly 0
    delta: Tensor  # (batch, heads, rows): sum(dout * out)

    def cut(self, piece: Piece) -> Rows:
        dout, lse, delta = (x[:, :, piece.q_start : piece.q_stop] for x in self)
        return Rows(dout, lse, delta)


class Grads(NamedTuple):
    """Gradients of one block; dbias is None when there is no bias."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None


class Kernel(ABC):
    """Walks over pieces; a subclass gives the arithmetic of a single one."""

    name: str

    @abstractmethod
    def piece_forward(self, block: Operands, band: Band, options: Options) -> Partial:
        """Attention within one rectangle. Every row sees at least one key, unless its bias is -inf."""

    @abstractmethod
    def piece_backward(self, block: Operands, rows: Rows, band: Band, options: Options) -> Grads:
        """This rectangle's share of the gradients."""

    def refine(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        """The pieces as this kernel wants them; it may cut some up, and take them in another order."""
        return pieces

    def parts_forward(self, block: Operands, pieces: Sequence[Piece], options: Options) -> Iterable[Partial]:
        """The answer for every piece, in order; a kernel may compute several in one call."""
        return (self.piece_forward(block.cut(piece), piece.band, options) for piece in pieces)

    def parts_backward(self, block: Operands, rows: Rows, pieces: Sequence[Piece], options: Options) -> Iterable[Grads]:
        """Every piece's share, in order."""
        return (self.piece_backward(block.cut(piece), rows.cut(piece), piece.band, options) for piece in pieces)

    def forward(self, block: Operands, pieces: Sequence[Piece], options: Options) -> Partial:
        block, options = _upright(block, options)
        q, pieces = block.q, self.refine(pieces)
        if _is_whole(pieces, block):
            return self.piece_forward(block, pieces[0].band, options)
        # Rows that occur in one piece only are copied as they are; sums need the accumulation dtype.
        once = _rows_occur_once(pieces)
        total = nothing(q.shape[:-1], block.v.shape[-1], q.dtype if once else accum_dtype(q.dtype), q.device)
        for piece, part in zip(pieces, self.parts_forward(block, pieces, options), strict=True):
            into = Partial(*(x[:, :, piece.q_start : piece.q_stop] for x in total))
            if once:
                into.out.copy_(part.out)
                into.lse.copy_(part.lse)
            else:
                merge_(into, part)
        return total

    def backward(self, block: Operands, rows: Rows, pieces: Sequence[Piece], options: Options) -> Grads:
        if options.scale < 0:
            block, options = _upright(block, options)
            grads = self.backward(block, rows, pieces, options)
            return grads._replace(dq=-grads.dq)
        pieces = self.refine(pieces)
        if _is_whole(pieces, block):
            return self.piece_backward(block, rows, pieces[0].band, options)
        dtype = block.q.dtype if len(pieces) == 1 else accum_dtype(block.q.dtype)
        dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in block[:3])
        total = Grads(dq, dk, dv, None if block.bias is None else torch.zeros_like(block.bias))
        for piece, part in zip(pieces, self.parts_backward(block, rows, pieces, options), strict=True):
            total.dq[:, :, piece.q_start : piece.q_stop] += part.dq
            for whole, share in zip(total[1:], part[1:], strict=True):
                if whole is not None and share is not None:
                    whole[:, :, piece.k_start : piece.k_stop] += share
        return total


def _upright(block: Operands, options: Options) -> tuple[Operands, Options]:
    """The same logits from a positive scale: fused operators take the largest product in a row to have the largest logit."""
    if options.scale > 0:
        return block, options
    return block._replace(q=-block.q), options._replace(scale=-options.scale)


def _rows_occur_once(pieces: Sequence[Piece]) -> bool:
    runs = sorted((piece.q_start, piece.q_stop) for piece in pieces)
    return all(stop <= start for (_, stop), (start, _) in pairwise(runs))


def _is_whole(pieces: Sequence[Piece], block: Operands) -> bool:
    return len(pieces) == 1 and (pieces[0].rows, pieces[0].keys) == (block.q.shape[2], block.k.shape[2])
