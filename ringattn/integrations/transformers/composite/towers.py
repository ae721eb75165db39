"""Finds the text decoder of a model that has other towers (vision, audio), and lets those keep their own attention.

`attn_implementation="ringattn"` reaches every part of a composite model. Only its text decoder runs on shards; the other towers
see whole images and run transformers' sdpa. Parts are distinguished by structure: the decoder is what `get_decoder` returns and
has the text section of the config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import nn

TOWERS = "_ringattn_towers"  # attribute of a composite model: its modules outside the text decoder
OWN = "_ringattn_keeps_its_own"  # attribute of such a module: whether it may run its own attention

NO_TEXT = ("vision_config", "audio_config")  # sections of a composite config


def text_decoder(model: Any) -> Any:
    """The decoder of a composite model that is no encoder-decoder, or None for any other model."""
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        return None
    try:
        text = config.get_text_config()
        decoder = model.get_decoder()
    except (AttributeError, ValueError):  # several text sections, or none
        return None
    if text is config or decoder is model or type(getattr(decoder, "config", None)) is not type(text):
        return None
    return decoder


def with_towers_set_up(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps the call of transformers models: towers keep their own attention unless the model is given `Shards`."""

    @wraps(call)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return call(self, *args, **kwargs)
        find_towers(self)
        with _given_shards(self) if kwargs.get("ringattn") is not None else nullcontext():
            return call(self, *args, **kwargs)

    return wrapped


def find_towers(model: Any) -> None:
    """Makes modules outside the text decoder of `model` keep their own attention from now on. Idempotent."""
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
    """Refuses attention of towers while `model` itself runs on shards, since their inputs may be parts of the sequence."""
    before = [(vars(module), vars(module)[OWN]) for module in vars(model)[TOWERS]]
    for attributes, _ in before:
        attributes[OWN] = False
    try:
        yield
    finally:
        for attributes, own in before:
            attributes[OWN] = own


def misplaced_tower(module: nn.Module) -> str | None:
    """The reason why a tower cannot run within a call on shards, or None for a module outside towers."""
    if getattr(module, OWN, None) is not False:
        return None
    return (
        f"{type(module).__name__} stands beside the text decoder, and the model was called with the inputs of shard_batch and "
        "images: call ringattn.integrations.transformers.forward_whole(model, batch, group) with the whole batch"
    )


def keeps_own_attention(module: nn.Module) -> bool:
    """Whether the module belongs to a tower beside a text decoder, or to a model without text."""
    own: bool | None = getattr(module, OWN, None)
    return own if own is not None else getattr(getattr(module, "config", None), "base_config_key", "") in NO_TEXT
