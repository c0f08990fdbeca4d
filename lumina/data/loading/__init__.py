"""The prepared data set -> batches in a fixed global order."""
