"""Every error ringattn raises on purpose.

Catching `RingAttnError` catches them all. Each also derives from the builtin a caller would have expected, and each message
says what was found, where, and the cure: these texts are part of the interface.
"""


class RingAttnError(Exception):
    """Base of all errors raised by ringattn."""


class PlanError(RingAttnError, ValueError):
    """The arguments of `make_plan` contradict each other or cannot work."""


class InputError(RingAttnError, ValueError):
    """A tensor does not fit the plan; raised before anything is sent."""


class MismatchError(RingAttnError, ValueError):
    """Ranks came to the same call with different plans, shapes, dtypes or options; raised on every rank."""


class ScheduleError(RingAttnError, ValueError):
    """A schedule is not a correct algorithm: something is read too early, lost, or counted twice."""


class StalledError(RingAttnError, RuntimeError):
    """The simulated transport found every rank waiting for something that will never come."""


class CommError(RingAttnError, RuntimeError):
    """A transfer between ranks failed; names the rank, the peer, the step and the pass."""


class LaunchError(RingAttnError, RuntimeError):
    """The process was not started as a member of a group; says which command to use."""


class CheckpointError(RingAttnError, RuntimeError):
    """A checkpoint is missing, incomplete, or belongs to another configuration."""
