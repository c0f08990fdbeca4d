"""DeepSpeed: the only place of Lumina that touches its private names."""
