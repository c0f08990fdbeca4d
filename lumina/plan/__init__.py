"""Know before you pay: memory, time and cost of a run, and whether this machine can do it. No torch unless asked."""

from lumina.plan.commands import check_environment_command, estimate_time_command, plan_command

__all__ = ["check_environment_command", "estimate_time_command", "plan_command"]
