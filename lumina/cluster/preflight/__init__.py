"""Preflight: what would go wrong on the nodes of a hostfile, asked before a job is started."""
