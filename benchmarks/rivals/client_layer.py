"""Our side of `vq_layer.py`: `vptq` on one layer with a given Hessian, in a process of its own."""

from __future__ import annotations

from client import Meter, finish, read_job
from vq_client import given_layer

from compress.engine.blockpass import Block
from compress.engine.layer_stats import LayerStats
from compress.layer import Layer, LayerKind
from compress.passes.vptq import Vptq
from compress.pipeline import Pipeline


def main() -> None:
    job = read_job()
    (item,) = Pipeline.parse(job.settings["ours"]).passes
    assert isinstance(item, Vptq)
    meter, given = Meter(), given_layer(job)
    assert given is not None
    with meter.timed():
        layer = Layer("one", LayerKind.LINEAR, given["weight"], users=("one",))
        stats = LayerStats(hessian=given["hessian"], tokens=len(given["hessian"]))
        chosen = {"one": item.model_copy(update={"mismatch": 0.0})}
        made = item.block(Block("", {"one": layer}, {"one": layer}, chosen, {}, {"one": stats})).layers["one"]
    figures, weight = meter.figures(), made.float_weight()
    finish(job, "compress", {"layer_proj.weight": weight}, made.bits_per_weight * weight.numel(), figures)


if __name__ == "__main__":
    main()
