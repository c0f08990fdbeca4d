"""Liveness of ranks: a watchdog that ends a hung one, and straggler detection."""
