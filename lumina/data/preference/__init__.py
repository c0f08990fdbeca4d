"""Preference pairs: records, their data set and its batches."""
