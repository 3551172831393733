"""Whole-model passes stand between streamed stages, each stage starting from what the one before wrote."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import compress
from compress.engine import segment_files, store
from compress.engine.journal import Journal
from compress.engine.layer_stats import LayerStats
from compress.engine.layerpass import LayerPass, Pass
from compress.engine.modelpass import ModelPass, Stage
from compress.engine.part import Part
from compress.engine.stages import cut
from compress.errors import Interrupted, UsageError
from compress.inputs.datasets import Calibration, calibrate
from compress.layer import Layer, LayerSpec
from compress.models.model import Model
from compress.passes import Gptq, HadamardInputs, Rtn
from compress.pipeline import Pipeline, Result
from compress.progress import Progress


class Double(ModelPass):
    """Doubles every chosen weight."""

    name: ClassVar[str] = "double"
    part: ClassVar[Part] = Part.NONE
    rescales: ClassVar[bool] = True

    def plan(self, spec: LayerSpec) -> LayerSpec:
        return spec

    def apply(self, stage: Stage) -> None:
        model = stage.model
        for segment in model.structure.segments:
            layers = model.layers(segment)
            for name in layers.keys() & stage.chosen.keys():
                layers[name] = layers[name].with_weight(layers[name].float_weight() * 2)
            stage.write(segment, layers, model.plain(segment))
        stage.config["note"] = "doubled"


class Look(ModelPass):
    """Takes quantized layers as they are."""

    name: ClassVar[str] = "look"
    part: ClassVar[Part] = Part.TUNING

    def plan(self, spec: LayerSpec) -> LayerSpec:
        return spec

    def apply(self, stage: Stage) -> None:
        for segment in stage.model.structure.segments:
            stage.write(segment, stage.model.layers(segment), stage.model.plain(segment))


class Coarse(LayerPass):
    """Loses something of each weight, and stores it as the plain tensor that it was."""

    name: ClassVar[str] = "coarse"
    part: ClassVar[Part] = Part.VALUES
    before: ClassVar[frozenset[Part]] = frozenset({Part.WEIGHT, Part.ACT})

    def plan(self, spec: LayerSpec) -> LayerSpec:
        return spec

    def layer(self, layer: Layer, stats: LayerStats) -> Layer:
        weight = layer.float_weight()
        return layer.with_weight((weight * 8).round() / 8)


class CoarseModel(ModelPass):
    """The same as a stage of its own, which skips what projects queries."""

    name: ClassVar[str] = "coarse_model"
    part: ClassVar[Part] = Part.VALUES

    def plan(self, spec: LayerSpec) -> LayerSpec:
        return spec

    def apply(self, stage: Stage) -> None:
        for segment in stage.model.structure.segments:
            layers = stage.model.layers(segment)
            skipped = {name: "a query" for name in layers if name.endswith("q_proj")}
            for name in (layers.keys() & stage.chosen.keys()) - skipped.keys():
                layers[name] = Coarse().layer(layers[name], LayerStats())
            stage.write(segment, layers, stage.model.plain(segment), skipped=skipped)


class Stop(Look):
    """Is interrupted before it does anything."""

    name: ClassVar[str] = "stop"

    def apply(self, stage: Stage) -> None:
        raise Interrupted("stopped here")


@pytest.fixture(scope="module")
def model(llama: Path) -> Model:
    return compress.load(llama)


@pytest.fixture(scope="module")
def calibration(model: Model, text_file: Path) -> Calibration:
    return calibrate(model, text_file, samples=4, length=32)


def test_neighbouring_layer_passes_walk_together_and_a_whole_model_pass_alone() -> None:
    passes: Sequence[Pass] = [Rtn(), Gptq(), Double(), Double(), Rtn()]
    assert cut(passes) == [[0, 1], [2], [3], [4]]


def test_a_stage_starts_from_what_the_one_before_wrote(model: Model, tmp_path: Path) -> None:
    rtn = Rtn(bits=8, group_size=32)
    result = Pipeline(Double(), rtn).run(model, folder=tmp_path / "model")
    name = "model.layers.0.mlp.up_proj"
    doubled = replace(model.layer(model.structure.layers[name]), weight=2 * weight(model, name))
    expected = rtn.layer(doubled, LayerStats())
    assert torch.equal(weight(result.model, name), expected.float_weight())
    assert [row.changed for row in result.passes[0].layers if row.layer == name] == [True]
    assert json.loads((tmp_path / "model" / "config.json").read_text())["note"] == "doubled"
    assert not list((tmp_path / "model").glob("stage-*"))
    assert result.model.source_digest == model.digest


def test_a_stage_that_is_done_is_not_repeated_after_a_stop(
    model: Model,
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gptq = Gptq(format="int4(group=32)")
    clean = Pipeline(gptq, Look()).run(model, calibration, folder=tmp_path / "clean")
    journal = Journal(tmp_path / "journal")
    with pytest.raises(Interrupted):
        Pipeline(gptq, Stop()).run(model, calibration, folder=tmp_path / "again", journal=journal)
    monkeypatch.setattr(Gptq, "layer", None)
    resumed = Pipeline(gptq, Look())
    capsys.readouterr()
    journal = Journal(tmp_path / "journal")
    result = resumed.run(model, calibration, folder=tmp_path / "again", journal=journal, progress=Progress())
    assert f"Resuming {tmp_path}: at stage 2 of 2 (look)" in capsys.readouterr().err.splitlines()
    assert result.model.digest == clean.model.digest
    assert [len(item.layers) for item in result.passes] == [len(item.layers) for item in clean.passes]


class Killed(BaseException):
    """What no code of ours catches."""


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """The process dies when it is about to write, note or remove something for the `step`-th time; a folder that it
    was about to remove has then lost its first file."""
    left = step

    def dying(call: Callable[..., Any], before: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def called(*args: Any, **more: Any) -> Any:
            nonlocal left
            if left == 0:
                if before is not None:
                    before(*args)
                raise Killed
            left -= 1
            return call(*args, **more)

        return called

    def begin(folder: Path) -> None:
        min(path for path in folder.rglob("*") if path.is_file()).unlink()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", dying(shutil.rmtree, begin))
        patch.setattr(Journal, "add", dying(Journal.add))
        for module, name in ((segment_files, "write_segment"), (store, "write_text"), (store, "write_structure")):
            patch.setattr(module, name, dying(getattr(module, name)))
        yield


INT2 = Rtn(format="int2(group=32)")
OUTER = Rtn(format="int8(group=32)", targets=("kind:embedding", "kind:head"))


@pytest.mark.parametrize(
    "passes",
    [(INT2, Look()), (Double(), INT2, Look()), (HadamardInputs(block=16), INT2, Look(), OUTER)],
    ids=lambda passes: ", ".join(item.name for item in passes),
)
def test_a_run_killed_before_any_write_resumes_to_the_same_bytes_and_the_same_report(
    make_llama: Callable[..., Path], tmp_path: Path, passes: tuple[Pass, ...]
) -> None:
    model = compress.load(make_llama("one-block", num_hidden_layers=1))
    clean = Pipeline(*passes).run(model, folder=tmp_path / "clean")
    kills, died = 0, True
    while died:
        folder, journal = tmp_path / str(kills) / "model", tmp_path / str(kills) / "journal"
        folder.mkdir(parents=True)
        try:
            with killed_at(kills):
                Pipeline(*passes).run(model, folder=folder, journal=Journal(journal))
            died = False
        except Killed:
            kills += 1
        # after the last kill, the run was over: what came then, export or evaluation, was killed
        resumed = Pipeline(*passes).run(model, folder=folder, journal=Journal(journal))
        assert files(folder) == files(tmp_path / "clean")
        assert rows(resumed) == rows(clean)
        shutil.rmtree(folder.parent)
    assert kills > 10


@pytest.mark.parametrize("first", ["", "smoothquant, ", "hadamard(block=16), ", "rotate, ", "rotate, smoothquant, "])
def test_errors_are_those_against_the_last_weights_that_were_not_quantized(
    model: Model, calibration: Calibration, tmp_path: Path, first: str
) -> None:
    passes = Pipeline.parse(f"{first}rtn(format=int2(group=32))").passes
    rest = (Look(), Rtn(format="int8(group=32)", targets=("kind:embedding",)))
    found = Pipeline(*passes, *rest).run(model, calibration, folder=tmp_path / "model").passes
    rounded = {row.layer: row for row in found[len(passes) - 1].layers if row.changed}
    looked = {row.layer: row for row in found[len(passes)].layers if row.changed and row.format.startswith("int2")}
    assert looked and looked.keys() == rounded.keys()
    for name, row in looked.items():
        assert rounded[name].error_after == row.error_before == row.error_after
        assert row.error_after is not None and row.error_after > 0.05
    assert {path.name for path in (tmp_path / "model").iterdir() if path.is_dir()} == set()


INT8 = Rtn(format="int8(group=32)")


@pytest.mark.parametrize(
    "passes",
    [
        (Coarse(), INT8),
        (Coarse(), Look(targets=("*.o_proj",)), INT8),
        (Double(), Coarse(), INT8),
        (Double(), Coarse(), Look(targets=("*.o_proj",)), INT8),
        (Double(), CoarseModel(), INT8),
        (HadamardInputs(block=16), Coarse(), Look(targets=("*.o_proj",)), INT8),
    ],
    ids=lambda passes: ", ".join(item.name for item in passes),
)
def test_what_a_pass_lost_is_still_lost_when_a_later_stage_takes_up_the_plain_weights(
    model: Model, tmp_path: Path, passes: tuple[Pass, ...]
) -> None:
    found = Pipeline(*passes).run(model, folder=tmp_path / "model").passes
    place = next(place for place, item in enumerate(passes) if item.part is Part.VALUES)
    lost = {row.layer: row.error_after for row in found[place].layers if row.changed}
    last = {row.layer: row for row in found[-1].layers if row.changed}
    assert lost.keys() <= last.keys()
    for name, row in last.items():
        assert row.error_before == pytest.approx(lost.get(name, 0.0), rel=1e-6)
        assert name not in lost or (row.error_before or 0.0) > 0.001
    assert {path.name for path in (tmp_path / "model").iterdir() if path.is_dir()} == set()


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ((Coarse(), Double(), INT8), "double must come before coarse, which sets the weight values"),
        ((Coarse(), *Pipeline.parse("rotate").passes), "rotate must come before coarse, which sets the weight values"),
        ((Coarse(), HadamardInputs(block=16)), "hadamard must come before coarse"),
        ((Coarse(), *Pipeline.parse("awq(format=int4(group=32))").passes), "awq must come before coarse"),
        (
            (Coarse(targets=("*.k_proj",)), *Pipeline.parse("smoothquant(targets=[*.q_proj])").passes),
            "smoothquant rescales the layers beside it",
        ),
        ((INT8, Double()), "double must come before rtn, which sets the weight format"),
    ],
    ids=lambda case: ", ".join(item.name for item in case) if isinstance(case, tuple) else "",
)
def test_what_rescales_comes_before_what_sets_the_values_even_of_layers_beside(
    model: Model, passes: tuple[Pass, ...], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        Pipeline(*passes).resolve(model)


def test_a_transform_of_other_layers_leaves_those_beside_alone(model: Model) -> None:
    passes = Coarse(targets=("*.k_proj",)), HadamardInputs(block=16, targets=("*.q_proj",))
    assert Pipeline(*passes).resolve(model).passes["model.layers.0.self_attn.q_proj"]


def test_a_tied_weight_whose_head_a_later_stage_treats_alone_is_stored_twice(model: Model, tmp_path: Path) -> None:
    head = Rtn(format="int8(group=32)", targets=("kind:head",))
    result = Pipeline(Rtn(format="int4(group=32)"), Look(), head).run(model, folder=tmp_path / "model")
    assert result.untied == ("lm_head",)
    again = store.open_store(tmp_path / "model")
    assert torch.equal(weight(again, "model.embed_tokens"), weight(model, "model.embed_tokens"))
    expected = head.layer(model.layer(model.structure.layers["model.embed_tokens"]), LayerStats())
    assert torch.equal(weight(again, "lm_head"), expected.float_weight())


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(result: Result) -> list[Any]:
    """The report's rows but for the time they took."""
    return [[row.model_copy(update={"seconds": None}) for row in item.layers] for item in result.passes]


def weight(model: Model, name: str) -> torch.Tensor:
    return model.layer(model.structure.layers[name]).float_weight()
