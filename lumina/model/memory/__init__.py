"""Memory that does not grow with the sequence: tiles of tokens, recomputed layers, their inputs on the host."""
