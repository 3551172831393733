"""Passes that change the shape of a model cut a recipe: what comes after is laid over the model that they leave."""

import json
from pathlib import Path
from typing import Any, ClassVar

import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress.engine import store
from compress.engine.journal import Journal
from compress.engine.modelpass import ModelPass, Stage
from compress.engine.part import Part
from compress.engine.reshape import ReshapePass
from compress.errors import InputError, Interrupted, UsageError
from compress.inputs.datasets import Calibration, calibrate
from compress.layer import LayerSpec
from compress.models import placing
from compress.models.edits import Edit, Shape
from compress.models.model import Model
from compress.passes import Gptq, Rtn
from compress.pipeline import Pipeline
from compress.records import LayerResult

IDS = torch.arange(1, 33)[None]


class Drop(ReshapePass):
    """Leaves some blocks out; planned as the last ones."""

    name: ClassVar[str] = "drop"
    blocks: tuple[int, ...] = (0,)

    def shape(self, model: Model) -> Shape:
        return self.without(model, tuple(range(len(model.structure.blocks)))[-len(self.blocks) :])

    def without(self, model: Model, gone: tuple[int, ...]) -> Shape:
        kept = tuple(origin for place, origin in enumerate(model.origins) if place not in gone)
        return Shape({"num_hidden_layers": len(kept)}, (), kept)

    def apply(self, stage: Stage) -> None:
        made = stage.reshape(self.without(stage.model, self.blocks))
        for segment in made.structure.segments:
            stage.put(segment, *stage.taken(segment))
        names = [stage.model.structure.blocks[place] for place in self.blocks]
        stage.results += [LayerResult(layer=name, users=(), pass_text=str(self), changed=True) for name in names]


class Silence(ReshapePass):
    """Takes a part out of one block."""

    name: ClassVar[str] = "silence"
    part_of: str = "model.layers.0.self_attn"

    def shape(self, model: Model) -> Shape:
        kind: Any = "no attention" if "attn" in self.part_of else "no feed-forward"
        return Shape({}, (*model.edits, Edit(self.part_of, kind)), model.origins)

    def apply(self, stage: Stage) -> None:
        made = stage.reshape(self.shape(stage.model))
        for segment in made.structure.segments:
            stage.put(segment, *stage.taken(segment))


class Stop(ModelPass):
    """Is interrupted before it does anything."""

    name: ClassVar[str] = "stop"
    part: ClassVar[Part] = Part.TUNING

    def plan(self, spec: LayerSpec) -> LayerSpec:
        return spec

    def apply(self, stage: Stage) -> None:
        raise Interrupted("stopped here")


@pytest.fixture(scope="module")
def model(llama: Path) -> Model:
    return compress.load(llama)


@pytest.fixture(scope="module")
def calibration(model: Model, text_file: Path) -> Calibration:
    return calibrate(model, text_file, samples=4, length=32)


def logits(model: Model) -> torch.Tensor:
    found: torch.Tensor = placing.whole_module(model)(input_ids=IDS).logits
    return found


def test_a_block_left_out_is_the_model_without_it(model: Model, llama: Path, tmp_path: Path) -> None:
    result = Pipeline(Drop(blocks=(1,))).run(model, folder=tmp_path / "model")
    twin = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    del twin.model.layers[1]
    for index, block in enumerate(twin.model.layers):
        block.self_attn.layer_idx = index
    with torch.no_grad():
        assert torch.equal(logits(result.model), twin(input_ids=IDS).logits)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_hidden_layers"] == 2
    assert result.model.origins == (0, 2)
    assert result.source is model


def test_passes_after_it_name_the_blocks_that_are_left(model: Model, tmp_path: Path) -> None:
    rtn = Rtn(bits=8, group_size=32, targets=("model.layers.1.mlp.*",))
    result = Pipeline(Drop(blocks=(1,)), rtn).run(model, folder=tmp_path / "model")
    rows = {row.layer: row for row in result.passes[1].layers if row.changed}
    assert set(rows) == {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert all(row.error_before == 0 and 0 < (row.error_after or 0) < 1e-3 for row in rows.values())
    again = store.open_store(tmp_path / "model")
    assert (again.origins, len(again.structure.blocks)) == ((0, 2), 2)
    with pytest.raises(UsageError, match=r"model\.layers\.2.* matches no layer"):
        Pipeline(Drop(blocks=(1,)), Rtn(targets=("model.layers.2.*",))).resolve(model)


def test_origins_are_told_of_the_source_after_two_changes(model: Model) -> None:
    result = Pipeline(Drop(blocks=(0,)), Drop(blocks=(0,)), Rtn(bits=8, group_size=32)).run(model)
    assert result.model.origins == (2,)
    name = "mlp.up_proj"
    source, found = model.structure.layers[f"model.layers.2.{name}"], result.model.structure.layers
    kept = model.layer(source).float_weight() - result.model.layer(found[f"model.layers.0.{name}"]).float_weight()
    assert float(kept.abs().max()) < 0.01


def test_a_part_left_out_adds_nothing_and_caches_nothing(model: Model, llama: Path, tmp_path: Path) -> None:
    result = Pipeline(Silence(), Rtn(bits=8, group_size=32)).run(model, folder=tmp_path / "model")
    assert len(result.model.attentions) == 2 and len(result.model.structure.blocks) == 3
    assert not [name for name in result.model.structure.layers if name.startswith("model.layers.0.self_attn")]
    module = placing.whole_module(result.model)
    whole = module(input_ids=IDS, use_cache=False).logits
    first = module(input_ids=IDS[:, :20], use_cache=True)
    second = module(input_ids=IDS[:, 20:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(second.logits, whole[:, 20:], rtol=1e-4, atol=1e-5)


def test_the_exported_graph_has_the_shape_of_the_model(model: Model, tmp_path: Path) -> None:
    passes = Drop(blocks=(2,)), Silence(), Silence(part_of="model.layers.1.mlp")
    result = Pipeline(*passes, Rtn(bits=8, group_size=32)).run(model)
    assert len(result.model.structure.blocks) == 2 and len(result.model.attentions) == 1
    artifact = compress.export(result, profile="cpu-x86-avx2", out=tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "onnx" / "model.onnx")
    caches = [value.name for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    assert len(caches) == 2 * len(result.model.attentions)
    assert artifact.model().edits == result.model.edits


def test_a_stopped_run_takes_up_a_changed_shape(
    model: Model, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gptq = Gptq(format="int4(group=32)")
    passes = (Drop(blocks=(1,)), gptq)
    clean = Pipeline(*passes).run(model, calibration, folder=tmp_path / "clean")
    journal = Journal(tmp_path / "journal")
    with pytest.raises(Interrupted):
        Pipeline(*passes, Stop()).run(model, calibration, folder=tmp_path / "model", journal=journal)
    monkeypatch.setattr(Drop, "apply", None)  # what is done is not done again
    monkeypatch.setattr(Gptq, "layer", None)
    monkeypatch.setattr(Stop, "apply", lambda item, stage: [
        stage.write(segment, stage.model.layers(segment), stage.model.plain(segment))
        for segment in stage.model.structure.segments
    ])  # fmt: skip
    resumed = Pipeline(*passes, Stop()).run(
        model, calibration, folder=tmp_path / "model", journal=Journal(tmp_path / "journal")
    )
    assert resumed.model.digest == clean.model.digest
    again = Pipeline(*passes, Stop()).run(
        model, calibration, folder=tmp_path / "model", journal=Journal(tmp_path / "journal")
    )  # all of it is done, and only the last store is left
    assert again.passes == resumed.passes
    assert sorted(path.name for path in (tmp_path / "model").iterdir() if path.is_dir()) == []


def test_tied_weights_may_part_after_it(model: Model) -> None:
    passes = (Drop(blocks=(1,)), Rtn(bits=8, group_size=32, targets=("lm_head",)))
    result = Pipeline(*passes).run(model)
    assert result.untied == ("lm_head",)
    assert result.model.structure.layers["lm_head"].format is not None
    assert result.model.structure.layers["model.embed_tokens"].format is None


def test_the_plan_has_the_shape_that_is_left(model: Model) -> None:
    laid = Pipeline(Drop(blocks=(0,)), Rtn(bits=8, group_size=32)).lay(model)
    assert [len(part.model.structure.blocks) for part in laid] == [3, 2]
    assert laid[1].model.weights is None


def test_it_comes_before_what_decides_about_layers(model: Model) -> None:
    with pytest.raises(UsageError, match="drop changes the shape of the model, so it comes before rtn"):
        Pipeline(Rtn(), Drop()).lay(model)
    with pytest.raises(UsageError, match="takes no targets"):
        Drop(targets=("*",))


def test_a_store_that_edits_what_is_not_there_is_refused(model: Model, tmp_path: Path) -> None:
    Pipeline(Silence()).run(model, folder=tmp_path / "model")
    path = tmp_path / "model" / "structure.json"
    info = json.loads(path.read_text())
    info["edits"][0]["path"] = "model.layers.0.no_such"
    path.write_text(json.dumps(info))
    with pytest.raises(InputError, match=r"'model\.layers\.0\.no_such', which the model does not have"):
        store.open_store(tmp_path / "model")
    info["edits"][0]["kind"] = "melted"
    path.write_text(json.dumps(info))
    with pytest.raises(InputError, match="malformed"):
        store.open_store(tmp_path / "model")
