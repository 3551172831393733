"""Orthogonal matrices that spread outliers evenly: Hadamard matrices with random signs, random orthogonal ones.

All in float64, and all that is random from a seed. Pure functions on tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["hadamard", "random"]


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal matrix Q = diag(signs) · (I ⊗ core ⊗ H), of order n.

    signs (n,) of ±1, core (m, m) orthogonal, both float64; block: order of the Hadamard matrix H (Sylvester's, divided
    by √block), a power of two. n is a multiple of m · block, and Q block-diagonal where it is not m · block itself.
    """

    signs: Tensor
    core: Tensor
    block: int = 1

    @property
    def order(self) -> int:
        """n."""
        return len(self.signs)

    def __call__(self, rows: Tensor) -> Tensor:
        """rows (…, n) → rows · Q in float64, without forming Q: n log n operations a row where the core is small."""
        signed = rows.double() * self.signs
        if self.block == 1:  # one product of matrices instead of many with vectors
            return (signed.reshape(-1, len(self.core)) @ self.core).reshape(rows.shape)
        parts = transform(signed.reshape(-1, len(self.core), self.block))
        return (self.core.T @ parts).reshape(rows.shape)

    def matrix(self) -> Tensor:
        """Q, (n, n) float64."""
        return self(torch.eye(self.order, dtype=torch.float64))


def transform(values: Tensor) -> Tensor:
    """values (…, 2^k) → values · H / √2^k, H being Sylvester's Hadamard matrix (fast Walsh-Hadamard transform)."""
    size = values.shape[-1]
    assert size & (size - 1) == 0, f"{size} is no power of two"
    result, step = values.reshape(-1, size), 1
    while step < size:
        pairs = result.reshape(-1, size // (2 * step), 2, step)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        result, step = torch.stack([first + second, first - second], 2).reshape(-1, size), 2 * step
    whole: Tensor = (result / size**0.5).reshape(values.shape)
    return whole


def rotation(order: int, kind: Kind, maker: torch.Generator) -> Rotation:
    """A rotation of an order: `hadamard` with random signs, or any orthogonal matrix, by the measure of Haar. Where no
    Hadamard matrix of the order is known here (see `core_order`) it is the latter."""
    core = core_order(order) if kind == "hadamard" else None
    if core is None:
        return Rotation(torch.ones(order, dtype=torch.float64), random_orthogonal(order, maker))
    return Rotation(random_signs(order, maker), paley(core) / core**0.5, order // core)


def random_signs(count: int, maker: torch.Generator) -> Tensor:
    """(count,) float64 of ±1."""
    return torch.randint(0, 2, (count,), generator=maker).double() * 2 - 1


def random_orthogonal(order: int, maker: torch.Generator) -> Tensor:
    """(n, n) float64 by the QR decomposition of Gaussian noise; with the signs of R's diagonal its distribution is that
    of Haar (Mezzadri 2007, arXiv math-ph/0609050, eq. 5.12)."""
    noise = torch.randn(order, order, generator=maker, dtype=torch.float64)
    basis, upper = torch.linalg.qr(noise)
    haar: Tensor = basis * torch.where(upper.diagonal() < 0, -1.0, 1.0).double()
    return haar


def power_of_two(order: int) -> int:
    """The largest power of two that divides a number."""
    return order & -order


def core_order(order: int) -> int | None:
    """The smallest order m that Paley's constructions give, or 1, with order / m a power of two; None without any."""
    odd = order // power_of_two(order)
    candidates = [odd << twos for twos in range(power_of_two(order).bit_length())]
    return next((m for m in candidates if m == 1 or _paley_prime(m)), None)


def _paley_prime(order: int) -> tuple[int, bool] | None:
    """(q, whether the matrix is skew) with order = q + 1 and q ≡ 3, or order = 2 (q + 1) and q ≡ 1 (mod 4), q prime."""
    if order % 4:
        return None
    if _is_prime(order - 1):
        return order - 1, True
    q = order // 2 - 1
    return (q, False) if q % 4 == 1 and _is_prime(q) else None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, int(number**0.5) + 1))


def paley(order: int) -> Tensor:
    """A Hadamard matrix (order, order) of ±1, float64, by Paley's constructions (1933, J. Math. Phys. 12, 311); order 1
    is [1]. Raises: ValueError for an order that they do not give."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    found = _paley_prime(order)
    if found is None:
        raise ValueError(f"no Hadamard matrix of order {order} by Paley's constructions")
    q, is_skew = found
    square = {value * value % q for value in range(1, q)}
    row = torch.tensor([0.0 if value == 0 else 1.0 if value in square else -1.0 for value in range(q)]).double()
    places = torch.arange(q)
    bordered = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    bordered[0, 1:] = 1
    bordered[1:, 0] = -1 if is_skew else 1
    bordered[1:, 1:] = row[(places[:, None] - places) % q]
    one = torch.eye(q + 1, dtype=torch.float64)
    if is_skew:
        return one + bordered
    plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double()
    return torch.kron(bordered, plus) + torch.kron(one, minus)
