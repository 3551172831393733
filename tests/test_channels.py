"""Which channels of a classifier go together, which go first, and what is left of a layer: against obvious twins."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.maths.coupled_channels import Reading, removal_order, solve
from compress.models.model import Model
from compress.models.placing import whole_module
from compress.wiring import channel_narrowing as narrowing
from compress.wiring.channels import Group, Wiring, watch

CODE = '''
import torch
from torch import nn
from torch.nn import functional as F


def made(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return module.eval()


class Joined(nn.Module):
    """Two convolutions side by side, a depthwise one over both, and a flattened image."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.depth, self.point = nn.Conv2d(10, 10, 3, groups=10), nn.Conv2d(10, 5, 1)
        self.head = nn.Linear(5 * 4 * 4, 3)

    def forward(self, x):
        x = self.depth(torch.cat([self.left(x).relu(), F.silu(self.right(x))], 1))
        return self.head(self.point(x).relu_().flatten(1))


class Gated(nn.Module):
    """A gate for each channel, computed from the channels (squeeze and excitation)."""

    def __init__(self):
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.conv(x).relu()
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.head((x * gate).mean((2, 3)))


class Residual(nn.Module):
    """A stream that becomes wider by channels of zeros (He et al. 2016, option A)."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.c, self.d = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        x += self.b(self.a(x).relu())
        x = self.d(self.c(x).relu()) + F.pad(x, (0, 0, 0, 0, 2, 2))
        return self.head(F.max_pool2d(x, 2).mean((2, 3)))


class Mixing(nn.Module):
    """Channels that are shuffled, softmaxed, scaled one by one, cut in two, and written into another tensor."""

    def __init__(self):
        super().__init__()
        self.shuffled, self.softmaxed = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.scaled, self.halved, self.copied = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(4, 8, 1)
        self.free, self.scale, self.head = nn.Conv2d(8, 8, 1), nn.Parameter(torch.ones(8)), nn.Linear(8, 3)

    def forward(self, x):
        x = self.shuffled(x)
        x = self.softmaxed(x.view(-1, 2, 4, *x.shape[2:]).transpose(1, 2).reshape(x.shape)).softmax(1)
        x = self.halved(self.scaled(x) * self.scale[:, None, None])[:, :4]
        y = torch.zeros(x.shape[0], 8, *x.shape[2:])
        y[:] = self.copied(x)
        return self.head(self.free(y).mean((2, 3)))


class Counting(nn.Module):
    """Code that counts on a number of channels."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        x = self.second(self.first(x).relu()).mean((2, 3))
        return self.head(x.view(-1, 4))


def joined(): return made(Joined())
def gated(): return made(Gated())
def residual(): return made(Residual())
def mixing(): return made(Mixing())
def counting(): return made(Counting())


def sample_inputs(batch=2):
    return (torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(0)),)
'''


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("code") / "classifiers.py"
    path.write_text(CODE)
    return path


def opened(code: Path, name: str) -> tuple[Model, nn.Module, Wiring]:
    model = compress.load(f"{code}:{name}")
    module = whole_module(model)
    return model, module, watch(module, model.structure, images())


def images() -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def told(groups: Iterable[Group]) -> list[tuple[str, int, bool, set[str], set[str]]]:
    return [(",".join(g.rows), g.count, g.summed, set(g.along), set(g.columns)) for g in groups]


def test_channels_are_followed_through_joining_depthwise_layers_and_flattening(code: Path) -> None:
    _, _, wiring = opened(code, "joined")
    assert told(wiring.groups()) == [
        ("left", 4, False, {"depth"}, {"point"}),
        ("right", 6, False, {"depth"}, {"point"}),
        ("point", 5, False, set(), {"head"}),
    ]
    left, right, point = wiring.groups()
    assert (left.along["depth"][1], right.along["depth"][1], right.columns["point"][5]) == ((1,), (5,), (9,))
    assert point.columns["head"][1] == tuple(range(16, 32))
    assert wiring.obstacles() == {"head": "the model puts it out"}


def test_a_gate_goes_with_the_channels_that_it_multiplies(code: Path) -> None:
    _, _, wiring = opened(code, "gated")
    assert told(wiring.groups()) == [
        ("conv,up", 8, False, set(), {"down", "head"}),
        ("down", 4, False, set(), {"up"}),
    ]


def test_a_residual_stream_is_one_group_and_channels_of_zeros_have_to_stay(code: Path) -> None:
    _, _, wiring = opened(code, "residual")
    stream, *inner = wiring.groups()
    assert told([stream]) == [("stem,b,d", 4, True, set(), {"a", "c", "head"})]
    assert stream.rows["d"] == ((2,), (3,), (4,), (5,)) and stream.columns["head"] == stream.rows["d"]
    assert told(inner) == [("a", 6, False, set(), {"b"}), ("c", 6, False, set(), {"d"})]


def test_what_mixes_channels_keeps_them_and_says_so(code: Path) -> None:
    _, _, wiring = opened(code, "mixing")
    assert told(wiring.groups()) == [("free", 8, False, set(), {"head"})]
    reasons = wiring.obstacles()
    assert set(reasons) == {"shuffled", "softmaxed", "scaled", "halved", "copied", "head"}
    assert reasons["shuffled"] == "it goes through 'view', which may mix channels"
    assert reasons["scaled"] == "'mul' meets it with numbers for each channel"
    assert "_softmax" in reasons["softmaxed"] and "slice" in reasons["halved"] and "copy" in reasons["copied"]


@pytest.mark.parametrize("name", ["joined", "gated", "residual", "mixing"])
def test_taking_a_channel_out_leaves_what_silencing_it_does(name: str, code: Path) -> None:
    _, module, wiring = opened(code, name)
    for group in wiring.groups():
        for units in ([0], [1, group.count - 1]):
            gone = narrowing.gone_of([(group, units)])
            assert narrowing.agree(module, gone, images())
            weight = narrowing.narrowed(module, gone).get_submodule(group.name)._parameters["weight"]
            assert weight is not None and len(weight) == len(module.get_submodule(group.name).weight) - len(units)  # type: ignore[arg-type]


def test_code_that_counts_on_a_number_of_channels_is_found_out(code: Path) -> None:
    _, module, wiring = opened(code, "counting")
    first, second = wiring.groups()
    assert narrowing.agree(module, narrowing.gone_of([(first, [0])]), images())
    assert not narrowing.agree(module, narrowing.gone_of([(second, [0])]), images())


def problem(units: int, size: int, rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, rows that it reads, related to each other, and the columns of each unit."""
    maker = torch.Generator().manual_seed(seed)
    columns = torch.arange(units * size).reshape(units, size)
    mixing = torch.randn(units * size, units * size, generator=maker, dtype=torch.float64)
    inputs = torch.randn(rows, units * size, generator=maker, dtype=torch.float64) @ mixing
    inputs = torch.cat([inputs, torch.ones(rows, 1, dtype=torch.float64)], 1)
    return torch.randn(5, units * size + 1, generator=maker, dtype=torch.float64), inputs, columns


def test_the_order_of_removal_is_that_of_least_squares_solved_anew_each_time() -> None:
    cases = [problem(6, 3, 200, seed) for seed in (0, 1)]
    readings = [Reading(w, x.T @ x / len(x), columns) for w, x, columns in cases]
    order = removal_order(readings, 4, damp=1e-9)

    def loss(units: list[int]) -> float:
        total = 0.0
        for weight, inputs, columns in cases:
            kept = [place for place in range(weight.shape[1]) if place not in columns[units].flatten().tolist()]
            target = inputs @ weight.T
            error = target - inputs[:, kept] @ torch.linalg.lstsq(inputs[:, kept], target).solution
            total += float(error.square().sum() / target.square().sum())
        return total

    twin: list[int] = []
    for _ in range(4):
        rest = [unit for unit in range(6) if unit not in twin]
        twin.append(min(rest, key=lambda unit: loss([*twin, unit])))
    assert order == twin


def test_what_is_left_of_a_layer_is_solved_for_its_outputs_and_stays_where_data_say_nothing() -> None:
    weight, inputs, _ = problem(4, 2, 300, seed=2)
    wanted = torch.randn(len(inputs), 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    moment, cross = inputs.T @ inputs / len(inputs), wanted.T @ inputs / len(inputs)
    found = solve(weight, moment, cross, damp=1e-12)
    torch.testing.assert_close(found, torch.linalg.lstsq(inputs, wanted).solution.T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(solve(weight, moment, cross, damp=1e9), weight, rtol=1e-6, atol=1e-6)
    silent = moment.clone()
    silent[0], silent[:, 0], cross[:, 0] = 0.0, 0.0, 0.0
    assert torch.equal(solve(weight, silent, cross, damp=1e-9)[:, 0], weight[:, 0])
