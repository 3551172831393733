"""Passes: one file per method. Adding one: its file, its test, one line in `PASSES`.

Other distributions add passes through the entry point group `compress.passes`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, NamedTuple

if __name__ != "compress.passes":
    raise ImportError("Import this package as compress.passes: a second copy would be a second registry.")

from compress.errors import UsageError, nearest

if TYPE_CHECKING:
    from compress.engine.layerpass import Pass


class Entry(NamedTuple):
    """Where a pass is, and what it does in one line."""

    path: str
    summary: str


PASSES: dict[str, Entry] = {
    "rtn": Entry("compress.passes.rtn:Rtn", "round each weight to the nearest point of its grid; needs no data"),
    "gptq": Entry("compress.passes.gptq:Gptq", "round column by column, later columns absorbing the error; needs data"),
    "trellis": Entry("compress.passes.trellis:Trellis", "tiles of weights as paths through a trellis; needs data"),
    "vptq": Entry("compress.passes.vptq:Vptq", "vectors of weights as codes of learned codebooks; needs data"),
    "aqlm": Entry("compress.passes.aqlm:Aqlm", "sums of codebook entries, improved until they settle; needs data"),
    "awq": Entry("compress.passes.awq:Awq", "scale salient channels up, then round to nearest; needs data"),
    "hqq": Entry("compress.passes.hqq:Hqq", "move each group's zero point until errors are sparse; needs no data"),
    "bnb4": Entry("compress.passes.bnb4:Bnb4", "4-bit weights as bitsandbytes makes them; needs no data"),
    "llm_int8": Entry("compress.passes.llm_int8:LlmInt8", "8-bit weights and inputs but for outliers; needs no data"),
    "drop_blocks": Entry(
        "compress.passes.drop_blocks:DropBlocks", "take out the blocks that are missed least; needs data"
    ),
    "magnitude": Entry("compress.passes.magnitude:Magnitude", "set the smallest weights to zero; needs no data"),
    "wanda": Entry("compress.passes.wanda:Wanda", "set weights to zero by magnitude and input; needs data"),
    "ria": Entry("compress.passes.ria:Ria", "set weights to zero by relative importance and input; needs data"),
    "sparsegpt": Entry("compress.passes.sparsegpt:SparseGpt", "prune, what is left absorbing the error; needs data"),
    "pack_sparse": Entry("compress.passes.pack_sparse:PackSparse", "store pruned weights without their zeros; no data"),
    "gradual_magnitude": Entry(
        "compress.passes.gradual_magnitude:GradualMagnitude", "prune little by little in training; needs data"
    ),
    "heal": Entry("compress.passes.heal:Heal", "train a pruned model to put out what the original does; needs data"),
    "prune_width": Entry("compress.passes.prune_width:PruneWidth", "fewer channels, heads, hidden states; needs data"),
    "prune_experts": Entry("compress.passes.prune_experts:PruneExperts", "fewer experts in each mixture; needs data"),
    "act_quant": Entry("compress.passes.act_quant:ActQuant", "round layer inputs at run time; static=true needs data"),
    "smoothquant": Entry("compress.passes.smoothquant:SmoothQuant", "move the range of activations into the weights"),
    "awq_scale": Entry("compress.passes.awq:AwqScale", "the scaling of awq alone, for another pass that rounds"),
    "rotate": Entry("compress.passes.rotate:Rotate", "spread outliers by folded rotations; needs no data"),
    "hadamard": Entry("compress.passes.hadamard:HadamardInputs", "rotate layer inputs at run time; needs no data"),
    "autoround": Entry("compress.passes.autoround:AutoRound", "learn which way to round, block by block; needs data"),
    "bias_correct": Entry("compress.passes.bias_correct:BiasCorrect", "take the mean error out of biases; needs data"),
    "adaquant": Entry("compress.passes.adaquant:AdaQuant", "learn weights and grids layer by layer; needs data"),
    "block_tune": Entry("compress.passes.block_tune:BlockTune", "train codebooks, scales, norms by block; needs data"),
    "pv_tuning": Entry("compress.passes.pv_tuning:PvTuning", "train codes with entries, scales and norms; needs data"),
    "kv_quant": Entry(
        "compress.passes.kv_quant:KvQuant",
        "cache keys and values in few bits; static scales and sparing sensitive layers take data",
    ),
    "kv_evict": Entry("compress.passes.kv_evict:KvEvict", "keep a number of tokens in the cache; needs no data"),
    "kv_select": Entry("compress.passes.kv_select:KvSelect", "attend to chosen tokens of the cache; needs no data"),
    "tune": Entry("compress.passes.tune:Tune", "tune scales, norms and biases by the whole model's output; needs data"),
    "prune_channels": Entry(
        "compress.passes.prune_channels:PruneChannels", "take whole channels out of an image classifier; needs data"
    ),
}


@cache
def table() -> dict[str, Entry]:
    """All passes by name: ours, then those of other distributions. A name of ours cannot be taken over."""
    found = {
        point.name: Entry(point.value, f"from {point.dist.name if point.dist else 'another distribution'}")
        for point in entry_points(group="compress.passes")
    }
    return {**found, **PASSES}


def find(name: str) -> type[Pass]:
    """The class of a pass. Raises: UsageError for an unknown name, with the nearest one."""
    if name not in table():
        raise UsageError(f"Unknown pass '{name}'.{nearest(name, table())}")
    module, _, cls = table()[name].path.partition(":")
    found: type[Pass] = getattr(import_module(module), cls)
    return found


def __getattr__(name: str) -> Any:
    """Pass classes by their own name: `from compress.passes import Gptq`."""
    for entry in PASSES.values():
        module, _, cls = entry.path.partition(":")
        if cls == name:
            return getattr(import_module(module), cls)
    raise AttributeError(f"module 'compress.passes' has no attribute {name!r}")
