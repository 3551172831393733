"""VPTQ: short vectors of weights as entries of learned codebooks, later columns absorbing what they lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress import solve_vq
from compress.engine.codebook_pass import CodebookPass
from compress.engine.codebook_tasks import Task
from compress.errors import UsageError
from compress.formats.codebook import Codebook
from compress.solve_vq import Coded


class Vptq(CodebookPass):
    """Vector quantization with second-order compensation (VPTQ, Liu et al. 2024, arXiv 2409.17066), with what its
    authors' program leaves out. Codebooks come from k-means of the scaled weights, each counting as much as its input's
    second moment; GPTQ's loop chooses the codes; then sweeps of descent choose entries, scales and codes again, each
    with all others as they are (compress/solve_vq.py), which never makes the error of the output larger.

    Settings: `format` a codebook, or `bits`: counted bits per weight, codes, codebooks and scales together, for which
    vector length, entries and stages are chosen by the shapes of the layers; `share`: `none`, or `block` where the
    layers of a block hold one codebook in common; `damp`, `order`, `sequential`, `mismatch` and `guided` as in gptq
    (where layers are taken in turn, a shared codebook is learned from all of them before the first one's turn, with the
    inputs that they have in the block as it then is; in its turn each gets codes and scales). The rest are repairs,
    each of which can be turned off: `beam` codes of all stages are chosen together, from so many candidates (1: one
    stage after the other); `metric` codes of neighbouring columns go by what the columns after them cannot make up for,
    not by plain distance; `rescale` second moments follow the weights where these are scaled; `refit` sweeps of descent
    (0: none). Of the format: `outliers`, a share of the input columns, those of the largest second moments, with
    entries of their own; `bias` of each `row` or `column` beside its scale; `permute=hessian`: columns in the order of
    their second moments, so that those of a vector, or of a group, are alike.
    beam=1, metric=false, rescale=false, refit=0 with `out` in the format comes closest to the authors' program, which
    scales columns by their range where ours are scaled by their root mean square.
    """

    name: ClassVar[str] = "vptq"
    fixed_shared: ClassVar[frozenset[str]] = frozenset({"beam", "refit"})

    order: str = Field(default="static", pattern="^(static|given)$")
    metric: bool = True
    rescale: bool = True
    refit: int = Field(default=4, ge=0)
    outliers: float = Field(default=0, ge=0, lt=1)
    bias: str = Field(default="none", pattern="^(none|row|column)$")
    permute: str = Field(default="none", pattern="^(none|hessian)$")

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        assert isinstance(self.format, Codebook)
        for name, asked, said in (
            ("outliers", self.outliers, self.format.outliers),
            ("bias", self.bias, self.format.bias),
        ):
            if name in self.model_fields_set and said not in (0, "none", asked):
                raise UsageError(f"vptq: {name}={asked} and {self.format} contradict each other. Keep one of them.")
        if self.permute == "hessian" and self.format.axis == "out" and self.format.groups == 1:
            raise UsageError(
                f"vptq: permute=hessian would store an order that changes nothing: in {self.format} a vector lies in "
                "one column, and all columns have one codebook. Leave it out, or give groups."
            )
        return self

    @property
    def codebook(self) -> Codebook:
        """See CodebookPass, with what the settings add."""
        form = super().codebook
        more: dict[str, Any] = {"outliers": self.outliers} if self.outliers else {}
        more |= {"bias": self.bias} if self.bias != "none" else {}
        more |= {"permuted": True} if self.permute == "hessian" else {}
        return replace(form, **more) if more else form

    @property
    def column_order(self) -> str:
        return self.order

    def counts(self, task: Task, start: Coded) -> Tensor:
        if self.rescale:
            return super().counts(task, start)
        return start.hessian.diagonal().expand_as(start.target)

    def first_codes(self, task: Task, start: Coded, book: Tensor) -> Coded:
        """Codes from GPTQ's loop. Without `rescale` it runs on the scaled weights with second moments of unscaled
        inputs, as in the authors' program."""
        given, system = start, task.system
        if not self.rescale:
            given = replace(start, target=start.target / start.scale, scale=torch.ones(1, 1))
        found = solve_vq.compensate(given, book, system.factor, system.columns, self.beam, self.metric)
        return replace(start, codes=found.codes)

    def improved(self, coded: Sequence[Coded], book: Tensor, fixed: bool) -> tuple[list[Coded], Tensor]:
        return solve_vq.improve(coded, book, self.refit, self.beam, fixed=fixed)
