"""Tests of lumina.model.memory."""
