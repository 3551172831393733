"""kv_evict: the cache keeps a number of tokens, and drops the least important when there are more."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.engine.kv_pass import KvPass
from compress.errors import UsageError
from compress.kv.spec import KvSpec


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
    2510.00636); `sinks`, `recent`; `decay` of H2O's sums at each token; `by_age` whether they are divided by how long a
    token has been there; `chunk`.
    """

    name: ClassVar[str] = "kv_evict"
    fills_cache: ClassVar[str] = "which tokens are attended to"

    budget: int = Field(default=1024, ge=1)
    by: Literal["streaming", "key_norm", "h2o", "tova", "snapkv", "expected"] = "h2o"
    sinks: int = Field(default=4, ge=0)
    recent: int = Field(default=32, ge=1)
    decay: float = Field(default=1.0, gt=0, le=1)
    by_age: bool = False
    chunk: int = Field(default=256, ge=1)
    window: int = Field(default=32, ge=1)
    pool: int = Field(default=5, ge=1)
    interval: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _check_score(self) -> Self:
        if self.by != "h2o" and (self.decay != 1 or self.by_age):
            raise UsageError(f"{self.name}: decay and by_age are of by=h2o, not of {self.by}. Leave them out.")
        for names, scorer in ((("window", "pool"), "snapkv"), (("interval",), "expected")):
            given = sorted(self.model_fields_set & set(names))
            if given and self.by != scorer:
                raise UsageError(f"{self.name}: {given[0]} is of by={scorer}, not of {self.by}. Leave it out.")
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
        )
