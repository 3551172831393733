"""A checkpoint says how the cache is rounded, as compressed-tensors has it, and its reader does so."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import compress
from compress import hwprofiles
from compress.export import find
from compress.export.checkpoint import readback
from compress.kv.spec import KvSpec
from compress.models.model import Model

PROFILE = hwprofiles.load("cpu-x86-avx512-vnni")
TARGET = find("checkpoint")
SHAPES = {"tensor": (1, 1), "head": (2, 1)}


def in_format(text: str) -> KvSpec:
    return KvSpec(keys=text, values=text, static=True)


def with_caches(model: Model, text: str) -> Model:
    made, random = replace(model, kv=(in_format(text),) * 2), torch.Generator().manual_seed(0)
    shape, top = SHAPES[text.split("(")[1][:-1]], 127 if text.startswith("int8") else 448
    tensors = [{name: (torch.rand(shape, generator=random) + 0.3) / top for name in made.kv[0].wants} for _ in "12"]
    vars(made)["kv_tensors"] = tuple(tensors)
    return made


class Rounding(DynamicCache):
    """A slow twin: each number to the nearest that its format has, before it is attended to."""

    def __init__(self, scales: Any, whole: bool) -> None:
        super().__init__()
        self.scales, self.whole = scales, whole

    def update(self, key: Any, value: Any, layer: int, *args: Any, **settings: Any) -> Any:
        found = []
        for name, states in (("key_scale", key), ("value_scale", value)):
            scale = self.scales[layer][name][None, :, None]
            steps = states / scale
            nearest = (
                torch.round(steps).clamp(-128, 127)
                if self.whole
                else steps.clamp(-448, 448).to(torch.float8_e4m3fn).float()
            )
            found.append(nearest * scale)
        return super().update(*found, layer, *args, **settings)


@pytest.mark.parametrize("text", ["int8(tensor)", "int8(head)", "fp8_e4m3(tensor)", "fp8_e4m3(head)"])
def test_transformers_rounds_keys_and_values_by_the_scales_of_the_file(
    text: str, two_blocks: Path, tmp_path: Path
) -> None:
    made, ids = with_caches(compress.load(two_blocks), text), np.random.default_rng(0).integers(0, 256, (2, 24))
    TARGET.write(made, PROFILE, tmp_path)
    scheme = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    kind, by = ("int" if text.startswith("int") else "float"), ("tensor" if "tensor" in text else "attn_head")
    assert (scheme["num_bits"], scheme["type"], scheme["strategy"], scheme["dynamic"]) == (8, kind, by, False)
    stored = readback.stored(tmp_path, ("k_scale", "v_scale"))
    assert len(stored) == 4 and {tuple(each.shape) for each in stored.values()} == {
        (1,) if by == "tensor" else (2, 1, 1)
    }
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert TARGET.predict_bytes(made.structure.layers.values(), made, PROFILE) == size
    session = TARGET.session(tmp_path, 1)
    model = AutoModelForCausalLM.from_pretrained(two_blocks, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = model(torch.from_numpy(ids)).logits.numpy()
        twin = Rounding(made.kv_tensors, text.startswith("int"))
        rounded = model(torch.from_numpy(ids), past_key_values=twin).logits.numpy()
    np.testing.assert_allclose(session.logits(ids), rounded, atol=2e-3 * np.abs(rounded).max(), rtol=0)
    assert np.abs(rounded - plain).max() > 1e-3
    exact = TARGET.session(tmp_path, 1, exact=True)
    for found in (session.plain.logits(ids), exact.plain.logits(ids), exact.logits(ids)):
        np.testing.assert_allclose(found, plain, atol=1e-5 * np.abs(plain).max(), rtol=0)


def test_it_stands_beside_packed_weights(two_blocks: Path, tmp_path: Path) -> None:
    from compress.passes import Rtn
    from compress.pipeline import Pipeline

    result = Pipeline(Rtn(format="int8(channel)")).run(compress.load(two_blocks))
    made = with_caches(result.model, "int8(tensor)")
    TARGET.write(made, PROFILE, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["config_groups"] and config["kv_cache_scheme"]["type"] == "int"
    ids = np.random.default_rng(0).integers(0, 256, (1, 16))
    session = TARGET.session(tmp_path, 1)
    rounded, plain = session.logits(ids), session.plain.logits(ids)
    assert np.abs(rounded - plain).max() > 1e-4
    np.testing.assert_allclose(plain, find("checkpoint").session(tmp_path, 1, exact=True).logits(ids), atol=1e-4)


@pytest.mark.parametrize(
    ("specs", "told"),
    [
        ((KvSpec(keys="int8(token)", values="int8(token)"),), "has a scale with each token"),
        ((in_format("int8(channel)"),), "int8 and fp8_e4m3 by tensor or by head"),
        ((in_format("int4(head)"),), "int8 and fp8_e4m3 by tensor or by head"),
        ((KvSpec(keys="nf4", values="nf4"),), "has a scale with each token"),
        ((KvSpec(keys="int8(tensor)", static=True),), "some are in float"),
        ((in_format("int8(tensor)"), KvSpec()), "some are in float"),
        ((in_format("int8(tensor)"), in_format("int8(head)")), "one for all layers"),
        ((KvSpec(scorer="h2o", budget=64),), "drops no tokens"),
        ((KvSpec(keys="int2(group=32, float_zero)", values="int2(group=32)", keys_by="channel", residual=32),), "keys"),
    ],
    ids=str,
)
def test_what_the_scheme_cannot_say_is_refused_by_name(specs: tuple[KvSpec, ...], told: str) -> None:
    refusal = TARGET.takes_caches(specs, PROFILE)  # type: ignore[attr-defined]
    assert refusal is not None and refusal.usage and told in refusal.reason


def test_other_layouts_say_nothing_of_caches() -> None:
    refusal = find("checkpoint-gptq").takes_caches((in_format("int8(tensor)"),), PROFILE)  # type: ignore[attr-defined]
    assert refusal is not None and not refusal.usage and "says nothing of caches" in refusal.reason
