"""Shared maths: pure functions on tensors, each with a slow, obvious twin in the tests."""
