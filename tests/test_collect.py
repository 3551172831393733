"""Statistics of layer inputs against what a plain hook sees."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.engine.collect import DRIFT_STEP, Collector, unfold
from compress.engine.layer_stats import Stat
from compress.engine.stream import BlockStream
from compress.layer import LayerKind, LayerSpec
from compress.maths.histogram import BINS, Histogram
from compress.models.model import Model
from compress.models.skeleton import OUTER

BLOCK = "model.layers.0"
Q, OUT, UP = f"{BLOCK}.self_attn.q_proj", f"{BLOCK}.self_attn.o_proj", f"{BLOCK}.mlp.up_proj"


@pytest.fixture(scope="module")
def model(llama: Path) -> Model:
    return compress.load(llama)


@pytest.fixture
def stream(model: Model) -> BlockStream:
    ids = torch.randint(0, model.vocabulary, (4, 16), generator=torch.Generator().manual_seed(0))
    made = BlockStream(model, [ids[:3], ids[3:]], reference=True)
    made.start(model.layers(OUTER))
    made.load(0, model.layers(0), model.plain(0))
    return made


def seen_by(stream: BlockStream, name: str, hidden: list[Tensor]) -> Tensor:
    """All rows that enter a layer, by a plain hook."""
    rows: list[Tensor] = []
    module = stream.module.get_submodule(name)
    hook = module.register_forward_pre_hook(lambda _m, inputs: rows.append(inputs[0].reshape(-1, inputs[0].shape[-1])))
    runner = stream.runner(0)
    with torch.no_grad():
        for place, values in enumerate(hidden):
            runner.forward(place, values)
    hook.remove()
    return torch.cat(rows)


@pytest.mark.parametrize("name", [Q, OUT, UP])
def test_every_statistic_is_that_of_all_rows(stream: BlockStream, name: str) -> None:
    wants = {Stat.HESSIAN, Stat.ABS_MEAN, Stat.ABS_MAX, Stat.HISTOGRAM}
    stats = stream.collect(0, [name], wants)[name]
    rows = seen_by(stream, name, stream.hidden)
    assert stats.tokens == len(rows) == 64
    torch.testing.assert_close(stats.hessian, rows.T @ rows / len(rows))
    torch.testing.assert_close(stats.abs_mean, rows.abs().mean(0))
    torch.testing.assert_close(stats.abs_max, rows.abs().amax(0))
    assert stats.histogram is not None
    assert (stats.histogram.low, stats.histogram.high) == (float(rows.min()), float(rows.max()))
    assert float(stats.histogram.counts.sum()) == rows.numel()


def test_the_mismatch_of_both_streams_is_taken_row_by_row(stream: BlockStream) -> None:
    for hidden in stream.hidden:
        hidden += 0.1 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    stats = stream.collect(0, [Q, OUT], {Stat.HESSIAN, Stat.CROSS})
    for name in (Q, OUT):
        now, before = seen_by(stream, name, stream.hidden), seen_by(stream, name, stream.reference)
        torch.testing.assert_close(stats[name].cross, (before - now).T @ now / len(now), rtol=1e-4, atol=1e-6)
        # batches are of 48 and 16 tokens, so one token in eight is every eighth of all
        few = (before - now)[::DRIFT_STEP]
        torch.testing.assert_close(stats[name].drift, few.T @ few / len(few), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(stats[name].hessian, now.T @ now / len(now))


def saliencies(names: list[str]) -> dict[str, list[Tensor]]:
    """For batches of 48 and 16 tokens, two groups of rows."""
    maker = torch.Generator().manual_seed(0)
    return {name: [torch.rand(tokens, 2, generator=maker) for tokens in (48, 16)] for name in names}


def test_guided_moments_weigh_each_token_by_its_saliency(stream: BlockStream) -> None:
    names = [Q, f"{BLOCK}.self_attn.k_proj", OUT]  # q and k are fed the same tensor, but have their own gradients
    guides = saliencies([*names[:2], UP])
    stats = stream.collect(0, names, {Stat.HESSIAN, Stat.GUIDED, Stat.CROSS}, guides)
    for name in names[:2]:
        rows = seen_by(stream, name, stream.hidden)
        weights = torch.cat(guides[name])
        expected = torch.stack([rows.T @ (rows * weights[:, [group]]) / len(rows) for group in (0, 1)])
        torch.testing.assert_close(stats[name].guided, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(stats[name].hessian, rows.T @ rows / len(rows))
    assert stats[OUT].guided is None
    assert stream.collect(0, [Q], {Stat.HESSIAN}, guides)[Q].guided is None


def test_layers_fed_the_same_tensor_are_named_together(stream: BlockStream) -> None:
    names = [f"{BLOCK}.{part}" for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")]
    stats = stream.collect(0, names, {Stat.SHARING})
    assert [stats[name].sharing for name in names] == [tuple(names[:3])] * 3 + [(names[3],)]


def test_the_reference_stream_goes_on_as_the_model_was(model: Model, stream: BlockStream) -> None:
    stream.look_ahead(0)
    expected = [target.clone() for target in stream.targets]
    noisy = {name: layer.with_weight(layer.float_weight() * 1.1) for name, layer in model.layers(0).items()}
    stream.load(0, noisy, model.plain(0))
    stream.advance(0)
    for found, wanted, current in zip(stream.reference, expected, stream.hidden, strict=True):
        assert torch.equal(found, wanted)
        assert not torch.allclose(current, wanted)


@pytest.mark.parametrize("padding", [0, 1, "same"])
def test_a_convolution_is_its_patches_times_its_weight(padding: int | str) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3, padding=padding, bias=False)
    values = torch.randn(2, 3, 8, 8)
    rows = unfold(layer, values)
    expected = layer(values).permute(0, 2, 3, 1).reshape(-1, 5)
    torch.testing.assert_close(rows @ layer.weight.reshape(5, -1).T, expected)


def test_two_convolutions_share_statistics_only_where_they_see_the_same_patches() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.a(x), self.b(x), self.c(x)

    module = Three()
    specs = [LayerSpec(name, LayerKind.CONV, (4, 18), (name,)) for name in "abc"]
    collector = Collector(module, specs, {Stat.HESSIAN, Stat.SHARING})
    with collector.attached():
        module(torch.randn(1, 2, 6, 6))
    found = collector.finish()
    assert found["a"].sharing == found["b"].sharing == ("a", "b")
    assert found["c"].sharing == ("c",)
    assert found["c"].hessian is not None and found["c"].hessian.shape == (2, 2)


def pieces() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for scale in (0.01, 3.0, 0.5, 40.0):
        yield torch.randn(1000, generator=generator) * scale


def test_a_histogram_that_grew_counts_as_one_that_was_wide_from_the_start() -> None:
    grown = Histogram()
    for values in pieces():
        grown.add(values)
    everything = torch.cat(list(pieces()))
    assert grown.limit >= float(everything.abs().max()) > grown.limit / 2
    assert float(grown.counts.sum()) == len(everything)
    expected = torch.histc(everything, BINS, -grown.limit, grown.limit).double()
    # values on the very border of two bins may be counted in either
    assert float((grown.counts.cumsum(0) - expected.cumsum(0)).abs().max()) <= 2
    spread = float((grown.counts * grown.centers**2).sum() / grown.counts.sum()) ** 0.5
    assert spread == pytest.approx(float(everything.std()), rel=0.01)
