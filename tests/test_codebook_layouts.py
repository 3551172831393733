"""AQLM's and VPTQ's files, read back by a twin written from their descriptions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import compress
from compress.export.checkpoint import readback, runtime
from compress.export.checkpoint.layout import Choice, Layout, Packed
from compress.export.checkpoint.packing import wrap_codes
from compress.export.checkpoint.target import AQLM, VPTQ, CheckpointTarget
from compress.formats import parse_format
from compress.formats.base import QuantTensor
from compress.formats.codebook import Codebook
from compress.layer import ActSpec, Layer, LayerKind
from compress.models.model import Model
from compress.pipeline import Pipeline
from compress.target import Refusal, plan_layers
from helpers.layouts import COLUMNS, PROFILE, assert_read_back, config_of, layer_of, spec_of, verified, written

WIDTHS = range(1, 17)


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path]) -> Model:
    return compress.load(make_llama(num_hidden_layers=1, attention_bias=True))


def read_alone(layout: Layout, layer: Layer, folder: Path) -> torch.Tensor:
    """A module's weight, decoded by the twin from a file with nothing else."""
    save_file({f"m.{name}": tensor for name, tensor in layout.tensors(layer).items()}, folder / "model.safetensors")
    config = layout.config([Packed("m", spec_of(layer.format, *layer.shape))], [])
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return readback.read(folder)["m.weight"]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_aqlm_files_of_every_width_are_decoded_to_the_very_weights(tmp_path: Path, bits: int, stages: int) -> None:
    layer = layer_of(Codebook(vector=3, entries=1 << bits, stages=stages))
    assert torch.equal(read_alone(AQLM.layout, layer, tmp_path), layer.float_weight())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("stages", "groups", "scale"), [(1, 1, "column"), (2, 1, "none"), (2, 3, "column")])
def test_vptq_files_of_every_width_are_decoded_to_the_very_weights(
    tmp_path: Path, bits: int, stages: int, groups: int, scale: str
) -> None:
    form = Codebook(vector=4, entries=1 << bits, stages=stages, axis="out", groups=groups, scale=scale)
    layer = layer_of(form)
    assert torch.equal(read_alone(VPTQ.layout, layer, tmp_path), layer.float_weight())


@pytest.mark.parametrize("bits", WIDTHS)
def test_an_index_of_vptq_has_the_main_code_in_its_low_bits_and_the_residual_one_above(bits: int) -> None:
    layer = layer_of(Codebook(vector=4, entries=1 << bits, stages=2, axis="out"))
    assert isinstance(layer.weight, QuantTensor)
    codes = layer.weight.format.unpack(layer.weight.tensors, layer.shape)[0].long()  # type: ignore[attr-defined]
    words = VPTQ.layout.tensors(layer)["indices"]
    assert words.shape == (1, 4, -(-COLUMNS * 2 * bits // 32))
    stream = sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words[0, 3]))
    for column in range(COLUMNS):
        index = (stream >> (column * 2 * bits)) & ((1 << 2 * bits) - 1)
        assert divmod(index, 1 << bits) == (int(codes[3, column, 1]), int(codes[3, column, 0]))
    assert stream >> (COLUMNS * 2 * bits) == 0


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_of_the_upper_half_are_negative_in_aqlm_and_come_back(bits: int) -> None:
    codes = torch.arange(1 << bits)
    wrapped = wrap_codes(codes, bits)
    assert wrapped.dtype == (torch.int8 if bits <= 8 else torch.int16)
    half = 1 << (bits - 1)
    assert wrapped.tolist() == [code if code < half else code - (1 << bits) for code in range(1 << bits)]
    assert torch.equal(wrapped.long() % (1 << bits), codes)


AQLM_FORMS = ("codebook(vector=8, entries=16)", "codebook(vector=4, entries=256, stages=1, scale=none)")
VPTQ_FORMS = (
    "codebook(vector=6, entries=16, stages=2, out)",
    "codebook(vector=10, entries=16, stages=1, out, scale=none)",
    "codebook(vector=2, entries=256, stages=1, out, groups=4)",
)
BOTH = [*((AQLM, form) for form in AQLM_FORMS), *((VPTQ, form) for form in VPTQ_FORMS)]


@pytest.mark.parametrize(("target", "form"), BOTH)
def test_a_folder_has_the_planned_bytes_and_the_very_weights(
    model: Model, tmp_path: Path, target: CheckpointTarget, form: str
) -> None:
    made = written(target, model, f"rtn(format={form})", tmp_path)
    assert_read_back(made, readback.read(tmp_path))
    stored = readback.stored(tmp_path)
    for name, answer in plan_layers(target, made.structure.layers, PROFILE).items():
        assert isinstance(answer, Choice)
        for key, (shape, dtype) in answer.tensors.items():
            if answer.operator != "dense":
                assert (stored[f"{name}.{key}"].shape, stored[f"{name}.{key}"].dtype) == (shape, dtype)


def test_shared_codebooks_are_counted_with_each_layer_that_they_are_written_for() -> None:
    for target, form in ((AQLM, Codebook()), (VPTQ, Codebook(stages=2, axis="out"))):
        alone, shared = (target.layout.choose(spec_of(replace(form, share=share))) for share in (1, 7))
        assert isinstance(alone, Choice) and isinstance(shared, Choice)
        assert alone.stored_bytes == shared.stored_bytes
        assert "shared codebooks are written for each layer" in shared.note and "shared" not in alone.note


def test_aqlm_says_what_whole_bytes_cost() -> None:
    found = AQLM.layout.choose(spec_of(Codebook(vector=8, entries=16, stages=1)))
    assert isinstance(found, Choice) and "codes of 4 bits take 8 in these files" in found.note


def test_the_config_tells_each_reader_what_it_needs(model: Model, tmp_path: Path) -> None:
    text = 'rtn(format={}, ignore=["*.o_proj"])'
    written(AQLM, model, text.format(AQLM_FORMS[0]), tmp_path / "aqlm")
    plain = ["lm_head", "model.layers.0.self_attn.o_proj"]
    assert config_of(tmp_path / "aqlm") == {
        "quant_method": "aqlm",
        "nbits_per_codebook": 4,
        "num_codebooks": 2,
        "in_group_size": 8,
        "out_group_size": 1,
        "linear_weights_not_to_quantize": [name for each in plain for name in (each, f"{each}.weight")],
    }
    written(VPTQ, model, text.format(VPTQ_FORMS[2]), tmp_path / "vptq")
    config = config_of(tmp_path / "vptq")
    assert config["modules_to_not_convert"] == plain and len(config["config_for_layers"]) == 6
    assert config["config_for_layers"]["model.layers.0.self_attn.q_proj"]["bias"] is True
    assert config["config_for_layers"]["model.layers.0.mlp.down_proj"] == {
        **{"in_features": 96, "out_features": 64, "vector_lens": [-1, 2], "num_centroids": [-1, 256]},
        **{"num_res_centroids": [-1, -1], "group_num": 4, "group_size": 24, "outlier_size": 0, "bias": False},
        **{"indices_as_float": False, "enable_norm": True, "enable_perm": False, "is_indice_packed": True},
        "vector_quant_dim": "out",
    }


@pytest.mark.parametrize(
    ("target", "form", "reason"),
    [
        (AQLM, "int4(group=32)", "AQLM stores codebooks only"),
        (AQLM, "codebook(vector=8, entries=256, stages=1, out)", "export for checkpoint-vptq"),
        (AQLM, "codebook(vector=8, entries=256, stages=1, scale=column)", "AQLM scales rows. Give scale=row"),
        (AQLM, "codebook(vector=8, entries=256, stages=1, groups=2)", "one set of codebooks per layer"),
        (VPTQ, "nf4(block=64)", "VPTQ stores codebooks only"),
        (VPTQ, "codebook(vector=8, entries=256, stages=1)", "export for checkpoint-aqlm"),
        (VPTQ, "codebook(vector=8, entries=256, stages=1, out, scale=row)", "VPTQ scales columns"),
        (VPTQ, "codebook(vector=8, entries=256, stages=3, out)", "Give stages=1 or stages=2"),
        (VPTQ, "codebook(vector=3, entries=256, stages=1, out)", "vectors of 2, 4, 6, 8, 10, 12 and 16"),
        (VPTQ, "codebook(vector=8, entries=512, stages=1, out)", "entries of 16, 256, 1024, 4096, 8192"),
        (VPTQ, "codebook(vector=8, entries=8192, stages=2, out)", "stages=2, entries of 16, 256, 1024, 4096, 32768"),
        (VPTQ, "codebook(vector=8, entries=256, stages=2, out, groups=5)", "no multiple of 5 groups"),
        (VPTQ, "codebook(vector=8, entries=256, stages=1, out, groups=32)", "more than 16 bits .* have 16"),
    ],
)  # fmt: skip
def test_what_a_layout_cannot_store_is_refused_with_what_would_do(
    target: CheckpointTarget, form: str, reason: str
) -> None:
    found = target.layout.choose(spec_of(parse_format(form)))
    assert isinstance(found, Refusal) and re.search(reason, found.reason)


@pytest.mark.parametrize(("target", "form"), [(AQLM, Codebook()), (VPTQ, Codebook(axis="out"))])
def test_layers_that_the_readers_do_not_have_are_refused(target: CheckpointTarget, form: Codebook) -> None:
    spec = spec_of(form)
    act = ActSpec(parse_format("int8(token)"))
    for wrong, reason in (
        (replace(spec, segment=-1), "embeddings and the head"),
        (replace(spec, act=act), "rounds weights only"),
        (replace(spec, turned=True), "Conv1D"),
        (replace(spec, kind=LayerKind.EXPERT), "has no experts"),
        (replace(spec, kind=LayerKind.CONV), "not convolutions"),
    ):
        found = target.layout.choose(wrong)
        assert isinstance(found, Refusal) and reason in found.reason


def test_aqlm_refuses_codebooks_of_several_sizes_and_vptq_takes_them(model: Model, tmp_path: Path) -> None:
    text = 'rtn(format={}, overrides={{"*.v_proj": {{format: {}}}}})'
    made = Pipeline.parse(text.format(AQLM_FORMS[0], "codebook(vector=4, entries=16)")).run(model).model
    answers = plan_layers(AQLM, made.structure.layers, PROFILE)
    refused = {name for name, answer in answers.items() if isinstance(answer, Refusal)}
    assert refused == {name for name, spec in made.structure.layers.items() if spec.format is not None}
    found = answers["model.layers.0.self_attn.v_proj"]
    assert isinstance(found, Refusal)
    assert "codebooks of 2 x 16 entries of 4, 2 x 16 entries of 8 in one model" in found.reason
    made = written(VPTQ, model, text.format(*VPTQ_FORMS[:2]), tmp_path)
    assert_read_back(made, readback.read(tmp_path))


@pytest.mark.parametrize(("target", "form"), [(AQLM, AQLM_FORMS[0]), (VPTQ, VPTQ_FORMS[0])])
def test_without_its_reader_a_folder_is_only_checked_and_says_so(
    model: Model, tmp_path: Path, target: CheckpointTarget, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.util, "find_spec", lambda name: None)
    found = verified(model, target, form, tmp_path)
    assert found.level == "checked" and "has not run in another tool" in found.notes[0]
