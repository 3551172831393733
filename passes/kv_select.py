"""kv_select: the cache keeps every token, and each step attends to some of them."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.engine.kv_pass import KvPass
from compress.errors import UsageError
from compress.kv.index import library
from compress.kv.spec import Index, KvSpec
from compress.models.model import Model

_KEPT = {"token_select": 2048, "retrieval": 128}
_ONLY = {"token_select": ("page", "reuse"), "retrieval": ("index", "links", "effort", "queries")}


class KvSelect(KvPass):
    """Tokens are chosen by the query, and none is dropped: it saves no memory, and is meant for time at long context.
    The first tokens (`sinks`) and the newest (`recent`) are always attended to; all keep their true positions.

    Settings: `by`: `token_select`, one choice for all heads of a layer by the sum of their softmaxes (Wu et al. 2024,
    arXiv 2411.02886), of a prompt for each `chunk` tokens by their mean query; `retrieval`, each query head's nearest
    keys by an index in host memory (RetrievalAttention, Liu et al. 2024, arXiv 2409.10516), prompts attending to
    everything; `keep` tokens that are chosen (2048 and 128); `sinks`, `recent`; `chunk` tokens of a prompt that are
    read at once. Of token_select: `page` tokens side by side that are chosen together; `reuse`, the cosine with an
    earlier query from which on its choice is taken again, 0 for never (the paper: 0.9). Of retrieval: `index`:
    `linked`, HNSW whose keys are linked through earlier queries as well, `hnsw`, by keys alone, `exact`, all products;
    `links` per key; `effort`, keys that a search keeps in view; `queries` that are kept to link by.
    """

    name: ClassVar[str] = "kv_select"
    fills_cache: ClassVar[str] = "which tokens are attended to"

    by: Literal["token_select", "retrieval"] = "token_select"
    keep: int | None = Field(default=None, ge=1)
    sinks: int = Field(default=128, ge=0)
    recent: int = Field(default=512, ge=1)
    chunk: int = Field(default=512, ge=1)
    page: int = Field(default=1, ge=1)
    reuse: float = Field(default=0.0, ge=0, le=1)
    index: Index = "linked"
    links: int = Field(default=32, ge=2)
    effort: int = Field(default=512, ge=1)
    queries: int = Field(default=2048, ge=1)

    @model_validator(mode="after")
    def _check_choice(self) -> Self:
        fields = type(self).model_fields
        other = "retrieval" if self.by == "token_select" else "token_select"
        odd = [name for name in _ONLY[other] if getattr(self, name) != fields[name].default]
        if odd:
            raise UsageError(f"{self.name}: {', '.join(odd)} of by={other}, not of {self.by}. Leave it out.")
        self.fill(KvSpec(), 0)
        return self

    def check(self, model: Model) -> None:
        super().check(model)
        if self.by == "retrieval" and self.index != "exact":
            library()

    def fill(self, spec: KvSpec, layer: int) -> KvSpec:
        return replace(
            spec,
            selector=self.by,
            select=self.keep or _KEPT[self.by],
            sinks=self.sinks,
            recent=self.recent,
            chunk=self.chunk,
            page=self.page,
            reuse=self.reuse,
            index=self.index,
            links=self.links,
            effort=self.effort,
            queries=self.queries,
        )
