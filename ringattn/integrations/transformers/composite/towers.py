"""Finds the text decoder of a model that has other towers beside it (vision, audio), and lets those keep their own attention.

`attn_implementation="ringattn"` reaches every part of a composite model. Only its text decoder runs on shards; what stands
beside it sees whole images, and runs transformers' sdpa. Parts are distinguished by structure: the decoder is what the model
names as such and runs on the text section of the config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import nn

TOWERS = "_ringattn_towers"  # of a composite model: its modules outside the text decoder
OWN = "_ringattn_keeps_its_own"  # of such a module: whether its attention may run on what this rank gives it

NO_TEXT = ("vision_config", "audio_config")  # sections of a composite config, to which a config may say it belongs


def text_decoder(model: Any) -> Any:
    """The decoder of a composite model that is no encoder-decoder, or None for any other model."""
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        return None
    try:
        text = config.get_text_config()
        decoder = model.get_decoder()
    except (AttributeError, ValueError):  # several texts, or none
        return None
    if text is config or decoder is model or type(getattr(decoder, "config", None)) is not type(text):
        return None
    return decoder


def minding_towers(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` of any model of transformers, whose towers keep their own attention unless the model is given `Shards`."""

    @wraps(call)
    def minding(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return call(self, *args, **kwargs)
        find_towers(self)
        with _given_shards(self) if kwargs.get("ringattn") is not None else nullcontext():
            return call(self, *args, **kwargs)

    return minding


def find_towers(model: Any) -> None:
    """Let modules beside the text decoder of `model` run their own attention, from now on. Idempotent."""
    if TOWERS in vars(model):
        return
    decoder = text_decoder(model)
    within = set() if decoder is None else set(decoder.modules())
    towers = () if decoder is None else tuple(module for module in model.modules() if module not in within)
    vars(model)[TOWERS] = towers
    for module in towers:
        vars(module).setdefault(OWN, True)


@contextmanager
def _given_shards(model: Any) -> Iterator[None]:
    """While `model` itself runs on shards, what a tower is given may be a part of the sequence: its attention is refused."""
    before = [(vars(module), vars(module)[OWN]) for module in vars(model)[TOWERS]]
    for attributes, _ in before:
        attributes[OWN] = False
    try:
        yield
    finally:
        for attributes, own in before:
            attributes[OWN] = own


def misplaced(module: nn.Module) -> str | None:
    """Why a tower cannot run within a call on shards, or None for what is no tower."""
    if getattr(module, OWN, None) is not False:
        return None
    return (
        f"{type(module).__name__} stands beside the text decoder, and the model was called with the inputs of shard_batch and "
        "images: call ringattn.integrations.transformers.forward_whole(model, batch, group) with the whole batch"
    )


def keeps_its_own(module: nn.Module) -> bool:
    """Whether it stands beside the text decoder of a model that has run, or belongs to what sees no text at all."""
    own: bool | None = getattr(module, OWN, None)
    return own if own is not None else getattr(getattr(module, "config", None), "base_config_key", "") in NO_TEXT
