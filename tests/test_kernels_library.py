"""The compiled library: found or told why not, built on demand, never by itself."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compress.errors import ResourceError, UnsupportedError
from compress.kernels import CodebookProduct, library

needs_compiler = pytest.mark.skipif(
    not (shutil.which("cc") or shutil.which("clang")) or sys.platform == "win32", reason="no C compiler here"
)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the sources and no library, which the module takes for its own."""
    for name in (*library.SOURCES, "kernels.h", "tables.h"):
        shutil.copy(library.HERE / name, tmp_path)
    monkeypatch.setattr(library, "HERE", tmp_path)
    library._opened.cache_clear()
    yield tmp_path
    library._opened.cache_clear()


def product() -> CodebookProduct:
    made = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (64, 4, 2), generator=made)
    return CodebookProduct(codes, torch.randn(1, 2, 256, 8, generator=made), torch.ones(1, 1), (64, 32))


def test_without_the_library_torch_computes_and_the_reason_is_told(elsewhere: Path) -> None:
    assert product().kernel == "codebook torch" and library.kernel_paths() == ("torch",)
    assert "`python -m compress.kernels build`" in library.missing()
    with pytest.raises(UnsupportedError, match="'avx2': the compiled kernels were not built"):
        library.chosen_path("avx2")
    with pytest.raises(UnsupportedError, match="No compiled kernels"):
        library.library()
    product()(torch.ones(32))
    assert not list(elsewhere.glob("*.so*")), "nothing is compiled when a program runs"


@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_a_damaged_library_is_left_aside_with_the_reason(elsewhere: Path, content: bytes) -> None:
    (elsewhere / "_codebook.abi3.so").write_bytes(content)
    assert library.missing().startswith("_codebook.abi3.so cannot be used")
    assert library.kernel_paths() == ("torch",)


@needs_compiler
def test_the_library_is_built_on_demand(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLAGS", "-O0")  # quick to compile
    built = library.build()
    assert library.missing() == "" and "portable" in library.kernel_paths()
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(product()(x), x @ product().dequantize().T, rtol=0.02, atol=0.2)
    assert sorted(elsewhere.glob("*codebook*")) == [built], "no rest of a build is left"


def test_a_compiler_that_fails_is_quoted(elsewhere: Path) -> None:
    with pytest.raises(UnsupportedError, match="could not compile the kernels"):
        library.build(f"{sys.executable} -c raise")


def test_a_machine_without_a_compiler_is_told_what_to_install(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(elsewhere))
    with pytest.raises(UnsupportedError, match="Install GCC or Clang"):
        library.build()


def test_a_folder_that_cannot_be_written_is_named(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ResourceError, match="cannot be written"):
        library.build("cc")


def test_the_command_tells_what_there_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for words, code in (([], 0), (["compile"], 2)):
        monkeypatch.setattr(sys, "argv", ["compress.kernels", *words])
        with pytest.raises(SystemExit) as left:
            runpy.run_module("compress.kernels", run_name="__main__")
        assert left.value.code == code
    told = capsys.readouterr()
    assert "fastest first: " in told.out and "torch." in told.out and "Usage" in told.err
