"""Determines which attention layers of a process belong to the model that was passed to DeepSpeed's registration.

The name of an attention ("sdpa") is shared by all models of a process: reference models, vision towers, metrics. Those keep it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PretrainedConfig, PreTrainedModel

from ringattn.errors import InputError
from ringattn.integrations.transformers.composite.towers import text_decoder


class Served:
    """Determines whether a layer is a text layer of `model`, a model or a config.

    Given a model, its own layers are always served, and those of another model of its type (a copy, a teacher) where the caller
    passes it position_ids, as sequence-parallel jobs do. Given a config, all layers of its type are served.
    """

    def __init__(self, model: Any, config: PretrainedConfig) -> None:
        self.text = config.get_text_config()
        self.modules: WeakSet[nn.Module] = WeakSet()
        self.positions: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # those that callers passed to models
        self.given = isinstance(model, nn.Module)
        if self.given:
            self.modules.update((text_decoder(model) or model).modules())
            self._record_positions()

    def layer(self, module: nn.Module, position_ids: Tensor | None) -> bool:
        """Whether attention of `module` runs on shards. Raises `InputError` where that is unknown."""
        if module in self.modules:
            return True
        config = getattr(module, "config", None)
        if config is None and not self.given:
            raise InputError(
                f"{type(module).__name__} has no config that names its model; pass the model itself to "
                "register_with_transformers instead of its name"
            )
        if type(config) is not type(self.text):
            return False
        return not self.given or (position_ids is not None and position_ids in self.positions)

    def model(self, model: nn.Module, position_ids: Tensor) -> bool:
        """Whether the layers of a model called with these positions run on shards."""
        config = getattr(model, "config", None)
        if model in self.modules or (self.given and any(module in self.modules for module in model.children())):
            return True
        if type(config) is not type(self.text):
            return False
        return not self.given or position_ids in self.positions

    def mask(self, config: Any) -> bool:
        """Whether a mask for this config may belong to a served layer."""
        return isinstance(config, PretrainedConfig) and type(config.get_text_config()) is type(self.text)

    def _record_positions(self) -> None:
        call: Callable[..., Any] = PreTrainedModel.__call__
        positions = self.positions

        @wraps(call)
        def wrapped(model: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(kwargs.get("position_ids"), Tensor):
                positions[kwargs["position_ids"]] = True
            return call(model, *args, **kwargs)

        PreTrainedModel.__call__ = wrapped  # type: ignore[method-assign]
