"""Elastic jobs over many machines: supervisor in the launcher, agent on each node, control channel between them."""
