"""Fast products: as exact as torch's own, and only meanwhile."""

import pytest
import torch

from compress.maths import products


def test_fast_products_are_float32_products() -> None:
    maker = torch.Generator().manual_seed(1)
    first, second = torch.randn(300, 400, generator=maker), torch.randn(500, 400, generator=maker)
    exact = first.double() @ second.double().T
    with products.fast():
        found = torch.nn.functional.linear(first, second)
    assert float((found - exact).abs().max() / exact.abs().max()) < products.AS_GOOD_AS_FLOAT32


@pytest.mark.parametrize("stays", [True, False])
def test_the_precision_is_as_it_was_afterwards(stays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    monkeypatch.setattr(products, "_stays_float32", lambda: stays)
    with pytest.raises(ZeroDivisionError), products.fast():
        assert (matmul.fp32_precision == "bf16") is (stays or before == "bf16")
        raise ZeroDivisionError
    assert matmul.fp32_precision == before


def test_a_machine_that_would_round_to_bfloat16_keeps_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    products._stays_float32.cache_clear()
    monkeypatch.setattr(products, "_error", lambda _rows: 4e-3)
    try:
        assert not products._stays_float32()
    finally:
        products._stays_float32.cache_clear()
