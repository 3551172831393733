"""What every registered pass owes, whoever wrote it. A new pass is tested by being in the table."""

from pathlib import Path

import pytest
import torch

import compress
from compress.engine.part import Part
from compress.inputs.datasets import Calibration, calibrate
from compress.models.model import Model
from compress.models.skeleton import OUTER
from compress.passes import find, table
from compress.pipeline import Pipeline, Result, planned

# every pass is run as the last of these texts (by default its bare name) on a Llama of three blocks, 64 wide, whose
# head is its embedding: settings that fit it, where the defaults do not; what must come before a pass; few steps
FITTING = {"gptq": "gptq(format=int4(group=32))", "rtn": "rtn(format=int4(group=32))"}
FITTING |= {"sparsegpt": "sparsegpt(sparsity=0.3)"}
FITTING |= {"gradual_magnitude": "gradual_magnitude(sparsity=0.3, steps=4, end=2, every=1)"}
FITTING |= {"trellis": "trellis(format=trellis(bits=3, block=32))"}
FITTING |= {
    "adaquant": f"{FITTING['rtn']}, adaquant(steps=2)",
    "autoround": f"{FITTING['rtn']}, autoround(steps=2)",
    "block_tune": f"{FITTING['rtn']}, block_tune(steps=2)",
    "tune": f"{FITTING['rtn']}, tune(steps=2)",
    "pv_tuning": f"{FITTING['rtn']}, pv_tuning(steps=2)",
    "pack_sparse": "magnitude(sparsity=0.3), pack_sparse",
    "heal": "magnitude(sparsity=0.3), heal(tokens=512)",
    "bias_correct": f"{FITTING['rtn']}, bias_correct(add=true)",
}
OTHER_MODELS = {"prune_channels", "prune_experts"}
"""Passes that this Llama has nothing for."""
LARGEST_ERROR = 0.2
"""Relative squared error of a weight that a pass may make with those settings: more is a mistake, or needs others."""
NAMES = sorted(table())


def text_of(name: str) -> str:
    return FITTING.get(name, name)


@pytest.fixture(scope="module")
def model(llama: Path) -> Model:
    return compress.load(llama)


@pytest.fixture(scope="module")
def calibration(model: Model, text_file: Path) -> Calibration:
    return calibrate(model, text_file, samples=8, length=64)


@pytest.fixture(scope="module", params=[name for name in NAMES if name not in OTHER_MODELS])
def result(request: pytest.FixtureRequest, model: Model, calibration: Calibration) -> Result:
    return Pipeline.parse(text_of(request.param)).run(model, calibration)


@pytest.fixture
def by_layer(result: Result) -> None:
    """Leave out passes that choose no layers."""
    if not result.pipeline.passes[-1].chooses():
        pytest.skip("it is about the model as a whole, and chooses no layers")


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_is_built_by_its_name_and_prints_back(name: str) -> None:
    assert find(name).name == name
    assert str(Pipeline.parse(text_of(name))) == text_of(name)
    assert (find(name).__doc__ or "").strip()


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_says_in_the_words_there_are_what_it_fills_and_what_must_come_before_or_after(name: str) -> None:
    item = find(name)()
    for parts in ({item.part}, item.also, item.before, item.after):
        assert all(isinstance(part, Part) for part in parts)
    made = item.rescales or item.renews or not item.chooses()
    assert item.fills() or made, "a pass that fills nothing changes the model as a whole, or trains anew"
    assert not item.fills() & item.precedes(), "it would have to come before itself"


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_is_frozen_and_closed(name: str) -> None:
    one = find(name)()
    with pytest.raises(ValueError, match="frozen"):
        one.targets = ("x",)
    with pytest.raises(compress.CompressError, match="unknown setting"):
        find(name).build({"no_such_setting": 1})


def test_every_value_stays_finite_and_every_shape_the_same(result: Result, model: Model) -> None:
    expected = result.pipeline.resolve(model).structure.layers
    for name, spec in result.model.structure.layers.items():
        weight = result.model.layer(spec).float_weight()
        assert bool(torch.isfinite(weight).all()), name
        assert tuple(weight.shape) == expected[name].shape


def test_what_was_planned_is_what_was_made(result: Result, model: Model) -> None:
    expected = planned(result.pipeline.resolve(model))
    for name, spec in result.model.structure.layers.items():
        assert (spec.format, spec.act) == (expected[name].format, expected[name].act), name


@pytest.mark.usefixtures("by_layer")
def test_layers_outside_the_blocks_are_untouched_unless_named(result: Result, model: Model) -> None:
    if result.pipeline.passes[-1].whole:
        pytest.skip("it treats every layer there is, and says so")
    for spec in model.structure.segment_layers(OUTER):
        again = result.model.layer(result.model.structure.layers[spec.name])
        assert torch.equal(again.float_weight(), model.layer(spec).float_weight())
        skipped = [row for row in result.passes[-1].layers if row.layer == spec.name]
        assert [row.changed for row in skipped] == [False] and skipped[0].reason


@pytest.mark.usefixtures("by_layer")
def test_every_layer_is_changed_or_left_with_a_reason(result: Result, model: Model) -> None:
    """A pass that fills a part fills it everywhere; one that rescales may find no use for some layer."""
    item, rows = result.pipeline.passes[-1], result.passes[-1].layers
    changed = {row.layer for row in rows if row.changed}
    laid = result.pipeline.resolve(model)
    chosen = laid.structure.layers.keys() - laid.skipped[-1].keys()
    assert len({row.layer for row in rows}) == len(rows)
    assert changed and chosen <= {row.layer for row in rows}
    assert not item.part or chosen <= changed
    assert all(row.reason for row in rows if not row.changed)


@pytest.mark.usefixtures("by_layer")
def test_every_changed_layer_reports_format_bits_and_error(result: Result) -> None:
    for row in [row for row in result.passes[-1].layers if row.changed]:
        assert row.format and row.bits_per_weight
        assert row.error_before == 0.0 or len(result.passes) > 1
        assert row.error_after is not None and 0 <= row.error_after < LARGEST_ERROR
        assert row.seconds is not None


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OTHER_MODELS])
def test_the_same_inputs_give_the_same_bytes(name: str, model: Model, calibration: Calibration, tmp_path: Path) -> None:
    digests = {
        Pipeline.parse(text_of(name)).run(model, calibration, folder=tmp_path / str(turn)).model.digest
        for turn in range(2)
    }
    assert len(digests) == 1


def test_an_unknown_pass_offers_the_nearest() -> None:
    with pytest.raises(compress.CompressError, match="Did you mean 'gptq'"):
        find("gptk")
