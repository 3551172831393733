"""The cache of keys and values, compressed: what each layer stores and drops, and the cache of transformers for it."""
