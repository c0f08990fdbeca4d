"""Work of one model shared between ranks beside data parallelism."""
