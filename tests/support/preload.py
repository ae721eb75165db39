"""Imported once by the fork server of tests/support/spawn.py: what most ranks need, which they then share and never collect."""

import contextlib
import gc

import torch
import torch.distributed  # noqa: F401

import ringattn.execution.attention
import ringattn.nn

with contextlib.suppress(ImportError):  # transformers takes 4 seconds of a core to import, in each rank of each test with it
    import transformers.models.auto.modeling_auto  # noqa: F401

    import ringattn.integrations.transformers.whole_batch  # noqa: F401

gc.freeze()  # else each rank's collections would walk, and copy, a million objects that none of them made
