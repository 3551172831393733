"""What is continuous in compressed layers, and in the vectors beside them, as tensors that take gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from compress.formats.codebook import Codebook
from compress.formats.int_grid import IntGrid
from compress.formats.trellis import Trellis
from compress.layer import ActSpec, Layer, LayerSpec
from compress.models.placing import replace_input_rounding
from compress.training import distill
from compress.training.soft import SoftInput, SoftRounding, SoftWeight, lend_soft
from compress.training.soft_codebook import parted, soft_codebooks
from compress.training.soft_trellis import SoftTrellis
from compress.training.trainable import lend_tensor, lending, take_back

Trained = Literal["scales", "codebooks", "norms", "biases", "inputs"]


class Continuous:
    """Some layers in loaded modules, with what is trained of them in place of what is stored.

    `scales` of layers on integer grids or in trellises, `codebooks` entries and scales of layers in them, `norms` the
    vectors that are given, `biases`, `inputs` static input grids. Codes stay as they are. Layers that hold a codebook
    in common train it together; where some of its holders are not among the layers, its entries stay.

    Args: root: the modules, with the weights of these layers in them; vectors: name → (n,) float32.
    """

    def __init__(
        self, root: nn.Module, layers: Mapping[str, Layer], vectors: Mapping[str, Tensor], parts: frozenset[Trained]
    ) -> None:
        self.root, self.layers = root, layers
        self.books = soft_codebooks(layers.values()) if "codebooks" in parts else {}
        self.parted = parted(self.books)
        self.grids = {
            name: SoftRounding(layer, None)
            for name, layer in layers.items()
            if isinstance(layer.format, IntGrid) and "scales" in parts
        }
        self.trellises = {
            name: SoftTrellis(layer)
            for name, layer in layers.items()
            if isinstance(layer.format, Trellis) and "scales" in parts
        }
        self.biases = {
            name: layer.bias.float().clone()
            for name, layer in layers.items()
            if layer.bias is not None and "biases" in parts
        }
        learned = {name: layer.act for name, layer in layers.items() if layer.act and _has_grid(layer.act)}
        self.inputs = {name: SoftInput(act) for name, act in learned.items() if "inputs" in parts}
        self.vectors = {name: vector.detach().float().clone() for name, vector in vectors.items() if "norms" in parts}
        self.weights: tuple[SoftWeight, ...] = (*self.grids.values(), *self.trellises.values(), *self.books.values())

    @property
    def trained(self) -> frozenset[str]:
        """The layers of which something is trained."""
        books = {name for name, each in self.books.items() if name not in self.parted or each.form.scale != "none"}
        return frozenset({*self.grids, *self.trellises, *books, *self.biases, *self.inputs})

    def groups(self, lr: float) -> list[distill.Group]:
        """What is trained; entries and vectors at a rate that is relative to their size."""
        scales = [each.factor for each in self.grids.values()]
        scales += [each.factor for each in self.books.values() if each.form.scale != "none"]
        scales += [factor for each in self.trellises.values() for factor in each.factors]
        groups = [distill.Group([*scales, *(each.log_scale for each in self.inputs.values())], lr)]
        books = {id(each.book): each.book for name, each in self.books.items() if name not in self.parted}
        for tensor in (*books.values(), *self.biases.values(), *self.vectors.values()):
            groups.append(distill.Group([tensor], lr * (float(tensor.square().mean().sqrt()) or 1.0)))
        return [group for group in groups if group.tensors]

    @contextmanager
    def lent(self) -> Iterator[None]:
        """The modules compute with what is trained; weights as they were when `lend_weights` was last called."""
        biases = {f"{name}.bias": bias for name, bias in self.biases.items()}
        for name, tensor in (biases | self.vectors).items():
            lend_tensor(self.root, name, tensor)
        for name, soft in self.inputs.items():
            replace_input_rounding(self.root.get_submodule(name), soft.round)
        try:
            with lending(self.root, [each.layer for each in self.weights]):
                yield
        finally:
            for name in biases | self.vectors:
                take_back(self.root, name)

    def lend_weights(self) -> None:
        """Before each pass through the modules, since weights are computed from what is trained."""
        lend_soft(self.root, self.weights)

    def layer(self, layer: Layer) -> Layer:
        """A layer as it now is."""
        name = layer.name
        soft = self.grids.get(name) or self.trellises.get(name) or self.books.get(name)
        done = soft.rounded() if soft else layer
        act = self.inputs[name].rounded() if name in self.inputs else layer.act
        return replace(done, act=act, bias=self.biases.get(name, layer.bias))

    def notes(self, name: str, note: str) -> tuple[str, ...]:
        """For the report, of one layer."""
        kept = "the entries of its codebook stayed: layers that this pass is not for hold them too"
        return (note, kept) if name in self.parted else (note,)


def trainable(spec: LayerSpec, parts: frozenset[Trained]) -> bool:
    """Whether a layer will have something of some parts to train, its values unseen."""
    form, act = spec.format, spec.act
    found = {
        "scales": isinstance(form, IntGrid | Trellis),
        "codebooks": isinstance(form, Codebook),
        "biases": spec.has_bias,
        "inputs": act is not None and _has_grid(act),
    }
    return any(found.get(part, False) for part in parts)


def vectors_of(root: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Those of some stored tensors that are vectors and parameters of the modules, norm weights and biases, by name:
    what a module only keeps book of, a running mean say, takes no gradient."""
    parameters = dict(root.named_parameters())
    found = {name: parameters[name] for name in names if name in parameters}
    return {name: tensor.detach() for name, tensor in found.items() if tensor.ndim == 1}


def _has_grid(act: ActSpec) -> bool:
    return act.static and isinstance(act.format, IntGrid)
