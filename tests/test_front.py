"""Which variant is worth taking: dominance under noise, limits at the worse end, ties and their sentence."""

from __future__ import annotations

import math
import random

import pytest

from compress.errors import UsageError
from compress.sweep.front import AXES, Axis, Candidate, Estimate, Limit, choose, dominates, front, is_better
from compress.sweep.limits import read_limits, resolve


def one(name: str, loss: float, latency: float, size: float, *, noise: float = 0.0, effort: int = 1) -> Candidate:
    """noise: half of the relative width of loss and latency."""

    def wide(value: float) -> Estimate:
        return Estimate(value, value * (1 - noise), value * (1 + noise))

    estimates: dict[Axis, Estimate] = {"loss": wide(loss), "latency": wide(latency), "size": Estimate.of(size)}
    return Candidate(name, estimates, (effort, 1))


def slow_front(candidates: list[Candidate]) -> list[str]:
    """Of exact figures, the obvious way: nobody is at least as good everywhere and better somewhere."""
    kept = []
    for each in candidates:
        values = [each.estimates[axis].value for axis in AXES]
        beaten = False
        for other in candidates:
            others = [other.estimates[axis].value for axis in AXES]
            beaten |= all(a <= b for a, b in zip(others, values, strict=True)) and others != values
        if not beaten:
            kept.append(each.name)
    return kept


def test_the_front_of_exact_figures_is_the_pareto_front() -> None:
    maker = random.Random(0)
    for _ in range(50):
        # steps far above the margins, so that equal and different are plain
        found = [one(str(place), *(maker.randint(1, 6) for _ in range(3))) for place in range(12)]
        assert list(front(found, {})) == slow_front(found)


def test_what_differs_within_its_noise_only_is_not_dominated() -> None:
    first, second = one("a", 0.10, 0.50, 100, noise=0.2), one("b", 0.11, 0.52, 100, noise=0.2)
    assert not dominates(first, second, {}) and front([first, second], {}) == ("a", "b")
    assert dominates(one("a", 0.10, 0.50, 100), one("b", 0.11, 0.52, 100), {})


def test_better_in_one_thing_and_worse_in_another_is_no_dominance() -> None:
    first, second = one("a", 0.10, 0.90, 100), one("b", 0.20, 0.50, 100)
    assert not dominates(first, second, {}) and not dominates(second, first, {})


def test_a_difference_measured_side_by_side_counts_for_more_than_two_wide_intervals() -> None:
    first, second = one("a", 0.10, 0.50, 100, noise=0.5), one("b", 0.12, 0.50, 100, noise=0.5)
    assert not is_better("loss", first, second, {})
    apart: dict[tuple[Axis, str, str], Estimate] = {("loss", "a", "b"): Estimate(-0.02, -0.025, -0.015)}
    assert is_better("loss", first, second, apart) and not is_better("loss", second, first, apart)
    apart["loss", "a", "b"] = Estimate(-0.02, -0.05, 0.01)
    assert not is_better("loss", first, second, apart)


def test_a_certain_difference_too_small_to_matter_is_none() -> None:
    assert not is_better("size", one("a", 1, 1, 1000), one("b", 1, 1, 1005), {})
    assert is_better("size", one("a", 1, 1, 1000), one("b", 1, 1, 1020), {})
    tiny: dict[tuple[Axis, str, str], Estimate] = {("latency", "a", "b"): Estimate(-0.006, -0.007, -0.005)}
    assert not is_better("latency", one("a", 1, 1, 1), one("b", 1, 1, 1), tiny)


def test_within_the_limits_the_fastest_is_recommended_and_each_other_has_its_reason() -> None:
    found = choose(
        [one("slow", 0.01, 0.9, 300), one("fast", 0.04, 0.4, 200), one("lossy", 0.30, 0.3, 100)],
        {},
        [Limit("loss", 0.05, "0.05")],
    )
    assert found.recommended == "fast" and found.allowed == ("slow", "fast")
    assert found.front == ("slow", "fast", "lossy")
    assert "slower than fast" in found.reasons["slow"] and "limit 0.05" in found.reasons["lossy"]


def test_a_limit_is_held_against_the_worse_end_of_the_interval() -> None:
    candidate = one("a", 0.045, 0.5, 100, noise=0.2)  # up to 0.054
    found = choose([candidate], {}, [Limit("loss", 0.05, "0.05")])
    assert found.recommended is None and "0.054" in found.reasons["a"] and "no variant meets" in found.sentence
    assert choose([candidate], {}, [Limit("loss", 0.055, "0.055")]).recommended == "a"


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (Limit("size", 4e6, "40%"), "size may be up to 5 MB (limit 40%, 4 MB)"),
        (Limit("size", 4e6, "4MB"), "size may be up to 5 MB (limit 4MB)"),
        (Limit("latency", 0.4, "2ms"), "0.5x the baseline's time (limit 2ms, 0.4x the baseline's time)"),
        (Limit("latency", 0.4, "0.4x"), "0.5x the baseline's time (limit 0.4x)"),
        (Limit("loss", 0.01, "0.01"), "loss may be up to 0.02 (limit 0.01)"),
    ],
)
def test_a_limit_is_told_in_the_unit_of_what_exceeds_it(limit: Limit, words: str) -> None:
    assert words in choose([one("a", 0.02, 0.5, 5e6)], {}, [limit]).reasons["a"]


def test_what_was_not_measured_meets_no_limit_and_is_not_better() -> None:
    candidate = Candidate("a", {"size": Estimate.of(10)})
    assert "latency was not measured" in choose([candidate], {}, [Limit("latency", 1.0, "1x")]).reasons["a"]
    assert not is_better("latency", candidate, one("b", 1, 1, 1), {})


def test_a_loss_that_is_no_number_is_worse_than_any() -> None:
    broken = Candidate("b", {"loss": Estimate.of(math.nan), "size": Estimate.of(1), "latency": Estimate.of(0.1)})
    found = choose([broken, one("a", 0.01, 0.9, 100)], {}, [Limit("loss", 1e9, "1e9")])
    assert found.recommended == "a" and found.allowed == ("a",)


def test_of_a_tie_the_simpler_is_taken_and_the_sentence_says_that_it_was_a_tie() -> None:
    hard, easy = one("hard", 0.04, 0.5, 100, noise=0.1, effort=3), one("easy", 0.041, 0.51, 100, noise=0.1, effort=1)
    found = choose([hard, easy], {}, [Limit("loss", 0.1, "0.1")])
    assert found.recommended == "easy" and found.tied == ("hard",)
    assert "a tie with hard" in found.sentence and "not to be told from easy" in found.reasons["hard"]


def test_the_user_says_what_decides() -> None:
    found = [one("small", 0.09, 0.8, 100), one("fast", 0.08, 0.4, 200), one("good", 0.01, 0.9, 300)]
    for axis, name in (("size", "small"), ("latency", "fast"), ("loss", "good")):
        assert choose(found, {}, prefer=[axis]).recommended == name  # type: ignore[list-item]


def test_without_any_word_on_loss_nothing_is_recommended_unless_one_is_the_whole_front() -> None:
    found = [one("small", 0.09, 0.8, 100), one("good", 0.01, 0.9, 300), one("bad", 0.5, 0.9, 300)]
    open_choice = choose(found, {})
    assert open_choice.recommended is None and "nothing says how much may be lost" in open_choice.sentence
    assert set(open_choice.reasons) == {"bad"} and open_choice.allowed == ("small", "good", "bad")
    assert choose(found, {}, bounded=True).recommended == "small"
    assert choose(found[1:], {}).recommended == "good"


def test_what_may_not_be_taken_is_neither_on_the_front_nor_recommended() -> None:
    wrong = Candidate("wrong", one("x", 0.0, 0.1, 1).estimates, refused="failed: no")
    found = choose([wrong, one("a", 0.1, 0.5, 10)], {}, bounded=True)
    assert found.front == ("a",) and found.recommended == "a" and found.reasons["wrong"] == "failed: no"
    assert "none of 1 variants" in choose([wrong], {}).sentence


@pytest.mark.parametrize(
    ("latency", "expected"), [("5ms", 0.5), ("0.8x", 0.8), ("80%", 0.8), ("8000us", 0.8), ("0.01s", 1.0)]
)
def test_latency_limits_are_times_or_shares_of_the_baseline(latency: str, expected: float) -> None:
    (limit,) = resolve(read_limits(latency=latency), 1000, 0.010)
    assert limit.axis == "latency" and limit.most == pytest.approx(expected)


@pytest.mark.parametrize(("size", "expected"), [("3MB", 3e6), ("300", 300), ("30%", 3000), ("0.5x", 5000)])
def test_size_limits_are_bytes_or_shares_of_the_source(size: str, expected: float) -> None:
    (limit,) = resolve(read_limits(size=size), 10_000, None)
    assert limit.most == pytest.approx(expected)


def test_a_time_limit_without_a_measured_baseline_is_met_by_nothing() -> None:
    (limit,) = resolve(read_limits(latency="5ms"), 1000, None)
    assert choose([one("a", 0.1, 0.5, 10)], {}, [limit]).recommended is None


@pytest.mark.parametrize(
    "given",
    [{"loss": -1.0}, {"loss": math.nan}, {"latency": "5"}, {"latency": "5 parsecs"}, {"latency": "-5ms"},
     {"size": "1.2.3MB"}, {"size": "0"}, {"size": "3 Mb"}, {"prefer": "beauty"}],
)  # fmt: skip
def test_a_limit_that_cannot_be_read_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="--"):
        read_limits(**given)  # type: ignore[arg-type]
