"""Rotations are orthogonal, spread what is in one place over all, and come out of their seed."""

import math

import pytest
import torch

from compress.maths.rotation import core_order, paley, power_of_two, random_orthogonal, rotation, transform


def maker(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sylvester(order: int) -> torch.Tensor:
    """Entry (i, j) is −1 where i and j share an odd number of bits."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(order)] for i in range(order)]).double()


@pytest.mark.parametrize("order", [1, 2, 8, 64])
def test_the_fast_transform_is_the_product_with_sylvesters_matrix(order: int) -> None:
    rows = torch.randn(3, 5, order, generator=maker(), dtype=torch.float64)
    assert torch.allclose(transform(rows), rows @ sylvester(order) / order**0.5, atol=1e-12)


@pytest.mark.parametrize("order", [1, 12, 20, 28, 36, 60, 84, 108, 148])
def test_paleys_matrices_are_of_signs_with_rows_at_right_angles(order: int) -> None:
    matrix = paley(order)
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


def test_an_order_without_a_known_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="order 92"):
        paley(92)


@pytest.mark.parametrize(
    ("order", "core"),
    [(4096, 1), (5120, 20), (3584, 28), (896, 28), (576, 36), (960, 60), (5376, 84), (11008, 5504), (14, None)],
)
def test_the_sizes_of_real_models_have_hadamard_matrices_but_for_some(order: int, core: int | None) -> None:
    assert core_order(order) == core


@pytest.mark.parametrize(("order", "kind"), [(64, "hadamard"), (48, "hadamard"), (22, "hadamard"), (40, "random")])
def test_a_rotation_keeps_lengths_and_angles_and_is_its_matrix(order: int, kind: str) -> None:
    found = rotation(order, kind, maker())  # type: ignore[arg-type]
    matrix = found.matrix()
    assert torch.allclose(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), atol=1e-12)
    rows = torch.randn(2, 3, order, generator=maker(1))
    assert torch.allclose(found(rows), rows.double() @ matrix, atol=1e-12)


def test_a_hadamard_rotation_spreads_one_entry_evenly_and_a_random_one_nearly() -> None:
    one = torch.zeros(96).double()
    one[17] = 1.0
    assert torch.allclose(rotation(96, "hadamard", maker())(one).abs(), torch.tensor(1 / math.sqrt(96)).double())
    assert float(rotation(96, "random", maker())(one).abs().max()) < 0.5


def test_an_order_without_a_hadamard_matrix_gets_a_random_one() -> None:
    assert rotation(22, "hadamard", maker()).block == 1 and len(rotation(22, "hadamard", maker()).core) == 22


def test_the_seed_decides_and_the_kinds_differ() -> None:
    first, again, other = (rotation(32, "hadamard", maker(seed)).matrix() for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    first, again, other = (random_orthogonal(8, maker(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_random_orthogonal_matrices_have_no_preferred_sign() -> None:
    corners = [float(random_orthogonal(3, maker(seed))[0, 0]) for seed in range(400)]
    assert abs(sum(corners) / 400) < 4 * (1 / 3) ** 0.5 / 20  # four standard errors; without the signs it is −0.5


@pytest.mark.parametrize(("number", "power"), [(1, 1), (96, 32), (768, 256), (7, 1)])
def test_the_power_of_two_in_a_number(number: int, power: int) -> None:
    assert power_of_two(number) == power
