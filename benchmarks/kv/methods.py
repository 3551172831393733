"""What the cache benchmarks compare: by name, what each layer's cache keeps of so many tokens."""

from __future__ import annotations

from typing import Any

from compress.kv.spec import KvSpec

SINKS, RECENT_SHARE = 4, 0.25
"""Of a budget: newest tokens that always stay. All that drop tokens have the same, so that scores alone differ."""

EVICTING: dict[str, dict[str, Any]] = {
    "streaming": {"scorer": "position"},
    "key_norm": {"scorer": "key_norm"},
    "h2o": {"scorer": "h2o"},
    "h2o by age": {"scorer": "h2o", "by_age": True},
    "h2o, decay 0.99": {"scorer": "h2o", "decay": 0.99},
    "tova": {"scorer": "tova"},
    "snapkv": {"scorer": "snapkv"},
    "expected": {"scorer": "expected"},
    "key_diff": {"scorer": "key_diff"},
    "h2o, int8(token)": {"scorer": "h2o", "keys": "int8(token)", "values": "int8(token)"},
}
for _name in ("snapkv", "expected", "key_diff"):
    EVICTING[f"{_name}, heads share"] = {**EVICTING[_name], "heads": "adaptive"}
ALONE: dict[str, dict[str, Any]] = {
    f"{name}, score alone": {**EVICTING[name], "recent": 1, "sinks": sinks}
    for name, sinks in {"key_norm": 0, "h2o by age": 0, "tova": 0, "expected": SINKS, "key_diff": 0}.items()
}
"""As kvpress has these methods: no token stays but by its score, of `expected` the first ones."""
NO_WIDER = {"snapkv": "window", "expected": "interval"}
"""Settings that are what stays, at most: the newest queries, the steps until a score is made."""
WINDOW = 16
"""Of SnapKV, where the budget has room for it."""
STORING: dict[str, dict[str, Any]] = {
    "int8(token)": {"keys": "int8(token)", "values": "int8(token)"},
    "int4(token)": {"keys": "int4(token)", "values": "int4(token)"},
    "int4(group=16)": {"keys": "int4(group=16)", "values": "int4(group=16)"},
    "fp8_e4m3(token)": {"keys": "fp8_e4m3(token)", "values": "fp8_e4m3(token)"},
    "KIVI-4": {
        "keys": "int4(group=32, float_zero)",
        "values": "int4(group=32, float_zero)",
        "keys_by": "channel",
        "residual": 32,
    },
    "KIVI-2": {
        "keys": "int2(group=32, float_zero)",
        "values": "int2(group=32, float_zero)",
        "keys_by": "channel",
        "residual": 32,
    },
}


def recent(budget: int) -> int:
    """Newest tokens that stay, of a budget."""
    return max(1, int(RECENT_SHARE * budget))


def evicting(layers: int, budget: int) -> dict[str, list[KvSpec]]:
    """Caches that keep `budget` tokens per head. To add one is to add a row above, or here where layers differ."""
    kept = {"budget": budget, "sinks": SINKS, "recent": recent(budget)}
    return {name: [_spec({**kept, **settings})] * layers for name, settings in (EVICTING | ALONE).items()}


def _spec(settings: dict[str, Any]) -> KvSpec:
    name = NO_WIDER.get(settings["scorer"])
    return KvSpec(**settings, **({name: min(WINDOW, settings["recent"])} if name else {}))


def storing(layers: int) -> dict[str, list[KvSpec]]:
    """Caches that keep all tokens in few bits."""
    return {name: [KvSpec(**settings)] * layers for name, settings in STORING.items()}
