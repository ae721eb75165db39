"""Defines every error that ringattn raises on purpose.

Catching `RingAttnError` catches all of them. Each also derives from the builtin error a caller would expect. Each message names
what was found, where, and how to fix it; these texts are part of the interface.
"""


class RingAttnError(Exception):
    """Base of all errors raised by ringattn."""


class PlanError(RingAttnError, ValueError):
    """The arguments of `make_plan` contradict each other or cannot work."""


class InputError(RingAttnError, ValueError):
    """A tensor does not fit the plan; raised before anything is sent."""


class MismatchError(RingAttnError, ValueError):
    """Ranks made the same call with different plans, shapes, dtypes or options; raised on every rank."""


class ScheduleError(RingAttnError, ValueError):
    """A schedule is not a correct algorithm: a value is read too early, lost, or counted twice."""


class StalledError(RingAttnError, RuntimeError):
    """The simulated transport found that every rank waits for a message that will never arrive."""


class CommError(RingAttnError, RuntimeError):
    """A transfer between ranks failed; the message names the rank, the peer, the step and the pass."""


class LaunchError(RingAttnError, RuntimeError):
    """The process was not started as a member of a group; the message names the command to use."""


class CheckpointError(RingAttnError, RuntimeError):
    """A checkpoint is missing, incomplete, or belongs to another configuration."""
