"""Generation with a KV cache: batches of sequences, sampling, and text as it arrives."""
