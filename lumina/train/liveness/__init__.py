"""Whether all ranks still move: a watchdog that ends a hung rank, and the comparison that names a slow one."""
