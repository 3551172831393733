"""Codebook products on a GPU: Triton's kernels in its interpreter, and torch in their place; on a GPU where one is.

No GPU runs these in the usual tests: that Triton makes machine code for several chips is checked beside the
interpreter, which takes some things that its compiler does not.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import extras
from compress.errors import UnsupportedError, UsageError
from compress.kernels import CodebookProduct, GpuProduct, codebook_product, gpu, library, missing_triton
from helpers import triton_cases
from helpers.triton_cases import BUILDS, CASES, MANY, TOKENS

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (extra triton)")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
# relative error of the dtype's rounding of the output (Triton's interpreter cuts bfloat16 off), and of many tokens'
# weights; float32 is that of its sums
ROUNDING = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1.6e-2}


def told(what: str, cache: Path, **environment: str) -> dict[str, dict[str, Any]]:
    """What a process of its own found."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    names = {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", **environment}
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", library.VARIABLE)
    }
    command = [sys.executable, "-m", "helpers.triton_cases", what]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**inherited, **names})
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return told("cpu", tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return told("cuda", tmp_path_factory.mktemp("triton"))


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where it is not installed."""
    monkeypatch.setitem(sys.modules, "triton", None)
    gpu._kernels.cache_clear()
    yield
    gpu._kernels.cache_clear()


def computes_its_weight(found: dict[str, Any], kernel: str) -> None:
    assert found["kernel"] == kernel
    assert found["decoded"] < 1e-6 and found["rows"] and found["not finite"] and found["as decoding"] < 1e-6
    for dtype, counts in TOKENS.items():
        for tokens in counts:
            assert found[f"{dtype}, {tokens}"] < ROUNDING[dtype], (dtype, tokens)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_compute_in_the_interpreter_what_the_format_decodes(
    interpreted: dict[str, dict[str, Any]], name: str
) -> None:
    computes_its_weight(interpreted[name], "codebook triton")


@needs_triton
@needs_gpu
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_compute_on_a_gpu_what_the_format_decodes(on_gpu: dict[str, dict[str, Any]], name: str) -> None:
    computes_its_weight(on_gpu[name], "codebook triton")


@pytest.mark.parametrize("name", CASES)
def test_torch_computes_the_same_where_there_is_no_triton(name: str) -> None:
    computes_its_weight(triton_cases.checked(name, "cpu", "torch"), "codebook torch")


@needs_gpu
def test_torch_computes_the_same_on_a_gpu() -> None:
    computes_its_weight(triton_cases.checked("groups", "cuda", "torch"), "codebook torch")


@needs_triton
def test_the_kernels_read_the_codes_as_the_format_packs_them(interpreted: dict[str, dict[str, Any]]) -> None:
    assert all(found["packed"] for found in interpreted.values())
    spent = interpreted["bytes"]
    assert spent["nbytes"] == spent["stored"] + 2 + 2 * 13  # the end of the last code, and a scale in float32


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_the_kernels_are_compiled_for_chips_that_need_not_be_here(tmp_path: Path) -> None:
    found = told("compile", tmp_path)
    assert set(found) == {f"{name}, {chip}" for name, chip, _ in BUILDS}
    assert all(min(sizes.values()) > 0 and len(sizes) == 2 for sizes in found.values())


def test_panels_of_rows_make_up_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("groups", "out"):
        product, weight = triton_cases.product(name, "cpu", "torch")
        x = torch.randn(MANY, weight.shape[1], generator=torch.Generator().manual_seed(0))
        monkeypatch.setattr(gpu, "PANEL", 1)  # a row of codes at a time
        torch.testing.assert_close(product(x), x @ weight.T, rtol=1e-5, atol=1e-5)


def test_codebooks_are_held_in_float16_where_that_changes_nothing() -> None:
    form, tensors, shape = triton_cases.stored("bytes")
    codes, book, scale = form.unpack(tensors, shape)
    half = GpuProduct(codes, book, scale, shape, device="cpu", path="torch")
    whole = GpuProduct(codes, book * 1.0001, scale, shape, device="cpu", path="torch")
    assert whole.nbytes - half.nbytes == book.numel() * 2
    torch.testing.assert_close(whole.dequantize(), half.dequantize() * 1.0001)


def test_leading_axes_no_tokens_and_float64_are_taken() -> None:
    product, weight = triton_cases.product("out", "cpu", "torch")
    x = torch.randn(2, 3, weight.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = product(x)
    assert y.shape == (2, 3, len(weight)) and y.dtype == torch.float64
    torch.testing.assert_close(y, x @ weight.T.double(), rtol=1e-4, atol=1e-4)
    assert product(x[:0]).shape == (0, 3, len(weight)) and product(x[0, 0]).shape == (len(weight),)
    for wrong in (x[..., 1:], x.long(), x.to("meta")):
        with pytest.raises(UsageError, match=r"floating inputs \(\.\.\., 140\)"):
            product(wrong)
    with pytest.raises(UsageError, match="no gradients"):
        product(x.requires_grad_())


def test_the_device_decides_which_product_is_made() -> None:
    form, tensors, shape = triton_cases.stored("bytes")
    parts = form.unpack(tensors, shape)
    assert isinstance(codebook_product(*parts, shape), CodebookProduct)
    with pytest.raises(UsageError, match="`codebook_product` makes the product for a GPU"):
        CodebookProduct(parts.codes, parts.codebook.to("meta"), parts.scale, shape)
    with pytest.raises(UsageError, match="do not make a weight"):
        codebook_product(*parts, (shape[0], shape[1] + 8), device="meta")


def test_a_path_that_the_device_lacks_is_refused_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cuda, other = torch.device("cuda:0"), torch.device("mps")
    with pytest.raises(UnsupportedError, match="'avx2' compute on the CPU; for cuda:0 there are triton and torch"):
        gpu.chosen_path(cuda, "avx2")
    with pytest.raises(UsageError, match="path='cuda' is no path of the kernels"):
        gpu.chosen_path(cuda, "cuda")
    with pytest.raises(UnsupportedError, match="'triton' compute on CUDA devices; for mps there is torch"):
        gpu.chosen_path(other, "triton")
    assert gpu.chosen_path(other) == "torch" and gpu.chosen_path(cuda, "torch") == "torch"
    monkeypatch.setenv(library.VARIABLE, "torch")
    assert gpu.chosen_path(cuda) == "torch"
    monkeypatch.setenv(library.VARIABLE, "triton")
    with pytest.raises(UnsupportedError, match=r"'triton': they compute on a GPU, not on the CPU\. This machine has"):
        library.chosen_path()


def test_a_device_that_is_named_without_its_number_takes_what_lies_on_it() -> None:
    form, tensors, shape = triton_cases.stored("bytes")
    product = GpuProduct(*form.unpack(tensors, shape), shape, device="cpu:0", path="torch")
    assert product(torch.ones(1, shape[1])).shape == (1, shape[0])


def test_without_triton_torch_computes_and_the_extra_is_named(no_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.VARIABLE, raising=False)
    assert gpu.gpu_paths() == ("torch",) and "pip install 'compress[triton]'" in missing_triton()
    assert gpu.chosen_path(torch.device("cuda")) == "torch"
    with pytest.raises(UnsupportedError, match=r"compress\[triton\]"):
        gpu.chosen_path(torch.device("cuda"), "triton")


def test_with_triton_its_kernels_are_chosen_on_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.VARIABLE, raising=False)
    monkeypatch.setattr(gpu, "_kernels", lambda: extras)
    assert gpu.gpu_paths() == ("triton", "torch") and missing_triton() == ""
    assert gpu.chosen_path(torch.device("cuda")) == "triton"


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would time this GPU")
def test_the_benchmark_times_nothing_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "codebook_gpu.py"
    if not path.is_file():
        pytest.skip("the benchmarks are not here")
    monkeypatch.syspath_prepend(path.parent)  # as when it is run
    with pytest.raises(SystemExit, match="There is no CUDA device here: nothing was timed"):
        runpy.run_path(str(path))["main"]([])
