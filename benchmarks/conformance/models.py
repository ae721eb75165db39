"""Builds a model of any type of transformers: tiny, in fp64, without dropout, all weights random and none without effect."""

from __future__ import annotations

from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from conformance.corrections import IN_EVALUATION, VARIANTS
from conformance.tiny import tiny_config

TASKS: dict[str, dict[str, Any]] = {
    "causal": dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "seq2seq": dict(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
}


def all_models() -> list[tuple[str, str]]:
    """(task, name) of every type, and of the variants of some."""
    return [(task, name) for task in TASKS for name in TASKS[task]] + [(VARIANTS[name][0], name) for name in VARIANTS]


def class_name(task: str, name: str) -> str:
    """The name of the class that transformers has for this type and task."""
    model_type = VARIANTS[name][1] if name in VARIANTS else name
    cls = TASKS[task][model_type]
    return cls if isinstance(cls, str) else cls[0]


def config_of(task: str, name: str) -> PretrainedConfig:
    """The tiny configuration of this type or variant, as its class wants it."""
    _, model_type, more = VARIANTS.get(name, (task, name, {}))
    return part_for(tiny_config(model_type, task == "causal", more), getattr(transformers, class_name(task, name)).config_class)


def build(task: str, name: str, attention: str | None = None, seed: int = 0) -> PreTrainedModel:
    """The same weights whenever and wherever it is built. attention: "sdpa", or "eager" where there is none, by default."""
    torch.manual_seed(seed)
    cls, config = getattr(transformers, class_name(task, name)), config_of(task, name)
    try:
        model = built(cls, config, attention or "sdpa")
    except ValueError:  # the model, or one inside, has only the other
        if attention is not None:
            raise
        model = built(cls, config, "eager")
    ready: PreTrainedModel = randomised(model, seed).train(name not in IN_EVALUATION)
    return ready


def built(cls: Any, config: PretrainedConfig, attention: str) -> PreTrainedModel:
    """The model with this attention, its experts one after another: the grouped product has no fp64."""
    model: PreTrainedModel = cls._from_config(config, attn_implementation=attention, experts_implementation="eager")
    doubled: PreTrainedModel = model.double()
    return doubled


def part_for(config: PretrainedConfig, cls: type) -> PretrainedConfig:
    """The configuration inside a composite one that the class is made of, as `AutoModel.from_config` takes it."""
    if isinstance(config, cls):
        return config
    values: list[Any] = list(vars(config).values())
    return cast(PretrainedConfig, next((part for part in values if type(part) is cls), config))


def randomised(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Weights under which every part of the model matters: as initialised, sinks, norms, biases and routers do nothing.

    Matrices are of the size that keeps activations near 1. What does not train (tables of positions) is left alone, and zero
    buffers that are saved (biases of routers and logits) become random.
    """
    source = torch.Generator().manual_seed(seed + 1)
    saved = model.state_dict().keys()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=source, dtype=parameter.dtype)
            if parameter.requires_grad:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else parameter + 0.1 * noise)
        for name, buffer in model.named_buffers():
            if name in saved and buffer.is_floating_point() and buffer.ndim and not buffer.any():
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=source, dtype=buffer.dtype))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model
