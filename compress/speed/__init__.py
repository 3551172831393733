"""Timing, memory and energy of a baseline and a variant, measured; and a roofline for machines not here."""
