"""The `checkpoint` target: what compressed-tensors and transformers make of the folders is our model, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

import compress
from compress.errors import CompressError, UnsupportedError, UsageError
from compress.export.checkpoint.target import COMPRESSED_TENSORS as TARGET
from compress.inputs.datasets import Calibration
from compress.inputs.windows import Windows
from compress.models.model import Model
from compress.pipeline import Pipeline
from compress.speed.footprint import deployable_bytes
from compress.target import Refusal
from helpers.checkpoints import PROFILE, assert_same_weights, compressed, config_of, keys_of, verified
from helpers.models import SIZES

INT4 = "rtn(format=int4(group=16))"


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path]) -> Model:
    return compress.load(make_llama(num_hidden_layers=1))


@pytest.mark.parametrize(
    ("form", "operator"),
    [
        ("int2(group=16)", "pack-quantized"),
        ("int3(group=32, signed)", "pack-quantized"),
        ("int4(group=32)", "pack-quantized"),
        ("int5(channel)", "pack-quantized"),
        ("int6(tensor)", "pack-quantized"),
        ("int7(tensor, asymmetric)", "pack-quantized"),
        ("int8(channel)", "pack-quantized"),
        ("fp8_e4m3(channel)", "float-quantized"),
        ("fp8_e4m3(tensor)", "float-quantized"),
        ("mxfp8_e4m3", "mxfp8-quantized"),
        ("mxfp4", "mxfp4-pack-quantized"),
        ("nvfp4", "nvfp4-pack-quantized"),
    ],
)
def test_transformers_decodes_the_very_weights_of_the_model(
    model: Model, tmp_path: Path, form: str, operator: str
) -> None:
    made, lowered = compressed(model, f"rtn(format={form})", tmp_path)
    assert lowered.operators == {"dense": 1, operator: 7}
    config = config_of(tmp_path)["quantization_config"]
    assert config["format"] == operator and config["version"] and config["ignore"] == ["lm_head"]
    predicted = TARGET.predict_bytes(made.structure.layers.values(), made, PROFILE)
    assert deployable_bytes(tmp_path) == pytest.approx(predicted, rel=0.005)
    session = TARGET.session(tmp_path, 1, exact=operator.startswith("nvfp4"))
    assert (session.level, session.notes) == ("ran", ()) and "compressed-tensors" in session.name
    assert_same_weights(made, session.model)


@pytest.mark.parametrize(
    ("text", "inputs"),
    [
        ("rtn(format=int8(channel)), act_quant(format=int8(token))", ("int", "token", True, True)),
        ("rtn(format=int8(channel, asymmetric)), act_quant(format=int8(tensor, asymmetric))",
         ("int", "tensor", False, True)),
        ("rtn(format=int4(group=32)), act_quant(format=int8(token))", ("int", "token", True, True)),
        ("rtn(format=fp8_e4m3(channel)), act_quant(format=fp8_e4m3(token))", ("float", "token", True, True)),
    ],
)  # fmt: skip
def test_rounded_inputs_are_declared_and_rounded_by_the_reader(
    model: Model, tmp_path: Path, text: str, inputs: tuple[Any, ...]
) -> None:
    made, lowered = compressed(model, text, tmp_path)
    args = config_of(tmp_path)["quantization_config"]["config_groups"]["group_0"]["input_activations"]
    assert (args["type"], args["strategy"], args["symmetric"], args["dynamic"]) == inputs
    assert args["observer"] is None
    session, ids = TARGET.session(tmp_path, 1), torch.arange(3, 35)[None].numpy()
    plain = TARGET.session(tmp_path, 1)
    for module in plain.model.modules():
        module.quantization_enabled = False
    assert abs(session.logits(ids) - plain.logits(ids)).max() > 1e-4  # it does round
    found = verified(made, lowered)
    assert found.level == "ran" and found.exact_relative_difference is not None
    assert found.exact_relative_difference < 0.02 and found.max_relative_difference < 0.25


@pytest.mark.parametrize(
    ("weights", "inputs", "names"),
    [
        ("int8(channel)", "int8(tensor)", {"input_scale"}),
        ("int8(channel)", "int8(tensor, asymmetric)", {"input_scale", "input_zero_point"}),
        ("fp8_e4m3(channel)", "fp8_e4m3(tensor)", {"input_scale"}),
        ("nvfp4", "nvfp4", {"input_global_scale"}),
    ],
)
def test_a_static_range_of_the_inputs_is_stored_and_read(
    model: Model, tmp_path: Path, weights: str, inputs: str, names: set[str]
) -> None:
    ids = torch.randint(3, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    calibration = Calibration(Windows(ids, tuple(range(4)), "ppl/disjoint-32", ""), 0, "made here")
    result = Pipeline.parse(f"rtn(format={weights}), act_quant(format={inputs}, static=true)").run(model, calibration)
    lowered = TARGET.write(result.model, PROFILE, tmp_path)
    name = "model.layers.0.mlp.up_proj"
    assert {f"{name}.{each}" for each in names} <= keys_of(tmp_path)
    args = config_of(tmp_path)["quantization_config"]["config_groups"]["group_0"]["input_activations"]
    assert args["dynamic"] == ("local" if inputs == "nvfp4" else False)
    found = verified(result.model, lowered)
    assert found.level == "ran" and found.exact_relative_difference is not None
    assert found.exact_relative_difference < 0.05


def test_packed_zero_points_are_those_that_compressed_tensors_unpacks(model: Model, tmp_path: Path) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    made, lowered = compressed(model, "rtn(format=int3(group=32, asymmetric))", tmp_path)
    spec = made.structure.layers["model.layers.0.self_attn.k_proj"]
    layer = made.layer(spec)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as handle:
        packed = handle.get_tensor(f"{spec.name}.weight_zero_point")
    zero = layer.weight.format.unpack(layer.weight.tensors, layer.weight.shape)[2]  # type: ignore[union-attr]
    found = unpack_from_int32(packed, 3, torch.Size(zero.shape), packed_dim=0)
    assert torch.equal(found.to(torch.int16) + 4, zero.to(torch.int16))
    session = TARGET.session(tmp_path, 1)
    assert_same_weights(made, session.model)
    assert session.level == "checked" and "has not run in another tool" in session.notes[0]
    found_here = verified(made, lowered)
    assert found_here.level == "checked" and found_here.notes == session.notes
    choice = TARGET.plan_layer(spec, PROFILE)
    assert not isinstance(choice, Refusal) and "transformers 5.23 does not load packed zero points" in choice.note


def test_layers_of_several_formats_are_groups_that_name_their_modules(model: Model, tmp_path: Path) -> None:
    text = 'rtn(format=int4(group=32), ignore=["*.o_proj"], overrides={"*.v_proj": {format: fp8_e4m3(channel)}})'
    made, lowered = compressed(model, text, tmp_path)
    config = config_of(tmp_path)["quantization_config"]
    assert config["format"] == "mixed-precision"
    groups = {group["format"]: group["targets"] for group in config["config_groups"].values()}
    assert groups["float-quantized"] == ["model.layers.0.self_attn.v_proj"]
    assert "model.layers.0.mlp.up_proj" in groups["pack-quantized"] and len(groups["pack-quantized"]) == 5
    assert config["ignore"] == ["lm_head", "model.layers.0.self_attn.o_proj"]
    assert_same_weights(made, TARGET.session(tmp_path, 1).model)
    assert verified(made, lowered).level == "ran"


def test_a_tied_weight_stays_tied_in_float_and_is_stored_for_each_user_where_it_is_packed(
    model: Model, tmp_path: Path
) -> None:
    compressed(model, INT4, tmp_path / "float")
    assert "lm_head.weight" not in keys_of(tmp_path / "float")
    assert config_of(tmp_path / "float")["tie_word_embeddings"] is True
    made, lowered = compressed(model, 'rtn(format=int8(channel), targets=["*"])', tmp_path / "packed")
    keys = keys_of(tmp_path / "packed")
    assert {"lm_head.weight_scale", "model.embed_tokens.weight_scale"} <= keys
    assert config_of(tmp_path / "packed")["tie_word_embeddings"] is False
    assert_same_weights(made, TARGET.session(tmp_path / "packed", 1).model)
    assert verified(made, lowered).level == "ran"
    predicted = TARGET.predict_bytes(made.structure.layers.values(), made, PROFILE)
    assert deployable_bytes(tmp_path / "packed") == pytest.approx(predicted, rel=0.01)


def test_a_head_that_a_pass_parts_from_its_embedding_is_no_longer_tied(model: Model, tmp_path: Path) -> None:
    made, _ = compressed(model, 'rtn(format=int4(group=32), targets=["lm_head"])', tmp_path)
    assert config_of(tmp_path)["tie_word_embeddings"] is False
    assert_same_weights(made, TARGET.session(tmp_path, 1).model)


def test_what_is_not_quantized_keeps_the_dtype_of_the_source(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    model = compress.load(make_llama(num_hidden_layers=1, dtype="bfloat16"))
    compressed(model, INT4, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as handle:
        dtypes = {name: handle.get_tensor(name).dtype for name in handle.keys()}  # noqa: SIM118
    assert dtypes["model.embed_tokens.weight"] == dtypes["model.norm.weight"] == torch.bfloat16
    assert dtypes["model.layers.0.mlp.up_proj.weight_scale"] == torch.float16
    assert config_of(tmp_path)["dtype"] == "bfloat16"
    assert (tmp_path / "tokenizer.json").is_file() and (tmp_path / "generation_config.json").is_file()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)  # as a user would
    assert loaded.dtype == torch.bfloat16 and torch.isfinite(loaded(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("rtn(format=int4(group=48))", "64 columns are no multiple of the group 48"),
        ("rtn(format=fp6_e3m2(group=32))", "compressed-tensors stores fp8_e4m3"),
        ('rtn(format=int4(group=32), targets=["*"])', "transformers loads no packed embedding"),
        ("rtn(format=int4(group=32, asymmetric)), act_quant(format=int8(token))", "Give symmetric weights"),
        ("rtn(format=int4(group=32, float_zero))", "stores whole zero points only"),
        ("llm_int8", "keeps no outliers in float"),
        ("act_quant(format=int8(token))", "rounds both or none"),
        ("rtn(format=int8(channel)), act_quant(format=int4(token))", "compressed-tensors rounds them to int8"),
    ],
)
def test_what_it_cannot_store_is_refused_with_what_would_do(
    model: Model, tmp_path: Path, text: str, reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        compressed(model, text, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bias_that_readers_would_pass_over_is_refused(model: Model) -> None:
    name = "model.layers.0.self_attn.q_proj"
    spec = model.structure.layers[name]
    with pytest.raises(UnsupportedError, match=f"{name} got a bias from a pass"):
        TARGET.predict_bytes([replace(spec, has_bias=True)], model, PROFILE)


def test_a_gpt2_whose_weights_are_turned_is_refused_but_saved_in_float(
    save_random: Callable[..., Path], tmp_path: Path
) -> None:
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    model = compress.load(save_random("gpt2", config))
    with pytest.raises(UnsupportedError, match="Conv1D"):
        compressed(model, INT4, tmp_path / "packed")
    made, lowered = compressed(model, "", tmp_path / "float")
    assert verified(made, lowered).max_relative_difference < 1e-5


def test_an_encoder_is_saved_as_the_base_that_was_read(save_random: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    model = compress.load(save_random("bert", transformers.BertConfig(**sizes), "AutoModelForMaskedLM"))
    made, lowered = compressed(model, INT4, tmp_path)
    config = config_of(tmp_path)
    assert config["architectures"] == ["BertModel"] and "pooler.dense" in config["quantization_config"]["ignore"]
    session = TARGET.session(tmp_path, 1)
    assert not session.is_decoder and session.logits(torch.arange(5)[None].numpy()).shape == (1, 5, 32)
    session.call(torch.arange(5)[None].numpy(), 0)()
    assert_same_weights(made, session.model)
    assert verified(made, lowered).max_relative_difference < 1e-5


def test_a_folder_with_a_hole_is_not_run(model: Model, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    compressed(model, INT4, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight_packed"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CompressError, match=r"would leave it random|cannot load"):
        TARGET.session(tmp_path, 1)
