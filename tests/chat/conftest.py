"""Hypothesis without a deadline: the first example of a process reads the vocabulary, and CI machines stall."""

from hypothesis import settings

settings.register_profile("lumina", deadline=None)
settings.load_profile("lumina")
