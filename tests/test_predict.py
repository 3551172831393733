"""What training costs is in the plan: memory beside a measured run, and time by the number of steps."""

import json
import subprocess
import sys

import pytest

import compress
from compress import hwprofiles, plan, quickstart, recipe
from compress.errors import ResourceError
from compress.models.model import Model
from compress.pipeline import Pipeline, planned
from compress.plan import make_plan, refusal
from compress.predict import Sizes
from compress.recipe import CalibrationSettings, Recipe
from compress.records import Plan

PROFILE = hwprofiles.load("cpu-x86-avx512-vnni")
MEASURE = """
import sys
import compress
from compress.inputs.datasets import calibrate
from compress.memory import peak_memory
from compress.pipeline import Pipeline

folder, passes = sys.argv[1:]
model = compress.load(folder)
calibration = calibrate(model, folder + "/calib.txt.gz", samples=8, length=128)
before = peak_memory()
Pipeline.parse(passes).run(model, calibration)
print(peak_memory() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A Llama of 7 billion parameters, without its weights."""
    folder = tmp_path_factory.mktemp("large")
    shape = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(shape))
    return compress.load(folder, weights=False)


def of(passes: str, **calibration: int) -> Recipe:
    return recipe.of_passes(passes).model_copy(update={"calibration": CalibrationSettings(**calibration)})


def found(model: Model, passes: str) -> Plan:
    return make_plan(model, of(passes), PROFILE)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_the_memory_predicted_for_tuning_is_within_25_percent_of_what_a_run_takes() -> None:
    passes, folder = "rtn(bits=4), tune(steps=1)", quickstart.folder()
    model = compress.load(folder)
    pipeline = Pipeline.parse(passes)
    specs = planned(pipeline.resolve(model)).values()
    sizes = Sizes.of(model, specs, of(passes, samples=8, length=128), True, pipeline.passes)
    done = subprocess.run([sys.executable, "-c", MEASURE, folder, passes], capture_output=True, text=True, check=True)
    assert sizes.training == pytest.approx(int(done.stdout), rel=0.25)


def test_a_run_that_tunes_a_model_larger_than_memory_is_refused(large: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    rounded, tuned = found(large, "rtn(bits=4)"), found(large, "rtn(bits=4), tune")
    floats = 4 * 6.7e9
    assert tuned.predicted_peak_memory_bytes > rounded.predicted_peak_memory_bytes + 5 * floats
    few = found(large, "rtn(bits=4), tune(parts=[norms])").predicted_peak_memory_bytes
    assert 2 * floats < few < 0.5 * tuned.predicted_peak_memory_bytes
    monkeypatch.setattr(plan, "allowed_memory", lambda: 128 * 10**9)
    assert refusal(found(large, "rtn(bits=4)")) is None
    error = refusal(found(large, "rtn(bits=4), tune"))
    assert isinstance(error, ResourceError) and "leave out passes that train" in str(error)


def test_a_pass_that_trains_blocks_holds_one_at_a_time(large: Model) -> None:
    learned, tuned = (
        found(large, f"rtn(bits=4), {name}").predicted_peak_memory_bytes for name in ("autoround", "tune")
    )
    assert learned < 0.3 * tuned


@pytest.mark.parametrize("name", ["autoround", "adaquant", "tune"])
def test_time_grows_with_the_steps_of_a_pass_that_trains(large: Model, name: str) -> None:
    none, few, many, most = (
        found(large, f"rtn(bits=4){more}").predicted_seconds
        for more in ("", *(f", {name}(steps={steps})" for steps in (1000, 2000, 101000)))
    )
    assert none < few < many
    assert most - few == pytest.approx(100 * (many - few), rel=0.01)


def test_stages_need_disk_for_what_they_hand_on(large: Model) -> None:
    one, two, turned = (
        found(large, text).predicted_disk_bytes for text in ("rtn(bits=4)", "rtn(bits=4), tune", "rotate, rtn(bits=4)")
    )
    assert one < two < turned


def test_the_state_of_a_training_needs_disk_twice_while_it_is_written_anew(large: Model) -> None:
    weights = 4 * sum(spec.shape[0] * spec.shape[1] for spec in large.structure.layers.values() if spec.segment >= 0)
    whole, few = (found(large, f"magnitude, heal(mode={mode})").predicted_disk_bytes for mode in ("full", "lora"))
    assert whole - few == pytest.approx(2 * 3.9 * weights)


def test_a_walk_before_the_walk_takes_time(large: Model) -> None:
    first, second = (found(large, f"wanda({each})").predicted_seconds for each in ("", "allocate=owl"))
    assert first < second
