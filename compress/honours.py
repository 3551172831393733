"""What of a layer a target or a lowering writes, declared. What it does not declare is refused, never dropped.

The check is here, so that a `choose` which forgets a field cannot lose it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.layer import LayerKind, LayerSpec

    Kinds = frozenset[LayerKind]


@dataclass(frozen=True)
class Honours:
    """The kinds of layers taken, and of those the ones whose rounded inputs (`act`), transforms of the input (`pre`)
    and `bias` are written."""

    kinds: Kinds
    act: Kinds = frozenset()
    pre: Kinds = frozenset()
    bias: Kinds = frozenset()

    def lacking(self, spec: LayerSpec) -> str:
        """What the layer asks for that is not declared, as in "inputs in int8(token)"; empty where nothing."""
        if spec.kind not in self.kinds:
            return f"layers of kind {spec.kind}"
        for name, wanted in WANTED.items():
            what = wanted(spec)
            if what and spec.kind not in getattr(self, name):
                return f"{what} of a layer of kind {spec.kind}"
        return ""


WANTED: Mapping[str, Callable[[LayerSpec], str]] = {
    "act": lambda spec: f"inputs in {spec.act}" if spec.act is not None else "",
    "pre": lambda spec: f"inputs transformed by {', '.join(map(str, spec.pre))}" if spec.pre else "",
    "bias": lambda spec: "the bias" if spec.has_bias else "",
}
"""By declaration: what a layer asks for, empty where it does not. A new field of `LayerSpec` that changes what is
computed (a mask) gets a line here and in `Honours`; tests/test_every_lowering.py tells one that has none."""


def combined(several: Iterable[Honours]) -> Honours:
    """What at least one of several writes: of a target, whose lowerings declare more closely."""
    several = list(several)
    return Honours(*(_union(getattr(each, name) for each in several) for name in ("kinds", *WANTED)))


def _union(kinds: Iterable[Kinds]) -> Kinds:
    return frozenset(kind for each in kinds for kind in each)
