"""Which store a `KvSpec` asks for."""

from __future__ import annotations

from typing import Literal

from compress.formats.int_grid import IntGrid
from compress.kv.growing import GrowingStore
from compress.kv.spec import KvSpec, LayerTensors, row_format
from compress.kv.static import static_format
from compress.kv.stores import ChannelStore, FloatStore, RecentStore, RowStore, SlotStore, StaticStore, Store


def store_of(spec: KvSpec, part: Literal["key", "value"], tensors: LayerTensors) -> Store:
    """An empty store for the keys or values of a layer. tensors: what the spec wants."""
    text = spec.keys if part == "key" else spec.values
    if not text:
        return GrowingStore() if spec.selects else FloatStore()
    if part == "key" and spec.keys_by == "channel":
        form = row_format(text)
        assert isinstance(form, IntGrid)
        return ChannelStore(form, spec.residual)
    store: SlotStore
    if spec.static_part(part):
        store = StaticStore(static_format(text), tensors[f"{part}_scale"])
    else:
        store = RowStore(row_format(text), spec.rotated)
    return RecentStore(store, spec.residual) if spec.residual else store
