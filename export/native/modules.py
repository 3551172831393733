"""What takes the place of a linear layer or an embedding whose weight is a codebook's: it is never decoded whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.formats import codebook_columns
from compress.formats.codebook import Codebook
from compress.formats.codebook_columns import Piece
from compress.kernels import CodebookProduct, PiecedProduct


class CodebookLinear(nn.Module):
    """x (…, in) → x Wᵀ + bias (…, out), computed from the codes. bias (out,) float32 or None."""

    bias: Tensor | None

    def __init__(
        self, product: CodebookProduct | PiecedProduct, shape: tuple[int, int], bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.product = product
        self.out_features, self.in_features = shape
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, values: Tensor) -> Tensor:
        """See the class."""
        result = self.product(values)
        return result if self.bias is None else result + self.bias


class CodebookEmbedding(nn.Module):
    """ids (…) → rows of the weight (…, in) float32, each decoded when it is asked for. tensors: as the format stores
    them."""

    def __init__(self, form: Codebook, tensors: dict[str, Tensor], shape: tuple[int, int]) -> None:
        super().__init__()
        self.pieces = form.pieces(tensors, shape)
        self.num_embeddings, self.embedding_dim = shape

    def forward(self, ids: Tensor) -> Tensor:
        """See the class."""
        wanted, places = torch.unique(ids, return_inverse=True)
        return functional.embedding(places, self.rows(wanted))

    def rows(self, wanted: Tensor) -> Tensor:
        """Some rows (n,) int64 → (n, in) float32."""
        return codebook_columns.assembled(self.pieces, [_rows(piece, wanted) for piece in self.pieces])


def _rows(piece: Piece, wanted: Tensor) -> Tensor:
    """Some rows (n,) int64 of a piece's columns, float32."""
    form = piece.form
    each = form.vector if form.axis == "out" else 1  # rows that are decoded from one row of codes
    codes = wanted // each
    tensors = {**piece.tensors, "codes": piece.tensors["codes"][codes]}
    if form.scale == "row":
        decoded = codes[:, None] * each + torch.arange(each)
        tensors["scale"] = piece.tensors["scale"][decoded.flatten().clamp(max=piece.shape[0] - 1)]
    values = form.dequantize(tensors, (len(wanted) * each, piece.shape[1]))
    values = values[torch.arange(len(wanted)) * each + wanted % each]
    if piece.bias is None:
        return values
    return values + (piece.bias if piece.bias.shape[0] == 1 else piece.bias[wanted])


def why_not(child: nn.Module) -> str:
    """Why a module cannot be replaced by one of these: one of a class of its own may do more than multiply, as one that
    scales its rows; empty where it can."""
    from transformers.pytorch_utils import Conv1D

    if type(child) in (nn.Linear, nn.Embedding, Conv1D):
        return ""
    return f"it is a {type(child).__name__}, which may do more than a linear layer or an embedding does"


def put(module: nn.Module, path: str, child: nn.Module) -> None:
    """Put a module where another is."""
    owner, _, key = path.rpartition(".")
    setattr(module.get_submodule(owner), key, child)
