"""Saving a run: when checkpoints and backups are made, and how an engine is taken into one and filled from one."""
