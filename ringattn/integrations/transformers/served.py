"""Says which attention layers of a process belong to the model that was given to DeepSpeed's registration.

The name of an attention ("sdpa") is one for all models of a process: reference models, vision towers, metrics. Those keep it.
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
    """The text layers of `model`, a model or a config.

    Where a model was given, its own layers are served always, and those of another model of its kind (a copy, a teacher) where
    the caller hands that one position_ids, as a job does that cuts sequences. Where a config was given, all layers of its kind.
    """

    def __init__(self, model: Any, config: PretrainedConfig) -> None:
        self.text = config.get_text_config()
        self.modules: WeakSet[nn.Module] = WeakSet()
        self.positions: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # those that callers have handed to models
        self.given = isinstance(model, nn.Module)
        if self.given:
            self.modules.update((text_decoder(model) or model).modules())
            self._mind_positions()

    def layer(self, module: nn.Module, position_ids: Tensor | None) -> bool:
        """Whether attention of `module` runs on parts of sequences. Raises `InputError` where that cannot be known."""
        if module in self.modules:
            return True
        config = getattr(module, "config", None)
        if config is None and not self.given:
            raise InputError(
                f"{type(module).__name__} does not say which model it belongs to; pass the model itself to "
                "register_with_transformers, in the place of its name"
            )
        if type(config) is not type(self.text):
            return False
        return not self.given or (position_ids is not None and position_ids in self.positions)

    def model(self, model: nn.Module, position_ids: Tensor) -> bool:
        """Whether the layers of a model called with these positions run on parts of sequences."""
        config = getattr(model, "config", None)
        if model in self.modules or (self.given and any(module in self.modules for module in model.children())):
            return True
        if type(config) is not type(self.text):
            return False
        return not self.given or position_ids in self.positions

    def mask(self, config: Any) -> bool:
        """Whether a mask made for this config may be for a layer that is served."""
        return isinstance(config, PretrainedConfig) and type(config.get_text_config()) is type(self.text)

    def _mind_positions(self) -> None:
        call: Callable[..., Any] = PreTrainedModel.__call__
        positions = self.positions

        @wraps(call)
        def minding(model: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(kwargs.get("position_ids"), Tensor):
                positions[kwargs["position_ids"]] = True
            return call(model, *args, **kwargs)

        PreTrainedModel.__call__ = minding  # type: ignore[method-assign]
