"""Sampling against slow twins that follow the definitions with lists."""

import math

import numpy as np
import pytest

from compress.errors import InputError, UsageError
from compress.runtime.sampling import Sampling, choose, draw, probabilities, softmax, top_k_mask, top_p_mask

MAKER = np.random.default_rng(0)


def slow_probabilities(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Sort, cut, renormalize, cut, renormalize."""
    powers = [math.exp((value - max(logits)) / temperature) for value in logits]
    chances = [power / sum(powers) for power in powers]
    order = sorted(range(len(logits)), key=lambda place: (-logits[place], place))
    kept = order[: top_k or None]
    total = sum(chances[place] for place in kept)
    chances = [chances[place] / total if place in kept else 0.0 for place in range(len(logits))]
    if top_p < 1:
        nucleus, reached = [], 0.0
        for place in kept:
            nucleus.append(place)
            reached += chances[place]
            if reached >= top_p:
                break
        total = sum(chances[place] for place in nucleus)
        chances = [chances[place] / total if place in nucleus else 0.0 for place in range(len(logits))]
    return chances


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 3, 40, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.35, 0.001])
def test_probabilities_are_those_of_the_definition(temperature: float, top_k: int, top_p: float) -> None:
    logits = MAKER.normal(0, 3, (4, 40)).astype(np.float32)
    found = probabilities(logits, temperature, top_k, top_p)
    for row, values in zip(found, logits, strict=True):
        assert row == pytest.approx(slow_probabilities(values.tolist(), temperature, top_k, top_p), abs=1e-12)
        assert row.sum() == pytest.approx(1)


def test_of_equal_logits_the_first_are_kept() -> None:
    assert top_k_mask(np.array([[1.0, 2.0, 1.0, 1.0]]), 2).tolist() == [[True, True, False, False]]
    assert top_p_mask(np.full((1, 4), 0.25), 0.5).tolist() == [[True, True, False, False]]


def test_a_nucleus_that_needs_all_tokens_keeps_all() -> None:
    assert top_p_mask(np.full((1, 7), 1 / 7), 1 - 1e-12).all()


def test_a_draw_is_the_first_token_whose_cumulative_probability_exceeds_the_number() -> None:
    chances = np.array([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    numbers = np.array([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 1e-16])
    assert draw(np.tile(chances, (6, 1)), numbers).tolist() == [1, 1, 3, 3, 4, 4]


def test_many_draws_have_the_frequencies_of_the_distribution() -> None:
    sampling = Sampling(temperature=1.5, top_k=3, seed=1)
    logits, generators = np.array([[0.0, 1.0, 2.0, -1.0]]), sampling.generators(1)
    drawn = [int(choose(logits, sampling, generators)[0]) for _ in range(4000)]
    expected = probabilities(logits, 1.5, 3)[0]
    for token in range(4):
        assert drawn.count(token) / 4000 == pytest.approx(expected[token], abs=0.03)
    assert 3 not in drawn


def test_greedy_takes_the_first_of_the_largest_and_draws_no_numbers() -> None:
    sampling = Sampling()
    generators = sampling.generators(1)
    before = generators[0].bit_generator.state
    assert choose(np.array([[0.0, 5.0, 5.0]]), sampling, generators).tolist() == [1]
    assert generators[0].bit_generator.state == before


def test_a_row_draws_the_same_whatever_rows_are_beside_it() -> None:
    sampling, logits = Sampling(temperature=1.0, seed=3), MAKER.normal(0, 1, (2, 50))
    both = [choose(logits, sampling, made) for made in [sampling.generators(2)] for _ in range(20)]
    alone = [choose(logits[:1], sampling, made) for made in [sampling.generators(1)] for _ in range(20)]
    assert [row[0] for row in both] == [row[0] for row in alone]
    assert [row[0] for row in both] != [row[1] for row in both]


def test_tiny_temperatures_and_huge_logits_neither_overflow_nor_warn() -> None:
    with np.errstate(all="raise"):
        assert softmax(np.array([[1e30, 0.0, -1e30]])).tolist() == [[1.0, 0.0, 0.0]]
    assert softmax(np.array([[2.0, 1.0]]), 1e-300).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("logits", [[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]])
def test_logits_that_give_no_distribution_stop(logits: list[float]) -> None:
    with pytest.raises(InputError, match="NaN or infinite"):
        choose(np.array([logits]), Sampling(), [])


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": 1, "top_k": -1}, "top_k=-1"),
        ({"temperature": 1, "top_p": 0}, "top_p=0"),
        ({"temperature": 1, "top_p": 1.5}, "top_p=1.5"),
        ({"seed": -1}, "seed=-1"),
        ({"top_p": 0.5}, "temperature 0 draws nothing"),
        ({"top_k": 5}, "temperature 0 draws nothing"),
    ],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, float], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Sampling(**settings)  # type: ignore[arg-type]
