"""Outputs of a run: console, metrics.jsonl, events.jsonl, trackers, profile, sample answers."""
