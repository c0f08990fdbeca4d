"""Memory, time and cost of a run before it starts, and whether this machine can do it. No torch unless asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lumina.lazy import names_of

if TYPE_CHECKING:
    from lumina.plan.compilers import refuse_missing_compiler as refuse_missing_compiler
    from lumina.plan.costs.devices import Device as Device
    from lumina.plan.costs.devices import local_device as local_device
    from lumina.plan.costs.workload import attended_keys as attended_keys
    from lumina.plan.costs.workload import layer_matrix_parameters as layer_matrix_parameters
    from lumina.plan.environment import MIN_FREE_DISK as MIN_FREE_DISK
    from lumina.plan.environment import CheckResult as CheckResult
    from lumina.plan.environment import Status as Status
    from lumina.plan.environment import check_all as check_all
    from lumina.plan.estimate_report import print_estimate as print_estimate
    from lumina.plan.plan_report import print_plan as print_plan
    from lumina.plan.stage import default_document as default_document
    from lumina.plan.stage import smallest_memory as smallest_memory

_HOMES = {
    "CheckResult": "environment",
    "Device": "costs.devices",
    "MIN_FREE_DISK": "environment",
    "Status": "environment",
    "attended_keys": "costs.workload",
    "check_all": "environment",
    "default_document": "stage",
    "layer_matrix_parameters": "costs.workload",
    "local_device": "costs.devices",
    "print_estimate": "estimate_report",
    "print_plan": "plan_report",
    "refuse_missing_compiler": "compilers",
    "smallest_memory": "stage",
}

__all__ = [
    "MIN_FREE_DISK",
    "CheckResult",
    "Device",
    "Status",
    "attended_keys",
    "check_all",
    "default_document",
    "layer_matrix_parameters",
    "local_device",
    "print_estimate",
    "print_plan",
    "refuse_missing_compiler",
    "smallest_memory",
]


__getattr__ = names_of(__name__, _HOMES)
