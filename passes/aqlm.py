"""AQLM: vectors of weights as sums of codebook entries, entries and codes improved in turn until they settle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress import solve_vq
from compress.engine.codebook_pass import CodebookPass
from compress.engine.codebook_tasks import Task
from compress.errors import UsageError
from compress.solve_vq import Coded


class Aqlm(CodebookPass):
    """Additive quantization of language models (AQLM, Egiazarian et al. 2024, arXiv 2401.06118).

    Entries come from k-means of the scaled weights, one stage on what the stages before it leave; first codes are those
    nearest. Then sweeps of descent on the error of the layer's output: entries and scales (least squares, where the
    authors take Adam steps), then the codes of each vector of a row in turn, with all others as they are, by a beam
    over the stages. It ends with the sweep that gains less than `tolerance`. Tuning block by block, the paper's third
    phase, is the pass `block_tune` after this one.

    Settings: `format` a codebook along the inputs, or `bits`: counted bits per weight, codes, codebooks and scales
    together, for which vector length, entries and stages are chosen by the shapes of the layers; `share`, `sequential`,
    `mismatch` and `guided` as in vptq; `damp` of the second moments, as a share of their mean diagonal: the paper needs
    none, a little keeps inputs that were seldom on from deciding codes; `beam` candidates in the choice of codes;
    `sweeps` at most; `tolerance` the share of the error that a sweep has to gain for another one.
    """

    name: ClassVar[str] = "aqlm"
    fixed_shared: ClassVar[frozenset[str]] = frozenset({"beam", "sweeps", "tolerance"})

    damp: float = Field(default=0.01, gt=0, le=1)
    sweeps: int = Field(default=25, ge=1)
    tolerance: float = Field(default=0.01, ge=0, lt=1)

    @model_validator(mode="after")
    def _check_axis(self) -> Self:
        if self.codebook.axis == "out":
            raise UsageError(
                f"aqlm: the vectors of {self.format} lie along the outputs, those of AQLM along the inputs. Leave "
                "`out` away, or use vptq."
            )
        return self

    def first_codes(self, task: Task, start: Coded, book: Tensor) -> Coded:
        """The codes of the nearest sums of entries."""
        form, target = start.form, start.target
        columns = torch.arange(target.shape[1])
        codes, _ = form.quantize(target, form.params(book, start.scale, target.shape[1]), columns)
        rows, units = form.units((target.shape[0], target.shape[1]))
        return replace(start, codes=codes.reshape(rows, units, form.stages).long())

    def improved(self, coded: Sequence[Coded], book: Tensor, fixed: bool) -> tuple[list[Coded], Tensor]:
        return solve_vq.improve(coded, book, self.sweeps, self.beam, fixed=fixed, tolerance=self.tolerance)
