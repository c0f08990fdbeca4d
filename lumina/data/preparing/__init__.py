"""Records -> tokens, loss masks, chunks and packed samples, in parallel; splits and deduplication."""
