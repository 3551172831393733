"""Interval estimates: pure functions on arrays, no torch, no clock, no random numbers."""
