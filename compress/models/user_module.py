"""Models of the user's own code, named as `file.py:callable`.

The callable takes nothing and returns the nn.Module with its weights. Beside it in the file are `sample_inputs(batch)`,
which returns what the module takes, and, if there are any, `MEAN` and `STD` of its inputs or a function `preprocess`.
The file is run because its user named it; an artifact that names it is opened only while the file is as it was.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import InputError, UsageError, nearest

_REFERENCE = re.compile(r"(?P<path>.+\.py):(?P<name>[A-Za-z_]\w*)")


@dataclass(frozen=True)
class Preprocess:
    """What turns stored pixels into the module's input; `text` says it in the report."""

    text: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    function: Callable[[Tensor], Any] | None = field(default=None, compare=False)

    def __call__(self, pixels: Tensor) -> Tensor:
        """(N, channels, h, w) uint8 → the same shape in float32. Raises: InputError for a function that fails."""
        if self.function is not None:
            return self._by_function(pixels)
        values = pixels.float() / 255
        if self.mean:
            mean, std = (torch.tensor(figures)[:, None, None] for figures in (self.mean, self.std))
            values = (values - mean) / std
        return values

    def _by_function(self, pixels: Tensor) -> Tensor:
        assert self.function is not None
        with _user_code("preprocess"):
            found = self.function(pixels)
        if not isinstance(found, Tensor) or found.shape != pixels.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"preprocess returned {shape} for images {tuple(pixels.shape)}; a tensor alike is wanted.")
        return found.detach().float().cpu()


@dataclass(frozen=True)
class Factory:
    """A callable in a file: absolute path, name, and sha256 of the file's bytes."""

    path: Path
    name: str
    sha256: str
    _module: ModuleType = field(compare=False, repr=False)

    @property
    def reference(self) -> str:
        """`/path/file.py:callable`."""
        return f"{self.path}:{self.name}"

    def build(self) -> nn.Module:
        """A new module from the callable, in evaluation mode on the CPU. Raises: InputError, UsageError."""
        with _user_code(self.reference), _beside(self.path):
            module = getattr(self._module, self.name)()
        if not isinstance(module, nn.Module):
            raise UsageError(f"{self.reference} returned a {type(module).__name__}, not a torch.nn.Module.")
        return module.cpu().eval().requires_grad_(False)

    def sample(self, batch: int = 2) -> Tensor:
        """What the module takes, from `sample_inputs`: one float tensor. Raises: UsageError, InputError."""
        function = getattr(self._module, "sample_inputs", None)
        if not callable(function):
            raise UsageError(
                f"{self.path} has no sample_inputs(batch), which tells what {self.name} takes. Add: "
                "def sample_inputs(batch=2): return (torch.randn(batch, 3, 224, 224),)"
            )
        with _user_code(f"{self.path}: sample_inputs"), _beside(self.path):
            found = function(batch)
        items = list(found) if isinstance(found, tuple | list) else [found]
        if len(items) != 1 or not isinstance(items[0], Tensor) or not items[0].is_floating_point():
            kinds = ", ".join(type(item).__name__ for item in items)
            raise UsageError(f"{self.path}: sample_inputs returned ({kinds}); one tensor of floats is supported.")
        return items[0].detach().float().cpu()

    def preprocess(self, channels: int) -> Preprocess:
        """How the file says that images become inputs: `preprocess`, or `MEAN` and `STD`, or x / 255.

        Raises: UsageError for figures that do not fit.
        """
        function = getattr(self._module, "preprocess", None)
        if callable(function):
            return Preprocess(f"{self.path.name}: preprocess", function=function)
        mean, std = (self._figures(name, channels) for name in ("MEAN", "STD"))
        if bool(mean) != bool(std):
            raise UsageError(f"{self.path}: MEAN and STD belong together, found only one of them.")
        if not mean:
            return Preprocess("x / 255")
        if min(std) <= 0:
            raise UsageError(f"{self.path}: STD={std}: each must be above 0.")
        return normalising(mean, std)

    def _figures(self, name: str, channels: int) -> tuple[float, ...]:
        found = getattr(self._module, name, None)
        if found is None:
            return ()
        try:
            figures = torch.as_tensor(found, dtype=torch.float64).flatten().tolist()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"{self.path}: {name}={found!r} is no number per channel.") from error
        figures = figures * channels if len(figures) == 1 else figures
        if len(figures) != channels:
            raise UsageError(f"{self.path}: {name} has {len(figures)} figures, but images have {channels} channels.")
        return tuple(figures)


def normalising(mean: tuple[float, ...], std: tuple[float, ...]) -> Preprocess:
    """Pixels from 0 to 1, less the mean, by the standard deviation, per channel."""
    return Preprocess(f"(x / 255 - {_listed(mean)}) / {_listed(std)}", mean, std)


def is_reference(source: str) -> bool:
    """Whether a source names a callable in a file."""
    return _REFERENCE.fullmatch(source) is not None


def open_factory(reference: str, sha256: str = "") -> Factory:
    """Run a file and find its callable.

    Args: sha256: what the file must be; it is not run otherwise.
    Raises: UsageError (no such file or callable), InputError (another file than that; the file fails).
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise UsageError(f"{reference} is not of the form file.py:callable.")
    path, name = Path(match["path"]).expanduser().resolve(), match["name"]
    if not path.is_file():
        raise UsageError(f"No such file: {path}. Give file.py:callable.")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 and found != sha256:
        raise InputError(f"{path} is not the file that it was (sha256 {found}, expected {sha256}), so it is not run.")
    module = _import(path, found)
    if not callable(getattr(module, name, None)):
        names = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise UsageError(f"{path} has no callable '{name}'.{nearest(name, names)}")
    return Factory(path, name, found, module)


def was_run(path: Path, sha256: str) -> bool:
    """Whether this process has run the file as it is, so that its user named it."""
    return _module_name(path, sha256) in sys.modules


def _module_name(path: Path, sha256: str) -> str:
    return f"compress_user_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}_{sha256[:16]}"


def _import(path: Path, sha256: str) -> ModuleType:
    name = _module_name(path, sha256)
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles of the file look themselves up here
    try:
        with _user_code(str(path)), _beside(path):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _beside(path: Path) -> Iterator[None]:
    """Meanwhile the file may import what lies beside it, as when it is run itself."""
    folder = str(path.parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


@contextmanager
def _user_code(where: str) -> Iterator[None]:
    """The user's own errors as ours. Raises: InputError naming what failed."""
    try:
        yield
    except (Exception, SystemExit) as error:
        text = next((line for line in str(error).splitlines() if line.strip()), "")
        raise InputError(f"{where} failed ({type(error).__name__}: {text}).") from error


def _listed(figures: tuple[float, ...]) -> str:
    return f"[{', '.join(f'{figure:g}' for figure in figures)}]"
