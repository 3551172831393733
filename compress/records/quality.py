"""The records of a model's quality: figures, curves, changed answers, continuations and the worst samples."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.records.base import Interval, Record


class Metric(Record):
    """One figure with its uncertainty. `samples` counts independent clusters (windows, documents)."""

    value: float
    interval: Interval | None = None
    samples: int
    unit: str
    protocol: str
    better: Literal["lower", "higher"]
    detail: bool = Field(default=False, description="left out of the first table of a page")


class CurvePoint(Record):
    """The figure over the part of the data whose x lies in [low, high)."""

    low: float
    high: float
    value: float
    interval: Interval | None = None
    count: int = Field(description="tokens or images in this part")


class Curve(Record):
    """A figure by something else: the divergence by the position in a window, say."""

    name: str
    x: str
    y: str
    unit: str
    protocol: str
    points: tuple[CurvePoint, ...]


class Flips(Record):
    """Samples (tokens, images) that are answered rightly by one of the two models only, and whether that many more one
    way than the other may be chance."""

    gained: int = Field(description="wrong in the original, right now")
    lost: int = Field(description="right in the original, wrong now")
    samples: int
    p_value: float | None = Field(description="None where the clusters are too few for a test")
    test: str


class WorstSample(Record):
    """A token of a window, or an image, where the compressed model is furthest from the original.

    `target` is what is true, `reference` what the original puts first, `chosen` what the compressed model does: token
    ids or classes, with the original's and the compressed model's probability of `target`. Texts are empty without a
    tokenizer.
    """

    sample: int = Field(description="window, or image, of the quality data")
    position: int | None = Field(default=None, description="of `target` in its window")
    kl: float
    target: int
    reference: int
    chosen: int
    reference_probability: float
    probability: float
    context: tuple[int, ...] = Field(default=(), description="the tokens before, the last of them next to `target`")
    context_text: str = ""
    target_text: str = ""
    reference_text: str = ""
    chosen_text: str = ""


class Continuations(Record):
    """How the same prompts go on, token by token, against the original."""

    agreement: Metric = Field(description="share of positions with the same token")
    exact_match: Metric = Field(description="share of prompts that go on alike to the end")
    first_divergence: Metric = Field(description="tokens before the first that differs")


class Generation(Record):
    """Continuations under one setting, all prompts in one batch with the same random numbers in both models. control:
    the original against itself in smaller batches (greedy: one prompt at a time), which rounding alone may change; no
    smaller difference counts."""

    temperature: float
    top_k: int = Field(description="0: no limit")
    prompts: int
    tokens: int = Field(description="wanted after each prompt")
    compressed: Continuations
    control: Continuations


class Quality(Record):
    """Metrics of one model on one data set. `where` says what computed them."""

    subject: Literal["baseline", "compressed"]
    where: str
    metrics: dict[str, Metric]
    data_digest: str
    curves: tuple[Curve, ...] = ()
    flips: Flips | None = None
    generation: tuple[Generation, ...] = ()
    worst: tuple[WorstSample, ...] = Field(default=(), description="furthest from the original first")
    notes: tuple[str, ...] = Field(default=(), description="what was not computed and why, and what was fitted")


class Gate(Record):
    """One gate of the recipe: the bound that was asked for and what was found (the worse end of the interval)."""

    name: str
    bound: float
    found: float
    met: bool
