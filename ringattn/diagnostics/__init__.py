"""Examines machines: installation, devices, kernels and links; writes bug reports."""

from ringattn.diagnostics.bug_report import write
from ringattn.diagnostics.cluster import examine_together
from ringattn.diagnostics.doctor import Finding, examine
from ringattn.diagnostics.probe import Probe

__all__ = ["Finding", "Probe", "examine", "examine_together", "write"]
