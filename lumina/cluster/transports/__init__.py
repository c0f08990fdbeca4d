"""Transports: how an agent or a probe is started on a node, one file each (lumina.config.registry)."""
