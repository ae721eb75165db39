"""Wraps a model so that it takes whole batches and runs on shards, and otherwise behaves like the wrapped model.

Trainer and its subclasses call the model and read its outputs; they also use its class, config and parameters, and accelerate
unwraps it. All of that is forwarded to the model. Only the call differs.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from ringattn.integrations.transformers.whole_batch import forward_whole, unwrap


class _LossOnly(dict[str, Any]):
    """Holds the loss of `outputs`; other outputs are gathered when a custom loss of the trainer reads them by name."""

    def __init__(self, outputs: Any) -> None:
        super().__init__(loss=outputs["loss"])
        self._outputs = outputs

    def __missing__(self, name: str) -> Any:
        return self._outputs[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._outputs, name)


class OnShards:
    """Wraps `model`: a call is `forward_whole` over `mesh`, for gradients that are averaged over ranks.

    sharding: for `shard_batch`.
    loss_only: whether a call with labels needs only the loss, so that logits are not gathered.
    """

    __slots__ = ("_loss_only", "_mesh", "_model", "_sharding")

    def __init__(self, model: Any, mesh: DeviceMesh, sharding: dict[str, Any], loss_only: bool = False) -> None:
        for name, value in zip(self.__slots__, (loss_only, mesh, model, sharding), strict=True):
            object.__setattr__(self, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = inspect.signature(unwrap(self._model).forward).bind_partial(*args).arguments | kwargs
        outputs = forward_whole(self._model, batch, self._mesh, averaged_over=self._mesh.size(), **self._sharding)
        loss = outputs.get("loss")
        return _LossOnly(outputs) if self._loss_only and loss is not None else outputs

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # isinstance() then behaves as for the model
        return type(self._model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._model, name)

    def __dir__(self) -> list[str]:
        return dir(self._model)

    def __repr__(self) -> str:
        return f"{self._model!r} on shards"
