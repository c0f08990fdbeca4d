"""What a run shows and writes down: console, metrics.jsonl, events.jsonl, trackers, profile, sample answers."""
