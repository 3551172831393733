"""The training loop: it finds a minimum, keeps the best iterate, and stops when it is told to."""

import pytest
import torch
from torch import Tensor

from compress.errors import InputError, UsageError
from compress.training.distill import Budget, Group, fit, split


def valley(point: Tensor, place: int) -> Tensor:
    """A different parabola per batch; the mean of all has its minimum at 2.5."""
    return (point - 1 - place).square().mean()


@pytest.mark.parametrize("optimizer", ["adam", "sign"])
def test_it_descends_to_the_mean_minimum_in_place(optimizer: str) -> None:
    point = torch.zeros(3)
    places = [0, 1, 2, 3]
    outcome = fit(
        [Group([point], 0.1)],
        lambda place: valley(point, place),
        places,
        places,
        Budget(200, batch=4),
        optimizer=optimizer,  # type: ignore[arg-type]
    )
    torch.testing.assert_close(point, torch.full((3,), 2.5), atol=0.1, rtol=0)
    assert outcome.after < outcome.before and outcome.steps == 200 and outcome.stopped == "steps"
    assert not point.requires_grad and point.grad is None


def test_adam_moves_as_torch_does() -> None:
    point, twin = torch.tensor([3.0]), torch.nn.Parameter(torch.tensor([3.0]))
    fit([Group([point], 0.1)], lambda _: point.square().sum(), [0], [0], Budget(3, check=3), schedule="constant")
    descent = torch.optim.Adam([twin], lr=0.1, betas=(0.9, 0.95))
    for _ in range(3):
        descent.zero_grad()
        twin.square().sum().backward()
        descent.step()
    torch.testing.assert_close(point, twin.detach())


def test_the_best_iterate_on_held_out_batches_is_kept_and_the_start_if_nothing_is_better() -> None:
    point = torch.tensor([0.0])
    train = [5]  # pulls to 6, while the held-out batch wants 1
    outcome = fit(
        [Group([point], 0.25)], lambda p: valley(point, p), train, [0], Budget(20, check=1), schedule="constant"
    )
    assert abs(float(point) - 1) < 0.3 and 0 < outcome.best < 20
    worse = torch.tensor([1.0])
    outcome = fit([Group([worse], 0.5)], lambda p: valley(worse, p), train, [0], Budget(5, check=1))
    assert float(worse) == 1.0 and outcome.best == 0 and outcome.before == outcome.after


def test_patience_and_minutes_end_it_early() -> None:
    point = torch.tensor([1.0])
    waiting = Budget(100, check=1, patience=3)
    assert fit([Group([point], 0.1)], lambda p: valley(point, p), [5], [0], waiting).stopped == "patience"
    late = fit([Group([point], 0.1)], lambda p: valley(point, p), [5], [0], Budget(100, minutes=0.0))
    assert late.stopped == "minutes" and late.steps == 1
    assert "stopped by minutes" in late.describe()


def test_tensors_stay_where_their_group_projects_them() -> None:
    point = torch.zeros(2)
    fit([Group([point], 0.3, lambda: point.clamp_(-0.5, 0.5))], lambda p: valley(point, p), [3], [3], Budget(10))
    assert point.tolist() == [0.5, 0.5]


def test_the_same_seed_gives_the_same_bytes_and_another_order_other_ones() -> None:
    def once(seed: int) -> Tensor:
        point = torch.zeros(1)
        fit([Group([point], 0.2)], lambda p: valley(point, p), list(range(7)), [0], Budget(9, check=9), seed=seed)
        return point

    assert torch.equal(once(0), once(0))
    assert not torch.equal(once(0), once(1))


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    point = torch.zeros(1)
    with pytest.raises(InputError, match="NaN or infinite"):
        fit([Group([point], 1.0)], lambda _: (point / 0).sum(), [0], [0], Budget(2))


def test_batches_to_hold_out_are_apart_from_those_to_train_on() -> None:
    train, held = split(16)
    assert held == [7, 15] and sorted(train + held) == list(range(16))
    assert split(2) == ([0], [1])
    assert split(1) == ([0], [0])
    with pytest.raises(UsageError, match="no batch"):
        split(0)
