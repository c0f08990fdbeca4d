"""Shared by the data formats: faults, the vocabulary of fields, turns, questions and answers."""
