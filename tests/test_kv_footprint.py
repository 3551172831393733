"""What a cache will hold is told by the plan, as it will really hold it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import compress
from compress.kv.cache import KvCache
from compress.kv.footprint import held_bytes
from compress.kv.spec import KvSpec
from compress.models import cache_tensors
from compress.plan import make_plan
from compress.profiles import as_profile
from compress.recipe import of_passes

LENGTH = 40
SPECS: list[dict[str, Any]] = [
    {},
    {"keys": "int8(token)", "values": "int4(group=8)"},
    {"scorer": "h2o", "budget": 16, "recent": 4},
    {"scorer": "expected", "budget": 16, "recent": 4, "interval": 4, "keys": "int8(token)"},
    {"scorer": "key_norm", "budget": 16, "recent": 4, "heads": "adaptive"},
    {"keys": "int4(group=16, float_zero)", "keys_by": "channel", "residual": 16},
    {"keys": "int8(channel)", "values": "int8(head)", "static": True},
]


@pytest.mark.parametrize("settings", SPECS, ids=str)
def test_predicted_bytes_are_those_that_are_held(llama: Path, settings: dict[str, Any]) -> None:
    model, spec = compress.load(llama), KvSpec(**settings)
    attention = model.attentions[0]
    shapes = cache_tensors.wanted(spec, attention, 64)
    module = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    tensors: list[dict[str, Tensor]] = [{name: torch.ones(shape) for name, shape in shapes.items()}] * 3
    cache = KvCache.attach(module, [spec] * 3, tensors)
    with torch.no_grad():
        module(torch.arange(1, LENGTH + 1)[None], past_key_values=cache, use_cache=True)
    counts = attention.kv_heads * 8 if spec.heads == "adaptive" else 0  # how many tokens each head holds
    assert cache.nbytes == 3 * (held_bytes(spec, *attention, LENGTH, shapes) + counts)


def test_a_plan_tells_how_caches_are_kept_and_what_they_take(llama: Path) -> None:
    model, profile = compress.load(llama), as_profile("cpu-x86-avx2")
    notes = make_plan(model, of_passes("kv_quant(float_layers=[0]), kv_evict(budget=64)"), profile).notes
    assert "The cache of layers 1, 2: int8(token) keys, int8(token) values, 64 tokens by h2o." in notes
    assert any(note.startswith("All caches of one sequence take about ") for note in notes)


def test_a_recipe_for_the_cache_alone_is_not_told_to_take_fewer_bits(llama: Path) -> None:
    model, profile = compress.load(llama), as_profile("cpu-x86-avx2")
    assert not any(
        "larger than the source" in line for line in make_plan(model, of_passes("kv_evict"), profile).warnings
    )
    notes = make_plan(model, of_passes("kv_evict(budget=4096)"), profile).notes
    assert any("Nothing is dropped of texts up to 4096 tokens" in note for note in notes)
