"""VPTQ's own program (branch `algorithm`), from a checkout named by VPTQ_SOURCE: its layer_quantizer, block by block.

Replaced, since it needs a GPU: cuML's KMeans by scikit-learn's with the same arguments (random start, one run, as many
iterations, seed 0; the residual stage hands it weights of one column too many, all alike, of which the first is read);
cupy's device and torch.cuda's synchronize do nothing. Its release takes a file with the factor of the inverse Hessian
that it does not write: made here by the lines that its solver has for that (1 % damping, columns by falling diagonal).
"""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from client import BLOCKS, Job, Meter, finish, read_job
from sklearn.cluster import KMeans
from torch import Tensor, nn
from vq_client import commit_of, float_model, given_layer, input_moments, source_of, stand_in

DAMPING = 0.01
FILES = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "gate": "up", "up": "up", "down": "down"}
WORD = 32
"""Its packed indices fill whole words of so many bits in each row of vectors."""


class HostKMeans(KMeans):
    """scikit-learn's, called as cuML's is."""

    def fit(self, data: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """See KMeans.fit."""
        weights = None if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
        if weights is not None and weights.ndim == 2:
            weights = weights[:, 0]
        super().fit(data, y, sample_weight=weights)
        self.labels_ = self.labels_.astype(np.int64)
        return self


def import_reference(source: Path) -> tuple[Any, Any]:
    """Its layer_quantizer and load_hessian, without the package's own imports of everything."""
    cluster = stand_in("cuml.cluster", KMeans=HostKMeans)
    stand_in("cuml", cluster=cluster)
    device = Namespace(Device=lambda *_: contextlib.nullcontext())
    stand_in("cupy", cuda=device)
    torch.cuda.synchronize = lambda *_: None
    stand_in("vptq", __path__=[str(source / "vptq")])
    stand_in("vptq.layers", __path__=[str(source / "vptq" / "layers")])
    from vptq.layer_quantizer import layer_quantizer
    from vptq.utils.hessian import load_hessian

    return layer_quantizer, load_hessian


def write_moments(folder: Path, name: str, second: Tensor, first: Tensor, load: Any) -> None:
    """The two files it reads for a layer: centred covariance and mean; factor of the inverse, order, dead columns."""
    count = len(first)
    rows, columns = torch.tril_indices(count, count)
    covariance = (second - torch.outer(first, first)).float()
    torch.save({"flatH": covariance[rows, columns], "mu": first.float(), "n": count}, folder / f"{name}.pt")
    hessian, _ = load(folder / f"{name}.pt", logging.getLogger())
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    order = hessian.diagonal().argsort(descending=True)
    hessian = hessian[order][:, order]
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(count)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    torch.save({"invH": factor, "perm": order, "zero_idx": dead}, folder / "inverse" / f"{name}.pt")


def settings_of(given: dict[str, Any]) -> Namespace:
    """Its arguments, as its tutorial's command has them where the job names no others."""
    return Namespace(
        vector_lens=[-1, given["vector"]],
        num_centroids=[-1, given["entries"]],
        num_res_centroids=[-1, given.get("residual", -1)],
        npercent=0,
        group_num=given.get("groups", 1),
        group_size=-1,
        kiter=100,
        ktol=1e-5,
        enable_norm=given.get("norm", True),
        norm_dim=0,
        enable_perm=True,
    )


def decoded(layer: Any) -> tuple[Tensor, float]:
    """(out, in) as stored in float16, and the bits of its packed indices, centroids, norm and permutation."""
    bits = 0.0
    for name in ("centroids", "res_centroids"):
        if (table := getattr(layer, name, None)) is not None:
            table.weight.data = table.weight.data.half().float()
            bits += 16 * table.weight.numel()
    for name in ("weight_scale", "weight_bias", "perm"):
        if (vector := getattr(layer, name, None)) is not None:
            vector.data = vector.data.half().float() if vector.is_floating_point() else vector.data
            bits += 16 * vector.numel()
    width = math.log2(layer.num_centroids) + (math.log2(layer.num_res_centroids) if layer.enable_residual else 0)
    rows = layer.num_codebooks * layer.num_indices
    bits += rows * WORD * math.ceil(layer.group_size * width / WORD)
    with torch.no_grad():
        return layer.dequant(), bits


def one_layer(layer: dict[str, Tensor], folder: Path, load: Any) -> tuple[list[Any], dict[str, str]]:
    """A block of one layer, and its file's name, with the file written."""
    block = nn.Module()
    block.proj = nn.Linear(*reversed(layer["weight"].shape), bias=False)
    block.proj.weight.data = layer["weight"].clone()
    write_moments(folder, "0_one", layer["hessian"], torch.zeros(len(layer["hessian"])), load)
    return [block], {"proj": "one"}


def whole_model(job: Job, folder: Path, load: Any) -> tuple[list[Any], dict[str, str]]:
    """The blocks, and layers' names in them → the name of their inputs' file, with all files written."""
    model = float_model(job)
    names: dict[str, str] = {}
    for key, (second, first) in input_moments(model, job.ids).items():
        place, _, inner = key.removeprefix(BLOCKS).partition(".")
        names[inner] = FILES[inner.rpartition(".")[2].removesuffix("_proj")]
        if not (folder / f"{place}_{names[inner]}.pt").is_file():
            write_moments(folder, f"{place}_{names[inner]}", second, first, load)
    return list(model.model.layers), names


def main() -> None:
    meter, job = Meter(), read_job()
    source = source_of("VPTQ_SOURCE")
    quantize, load = import_reference(source)
    logger = logging.getLogger()
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
    single, settings = given_layer(job), settings_of(job.settings)
    weights, bits = {}, 0.0
    with tempfile.TemporaryDirectory() as name, meter.timed():
        folder = Path(name)
        (folder / "inverse").mkdir()
        args = Namespace(hessian_path=str(folder), inv_hessian_path=str(folder / "inverse"))
        blocks, names = whole_model(job, folder, load) if single is None else one_layer(single, folder, load)
        for place, block in enumerate(blocks):
            quantize(args, settings, block, place, logger, "cpu", torch.float32, names)
            for inner in names:
                key = f"{BLOCKS}{place}.{inner}.weight" if single is None else "layer_proj.weight"
                weights[key], own = decoded(block.get_submodule(inner))
                bits += own
    finish(job, "vptq", weights, bits, {**meter.figures(), "version": f"algorithm {commit_of(source)}"})


if __name__ == "__main__":
    main()
