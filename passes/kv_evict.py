"""kv_evict: the cache keeps a number of tokens, and drops the least important when there are more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from compress.engine import kv_budgets, kv_heads
from compress.engine.kv_pass import KvPass, Observed, Settled
from compress.errors import UsageError
from compress.kv.spec import Heads, KvSpec
from compress.maths import budgets
from compress.training import retaining

_LEARNED = ("locret", "kvzap")
_LEARNING = ("labels", "width", "steps", "lr", "seed")

WIDTH = 256
"""Of a head of locret, where none is given."""


class KvEvict(KvPass):
    """A budget of tokens per head, those kept by a score. The first tokens (`sinks`) and the newest (`recent`) always
    stay; all keep their true positions. Long prompts are read `chunk` tokens at a time with dropping in between, so the
    peak is bounded too.

    Settings: `budget` tokens; `by`: `streaming`, the newest (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453);
    `key_norm`, those with short keys (Devoto et al. 2024, arXiv 2406.11430), which needs no attention weights; `h2o`,
    those attended to most, per group of query heads (Zhang et al. 2023, arXiv 2306.14048); `tova`, most by the last
    token, one choice for all heads (Oren et al. 2024, arXiv 2401.06104); `snapkv`, most by the newest `window` queries,
    averaged over the `pool` positions around (Li et al. 2024, arXiv 2404.14469); `expected`, most by queries that are
    yet to come, as far as those seen tell, weighed by the length of values, anew every `interval` tokens (arXiv
    2510.00636); `key_diff`, those whose keys are least like the others (Park et al. 2025, arXiv 2504.15364); `locret`
    and `kvzap`, those that a trained head scores highest as they are written; `sinks`, `recent`; `decay` of H2O's sums
    at each token; `by_age` whether they are divided by how long a token has been there (of a trained head: whether it
    loses with the logarithm of that, as fast as data tell, so that nothing old stays for ever); `chunk`.

    Heads are trained by layer on the finished model, on calibration windows of which an eighth is held out. One of
    `locret` (Huang et al. 2024, arXiv 2410.01805) sees a token's query, key and value, one of `kvzap` (arXiv
    2601.07891) what goes into the attention. Settings: `labels` what they learn to say: `logits`, the largest product
    with the queries of a window's last quarter (Locret's, and its default); `replay`, the logarithm of the largest
    attention, times what the value adds, when the text is repeated (KVzap's, and its default); `attention`, the
    logarithm of the sum of what the last quarter gives it; `outputs`, of that times what its value adds; `width`
    between a head's two layers, 0 for a linear one by ridge regression (default 256 for `locret`, 0 for `kvzap`);
    `steps`, `lr` of Adam where there are two; `seed`.

    `layers`: `even`, the budget is that of each layer; `pyramid`, it falls in equal steps to budget / `beta` in the
    last layer (PyramidKV, Cai et al. 2024, arXiv 2406.02069); `measured`, the budgets that lose the least attention on
    calibration windows longer than the budget. The total is the same. `heads`: `even`, or `adaptive`: the heads of a
    layer share heads · budget tokens by their scores, each at least `floor` of its budget (AdaKV, Feng et al. 2024,
    arXiv 2407.11550); what each holds is what is stored.
    """

    name: ClassVar[str] = "kv_evict"
    fills_cache: ClassVar[str] = "which tokens are attended to"

    budget: int = Field(default=1024, ge=1)
    by: Literal["streaming", "key_norm", "h2o", "tova", "snapkv", "expected", "key_diff", "locret", "kvzap"] = "h2o"
    sinks: int = Field(default=4, ge=0)
    recent: int = Field(default=32, ge=1)
    decay: float = Field(default=1.0, gt=0, le=1)
    by_age: bool = False
    chunk: int = Field(default=256, ge=1)
    window: int = Field(default=32, ge=1)
    pool: int = Field(default=5, ge=1)
    interval: int = Field(default=16, ge=1)
    labels: kv_heads.Labels | None = None
    width: int | None = Field(default=None, ge=0)
    steps: int = Field(default=400, ge=1)
    lr: float = Field(default=0.003, gt=0, le=1)
    seed: int = 0
    layers: Literal["even", "pyramid", "measured"] = "even"
    beta: float = Field(default=20.0, gt=1)
    heads: Heads = "even"
    floor: float = Field(default=0.2, ge=0, le=1)

    @model_validator(mode="after")
    def _check_score(self) -> Self:
        if self.by != "h2o" and (self.decay != 1 or (self.by_age and self.by not in _LEARNED)):
            raise UsageError(f"{self.name}: decay and by_age are of by=h2o, not of {self.by}. Leave them out.")
        for names, scorer in ((("window", "pool"), "snapkv"), (("interval",), "expected")):
            given = sorted(self.model_fields_set & set(names))
            if given and self.by != scorer:
                raise UsageError(f"{self.name}: {given[0]} is of by={scorer}, not of {self.by}. Leave it out.")
        if self.by_age and self.by in _LEARNED and self._labels == "replay":
            raise UsageError(
                f"{self.name}: by_age learns how fast tokens lose with age, which labels=replay do not tell, since all "
                "are asked for after as many tokens. Take labels=attention."
            )
        if self.by not in _LEARNED and (odd := next((name for name in _LEARNING if name in self.model_fields_set), "")):
            raise UsageError(f"{self.name}: {odd} is of by=locret and by=kvzap, not of {self.by}. Leave it out.")
        idle = next((name for name in ("steps", "lr", "seed") if name in self.model_fields_set), "")
        if idle and self.by in _LEARNED and not self._width:
            raise UsageError(
                f"{self.name}: {idle} is of heads with two layers, and one of width=0 is solved in closed form. Give a "
                "width, or leave it out."
            )
        if self.layers == "measured" and self.by in _LEARNED and self._labels == "replay":
            raise UsageError(
                f"{self.name}: labels=replay reads every text twice, so layers=measured would see what no text has. "
                "Take labels=attention."
            )
        if "beta" in self.model_fields_set and self.layers != "pyramid":
            raise UsageError(f"{self.name}: beta is of layers=pyramid, not of {self.layers}. Leave it out.")
        if "floor" in self.model_fields_set and self.heads != "adaptive":
            raise UsageError(f"{self.name}: floor is of heads=adaptive, not of {self.heads}. Leave it out.")
        self.fill(KvSpec(), 0)
        return self

    def fill(self, spec: KvSpec, layer: int) -> KvSpec:
        return replace(
            spec,
            scorer="position" if self.by == "streaming" else self.by,
            budget=self.budget,
            sinks=self.sinks,
            recent=self.recent,
            decay=self.decay,
            by_age=self.by_age,
            chunk=self.chunk,
            window=self.window,
            pool=self.pool,
            interval=self.interval,
            head_width=self._width,
            heads=self.heads,
            floor=self.floor,
        )

    def filled(self, caches: Sequence[KvSpec]) -> tuple[KvSpec, ...]:
        specs = super().filled(caches)
        if self.layers != "pyramid":
            return specs
        shares = budgets.pyramid(self.budget, len(specs), self.beta, self.sinks + self.recent + 1)
        return tuple(replace(spec, budget=share) for spec, share in zip(specs, shares, strict=True))

    @property
    def _width(self) -> int:
        if self.width is None:
            return WIDTH if self.by == "locret" else 0
        return self.width

    @property
    def _labels(self) -> kv_heads.Labels:
        return self.labels or ("logits" if self.by == "locret" else "replay")

    @property
    def counts_layers(self) -> bool:
        return self.layers != "even"

    @property
    def measures(self) -> bool:
        return self.by in _LEARNED or self.layers == "measured"

    def windows(self, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        if self.layers == "measured":
            kv_budgets.check_windows(batches, self.budget)
        if self.by not in _LEARNED:
            return batches
        kv_heads.check_windows(batches, self._labels, self.sinks, self.recent)
        return kv_heads.repeated(batches) if self._labels == "replay" else batches

    def observe(self, spec: KvSpec, layer: int, seen: Observed) -> dict[str, Tensor]:
        found = {kv_budgets.LOSSES: kv_budgets.losses(spec, seen)} if self.layers == "measured" else {}
        if self.by in _LEARNED:
            smooth = retaining.SMOOTH if self._labels == "logits" else 0.0
            how = retaining.Fitting(self._width, self.by == "kvzap", self.steps, self.lr, smooth, self.seed)
            found |= kv_heads.learned(spec, seen, self._labels, how)
        return found

    def conclude(self, caches: Sequence[KvSpec], found: Sequence[Mapping[str, Tensor]]) -> Sequence[Settled]:
        settled = [Settled(spec) for spec in caches]
        if self.layers == "measured":
            settled = kv_budgets.shared(caches, found, self.budget)
        if self.by not in _LEARNED:
            return settled
        return [
            Settled(
                each.spec,
                kv_heads.tensors_of(each.spec, taken),
                each.notes + kv_heads.told(taken[kv_heads.FIGURES], self._labels),
            )
            for each, taken in zip(settled, found, strict=True)
        ]
