"""The native target: codebook weights run by this package's own kernels, from a run to the tokens of its artifact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

import compress
from compress import hwprofiles, manifest
from compress.__main__ import main
from compress.errors import InputError, UnsupportedError, UsageError
from compress.export import find
from compress.export.native import contents, rules, runtime, target
from compress.export.native.modules import CodebookEmbedding, CodebookLinear
from compress.formats import parse_format
from compress.formats.codebook import Codebook
from compress.hwprofiles import files as profile_files
from compress.layer import ActSpec, LayerKind, LayerSpec
from compress.models.model import Model
from compress.pipeline import Pipeline
from compress.profiles import as_profile
from compress.quality.verification import verify_export
from compress.speed.footprint import deployable_bytes
from compress.target import Refusal
from compress.transforms import Hadamard
from helpers import models

SMALL = "codebook(vector=4, entries=16, stages=2)"
PROFILE = as_profile(hwprofiles.load("cpu-x86-avx512-vnni"), "native")
LINEAR = LayerSpec("layer", LayerKind.LINEAR, (32, 64), ("layer",), format=parse_format(SMALL))


def compressed(model: Any, form: str = SMALL, targets: str = "") -> Model:
    return Pipeline.parse(f"rtn(format={form}{targets})").run(model).model


def windows(model: Model) -> torch.Tensor:
    return torch.randint(0, model.vocabulary, (16, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def made(one_block: Path) -> Model:
    return compressed(compress.load(one_block))


@pytest.fixture(scope="module")
def written(made: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of codebooks. Do not write into it."""
    return target.write(made, PROFILE, tmp_path_factory.mktemp("native") / "native").folder


def test_a_run_writes_what_verify_generate_and_eval_take_with_the_kernel_named(
    one_block: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = {**profile_files.contents(profile_files.FOLDER / "cpu-x86-avx2.yaml"), "grid": {"decode": [[1, 16]]}}
    (tmp_path / "quick.yaml").write_text(yaml.safe_dump({**quick, "id": "quick"}))
    out, profile = tmp_path / "out", tmp_path / "quick.yaml"
    given = ["run", one_block, "--passes", f"rtn(format={SMALL})", "-d", text_file, "-o", out, "-p", profile]
    options = ["-t", "native", "--samples", 4, "--quality-samples", 4, "--length", 64, "--budget", 0.1, "--json"]
    assert main([str(word) for word in (*given, *options)]) == 0
    report = json.loads(capsys.readouterr().out)
    kernel = report["verification"]["runtime"].partition(" with ")[2]
    assert kernel.startswith("codebook ") and report["speed"]["runtime"].endswith(kernel)
    assert report["operators"] == {"codebook": 7, "dense": 1} and report["verification"]["level"] == "ran"
    assert report["artifact_bytes"] == deployable_bytes(out / "native") < report["source_bytes"]
    assert report["plan"]["predicted_artifact_bytes"] == pytest.approx(report["artifact_bytes"], rel=0.01)
    assert main(["verify", str(out)]) == 0
    assert main(["eval", str(out), "--data", str(text_file), "--quality-samples", "2"]) == 0
    engine = compress.load(out, threads=1)
    assert engine.placement.provider == kernel and engine.placement.file == "native"
    together = engine.generate(["the river", "a stone"], max_new_tokens=4).rows  # the second is padded
    assert together[0] == engine.generate("the river", max_new_tokens=4).rows[0]
    capsys.readouterr()
    assert main(["generate", str(out), "--prompt", "the river", "-n", "4"]) == 0
    assert capsys.readouterr().out.strip() == f"the river{engine.generate('the river', max_new_tokens=4).text}".strip()


@pytest.mark.parametrize(
    "form",
    [
        *(SMALL, "codebook(vector=8, entries=256, stages=1, groups=2)", "codebook(vector=2, entries=4, scale=none)"),
        *("codebook(vector=6, entries=16, stages=1, out)", "codebook(vector=4, entries=512, stages=1)"),
        "codebook(vector=5, entries=8, stages=2, out, scale=row)",
    ],
)
def test_every_layout_of_a_codebook_computes_what_the_model_in_memory_does(
    form: str, one_block: Path, tmp_path: Path
) -> None:
    model = compressed(compress.load(one_block), form, ", targets=[*]")  # the tied embedding and head as well
    lowered = target.write(model, PROFILE, tmp_path / "native")
    assert lowered.operators == {"codebook": 8}
    found = verify_export(model, lowered.folder, PROFILE, windows(model), lowered.bounds)
    assert found.agrees and found.exact_relative_difference is not None and found.exact_relative_difference < 1e-5
    assert deployable_bytes(lowered.folder) == pytest.approx(
        target.predict_bytes(model.structure.layers.values(), model, PROFILE), rel=0.01
    )


def test_no_quantized_weight_is_ever_dense(written: Path, made: Model) -> None:
    session = target.session(written, 1)
    products = [child for child in session.model.modules() if isinstance(child, CodebookLinear)]
    assert len(products) == 7
    dense = {tuple(parameter.shape) for parameter in session.model.parameters() if parameter.ndim == 2}
    assert dense == {made.structure.layers["model.embed_tokens"].shape}


@pytest.mark.parametrize(
    "form",
    [
        *("codebook(vector=4, entries=16, stages=2)", "codebook(vector=4, entries=8, stages=1, out)"),
        "codebook(vector=5, entries=8, stages=1, out, scale=row)",
    ],
)
def test_an_embedding_decodes_the_rows_that_are_asked_for(form: str) -> None:
    found = parse_format(form)
    assert isinstance(found, Codebook)
    weight = torch.randn(18, 8, generator=torch.Generator().manual_seed(0))
    params = found.fit(weight)
    codes, _ = found.quantize(weight, params, torch.arange(8))
    stored = found.pack(codes, params, (18, 8))
    ids = torch.tensor([[17, 0, 5], [5, 5, 16]])
    assert torch.equal(CodebookEmbedding(found, stored.tensors, (18, 8))(ids), stored.dequantize()[ids])


def test_biases_turned_weights_and_a_head_of_its_own_are_kept(
    save_random: Callable[..., Path], one_block: Path, tmp_path: Path
) -> None:
    sizes = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    gpt2 = compressed(compress.load(save_random("native-gpt2", transformers.GPT2Config(**sizes))))
    parted = compressed(compress.load(one_block), targets=", targets=[lm_head]")
    for name, model in (("gpt2", gpt2), ("parted", parted)):
        lowered = target.write(model, PROFILE, tmp_path / name)
        assert verify_export(model, lowered.folder, PROFILE, windows(model), lowered.bounds).agrees
    session = target.session(tmp_path / "gpt2", 1)
    assert all(child.bias is not None for child in session.model.modules() if isinstance(child, CodebookLinear))
    assert json.loads((tmp_path / "parted" / "config.json").read_text())["tie_word_embeddings"] is False


def test_an_encoder_gives_hidden_states_padded_or_not(save_random: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, intermediate_size=64, max_position_embeddings=64)
    model = compressed(compress.load(save_random("native-bert", config, "AutoModel")))
    lowered = target.write(model, PROFILE, tmp_path / "native")
    assert verify_export(model, lowered.folder, PROFILE, windows(model), lowered.bounds).agrees
    session, ids = target.session(lowered.folder, 1), windows(model)[:2].numpy()
    mask = np.ones_like(ids)
    mask[1, 20:] = 0
    hidden = target.runner(session, lowered.folder).hidden(ids, mask)
    assert not session.is_decoder and np.abs(hidden[1, :20] - session.logits(ids[1:, :20])[0]).max() < 1e-2


def test_experts_stay_in_float_and_are_computed(save_random: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {**models.SIZES, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    folder = save_random("native-mixtral", transformers.MixtralConfig(**sizes, num_local_experts=4))
    model = compressed(compress.load(folder), targets=", targets=[*self_attn*]")
    lowered = target.write(model, PROFILE, tmp_path / "native")
    assert lowered.operators["codebook"] == 4
    assert verify_export(model, lowered.folder, PROFILE, windows(model), lowered.bounds).agrees
    expert = next(spec for spec in model.structure.layers.values() if spec.kind is LayerKind.EXPERT)
    answer = target.plan_layer(replace(expert, format=parse_format(SMALL)), PROFILE)
    assert isinstance(answer, Refusal) and "leave them in float" in answer.reason


def test_codebooks_that_layers_have_in_common_are_written_once(one_block: Path, tmp_path: Path) -> None:
    model = compress.load(one_block)
    assert isinstance(model, Model)
    form = parse_format("codebook(vector=4, entries=256, stages=1, share=2)")
    assert isinstance(form, Codebook)
    pair = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")]
    specs = {
        name: replace(spec, format=form) if name in pair else spec for name, spec in model.structure.layers.items()
    }
    params = form.fit(model.layer(specs[pair[0]]).float_weight())

    class Shared:
        """The model's weights, two layers in codes of one codebook."""

        def __getattr__(self, name: str) -> Any:
            return getattr(model.weights, name)

        def layer(self, spec: LayerSpec) -> Any:
            layer = model.layer(replace(spec, format=None))
            if spec.name not in pair:
                return layer
            codes, _ = form.quantize(layer.float_weight(), params, torch.arange(spec.shape[1]))
            return layer.with_weight(form.pack(codes, params, spec.shape))

    made = replace(model, structure=replace(model.structure, layers=specs), weights=Shared())  # type: ignore[arg-type]
    lowered = target.write(made, PROFILE, tmp_path / "native")
    told = contents.read(lowered.folder)
    assert dict(told.aliases) == {f"{pair[1]}.weight.codebook": f"{pair[0]}.weight.codebook"}
    tensors = load_file(lowered.folder / "model.safetensors")
    assert sum(name.endswith(".codebook") for name in tensors) == 1
    predicted = target.predict_bytes(specs.values(), made, PROFILE)
    assert deployable_bytes(lowered.folder) == pytest.approx(predicted, rel=0.01)
    assert verify_export(made, lowered.folder, PROFILE, windows(made), lowered.bounds).agrees


def test_a_machine_without_compiled_kernels_computes_in_torch_and_says_so(
    written: Path, made: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESS_KERNELS", "torch")
    monkeypatch.setattr("compress.kernels.missing", lambda: "there is no codebook.so")
    found = verify_export(made, written, PROFILE, windows(made), rules.ROUNDED_TABLES)
    assert found.agrees and found.runtime.endswith("with codebook torch") and found.max_relative_difference < 1e-5
    said = "7 codebook layer(s) were computed by torch, many times slower than by a kernel: there is no codebook.so"
    assert found.notes[0] == said


def test_what_is_generated_is_compared_token_by_token_and_fails_where_it_is_wrong(
    written: Path, made: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, exact, ids = target.session(written, 1), target.session(written, 1, exact=True), windows(made).numpy()
    agrees, notes = target.compare_graphs(session, exact, ids, 1e-3, 128)
    assert agrees and "token by token" in notes[0] and "on 32 positions" in notes[0]
    read = session.one_by_one
    monkeypatch.setattr(session, "one_by_one", lambda row: read(row[:, ::-1].copy()))
    assert not target.compare_graphs(session, exact, ids, 1e-3, 128)[0]


def test_a_path_of_the_kernels_that_there_is_not_is_refused_with_what_there_is(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESS_KERNELS", "sse")
    with pytest.raises(UsageError, match="sse"):
        target.session(written, 1)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (replace(LINEAR, format=parse_format("int4(group=32)")), "--target onnx"),
        (replace(LINEAR, act=ActSpec(parse_format("int8(token)"))), r"inputs in int8\(token\)"),
        (replace(LINEAR, pre=(Hadamard(32),)), "inputs transformed by hadamard"),
        (replace(LINEAR, kind=LayerKind.CONV, format=None), "layers of kind conv"),
        (replace(LINEAR, kind=LayerKind.EMBEDDING, has_bias=True), "the bias"),
    ],
)
def test_what_is_not_run_is_refused_with_the_reason(spec: LayerSpec, said: str) -> None:
    answer = target.plan_layer(spec, PROFILE)
    assert isinstance(answer, Refusal)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(answer.reason)


def test_codes_of_every_width_have_a_kernel() -> None:
    for bits in range(1, 17):
        answer = target.plan_layer(replace(LINEAR, format=Codebook(entries=2**bits)), PROFILE)
        assert isinstance(answer, rules.Choice) and (answer.operator, answer.kernel) == ("codebook", "fast")


def test_a_profile_without_the_runtime_is_refused_and_those_with_it_are_named() -> None:
    with pytest.raises(UsageError, match=r"nvidia-l4 has no runtime torch.*cpu-x86-avx2, cpu-x86-avx512-vnni"):
        target.require_tools(hwprofiles.load("nvidia-l4"))


def test_a_module_that_does_more_than_multiply_is_not_replaced(
    save_random: Callable[..., Path], tmp_path: Path
) -> None:
    sizes = {**models.SIZES, "num_hidden_layers": 1, "head_dim": 16}
    model = compress.load(save_random("native-gemma3", transformers.Gemma3TextConfig(**sizes)))
    with pytest.raises(UnsupportedError, match=r"embed_tokens cannot be a codebook: it is a \w+Embedding"):
        target.write(compressed(model, targets=", targets=[*]"), PROFILE, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change what native.json says."""

    def spoil(folder: Path) -> None:
        found = json.loads((folder / contents.NAME).read_text())
        change(found)
        (folder / contents.NAME).write_text(json.dumps(found))

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Change the tensors."""

    def spoil(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")

    return spoil


Q = "model.layers.0.self_attn.q_proj"
CODES = f"{Q}.weight.codes"


def layer(**changes: Any) -> Callable[[Path], object]:
    return edited(lambda found: found["layers"][Q].update(changes))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / contents.NAME).unlink(), "native.json"),
        (lambda folder: (folder / contents.NAME).write_text("[" * 100_000), "native.json is not JSON"),
        (lambda folder: (folder / contents.NAME).write_text("[]"), "not an object"),
        (edited(lambda found: found.update(schema=2)), "schema 2; this version reads 1"),
        (edited(lambda found: found.pop("layers")), "native.json is malformed"),
        (edited(lambda found: found.update(layers=[Q])), "native.json is malformed"),
        (edited(lambda found: found.update(aliases={"x": 3})), "native.json is malformed"),
        (
            edited(lambda found: found["layers"].update(other=found["layers"][Q])),
            "layer other: by config.json there is",
        ),
        (edited(lambda found: found["layers"].pop(Q)), f"has no tensor {Q}.weight"),
        (layer(format="trellis(bits=2)"), "native.json is malformed .*trellis"),
        (layer(format="int4(group=32)"), "nothing reads int4"),
        (layer(format="codebook(vector=5)"), "cannot hold 64 x 64"),
        (layer(format="codebook(vector=4, entries=16, stages=3)"), r"q_proj.weight.codes is torch.uint8 \(64, 16\)"),
        (layer(format=3), "native.json is malformed"),
        (layer(users=[]), "by config.json it is used by"),
        (layer(users="q"), "native.json is malformed"),
        (tensors(lambda found: found.pop(CODES)), f"has no tensor {CODES}"),
        (tensors(lambda found: found.update({CODES: found[CODES].short()})), "torch.int16"),
        (tensors(lambda found: found.update({"model.norm.weight": torch.ones(3)})), "model.norm.weight is"),
        (tensors(lambda found: found.update(more=torch.ones(3))), "more is no part of the model"),
        (tensors(lambda found: found.update({f"{Q}.bias": torch.ones(3)})), "q_proj.bias is"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 50), "truncated or malformed"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no \\*.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    ],
)
def test_a_folder_that_was_not_written_so_is_refused(
    spoil: Callable[[Path], object], said: str, written: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "native"))
    spoil(folder)
    with pytest.raises(InputError, match=said):
        runtime.Session(folder, 1)


def test_an_artifact_whose_tensors_are_cut_off_ends_the_command_with_5(
    written: Path, made: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(written, tmp_path / "out" / "native")
    path = tmp_path / "out" / "native" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert PROFILE.detect is not None
    anywhere = PROFILE.detect.model_copy(update={"architecture": ("x86_64", "aarch64")})
    profile = PROFILE.model_copy(update={"isa": (), "detect": anywhere})
    facts = {"task": str(made.task), "profile": profile.model_dump(mode="json")}
    manifest.write(tmp_path / "out", facts, ["native"])
    assert main(["generate", str(tmp_path / "out"), "--prompt", "x", "-n", "1"]) == 5
    said = capsys.readouterr().err
    assert "truncated or malformed" in said and "Traceback" not in said


def test_it_is_the_target_of_its_name() -> None:
    assert find("native") is target
