"""How the parts of a block hang together, found by running it."""
