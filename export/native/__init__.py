"""The `native` target: a folder that this package runs itself, in torch on the CPU with its kernels for codebooks.

`rules.py` says what is taken, `contents.py` what `native.json` says, `loading.py` makes the module, where those of
`modules.py` are in place of linear layers, `runtime.py` runs it; `target.py` is what the table of targets names.
"""
