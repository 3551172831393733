"""Loading a written folder with transformers, as anyone would, and running it in torch on the CPU.

Packed weights are decoded to float32 before the first call, by the reader's own code: what runs is what was written,
at the speed of a float model. Where the reader of a layout is not installed, `readback` decodes instead, and the
session says that it only checked the files.
"""

from __future__ import annotations

import contextlib
import io
import logging
import time
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from compress.errors import InputError, unread
from compress.export.checkpoint import codebook_readers, kv_scheme, readback, readers, transform_config
from compress.files import read_json
from compress.models.folder import refuse_code
from compress.runtime import probing
from compress.runtime.torch_session import Ids, Plain, TorchSession

Level = Literal["ran", "built", "checked"]


class Session(TorchSession):
    """A checkpoint folder in torch.

    Args: threads for torch while a call runs; exact: inputs are rounded by our own grids instead of the reader's, and
    weights decoded in float32 where the reader takes less.
    Raises: InputError where transformers does not load the folder, or would fill a part of it with random numbers.
    """

    def __init__(self, folder: Path, threads: int, *, exact: bool = False) -> None:
        raw = _read_config(folder)
        config = raw.get("quantization_config") or {}
        started = time.perf_counter()
        obstacle = _obstacle(folder, config)
        beforehand = obstacle or (exact and readers.needs_float32(config))
        model = _load(folder, raw, _decoded(folder, config, obstacle) if beforehand else None)
        if not beforehand and config.get("quant_method") == "aqlm":
            codebook_readers.decode_aqlm(model)
        if not beforehand and config.get("quant_method") == "compressed-tensors":
            readers.decode(model, exact)
            if exact:
                readers.our_rounding(model)
        passed_over = _attach(model, folder, config)
        super().__init__(model, threads)
        self.load_s = time.perf_counter() - started
        self._rounding = kv_scheme.attached(model)
        told = kv_scheme.NOTE if self._rounding else ""
        self.level: Level = "checked" if obstacle or passed_over else "ran"
        self.notes = tuple(filter(None, (obstacle, passed_over, told)))
        if exact:
            kv_scheme.switch(self._rounding, False)
        self.name = _name(config.get("quant_method"), obstacle)

    @property
    def plain(self) -> Self | Plain:
        """See TorchSession: here, keys and values as they were computed."""
        return Plain(self.name, self._in_float, self.level, self.notes) if self._rounding else self

    def _in_float(self, ids: Ids) -> NDArray[np.float32]:
        with kv_scheme.in_float(self._rounding):
            return self.logits(ids)


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json of a written folder. Raises: InputError for what `write` does not make, or asks for code."""
    path = folder / "config.json"
    try:
        raw = read_json(path)
        is_ours = isinstance(raw["architectures"][0], str) and isinstance(
            raw.get("quantization_config", {}), dict | None
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{path} is not what the exporter wrote ({unread(error)}). Export the artifact again."
        ) from error
    if not is_ours:
        raise InputError(f"{path} is not what the exporter wrote. Export the artifact again.")
    refuse_code(path, raw)
    return dict(raw)


def _load(folder: Path, raw: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> Any:
    """The model in float32. tensors: decoded ones by file name, instead of the folder's."""
    import transformers

    found = getattr(transformers, raw["architectures"][0], None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise InputError(f"{folder}: transformers has no model {raw['architectures'][0]!r}. Export the artifact again.")
    maker: Any = found
    settings: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True, "local_files_only": True}
    settings["use_safetensors"] = True  # never a pickle
    source: Path | None = folder
    if tensors is not None:
        plain = {key: value for key, value in raw.items() if key != "quantization_config"}
        config = transformers.AutoConfig.for_model(**plain)
        source, settings = None, settings | {"config": config, "state_dict": tensors}
    try:
        with quiet():
            model, info = maker.from_pretrained(source, **settings)
    except Exception as error:  # transformers and its readers raise errors of many kinds
        raise InputError(f"transformers {transformers.__version__} cannot load {folder} ({error}).") from error
    # an encoder's base may have a pooler that the source's own architecture has not; hidden states come before it
    lost = [name for name in sorted(info["missing_keys"]) if "pooler." not in name] + sorted(info["mismatched_keys"])
    if lost:
        raise InputError(
            f"transformers {transformers.__version__} loads {folder}, but finds no {lost[0]} in it and would leave it "
            "random. Please report this."
        )
    model.eval()
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and reports of other libraries on stderr; what matters of them becomes an error or a note."""
    from transformers.utils import logging as reports

    shown, verbosity = reports.is_progress_bar_enabled(), reports.get_verbosity()
    reports.disable_progress_bar()
    reports.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells each call that inputs are rounded
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        reports.set_verbosity(verbosity)
        if shown:
            reports.enable_progress_bar()


def _attach(model: Any, folder: Path, config: dict[str, Any]) -> str:
    """Have declared transforms of inputs applied where the reader has not, and say so."""
    declared = config.get("transform_config") or {}
    endings = transform_config.suffixes(declared)
    if not endings or transform_config.is_attached(model):
        return ""
    transform_config.attach(model, declared, readback.stored(folder, endings))
    return transform_config.PASSED_OVER


def _obstacle(folder: Path, config: dict[str, Any]) -> str:
    """Why transformers cannot load such a folder here; empty where it can."""
    method = config.get("quant_method")
    if method in ("gptq", "awq") and readers.has_packed_experts(readback.names(folder)):
        return readers.PACKED_EXPERTS
    absent = [name for name in readers.PACKAGES.get(method, ()) if util.find_spec(name) is None]
    if absent:
        return (
            f"{' and '.join(absent)} not installed, so this package's own reader, written from the format's "
            f"description, decoded the {method} weights: the folder has not run in another tool"
        )
    by_layers = {"vptq": readers.VPTQ_BY_LAYERS, "exl3": readers.EXL3_BY_LAYERS}
    if method in by_layers:
        return by_layers[method]
    return readers.PACKED_ZERO if method == "compressed-tensors" and readers.has_packed_zero(config) else ""


def _decoded(folder: Path, config: dict[str, Any], obstacle: str) -> dict[str, torch.Tensor]:
    if config["quant_method"] == "compressed-tensors":
        return readers.decompress_files(readback.stored(folder), config)
    if obstacle == readers.VPTQ_BY_LAYERS:
        return codebook_readers.decode_vptq(readback.stored(folder), config)
    if obstacle == readers.EXL3_BY_LAYERS:
        return codebook_readers.decode_exl3(readback.stored(folder), config)
    return readback.read(folder)


def _name(method: str | None, obstacle: str) -> str:
    loader = f"transformers {metadata.version('transformers')}"
    if method is None:
        return f"{loader} CPU"
    package = readers.PACKAGES[method][0]
    if obstacle in (readers.VPTQ_BY_LAYERS, readers.EXL3_BY_LAYERS):
        return f"{loader} CPU on weights decoded by {package} {metadata.version(package)}"
    if not obstacle:
        return f"{loader} CPU with {package.replace('_', '-')} {metadata.version(package)}"
    return f"{loader} CPU on {method} weights decoded beforehand"


if __name__ == "__main__":
    probing.main(Session)
