"""Products from codes: every path that this machine has against the slow, obvious twin, and what is refused."""

from __future__ import annotations

import itertools
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from torch import Tensor

from compress.errors import UnsupportedError, UsageError
from compress.kernels import FEW_TOKENS, CodebookProduct, as_decoding, kernel_paths, library

PATHS = (*library.PATHS, library.TORCH)
# relative error of one token by look-up, on normal weights and inputs; all else is float32
ROUNDING = {"avx512-vbmi": 1.5e-3, "avx2": 6e-3}
FLOAT32 = 2e-6

# axis, out, in, vector, stages, entries, groups: rows that fill no tile, runs of tables that are not full, odd units
SHAPES = [
    ("in", 1, 8, 8, 1, 2, 1),
    ("in", 100, 72, 8, 1, 256, 1),
    ("in", 321, 136, 8, 2, 256, 1),
    ("in", 256, 24, 4, 3, 16, 2),
    ("in", 65, 90, 6, 4, 200, 3),
    ("in", 70, 64, 8, 1, 1024, 2),
    ("in", 9, 48, 24, 2, 300, 1),
    ("out", 37, 50, 8, 2, 256, 1),
    ("out", 100, 64, 6, 1, 4096, 2),
    ("out", 30, 9, 4, 3, 16, 3),
    ("out", 50, 10, 24, 1, 65536, 1),
    ("in", 321, 146, 2, 1, 16, 1),
]
KINDS = [SHAPES[2], SHAPES[-1], SHAPES[5], SHAPES[7]]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    if request.param not in kernel_paths():
        pytest.skip(f"not on this machine: {library.missing() or 'the processor lacks it'}")
    return str(request.param)


def parts(shape: tuple[str, int, int, int, int, int, int], scale: str = "row") -> tuple[Tensor, Tensor, Tensor]:
    """Codes, codebook and scale of a random layer."""
    axis, out, columns, vector, stages, entries, groups = shape
    made = torch.Generator().manual_seed(out * columns)
    rows, units = (out, columns // vector) if axis == "in" else (-(-out // vector), columns)
    codes = torch.randint(0, entries, (rows, units, stages), generator=made, dtype=torch.int32)
    codes[0, 0, 0] = entries - 1
    size = {"row": (out, 1), "column": (1, columns), "none": (1, 1)}[scale]
    return (
        codes,
        torch.randn(groups, stages, entries, vector, generator=made),
        torch.rand(size, generator=made) + 0.5,
    )


@cache
def dense(shape: tuple[str, int, int, int, int, int, int], scale: str) -> Tensor:
    """The twin's weight of a layer."""
    return twin(*parts(shape, scale), (shape[1], shape[2]), shape[0])


def twin(codes: Tensor, codebook: Tensor, scale: Tensor, shape: tuple[int, int], axis: str) -> Tensor:
    """The dense weight, one vector at a time."""
    rows, units, stages = codes.shape
    groups, _, _, v = codebook.shape
    weight = torch.zeros(-(-shape[0] // v) * v if axis == "out" else shape[0], shape[1])
    for row, unit in itertools.product(range(rows), range(units)):
        book = codebook[unit // (units // groups)]
        vector = sum((book[s, int(codes[row, unit, s])] for s in range(stages)), torch.zeros(v))
        if axis == "in":
            weight[row, unit * v : unit * v + v] = vector
        else:
            weight[row * v : row * v + v, unit] = vector
    return weight[: shape[0]] * scale


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def bound(product: CodebookProduct, tokens: int) -> float:
    looks_up = product.kernel == f"codebook {product.path}" and tokens <= FEW_TOKENS
    rounding = ROUNDING["avx512-vbmi"] if product._by_nibbles else ROUNDING.get(product.path, FLOAT32)
    return rounding if looks_up else FLOAT32


@pytest.mark.parametrize("scale", ["row", "column", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_a_product_equals_that_of_the_dense_weight_within_its_stated_rounding(
    path: str, shape: tuple[str, int, int, int, int, int, int], scale: str
) -> None:
    axis, out, columns = shape[:3]
    given = parts(shape, scale)
    product, weight = CodebookProduct(*given, (out, columns), axis, path=path), dense(shape, scale)
    torch.testing.assert_close(product.dequantize(), weight)
    made = torch.Generator().manual_seed(1)
    for tokens in (1, FEW_TOKENS, FEW_TOKENS + 5):
        x = torch.randn(tokens, columns, generator=made)
        # a single row has nothing to average its rounding over
        allowed = bound(product, tokens) * (4 if out == 1 else 1)
        assert error(product(x), x.double() @ weight.double().T) < allowed


def test_the_torch_path_equals_the_compiled_ones_to_the_last_bits_of_float32() -> None:
    given = parts(SHAPES[2])
    x = torch.randn(2, 136, generator=torch.Generator().manual_seed(0))
    torch_only = CodebookProduct(*given, (321, 136), path="torch")
    assert torch_only.kernel == "codebook torch"
    if "portable" not in kernel_paths():
        pytest.skip(library.missing())
    compiled = CodebookProduct(*given, (321, 136), path="portable")
    torch.testing.assert_close(torch_only(x), compiled(x), rtol=1e-5, atol=1e-5)


def test_some_rows_can_be_dequantized_alone(path: str) -> None:
    for shape in (SHAPES[2], SHAPES[8], SHAPES[-1]):
        axis, out, columns = shape[:3]
        product = CodebookProduct(*parts(shape), (out, columns), axis, path=path)
        assert torch.equal(product.dequantize(67, 95), product.dequantize()[67:95])
        assert product.dequantize(5, 5).shape == (0, columns)
        with pytest.raises(UsageError, match=f"{out + 1} of a weight of {out} rows"):
            product.dequantize(0, out + 1)


@pytest.mark.parametrize("shape", KINDS, ids=["tables", "nibbles", "decoded", "out"])
def test_inputs_of_zero_give_zero_and_the_smallest_ones_no_garbage(path: str, shape: tuple[str, int, int]) -> None:
    axis, out, columns = shape[:3]
    product = CodebookProduct(*parts(shape), (out, columns), axis, path=path)  # type: ignore[arg-type]
    assert torch.equal(product(torch.zeros(columns)), torch.zeros(out))
    assert product(torch.full((columns,), 1e-36)).abs().max() < 1e-30


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", KINDS, ids=["tables", "nibbles", "decoded", "out"])
def test_inputs_that_are_not_finite_give_outputs_that_are_not(
    path: str, shape: tuple[str, int, int], bad: float
) -> None:
    axis, out, columns = shape[:3]
    product = CodebookProduct(*parts(shape), (out, columns), axis, path=path)  # type: ignore[arg-type]
    x = torch.ones(2, columns)
    x[0, columns // 2] = bad
    y = product(x)
    assert not y[0].isfinite().any()
    assert torch.equal(y[1], product(x[1]))


def test_one_large_input_does_not_drown_the_others(path: str) -> None:
    """The scale of rounded tables is shared by few units only, and bits are left for the small ones beside it."""
    given = parts(("in", 512, 1024, 8, 2, 256, 1))
    product = CodebookProduct(*given, (512, 1024), path=path)
    x = torch.randn(1, 1024, generator=torch.Generator().manual_seed(3))
    x[0, 100] = 100.0
    exact = x.double() @ product.dequantize().double().T
    assert error(product(x), exact) < 4 * ROUNDING.get(path, FLOAT32)


@pytest.mark.parametrize(
    "shape", [("in", 1100, 1024, 8, 2, 256, 1), ("in", 1100, 1024, 2, 1, 16, 1), ("out", 1100, 512, 8, 2, 4096, 1)]
)
def test_the_number_of_threads_changes_no_byte(path: str, shape: tuple[str, int, int, int, int, int, int]) -> None:
    axis, out, columns = shape[:3]
    product = CodebookProduct(*parts(shape), (out, columns), axis, path=path)
    x = torch.randn(columns, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((product(x), product.dequantize()))
    finally:
        torch.set_num_threads(before)
    for y, weight in found[1:]:
        assert torch.equal(y, found[0][0]) and torch.equal(weight, found[0][1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_and_several_callers_at_a_time_get_the_same_bytes(path: str) -> None:
    if path == "torch":
        pytest.skip("torch's own threads do not outlive a fork")
    product = CodebookProduct(*parts(("in", 1100, 1024, 8, 2, 256, 1)), (1100, 1024), path=path)
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    before, expected = torch.get_num_threads(), product(x)
    try:
        torch.set_num_threads(2)
        with ThreadPoolExecutor(3) as callers:
            assert all(torch.equal(y, expected) for y in callers.map(product, [x] * 30))
        child = os.fork()
        if not child:
            code = 1
            try:  # nothing of this child may get out of here: it would go on as a second runner of all tests
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(60)  # rather than wait for ever
                code = 0 if torch.equal(product(x), expected) else 1
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(product(x), expected)
    finally:
        torch.set_num_threads(before)


def test_leading_axes_and_the_dtype_of_the_inputs_are_kept(path: str) -> None:
    product = CodebookProduct(*parts(SHAPES[1]), (100, 72), path=path)
    x = torch.randn(2, 3, 72, generator=torch.Generator().manual_seed(0))
    assert product(x).shape == (2, 3, 100) and product(x[:0]).shape == (0, 3, 100) and product(x[0, 0]).shape == (100,)
    half = product(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), product(x), rtol=0.05, atol=0.5)
    strided = torch.randn(72, 5, generator=torch.Generator().manual_seed(0)).T
    assert torch.equal(product(strided), product(strided.contiguous()))


def test_the_bytes_held_are_those_of_the_codes_and_little_more(path: str) -> None:
    codes, codebook, scale = parts(("in", 1024, 1024, 8, 2, 256, 1))
    product = CodebookProduct(codes, codebook, scale, (1024, 1024), path=path)
    assert codes.numel() <= product.nbytes <= codes.numel() + 2 * codebook.nbytes + scale.nbytes
    codes, codebook, scale = parts(("in", 1024, 1024, 2, 1, 16, 1))
    product = CodebookProduct(codes, codebook, scale, (1024, 1024), path=path)
    halves = 2 if path in ("avx2", "avx512-vbmi") else 1
    assert product.nbytes <= codes.numel() // halves + 32 * codebook.nbytes + scale.nbytes
    codes, codebook, scale = parts(("out", 1024, 256, 8, 1, 4096, 1))
    product = CodebookProduct(codes, codebook, scale, (1024, 256), "out", path=path)
    assert product.nbytes == 2 * codes.numel() + codebook.nbytes + scale.nbytes


def test_what_does_not_fit_is_refused_with_what_was_found() -> None:
    codes, codebook, scale = parts(SHAPES[1])
    for wrong, said in (
        ((codes, codebook, scale, (100, 80)), "do not make a weight"),
        ((codes, codebook, scale, (100, 72), "up"), "Allowed: in, out"),
        ((codes[..., 0], codebook, scale, (100, 72)), "rows, units, stages"),
        ((codes, codebook[:, :, :100], scale, (100, 72)), "of a codebook of 100 entries"),
        ((codes - 1, codebook, scale, (100, 72)), "Codes from -1"),
        ((codes, codebook, scale[:50], (100, 72)), "A scale is"),
        ((codes.repeat(1, 1, 5), codebook.repeat(1, 5, 1, 1), scale, (100, 72)), "5 stages"),
        ((codes, codebook.repeat(2, 1, 1, 1), scale, (100, 72)), "do not make a weight"),
    ):
        with pytest.raises(UsageError, match=said):
            CodebookProduct(*wrong)
    product = CodebookProduct(codes, codebook, scale, (100, 72))
    for x in (torch.ones(2, 71), torch.ones(2, 72, dtype=torch.int64), torch.ones(2, 72, device="meta")):
        with pytest.raises(UsageError, match=r"floating inputs \(\.\.\., 72\)"):
            product(x)
    with pytest.raises(UsageError, match="no gradients"):
        product(torch.ones(2, 72, requires_grad=True))


def test_a_path_that_the_machine_lacks_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    given = parts(SHAPES[1])
    with pytest.raises(
        UsageError, match=r"'avx9' is no path of the kernels.*Allowed: avx2, avx512-vbmi, portable, torch"
    ):
        CodebookProduct(*given, (100, 72), path="avx9")
    monkeypatch.setenv(library.VARIABLE, "fast")
    with pytest.raises(UsageError, match="COMPRESS_KERNELS='fast'"):
        CodebookProduct(*given, (100, 72))
    monkeypatch.setenv(library.VARIABLE, "avx512-vbmi")
    monkeypatch.setattr(library, "kernel_paths", lambda: ("portable", "torch"))
    with pytest.raises(UnsupportedError, match=r"'avx512-vbmi': .*This machine has: portable, torch"):
        CodebookProduct(*given, (100, 72))


def test_the_variable_names_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.VARIABLE, "torch")
    assert CodebookProduct(*parts(SHAPES[1]), (100, 72)).kernel == "codebook torch"
    monkeypatch.delenv(library.VARIABLE)
    assert CodebookProduct(*parts(SHAPES[1]), (100, 72)).path == kernel_paths()[0]


def test_many_tokens_are_computed_as_single_ones_where_that_is_asked() -> None:
    """So that quality, measured on whole windows, has the rounding that decoding has."""
    maker = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (64, 8, 2), generator=maker)
    book = torch.randn(1, 2, 16, 8, generator=maker)
    product = CodebookProduct(codes, book, torch.ones(1, 1), (64, 64))
    x = torch.randn(9, 64, generator=maker)
    single = torch.cat([product(row[None]) for row in x])
    with as_decoding():
        assert torch.equal(product(x), single)
    assert torch.allclose(product(x), x @ product.dequantize().T, atol=1e-4)
