"""Tests of lumina.model.parallel."""
