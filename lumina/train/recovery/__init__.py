"""Recovery from trouble: the spike detector, out of memory, what is decided and how it is carried out."""
