"""Weights of a loaded block that take gradients: lent to its modules for training, then taken back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress.layer import Layer, LayerKind
from compress.models import experts
from compress.models.skeleton import is_turned


def lend(root: nn.Module, layer: Layer, weight: Tensor, bias: Tensor | None = None) -> None:
    """Let the modules of a layer compute with a weight (out, in), and a bias, that are no parameters of theirs.

    Until `lending` ends, they hide the parameters. Experts: see `lend_experts`.
    """
    for user in layer.users:
        child = root.get_submodule(user)
        parameter = child._parameters["weight"]
        assert parameter is not None
        child.__dict__["weight"] = (weight.T if is_turned(child) else weight).reshape(parameter.shape)
        if bias is not None and user == layer.name:
            child.__dict__["bias"] = bias


def lend_tensor(root: nn.Module, name: str, tensor: Tensor) -> None:
    """The same for a tensor that is no layer's, a norm's weight say."""
    path, _, key = name.rpartition(".")
    root.get_submodule(path).__dict__[key] = tensor


def take_back(root: nn.Module, name: str) -> None:
    """Undo `lend_tensor`."""
    path, _, key = name.rpartition(".")
    root.get_submodule(path).__dict__.pop(key, None)


def lend_experts(root: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """The same for experts: name → (out, in). Experts of a stack that are not named stay as they are."""
    stacks: dict[tuple[str, str], dict[int, Tensor]] = {}
    for name, weight in weights.items():
        path, key, index = experts.owner(name)
        stacks.setdefault((path, key), {})[index] = weight
    for (path, key), found in stacks.items():
        child = root.get_submodule(path)
        stack = child._parameters[key]
        assert stack is not None
        turned = bool(child.is_transposed)
        parts = [found[i].T if turned else found[i] for i in found]
        rows = torch.tensor(list(found))
        child.__dict__[key] = stack.detach().index_copy(0, rows, torch.stack(parts))


@contextmanager
def lending(root: nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
    """Afterwards the modules of these layers have their own parameters again."""
    try:
        yield
    finally:
        for layer in layers:
            for user in layer.users:
                path, key = experts.owner(user)[:2] if layer.kind is LayerKind.EXPERT else (user, "weight")
                child = root.get_submodule(path)
                child.__dict__.pop(key, None)
                child.__dict__.pop("bias", None)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The values of `hard` with the gradient of `soft` (Bengio et al. 2013, arXiv 1308.3432)."""
    return soft + (hard - soft).detach()
