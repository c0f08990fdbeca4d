"""Preflight: checks of the nodes of a hostfile before a job is started on them."""
