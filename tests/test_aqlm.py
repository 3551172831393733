"""The pass `aqlm`: descent until it settles, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress import solve_vq
from compress.errors import UsageError
from compress.formats.base import QuantTensor
from compress.passes.aqlm import Aqlm
from compress.passes.vptq import Vptq
from helpers.coded import IN, OUT, layer, proxy, solved, stats


def error(item: Aqlm | Vptq, seed: int = 0) -> float:
    source, known = layer(seed=seed), stats(seed)
    (found,) = solved(item, [source], known)
    return proxy(source, found, known)


def aqlm(**settings: Any) -> Aqlm:
    return Aqlm.build({"format": IN, "mismatch": 0, **settings})


def test_first_codes_are_those_of_the_nearest_sum_of_entries() -> None:
    source, known = layer(), stats()
    (found,) = solved(aqlm(sweeps=1, tolerance=0), [source], known)
    assert isinstance(found.weight, QuantTensor) and str(found.format) == IN
    form, item = aqlm().codebook, aqlm()
    target = source.float_weight()
    scale = form.fit_scale(target)
    book = form.learn([(target / scale, torch.ones_like(target))])
    start = solve_vq.Coded(form, target, torch.eye(target.shape[1]), scale, torch.empty(0))
    codes = item.first_codes(None, start, book).codes  # type: ignore[arg-type]
    sums = (book[0, 0][:, None] + book[0, 1][None]).flatten(0, 1)
    vectors = (target / scale).reshape(48, -1, 1, 4)
    least = (vectors - sums).square().sum(-1).min(-1).values
    found_errors = (vectors[:, :, 0] - sums[codes[..., 0] * 16 + codes[..., 1]]).square().sum(-1)
    assert float((found_errors <= least + 1e-5).float().mean()) > 0.95  # the beam may miss a few


def test_more_sweeps_never_make_it_worse_and_it_stops_where_they_gain_too_little() -> None:
    errors = [error(aqlm(sweeps=sweeps, tolerance=0)) for sweeps in (1, 4, 12)]
    assert errors[0] > errors[1] >= errors[2]
    assert errors[2] <= error(aqlm(tolerance=0.01)) < errors[0]
    assert error(aqlm(tolerance=0.9)) == pytest.approx(errors[0], rel=0.2)


def test_it_ends_near_vptq_with_as_many_sweeps_and_far_below_its_first_codes() -> None:
    ours = sum(error(aqlm(sweeps=8, tolerance=0), seed) for seed in range(3))
    other = sum(error(Vptq.build({"format": IN, "mismatch": 0, "refit": 8}), seed) for seed in range(3))
    plain = sum(error(Vptq.build({"format": IN, "mismatch": 0, "refit": 0, "beam": 1}), seed) for seed in range(3))
    assert ours < 0.8 * plain and ours < 1.3 * other


def test_layers_of_a_block_may_hold_one_codebook() -> None:
    layers = [layer("block.a"), layer("block.b", rows=16, seed=2)]
    first, second = (each.weight for each in solved(aqlm(share="block"), layers, stats()))
    assert isinstance(first, QuantTensor) and isinstance(second, QuantTensor)
    assert first.tensors["codebook"] is second.tensors["codebook"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"format": "int4(group=32)"}, "aqlm: format=int4.*is no codebook"),
        ({"format": OUT}, "along the outputs"),
        ({"tolerance": 1.5}, "tolerance"),
        ({"overrides": {"*q_proj": {"share": "block"}}}, "may not set share"),
        ({"share": "block", "overrides": {"*q_proj": {"sweeps": 2}}}, "may not set sweeps"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Aqlm.build(settings)
