"""Reports on data: validation, estimates before any work, one sample in full."""
