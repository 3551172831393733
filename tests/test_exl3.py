"""EXL3 files: read back by a twin written from their description, and by GPTQModel's layers where there are any."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import compress
from compress.export.checkpoint import codebook_readers, readback
from compress.export.checkpoint.layout import Choice, Packed
from compress.export.checkpoint.target import EXL3
from compress.formats import parse_format
from compress.formats.trellis import Trellis
from compress.layer import ActSpec, Layer, LayerKind
from compress.maths import trellis
from compress.models.model import Model
from compress.target import Refusal, plan_layers
from helpers.layouts import PROFILE, config_of, spec_of, verified, written

EVERY = [(bits, "mul1") for bits in range(1, 9)] + [(3, "mcg"), (3, "3inst")]


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path]) -> Model:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4}
    return compress.load(make_llama("wide", num_hidden_layers=1, attention_bias=True, **sizes))


def layer_of(bits: int, code: str) -> Layer:
    """One with any symbols."""
    generator = torch.Generator().manual_seed(bits)
    symbols = torch.randint(0, 1 << bits, (8, 16 * trellis.SYMBOLS), generator=generator).to(torch.uint8)
    params = {"suh": torch.randn(256, generator=generator), "svh": torch.randn(128, generator=generator)}
    params = {name: value.half().float() for name, value in params.items()}
    return Layer("m", LayerKind.LINEAR, Trellis(bits, code).pack(symbols, params, (128, 256)))


def files_of(layer: Layer) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    tensors = {f"m.{name}": tensor for name, tensor in EXL3.layout.tensors(layer).items()}
    return tensors, EXL3.layout.config([Packed("m", spec_of(layer.format, *layer.shape))], [])


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """But for the order in which sums of 128 are added up."""
    assert float((found - expected).abs().max()) < 2e-6 * float(expected.abs().max())


@pytest.mark.parametrize(("bits", "code"), EVERY)
def test_files_of_every_width_and_code_are_decoded_to_the_very_weights(bits: int, code: str) -> None:
    layer = layer_of(bits, code)
    found = readback.DECODERS["exl3"][1](EXL3.layout.tensors(layer), {})
    assert_same(found, layer.float_weight())


@pytest.mark.parametrize(("bits", "code"), EVERY)
def test_gptqmodels_own_layer_decodes_the_very_weights(bits: int, code: str) -> None:
    pytest.importorskip(
        "gptqmodel.nn_modules.exllamav3_torch", reason="gptqmodel is not installed", exc_type=ImportError
    )
    layer = layer_of(bits, code)
    tensors, config = files_of(layer)
    assert_same(codebook_readers.decode_exl3(tensors, config)["m.weight"], layer.float_weight())


@pytest.mark.parametrize("form", ["trellis(bits=2)", "trellis(bits=3, mcg)"])
def test_a_folder_has_the_planned_bytes_and_the_very_weights(model: Model, tmp_path: Path, form: str) -> None:
    made = written(EXL3, model, f"rtn(format={form})", tmp_path)
    decoded, stored = readback.read(tmp_path), readback.stored(tmp_path)
    packed = [spec for spec in made.structure.layers.values() if spec.format is not None]
    assert packed
    for spec in packed:
        assert_same(decoded[f"{spec.name}.weight"], made.layer(spec).float_weight())
    for name, answer in plan_layers(EXL3, made.structure.layers, PROFILE).items():
        assert isinstance(answer, Choice)
        for key, (shape, dtype) in answer.tensors.items():
            if answer.operator != "dense":
                assert (stored[f"{name}.{key}"].shape, stored[f"{name}.{key}"].dtype) == (shape, dtype)


def test_the_config_tells_each_modules_tensors_and_the_mean_width(model: Model, tmp_path: Path) -> None:
    made = "rtn(format=trellis(bits=4, mcg), ignore=[*.mlp.*]), rtn(format=trellis(bits=2), targets=[*.mlp.*])"
    written(EXL3, model, made, tmp_path)
    config = config_of(tmp_path)
    assert (config["quant_method"], config["codebook"]) == ("exl3", "mcg")
    assert config["bits"] == round((4 * 4 + 3 * 2) / 7, 2)
    query = config["tensor_storage"]["model.layers.0.self_attn.q_proj"]
    assert query["bits_per_weight"] == 4 and query["mcg_multiplier"] == 0xCBAC1FED
    stored = readback.stored(tmp_path)
    for module, entry in config["tensor_storage"].items():
        own = {name: tensor for name, tensor in stored.items() if name.startswith(f"{module}.")}
        told = {name: (tuple(each["shape"]), each["torch_dtype"]) for name, each in entry["stored_tensors"].items()}
        assert told == {name: (tuple(each.shape), str(each.dtype)[6:]) for name, each in own.items()}
    assert json.loads((tmp_path / "quantization_config.json").read_text()) == config
    marker = stored["model.layers.0.self_attn.q_proj.mcg"]
    assert int(marker) & 0xFFFFFFFF == 0xCBAC1FED


def test_a_folder_is_verified_by_whatever_decodes_it_here(model: Model, tmp_path: Path) -> None:
    found = verified(model, EXL3, "trellis(bits=2)", tmp_path)
    assert found.level == "checked" and "has not run in another tool" in " ".join(found.notes)


@pytest.mark.parametrize(
    ("form", "changes", "reason"),
    [
        ("int4(group=32)", {}, "EXL3 stores trellises only"),
        ("trellis(bits=2, block=64)", {}, "order 128.*block"),
        ("trellis(bits=2)", {"kind": LayerKind.EXPERT}, "experts"),
        ("trellis(bits=2)", {"segment": -1}, "keeps embeddings and the head in float"),
        ("trellis(bits=2)", {"turned": True}, "Conv1D"),
        ("trellis(bits=2)", {"act": ActSpec(parse_format("int8(token)"))}, "rounds weights only"),
    ],
)
def test_what_exl3_does_not_hold_is_refused_with_the_reason(form: str, changes: dict[str, object], reason: str) -> None:
    spec = spec_of(parse_format(form), 128, 128)
    answer = EXL3.plan_layer(replace(spec, **changes), PROFILE)
    assert isinstance(answer, Refusal)
    assert re.search(reason, answer.reason)
