"""GPTQ with a Hessian per group of rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from compress.engine.layer_stats import LayerStats
from compress.errors import UsageError
from compress.formats import parse_format
from compress.maths.hessian import weighted_error
from compress.passes.gptq import Gptq
from helpers.gptq_twin import inputs, layer, moments, slow_gptq, with_damping


def guided(groups: int) -> torch.Tensor:
    """A Hessian for each of some groups of rows, none like another."""
    return torch.stack([moments(inputs(seed=10 + group)) for group in range(groups)])


@pytest.mark.parametrize("text", ["int3(group=8)", "int3(tensor)", "int2(group=8, asymmetric)", "nvfp4", "mxfp4"])
def test_where_every_token_weighs_the_same_guided_hessians_change_nothing(text: str) -> None:
    one, hessian, item = layer(7), moments(inputs()), Gptq(format=text)
    plain = item.layer(one, LayerStats(hessian, tokens=200)).float_weight()
    found = Gptq(format=text, guided=3).layer(one, LayerStats(hessian, tokens=200, guided=hessian.repeat(3, 1, 1)))
    torch.testing.assert_close(found.float_weight(), plain)
    assert not found.notes


@pytest.mark.parametrize("refit", [0, 3])
def test_a_group_of_rows_comes_out_as_a_layer_of_its_own_with_its_hessian(refit: int) -> None:
    one, hessians = layer(7), guided(3)
    stats = LayerStats(moments(inputs()), tokens=200, guided=hessians)
    found = Gptq(format="int3(group=8)", guided=3, refit=refit).layer(one, stats).float_weight()
    places = torch.arange(7).tensor_split(3)
    for hessian, rows in zip(hessians, places, strict=True):
        alone = replace(one, weight=one.float_weight()[rows])
        expected = Gptq(format="int3(group=8)", refit=refit).layer(alone, LayerStats(hessian, tokens=200))
        torch.testing.assert_close(found[rows], expected.float_weight())


def test_a_group_of_rows_equals_the_column_by_column_twin_with_its_hessian() -> None:
    form, one, hessians = parse_format("int3(group=8)"), layer(), guided(2)
    item = Gptq(format=form, guided=2, refit=0, damp=0.01)
    found = item.layer(one, LayerStats(moments(inputs()), tokens=200, guided=hessians)).float_weight()
    for hessian, rows in zip(hessians, (slice(0, 3), slice(3, 6)), strict=True):
        weight = one.float_weight()[rows]
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
        params = form.fit(weight, search=True)
        expected = slow_gptq(weight.double().numpy(), with_damping(hessian), form, params, order)
        assert np.abs(found[rows].numpy() - expected).max() < 1e-4


def test_guided_hessians_leave_each_group_less_of_its_own_error() -> None:
    one, hessians = layer(), guided(2)
    stats = LayerStats(moments(inputs()), tokens=200, guided=hessians)
    errors = [
        [
            weighted_error((made - one.float_weight())[rows], hessian)
            for hessian, rows in zip(hessians, (slice(0, 3), slice(3, 6)), strict=True)
        ]
        for made in (Gptq(format="int3(group=8)", guided=many).layer(one, stats).float_weight() for many in (2, 0))
    ]
    assert all(with_own < with_plain for with_own, with_plain in zip(*errors, strict=True))


def test_a_layer_without_a_gradient_is_told_in_its_notes() -> None:
    stats = LayerStats(moments(inputs()), tokens=200)
    one = Gptq(format="int3(group=8)", guided=2).layer(layer(), stats)
    assert any("not guided" in note for note in one.notes)
    plain = Gptq(format="int3(group=8)").layer(layer(), stats)
    assert torch.equal(one.float_weight(), plain.float_weight())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"guided": -1}, "guided=-1"),
        ({"guided": 2, "format": "nf4(block=64)"}, "blocks cross rows"),
        ({"guided": 2, "overrides": {"*": {"format": "nf4(block=64)"}}}, "blocks cross rows"),
        ({"guided": 2, "overrides": {"*": {"guided": 3}}}, "may not set guided=3"),
        ({"overrides": {"*": {"guided": 3}}}, "may not set guided=3"),
    ],
)
def test_what_cannot_be_guided_is_refused_with_the_setting(settings: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Gptq.build(settings)
    assert Gptq(guided=2, overrides={"*": {"guided": 0}}).row_groups == 2
