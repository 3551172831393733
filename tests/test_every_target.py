"""What every registered export target gets for free: its interface, and one small model from end to end."""

import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import compress
from compress import hwprofiles
from compress.errors import UnsupportedError, UsageError
from compress.export import TARGETS, find
from compress.formats import parse_format
from compress.hwprofiles import Profile
from compress.layer import LayerKind, LayerSpec
from compress.pipeline import Pipeline
from compress.profiles import as_profile
from compress.quality.verification import verify_export
from compress.speed.footprint import deployable_bytes, footprint
from compress.target import Refusal, Target, require_tools, timed_here

# what the second model of each target is made with, where its runtime does not take int8 of everything
RECIPES = {
    "checkpoint-aqlm": "rtn(format=codebook(vector=4, entries=16, stages=2))",
    "checkpoint-awq": "rtn(format=int4(group=32))",
    "checkpoint-exl3": "rtn(format=trellis(bits=2))",
    "checkpoint-gptq": "rtn(format=int8(channel))",
    "checkpoint-vptq": "rtn(format=codebook(vector=4, entries=16, stages=2, out))",
    "native": "rtn(format=codebook(vector=4, entries=16, stages=2))",
}
# models of other sizes, where a target takes no layers of 64
SIZES = {
    "checkpoint-exl3": {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_key_value_heads": 4,
        "num_hidden_layers": 1,
    }
}
FUNCTIONS = [name for name, _ in inspect.getmembers(Target, inspect.isfunction) if not name.startswith("_")]


@pytest.fixture(params=sorted(TARGETS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def profile(name: str) -> Profile:
    """One that is built for the target, else any: a target that reads no profile takes all."""
    found = [hwprofiles.load(each) for each in hwprofiles.names()]
    named = [each for each in found if find(name).RUNTIME in each.runtimes]
    chosen = next((each for each in found if each.target == name), as_profile([*named, found[0]][0], name))
    try:
        require_tools(find(name), chosen)
    except UnsupportedError as error:
        pytest.skip(str(error))
    return chosen


def test_a_format_that_a_target_has_no_place_for_is_a_matter_of_the_recipe_everywhere(
    name: str, profile: Profile
) -> None:
    form = parse_format("trellis(bits=2, block=16)")
    answer = find(name).plan_layer(LayerSpec("m", LayerKind.LINEAR, (128, 128), ("m",), format=form), profile)
    assert isinstance(answer, Refusal) and answer.usage


def test_a_target_offers_the_interface_and_takes_its_arguments(name: str, profile: Profile) -> None:
    target = find(name)
    assert target.HONOURS.kinds and target.RUNTIME and Path(target.FOLDER).name == target.FOLDER
    assert name != "onnx" or profile.runtime(target.RUNTIME).opset
    assert {"plan_layer", "predict_bytes", "capture", "write", "session", "probe_command"} == set(FUNCTIONS)
    for function in FUNCTIONS:
        asked = list(inspect.signature(getattr(Target, function)).parameters)[1:]  # without self
        assert list(inspect.signature(getattr(target, function)).parameters) == asked, function


def test_a_target_writes_what_its_runtime_loads_and_which_agrees_with_the_model(
    name: str, profile: Profile, llama: Path, make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_llama(f"for-{name}", **SIZES[name]) if name in SIZES else llama
    target, model = find(name), compress.load(source)
    specs = model.structure.layers
    choices = [target.plan_layer(spec, profile) for spec in specs.values()]
    assert not any(isinstance(choice, Refusal) for choice in choices)
    graph = target.capture(model, profile)
    lowered = target.write(model, profile, tmp_path / "float", graph)
    assert lowered.folder == tmp_path / "float" and set(lowered.float_layers) == set(specs)
    assert sum(lowered.operators.values()) == len(specs)
    predicted = target.predict_bytes(specs.values(), model, profile)
    assert deployable_bytes(lowered.folder) == pytest.approx(predicted, rel=0.2)

    made = Pipeline.parse(RECIPES.get(name, "rtn(format=int8(channel))")).run(model).model
    target.write(made, profile, tmp_path / "alone")
    small = target.write(made, profile, tmp_path / "small", graph)
    for path in sorted((tmp_path / "alone").rglob("*")):
        there = tmp_path / "small" / path.relative_to(tmp_path / "alone")
        if path.name == "engine":  # some hundred bytes of TensorRT-RTX's differ at each build
            assert path.stat().st_size == there.stat().st_size
        elif path.is_file():
            assert path.read_bytes() == there.read_bytes(), path.name
    graphs = [sum(path.stat().st_size for path in each.folder.iterdir() if path.is_file()) for each in (small, lowered)]
    assert graphs[0] < graphs[1]  # an engine, in a folder of its own, holds more code than a tiny model has weights
    windows = np.random.default_rng(0).integers(0, model.vocabulary, (8, 64))
    import torch

    for written, one in ((lowered, model), (small, made)):
        found = verify_export(one, written.folder, profile, torch.from_numpy(windows), written.bounds)
        assert found.agrees and len(found.greedy_tokens) == 64
        assert found.level == "ran" or (found.level in ("built", "checked") and "has not run" in " ".join(found.notes))


def test_a_session_reads_and_continues_and_runs_in_a_process_of_its_own(
    name: str, profile: Profile, one_block: Path, tmp_path: Path
) -> None:
    target = find(name)
    target.write(compress.load(one_block), profile, tmp_path)
    session = target.session(tmp_path, 1)
    assert session.name and session.is_decoder
    ids = np.array([[1, 2, 3]])
    logits = session.logits(ids)
    assert logits.shape == (1, 3, 256) and logits.dtype == np.float32
    first = session.greedy([1, 2, 3], 4)
    assert first[0] == int(logits[0, -1].argmax()) and len(first) == 4
    assert session.greedy([1, 2, 3], 4, first[:1]) == first[:1]
    if not timed_here(target, profile):
        with pytest.raises(UnsupportedError, match="cannot be timed"):
            session.call(ids, 5)
        return
    assert session.call(ids, 5)() is None
    taken = footprint(target, tmp_path, 1, 128)  # by its probe_command
    assert taken.load_s and taken.peak_memory_bytes and taken.peak_memory_bytes > 10_000_000


def test_an_unknown_target_is_named_with_those_that_there_are() -> None:
    with pytest.raises(UsageError, match=r"'onxx'.*Did you mean 'onnx'"):
        find("onxx")
