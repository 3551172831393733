"""How prompts go on: counted by hand, and with a runtime of a few lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import compress
from compress import hwprofiles
from compress.errors import InputError
from compress.export import find as find_target
from compress.inputs import datasets
from compress.pipeline import Pipeline
from compress.progress import Progress
from compress.quality.continuations import (
    SETTINGS,
    Amount,
    Plan,
    compare,
    compare_continuations,
    continuations,
    generation_metrics,
    plan_prompts,
)
from compress.quality.evaluate import evaluate, runners_of
from compress.quality.metrics import METRICS
from compress.quality.token_evaluate import with_continuations
from compress.records import Quality
from compress.runtime.sampling import Sampling

QUIET = Progress(quiet=True)
WORDS = 50


class Counting:
    """A model whose next logits follow from the last token alone; `noise` is added in batches of more than one."""

    def __init__(self, seed: int = 0, change: float = 0.0, noise: float = 0.0) -> None:
        maker = np.random.default_rng(seed)
        self.table = 2 * maker.standard_normal((WORDS, WORDS)) + change * np.random.default_rng(9).standard_normal(
            (WORDS, WORDS)
        )
        self.noise, self.batches = noise * maker.standard_normal((WORDS, WORDS)), list[int]()

    def start(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        assert mask[:, -1].all() and (np.diff(mask, axis=1) >= 0).all()  # padded on the left
        self.batches.append(len(ids))
        return self.step(ids[:, -1], np.ones(len(ids), bool))

    def step(self, tokens: np.ndarray, alive: np.ndarray) -> np.ndarray:
        return (self.table + (len(tokens) > 1) * self.noise)[tokens].astype(np.float32)


def plan(tokens: int = 12, ends: tuple[int, ...] = ()) -> Plan:
    return Plan([[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]], tokens, ends)


def test_agreement_is_counted_position_by_position() -> None:
    original = [[1, 2, 3, 4], [1, 2, 3, 4], [5, 6], [7, 7, 7, 7]]
    other = [[1, 2, 3, 4], [1, 9, 3, 9], [5, 6, 1, 1], [8, 8, 8, 8]]
    found = compare(original, other, 4, "p")
    assert found.agreement.value == pytest.approx((4 + 2 + 2 + 0) / 16)
    assert found.exact_match.value == 0.25
    assert found.first_divergence.value == pytest.approx((4 + 1 + 2 + 0) / 4)
    assert found.first_divergence.samples == 4 and found.first_divergence.unit == "tokens"


def test_one_prompt_gives_no_interval() -> None:
    found = compare([[1, 2]], [[1, 3]], 2, "p")
    assert [figure.interval for figure in (found.agreement, found.exact_match, found.first_divergence)] == [None] * 3


@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)
def test_a_prompt_goes_on_alike_alone_and_in_a_padded_batch(sampling: Sampling) -> None:
    runner = Counting()
    assert continuations(runner, plan(), sampling, 4) == continuations(runner, plan(), sampling, 1)
    assert runner.batches == [4, 1, 1, 1, 1]


def test_a_text_ends_with_its_end_token() -> None:
    free = continuations(Counting(), plan(), Sampling(), 4)
    end = free[0][3]
    ended = continuations(Counting(), plan(ends=(end,)), Sampling(), 4)
    for whole, cut in zip(free, ended, strict=True):
        assert cut == (whole[: whole.index(end) + 1] if end in whole else whole)


def test_the_same_model_goes_on_alike_under_every_setting() -> None:
    found = compare_continuations(Counting(), Counting(), plan(), QUIET)
    assert [(each.temperature, each.top_k) for each in found] == [(0, 0), (0.5, 0), (0.8, 0), (0.8, 40)]
    for each in found:
        assert each.compressed.exact_match.value == each.control.agreement.value == 1
        assert each.compressed.first_divergence.value == 12 and (each.prompts, each.tokens) == (4, 12)


def test_what_the_batch_alone_changes_shows_in_the_control() -> None:
    found = compare_continuations(Counting(noise=1.5), Counting(noise=1.5), plan(), QUIET)
    assert found[0].compressed.agreement.value == 1 and found[0].control.agreement.value < 0.8
    assert generation_metrics(found, control=True)["greedy_agreement"] == found[0].control.agreement


def test_another_model_diverges_and_every_figure_may_be_gated() -> None:
    found = compare_continuations(Counting(), Counting(change=1.5), plan(), QUIET)
    metrics = generation_metrics(found, control=False)
    assert found[0].compressed.first_divergence.value < 12 and found[0].control.agreement.value == 1
    generated = [name for name in METRICS["causal-lm"] if name.startswith(("greedy", "sampled"))]
    assert sorted(metrics) == sorted(generated)
    assert all(metric.detail and metric.better == "higher" for metric in metrics.values())
    assert "temperature 0.8, top-k 40, seed 0" in metrics["sampled_agreement_t0.8_top40"].protocol


def test_prompts_are_beginnings_of_windows_of_unlike_lengths_with_room_after_them() -> None:
    text = SimpleNamespace(eos_token_id=[2, 3])
    model = SimpleNamespace(longest=48, config=SimpleNamespace(get_text_config=lambda: text))
    windows = [torch.arange(64) + 100 * row for row in range(20)]
    found = plan_prompts(model, windows, Amount(5, 32))
    assert [len(prompt) for prompt in found.prompts] == [24, 21, 18, 15, 24]
    assert [prompt[0] for prompt in found.prompts] == [0, 400, 900, 1400, 1900]
    assert (found.tokens, found.ends) == (24, (2, 3))
    assert plan_prompts(model, windows, Amount(0)).prompts == []
    assert len(plan_prompts(model, windows[:2], Amount(8)).prompts) == 2


def bare(subject: str) -> Quality:
    return Quality(subject=subject, where="here", metrics={}, data_digest="d")  # type: ignore[arg-type]


def test_what_cannot_be_continued_is_told_in_a_note() -> None:
    runners, arms = (Counting(), Counting()), (bare("baseline"), bare("compressed"))
    for given, wanted, told in (
        (None, plan(), "does not generate here"),
        (runners, Plan([], 32, ()), "none are wanted"),
        (runners, plan(tokens=0), "no positions after a prompt"),
    ):
        baseline, artifact = with_continuations(arms, given, wanted, QUIET)
        assert baseline == arms[0] and not artifact.generation and told in artifact.notes[0]


def test_a_model_that_puts_out_nan_keeps_its_other_figures() -> None:
    broken = Counting()
    broken.table[:] = np.nan
    with pytest.raises(InputError, match="NaN"):
        compare_continuations(Counting(), broken, plan(), QUIET)
    _, artifact = with_continuations((bare("baseline"), bare("compressed")), (Counting(), broken), plan(), QUIET)
    assert "NaN" in artifact.notes[0] and not artifact.metrics


@pytest.fixture(scope="module")
def small(make_llama: Callable[..., Path]) -> Path:
    return make_llama("one-block", num_hidden_layers=1)


def test_an_artifact_is_judged_by_every_figure_in_its_runtime(small: Path, text_file: Path, tmp_path: Path) -> None:
    model, profile = compress.load(small), hwprofiles.load("cpu-x86-avx512-vnni")
    changed = Pipeline.parse("rtn(format=int3(group=32))").run(model).model
    target, windows = find_target("onnx"), datasets.quality_windows(model, text_file, samples=8, length=48)
    loaded = []
    for name, each in (("baseline", model), ("artifact", changed)):
        target.write(each, profile, tmp_path / name)
        loaded.append((target.session(tmp_path / name, 1), tmp_path / name))
    runners = runners_of(target, *loaded)
    found = evaluate(loaded[0][0], loaded[1][0], model, changed, windows, QUIET, runners, Amount(3, 8))

    metrics = found.artifact.metrics
    assert list(metrics) == [name for name in METRICS["causal-lm"] if name in metrics]
    assert set(METRICS["causal-lm"]) - set(metrics) == {"kl_p99"}  # of 8 * 47 tokens
    assert metrics["kl"].value == pytest.approx(found.memory.metrics["kl"].value, rel=0.05)
    assert set(found.memory.metrics) == {"perplexity", "nll", "kl", "top1_agreement", "nll_change"}
    assert [each.control.exact_match.value for each in found.artifact.generation] == [1.0] * 4
    assert found.baseline.metrics["greedy_agreement"].value == 1.0
    assert found.artifact.worst[0].context_text.isascii() and len(found.artifact.worst) == 20
    for subject in (found.baseline, found.artifact, found.memory):
        assert Quality.model_validate_json(subject.model_dump_json()) == subject
