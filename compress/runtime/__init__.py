"""An artifact in its runtime: what generates, classifies and encodes."""
