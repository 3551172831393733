"""The block stream where it could go wrong quietly: spilled activations, changing arguments, values not finite."""

import gc
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import compress
from compress.engine.stream import BlockStream
from compress.errors import InputError, UnsupportedError
from compress.inputs.datasets import Calibration
from compress.inputs.windows import Windows
from compress.maths import activations
from compress.models.skeleton import OUTER
from compress.models.stub import same_arguments
from compress.pipeline import Pipeline
from compress.quality.evaluate import stream_logits


def windows(count: int = 6, length: int = 16) -> Windows:
    ids = torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(0))
    return Windows(ids, tuple(range(count)), "random", "random")


def test_spilled_activations_give_the_same_bytes_and_leave_no_file(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calibration = compress.load(llama), Calibration(windows(), 0, "random")
    text = "gptq(format=int4(group=32))"
    kept = Pipeline.parse(text).run(model, calibration, folder=tmp_path / "kept")
    monkeypatch.setattr(activations, "SPILL_BYTES", 0)
    spilled = Pipeline.parse(text).run(model, calibration, folder=tmp_path / "spilled")
    assert spilled.model.digest == kept.model.digest
    names = sorted(path.name for path in (tmp_path / "spilled").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "kept").iterdir())


def test_two_streams_that_spill_do_not_share_a_file(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = compress.load(llama), windows().ids
    expected = [logits.clone() for logits in stream_logits(model, ids)]
    monkeypatch.setattr(activations, "SPILL_BYTES", 0)
    first, second = stream_logits(model, ids), stream_logits(model, ids.flip(0))
    for place, (one, other) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(one, expected[place])
        assert torch.equal(other, expected[len(expected) - 1 - place])


def test_allocated_views_keep_their_shapes_and_values_above_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "SPILL_BYTES", 0)
    views = activations.allocate([(2, 3), (1, 3)], tmp_path)
    for place, view in enumerate(views):
        view.fill_(place)
    assert [view.tolist() for view in views] == [[[0.0] * 3] * 2, [[1.0] * 3]]
    assert not list(tmp_path.iterdir())


def test_what_rests_outside_memory_comes_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "SPILL_BYTES", 4 * 5000)
    (usual,), views = activations.allocate([(50, 100)]), activations.allocate([(3, 4321), (2, 999)], tmp_path)
    for place, view in enumerate([usual, *views]):
        view.fill_(place)
    activations.rest(usual, views[0], views[1][1:])
    assert [bool((view == place).all()) for place, view in enumerate([usual, *views])] == [True] * 3


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="only Linux lists what is mapped")
def test_a_source_s_file_leaves_memory_with_each_block_and_what_was_read_stays_valid(
    llama: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "copy"))
    model = compress.load(folder)
    stream = BlockStream(model, list(windows().ids.split(1)))
    layers, expected = model.layers(0), compress.load(llama).layers(0)
    stream.load(0, layers, model.plain(0))
    assert mapped(folder)
    stream.release(0)
    assert all(torch.equal(layer.float_weight(), expected[name].float_weight()) for name, layer in layers.items())
    layers.clear()
    gc.collect()
    assert not mapped(folder)


def mapped(folder: Path) -> bool:
    return str(folder) in Path("/proc/self/maps").read_text()


def test_a_block_that_puts_out_nan_for_any_window_stops_the_run(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compress.load(llama)
    stream = BlockStream(model, list(windows().ids.split(1)))
    stream.start(model.layers(OUTER))
    stream.load(0, model.layers(0), model.plain(0))
    stream.hidden[1][0, 3, 5] = float("nan")  # not the last window
    with pytest.raises(InputError, match=r"model\.layers\.0 puts out NaN"):
        stream.advance(0)


def test_a_model_whose_blocks_are_handed_something_of_the_tokens_is_refused(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compress.load(llama)
    stream = BlockStream(model, list(windows().ids.split(1)))
    base = stream.module.model
    forward = type(base.layers[0]).forward
    assert forward is not None

    def with_extra(*args: object, **kwargs: object) -> object:
        kwargs["per_layer_input"] = kwargs["input_ids"].float().mean()
        return original(*args, **kwargs)

    original = base.forward
    monkeypatch.setattr(base, "forward", with_extra)
    with pytest.raises(UnsupportedError, match="depends on the tokens"):
        stream.start(model.layers(OUTER))


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (torch.ones(2), torch.ones(2), True),
        (torch.ones(2), torch.zeros(2), False),
        (torch.ones(2), torch.ones(3), False),
        (torch.ones(2), None, False),
        ({"a": (1, "x")}, {"a": (1, "x")}, True),
        ({"a": (1, "x")}, {"a": (2, "x")}, False),
        ({"a": 1}, {"b": 1}, False),
        ([torch.ones(1)], [torch.ones(1), 2], False),
        (object(), object(), True),
    ],
)
def test_recorded_arguments_are_compared_by_value(first: object, second: object, same: bool) -> None:
    assert same_arguments(first, second) is same


def test_double_precision_and_side_by_side_checkpoints_are_handled(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(make_llama("double", dtype="float64", num_hidden_layers=1), tmp_path / "model"))
    model = compress.load(folder)
    assert model.layers(0)["model.layers.0.mlp.up_proj"].weight.dtype == torch.float64
    half = {name: tensor.half() * 2 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.fp16.safetensors")
    again = compress.load(folder)
    assert (again.digest, again.source_bytes) == (model.digest, model.source_bytes)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(InputError, match=r"is in both model\.fp16\.safetensors and other\.safetensors"):
        compress.load(folder)
