"""The `checkpoint` targets: a folder as transformers saves it, its weights packed as other tools read them.

One file per layout; `target.py` has the objects that the table of targets names.
"""
