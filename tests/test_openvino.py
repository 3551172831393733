"""The openvino target: what is written, that OpenVINO runs it in the types that it should, and what is refused."""

from __future__ import annotations

import ctypes
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers

import compress
from compress import hwprofiles
from compress.__main__ import main
from compress.errors import InputError, UnsupportedError, UsageError
from compress.export import find
from compress.export.openvino import rules, runtime, target
from compress.export.openvino.signal_stack import kept_signal_stack
from compress.formats import parse_format
from compress.inputs.datasets import Calibration, calibrate
from compress.layer import ActSpec, LayerKind, LayerSpec
from compress.models.model import Model
from compress.pipeline import Pipeline
from compress.profiles import as_profile
from compress.quality.image_evaluate import probe_images
from compress.quality.verification import verify_export
from compress.target import Refusal

PROFILE = as_profile(hwprofiles.load("cpu-x86-avx512-vnni"), "openvino")
STATIC = "rtn(format=int8(channel)), act_quant(format=int8(tensor, asymmetric), static=true)"
needs_openvino = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("openvino") is None, reason="OpenVINO is not installed (extra openvino)"
)
LINEAR = LayerSpec("layer", LayerKind.LINEAR, (32, 64), ("layer",), format=parse_format("int8(channel)"))


@pytest.fixture(scope="module")
def encoder(save_random: Callable[..., Path]) -> Model:
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, intermediate_size=128, max_position_embeddings=64)
    return compress.load(save_random("openvino-bert", config, "AutoModel"))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def small(make_llama: Callable[..., Path]) -> Path:
    return make_llama("openvino-llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def decoder(small: Path) -> tuple[Model, bytes]:
    """A Llama of one block and its captured graph."""
    model = compress.load(small)
    assert isinstance(model, Model)
    return model, target.capture(model, PROFILE)


def windows(model: Model) -> torch.Tensor:
    return torch.randint(0, model.vocabulary, (16, 32), generator=torch.Generator().manual_seed(1))


def rounded(model: Model, passes: str = STATIC) -> Model:
    from compress.inputs.windows import Windows

    ids = windows(model)
    given = Calibration(Windows(ids, tuple(range(len(ids))), "random", "random"), 0, "random")
    return Pipeline.parse(passes).run(model, given).model


@needs_openvino
def test_a_float_encoder_computes_what_the_model_does_and_pads_without_a_trace(encoder: Model, tmp_path: Path) -> None:
    lowered = target.write(encoder, PROFILE, tmp_path / "openvino")
    found = verify_export(encoder, lowered.folder, PROFILE, windows(encoder), lowered.bounds)
    assert found.agrees and found.level == "ran" and found.max_relative_difference < 1e-4
    assert found.runtime.startswith("openvino 20") and found.runtime.endswith(" CPU")
    session = target.session(lowered.folder, 1)
    runner = target.runner(session, lowered.folder)
    ids = windows(encoder)[:2].numpy()
    mask = np.ones_like(ids)
    mask[1, 20:] = 0
    hidden = runner.hidden(ids, mask)
    assert np.abs(hidden[1, :20] - session.logits(ids[1:, :20])[0]).max() < 1e-4
    assert (runner.placement.provider, runner.placement.threads) == ("CPU", 1)
    assert runner.placement.file == "openvino/openvino_model.xml"


@needs_openvino
def test_rounded_inputs_run_on_integer_kernels_and_agree(encoder: Model, tmp_path: Path) -> None:
    made = rounded(encoder)
    lowered = target.write(made, PROFILE, tmp_path / "int8")
    found = verify_export(made, lowered.folder, PROFILE, windows(encoder), lowered.bounds)
    assert found.agrees
    session = target.session(lowered.folder, 1)
    static = [spec for spec in made.structure.layers.values() if spec.act is not None]
    assert session.kernels["i8"] + session.kernels["u8"] >= len(static) > 0
    assert any("in i8" in note or "in u8" in note for note in found.notes)
    target.write(encoder, PROFILE, tmp_path / "float")
    sizes = [(tmp_path / name / runtime.DATA).stat().st_size for name in ("int8", "float")]
    assert sizes[0] < 0.4 * sizes[1]


@needs_openvino
@pytest.mark.parametrize(
    "form",
    [
        *("int8(channel)", "int8(group=32)", "int4(group=32)", "int4(channel)", "int4(group=32, asymmetric)"),
        *("int4(group=32, float_zero)", "int4(group=16, signed)", "int3(group=32, asymmetric)", "int6(group=32)"),
    ],
)
def test_weights_of_every_integer_grid_decode_to_what_the_model_has(
    form: str, decoder: tuple[Model, bytes], tmp_path: Path
) -> None:
    model, graph = decoder
    targets = "" if "float_zero" not in form else ", targets=[model.layers.*]"
    made = Pipeline.parse(f"rtn(format={form}{targets})").run(model).model
    lowered = target.write(made, PROFILE, tmp_path, graph)
    found = verify_export(made, lowered.folder, PROFILE, windows(model), lowered.bounds)
    assert found.agrees
    assert found.exact_relative_difference is not None and found.exact_relative_difference < 1e-3


@needs_openvino
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_stored_as_it_is(dtype: str, make_llama: Callable[..., Path], tmp_path: Path) -> None:
    model = compress.load(make_llama(f"openvino-{dtype}", dtype=dtype, num_hidden_layers=1))
    assert isinstance(model, Model)
    lowered = target.write(model, PROFILE, tmp_path)
    assert verify_export(model, lowered.folder, PROFILE, windows(model), lowered.bounds).agrees
    stored = sum(spec.source_bytes for spec in model.structure.layers.values())
    assert (tmp_path / runtime.DATA).stat().st_size == pytest.approx(stored, rel=0.1)


@needs_openvino
def test_inputs_that_are_rotated_at_run_time_agree(decoder: tuple[Model, bytes], tmp_path: Path) -> None:
    model, graph = decoder
    made = Pipeline.parse("hadamard(block=32), rtn(format=int8(group=32))").run(model).model
    lowered = target.write(made, PROFILE, tmp_path / "openvino", graph)
    found = verify_export(made, lowered.folder, PROFILE, windows(made), lowered.bounds)
    assert found.agrees and found.exact_relative_difference is not None and found.exact_relative_difference < 1e-4


@needs_openvino
def test_an_image_classifier_with_rounded_inputs_agrees_and_runs_on_integer_kernels(
    cnn: str, images_file: Path, tmp_path: Path
) -> None:
    model = compress.load(cnn)
    assert isinstance(model, Model)
    made = Pipeline.parse(STATIC).run(model, calibrate(model, images_file, samples=32)).model
    lowered = target.write(made, PROFILE, tmp_path)
    found = verify_export(made, lowered.folder, PROFILE, probe_images(made), lowered.bounds)
    assert found.agrees and (tmp_path / "preprocessing.json").is_file()
    assert target.session(tmp_path, 1).kernels["f32"] < len(made.structure.layers)


@needs_openvino
def test_a_run_ends_with_a_report_and_the_artifact_generates(
    small: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    made = ["--passes", "rtn(format=int8(channel))", "-p", PROFILE.id, "--target", "openvino", "-d", str(text_file)]
    options = ["--samples", "4", "--quality-samples", "4", "--length", "64", "--budget", "0.2", "-q", "-o", str(out)]
    assert main(["run", str(small), *made, *options]) == 0
    report = compress.report.load(out / "report.json")
    assert report.verification is not None and report.verification.level == "ran"
    assert report.speed is not None and report.speed.runtime.startswith("openvino ")
    assert report.plan is not None
    assert report.plan.predicted_artifact_bytes == pytest.approx(report.artifact_bytes, rel=0.2)
    capsys.readouterr()
    prompts = ["the river", "a stone runs over the blue tree"]
    engine = compress.load(out, anyway=True, threads=1)
    assert not isinstance(engine, Model) and engine.placement.provider == "CPU"
    alone = [engine.generate(prompt, max_new_tokens=6).text for prompt in prompts]
    assert [row.text for row in engine.generate(prompts, max_new_tokens=6).rows] == alone


def _stack() -> list[int]:
    """This thread's alternate signal stack: place, flags, size."""
    found = (ctypes.c_size_t * 3)()
    ctypes.CDLL(None).sigaltstack(None, found)
    return [found[0], found[1] & 0xFFFFFFFF, found[2]]


@pytest.mark.skipif(sys.platform != "linux", reason="signals are handled on a stack of their own on Linux only")
def test_signals_are_handled_where_they_were_before_openvino_loaded_a_model() -> None:
    memory, before = ctypes.create_string_buffer(1 << 16), _stack()
    with kept_signal_stack():
        # as OpenVINO does, which frees the memory then
        ctypes.CDLL(None).sigaltstack((ctypes.c_size_t * 3)(ctypes.addressof(memory), 0, len(memory)), None)
        assert _stack() != before
    assert _stack() == before


@needs_openvino
def test_a_model_is_compiled_with_the_stack_of_signals_kept(
    encoder: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Mock(side_effect=kept_signal_stack)
    monkeypatch.setattr(runtime, "kept_signal_stack", kept)
    target.write(encoder, PROFILE, tmp_path)
    target.session(tmp_path, 1)
    assert kept.call_count == 1


@needs_openvino
@pytest.mark.parametrize("name", [runtime.GRAPH, runtime.DATA])
def test_a_damaged_folder_is_an_input_error_that_names_the_file(encoder: Model, tmp_path: Path, name: str) -> None:
    target.write(encoder, PROFILE, tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"openvino_model\.xml"):
        target.session(tmp_path, 1)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(InputError, match=r"openvino_model\.xml is missing"):
        target.session(tmp_path, 1)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (replace(LINEAR, kind=LayerKind.EXPERT), "mixture of experts .* export for onnx"),
        (replace(LINEAR, format=parse_format("fp8_e4m3(channel)")), "only integer grids"),
        (replace(LINEAR, format=parse_format("int4(group=48)")), "64 inputs are no whole number of groups"),
        (replace(LINEAR, act=ActSpec(parse_format("int8(token)"))), "grids fixed beforehand; use act_quant"),
        (
            replace(LINEAR, format=None, act=ActSpec(parse_format("int8(tensor)"), static=True)),
            "weight is not quantized",
        ),
        (
            replace(
                LINEAR, format=parse_format("int4(group=32)"), act=ActSpec(parse_format("int8(tensor)"), static=True)
            ),
            r"beside static int8 inputs a weight is int8\(channel\)",
        ),
    ],
)
def test_what_openvino_does_not_take_is_refused_with_the_reason(spec: LayerSpec, words: str) -> None:
    import re

    answer = rules.choose(spec, PROFILE)
    assert isinstance(answer, Refusal) and re.search(words, answer.reason), answer


def test_without_the_extra_the_error_names_it_and_the_command_ends_with_4(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'compress\[openvino\]'"):
        target.require_tools(PROFILE)
    made = ["--passes", "rtn(format=int8(channel))", "-p", PROFILE.id, "--target", "openvino", "-d", str(text_file)]
    assert main(["run", str(llama), *made, "-q", "-o", str(tmp_path / "out")]) == 4
    assert "compress[openvino]" in capsys.readouterr().err


def test_a_profile_without_openvino_is_a_usage_error() -> None:
    other = as_profile(hwprofiles.load("cpu-arm-dotprod"), "openvino")
    with pytest.raises(UsageError, match="cpu-arm-dotprod has no runtime openvino"):
        find("openvino").capture(None, other)  # type: ignore[arg-type]
    answer = rules.choose(LINEAR, other)
    assert isinstance(answer, Refusal) and "cpu-arm-dotprod" in answer.reason
