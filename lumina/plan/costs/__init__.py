"""Cost models: what one optimizer step takes in FLOPs, bytes, memory and time on a known device."""
