"""Lists the packages whose `__all__` users may rely on; everything else in ringattn may change."""

PUBLIC = (
    *("ringattn", "ringattn.sequence", "ringattn.schedule", "ringattn.schedule.draw", "ringattn.plan", "ringattn.planner"),
    *(
        "ringattn.kernels",
        "ringattn.kernels.fused",
        "ringattn.comm",
        "ringattn.faults",
        "ringattn.execution",
        "ringattn.merging",
        "ringattn.nn",
    ),
    *("ringattn.runtime", "ringattn.checkpoint", "ringattn.diagnostics", "ringattn.cli", "ringattn.cli.train"),
    *("ringattn.integrations.transformers", "ringattn.integrations.trainer", "ringattn.integrations.deepspeed"),
)
