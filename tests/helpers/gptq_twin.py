"""A layer, its inputs, and GPTQ column by column in NumPy."""

import numpy as np
import torch

from compress.layer import Layer, LayerKind
from compress.maths.hessian import accumulate


def inputs(rows: int = 200, features: int = 24, seed: int = 0) -> torch.Tensor:
    maker = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=maker) @ torch.randn(features, features, generator=maker)


def layer(rows: int = 6, columns: int = 24, seed: int = 1) -> Layer:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return Layer("block.linear", LayerKind.LINEAR, weight, users=("block.linear",))


def moments(values: torch.Tensor) -> torch.Tensor:
    return accumulate(None, values) / values.shape[0]


def slow_gptq(weight: np.ndarray, hessian: np.ndarray, form: object, params: dict, order: list[int]) -> np.ndarray:
    """Column by column with the inverse recomputed from the columns that are left (OBQ, eq. 2 of the paper)."""
    weight = weight.copy()
    result = np.zeros_like(weight)
    left = list(order)
    for column in order:
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        _, values = form.quantize(torch.tensor(weight[:, [column]]).float(), params, torch.tensor([column]))
        result[:, column] = values[:, 0].numpy()
        error = (weight[:, column] - result[:, column]) / inverse[0, 0]
        for place, other in enumerate(left[1:], 1):
            weight[:, other] -= error * inverse[0, place]
        left.pop(0)
    return result


def with_damping(hessian: torch.Tensor) -> np.ndarray:
    matrix: np.ndarray = hessian.double().numpy() + 0.01 * float(hessian.diagonal().mean()) * np.eye(len(hessian))
    return matrix
