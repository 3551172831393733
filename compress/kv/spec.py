"""`KvSpec`: what one layer's cache stores and keeps. The torch cache, the evaluation and exported graphs follow it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor

from compress.errors import UsageError, nearest
from compress.formats import parse_format
from compress.formats.base import Format
from compress.formats.float_grid import FloatGrid
from compress.formats.int_grid import IntGrid
from compress.formats.lookup import FIXED, Lookup
from compress.kv.static import has_static, static_format

Scorer = Literal["", "position", "key_norm", "h2o", "tova", "snapkv", "expected", "key_diff", "locret", "kvzap"]
Axis = Literal["token", "channel"]
Selector = Literal["", "token_select", "retrieval"]
Index = Literal["exact", "hnsw", "linked"]
Heads = Literal["even", "adaptive"]

LayerTensors = Mapping[str, Tensor]
"""What one layer's cache needs beside its `KvSpec`, by name (`KvSpec.wants`)."""


@dataclass(frozen=True)
class KvSpec:
    """Of one layer.

    keys, values: formats as text, empty where they stay as they are computed; keys_by: what shares a scale, `token` (a
    vector of one head at one position, or runs of its channels by group=N) or `channel` (runs of `group` tokens of one
    channel, as KIVI has keys); residual: newest tokens that stay in float; static: formats by `channel`, `head` or
    `tensor` have scales that all tokens share, tensors of the layer; rotated: vectors are turned by a Hadamard matrix
    before they are rounded, and back as they are read. scorer: by what tokens are dropped, empty where all are kept;
    budget: tokens that each head keeps; sinks: first tokens that are never dropped; recent: newest ones that are not.
    decay: of H2O's sums per step; by_age: whether they are divided by a token's age (of learned scores, which are
    logarithms: whether its logarithm is taken off); chunk: tokens of a prompt that are read at once; head_width: of the
    head of a learned scorer (compress/kv/heads.py) between its two layers, 0 for one that is linear. window: newest
    queries whose attention is SnapKV's score; pool: neighbours that it is averaged over, by position. interval: steps
    after which expected attention is computed anew. heads: whether each head keeps `budget` tokens, or all of them
    together heads · budget, each at least `floor` · budget.

    Where all tokens stay and each step attends to some: selector: by what they are chosen, empty where all are attended
    to; select: tokens that are chosen beside `sinks` and `recent`; page: tokens that are chosen together; reuse: cosine
    with an earlier query from which on its choice is taken again, 0 for never; index: how keys are searched; links: of
    a key in it; effort: keys that its search keeps in view; queries: earlier ones that it is built with.
    """

    keys: str = ""
    values: str = ""
    keys_by: Axis = "token"
    residual: int = 0
    static: bool = False
    rotated: bool = False
    scorer: Scorer = ""
    budget: int = 0
    sinks: int = 4
    recent: int = 32
    decay: float = 1.0
    by_age: bool = False
    chunk: int = 256
    head_width: int = 0
    window: int = 32
    pool: int = 5
    interval: int = 16
    heads: Heads = "even"
    floor: float = 0.2

    selector: Selector = ""
    select: int = 0
    page: int = 1
    reuse: float = 0.0
    index: Index = "linked"
    links: int = 32
    effort: int = 512
    queries: int = 2048

    def __post_init__(self) -> None:
        if self.scorer not in get_args(Scorer):
            allowed = [name for name in get_args(Scorer) if name]
            raise UsageError(f"unknown scorer '{self.scorer}'.{nearest(self.scorer, allowed)}")
        if self.chunk < 1:
            raise UsageError(f"chunk={self.chunk} is below 1.")
        if self.keys_by not in get_args(Axis):
            raise UsageError(f"keys_by={self.keys_by} is not one of {', '.join(get_args(Axis))}.")
        for name in ("sinks", "recent", "residual", "budget"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name}={getattr(self, name)} is below 0.")
        if not 0 < self.decay <= 1:
            raise UsageError(f"decay={self.decay} is not in (0, 1].")
        if self.evicts:
            self._check_eviction()
        self._check_head()
        self._check_heads()
        for text in filter(None, (self.keys, self.values)):
            static_format(text) if self.static and has_static(text) else row_format(text)
        if self.keys_by == "channel":
            self._check_channel()
        self._check_scales()
        self._check_selection()

    def _check_selection(self) -> None:
        for what, found, known in (("selector", self.selector, Selector), ("index", self.index, Index)):
            if found not in get_args(known):
                raise UsageError(
                    f"unknown {what} '{found}'.{nearest(found, [name for name in get_args(known) if name])}"
                )
        if not self.selects:
            return
        if self.evicts:
            raise UsageError("Tokens are either dropped (scorer) or chosen at each step (selector), not both.")
        for name in ("recent", "select", "page", "links", "effort", "queries"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} is below 1, where tokens are chosen at each step.")
        if self.select % self.page:
            raise UsageError(f"select={self.select} is no multiple of page={self.page}, and pages are chosen whole.")
        if not 0 <= self.reuse <= 1:
            raise UsageError(f"reuse={self.reuse} is a cosine in [0, 1]; 0: each step chooses anew.")

    def _check_scales(self) -> None:
        if self.static and not self.scale_tensors:
            raise UsageError(
                f"{self.told()}: static scales are shared by all tokens, and these formats have none. Give "
                "int8(channel), int8(head) or int8(tensor), or leave static out."
            )
        if self.rotated and not (self.keys or self.values):
            raise UsageError("rotated: nothing is rounded. Give a format, or leave rotated out.")
        if self.rotated and (self.static or self.keys_by == "channel"):
            raise UsageError(
                "rotated mixes the channels of a vector, so scales by channel or fitted to data do not go with it. "
                "Quantize by token, or leave rotated out."
            )

    def _check_eviction(self) -> None:
        if self.recent < 1:
            raise UsageError("recent=0: the newest token must be kept, since it is read at once. Give 1 or more.")
        if self.budget <= self.sinks + self.recent:
            raise UsageError(
                f"budget={self.budget} leaves nothing to choose: {self.sinks} first (sinks) and {self.recent} newest "
                f"tokens (recent) are always kept. Give at least {self.sinks + self.recent + 1}, or less of the others."
            )
        self._check_scorer()
        if self.keys_by == "channel" or self.residual:
            raise UsageError(
                "keys by channel and a residual of float tokens share scales over runs of tokens, of which single ones "
                "cannot be dropped. Quantize by token, or drop nothing."
            )

    def _check_head(self) -> None:
        if self.head_width < 0 or (self.head_width and not self.learned):
            raise UsageError(f"head_width={self.head_width} is of the learned scorers locret and kvzap, 0 or more.")
        if self.scorer == "locret" and not self.head_width:
            raise UsageError("head_width=0: a head of locret has two layers. Give 1 or more.")

    def _check_scorer(self) -> None:
        """Of the settings of single scorers."""
        for name, scorer in (("window", "snapkv"), ("interval", "expected")):
            value = getattr(self, name)
            if self.scorer == scorer and not 1 <= value <= self.recent:
                why = {
                    "window": "tokens of the window are seen by part of it only, so they must stay",
                    "interval": "a token must have its score before it may go",
                }[name]
                raise UsageError(
                    f"{name}={value} is not 1 to recent={self.recent}: {why}. Give recent={value} or a smaller {name}."
                )
        if self.scorer == "snapkv" and (self.pool < 1 or self.pool % 2 == 0):
            raise UsageError(f"pool={self.pool} is not odd: as many neighbours before as after. Give 1, 3, 5 or 7.")

    def _check_heads(self) -> None:
        if self.heads not in get_args(Heads):
            raise UsageError(f"heads={self.heads} is not one of {', '.join(get_args(Heads))}.")
        if not 0 <= self.floor <= 1:
            raise UsageError(f"floor={self.floor} is not in [0, 1]: it is a share of the budget.")
        if self.heads == "adaptive" and self.scorer in ("", "position", "tova"):
            name = {"position": "streaming"}.get(self.scorer, self.scorer)
            why = f"{name} scores alike for all heads" if name else "nothing is dropped"
            raise UsageError(
                f"heads=adaptive shares tokens out by the scores of heads, and {why}. Take the scorer key_norm, "
                "key_diff, h2o, snapkv, expected, locret or kvzap, or heads=even."
            )
        if self.heads == "adaptive" and self.learned and self.by_age:
            raise UsageError(
                "heads=adaptive compares the scores of heads, and with by_age each trained head loses with age in its "
                "own unit. Leave by_age out, or take heads=even."
            )
        if self.heads == "adaptive" and self.static:
            raise UsageError(
                "heads=adaptive stores the tokens of all heads together, and static scales are of each head. Quantize "
                "by token, or take heads=even."
            )

    def _check_channel(self) -> None:
        form = row_format(self.keys) if self.keys else None
        if not isinstance(form, IntGrid) or not isinstance(form.group, int):
            raise UsageError(
                f"keys={self.keys or 'float'} by channel: give an integer format with the tokens that share a scale, "
                "such as int2(group=32, float_zero)."
            )
        if self.residual < form.group or self.residual % form.group:
            raise UsageError(
                f"residual={self.residual}: keys by channel are rounded {form.group} tokens at a time, so it is a "
                f"multiple of {form.group}."
            )

    @property
    def evicts(self) -> bool:
        """Whether tokens are dropped."""
        return bool(self.scorer)

    @property
    def selects(self) -> bool:
        """Whether all tokens stay, of which each step attends to some."""
        return bool(self.selector)

    @property
    def is_plain(self) -> bool:
        """Whether the cache is as it would be without this."""
        return not (self.evicts or self.selects or self.keys or self.values)

    @property
    def wants(self) -> tuple[str, ...]:
        """The tensors that the layer's cache needs beside this, by name (compress/models/cache_tensors.py)."""
        return self.scale_tensors + self.head_tensors

    @property
    def scale_tensors(self) -> tuple[str, ...]:
        """Those of `wants` that are static scales (compress/kv/static.py)."""
        return tuple(f"{part}_scale" for part in ("key", "value") if self.static_part(part))

    @property
    def head_tensors(self) -> tuple[str, ...]:
        """Those of `wants` that are of a trained head (compress/kv/heads.py)."""
        if not self.learned:
            return ()
        layers = ("head.first", "head.second") if self.head_width else ("head.second",)
        biases = tuple(f"{name}_bias" for name in layers) if self.scorer == "kvzap" else ()
        return layers + biases

    @property
    def learned(self) -> bool:
        """Whether its score comes from a trained head, as a token is written."""
        return self.scorer in ("locret", "kvzap")

    def static_part(self, part: Literal["key", "value"]) -> bool:
        """Whether keys or values have scales that all tokens share: the tensor `key_scale` or `value_scale` (see
        compress/kv/static.py)."""
        text = self.keys if part == "key" else self.values
        return self.static and has_static(text) and not (part == "key" and self.keys_by == "channel")

    @property
    def reads(self) -> bool:
        """Whether its score needs the attention's probabilities."""
        return self.scorer in ("h2o", "tova", "snapkv")

    @property
    def compares(self) -> bool:
        """Whether its score is made of all keys that are held, each time."""
        return self.scorer == "key_diff"

    @property
    def turns(self) -> bool:
        """Whether its score needs queries without their rotation."""
        return self.scorer == "expected"

    def told(self) -> str:
        """For a report: `int8(token) keys, int4(group=32) values, 1024 tokens by h2o`."""
        by = " by channel" if self.keys_by == "channel" else ""
        recent = f", the newest {self.residual} in float" if self.residual else ""
        more = (", static scales" if self.static else "") + (", rotated" if self.rotated else "")
        stored = f"{self.keys or 'float'} keys{by}, {self.values or 'float'} values{more}{recent}"
        if self.selects:
            how = f"{self.selector}, {self.index}" if self.selector == "retrieval" else self.selector
            return f"{stored}, {self.select} attended to by {how}"
        shared = f" shared out by heads (at least {self.floor:g} of it each)" if self.heads == "adaptive" else ""
        return f"{stored}, {self.budget} tokens{shared} by {self.scorer}" if self.evicts else stored

    def as_data(self) -> dict[str, Any]:
        """For JSON: what is not the default."""
        return {name: value for name, value in asdict(self).items() if value != getattr(KvSpec(), name)}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> KvSpec:
        """Raises: UsageError, TypeError for what is none."""
        return cls(**data)


def check_size(spec: KvSpec, size: int) -> None:
    """Raises: UsageError where runs of channels do not divide the vectors of a head, which are so long."""
    for part, text in (("keys", spec.keys), ("values", spec.values)):
        if not text or (part == "keys" and spec.keys_by == "channel"):
            continue
        form = parse_format(text)
        group = form.group if isinstance(form, IntGrid | FloatGrid) else None
        if isinstance(group, int) and size % group:
            fitting = ", ".join(str(each) for each in (8, 16, 32, 64, 128) if size % each == 0) or str(size)
            raise UsageError(
                f"{part}={text}: heads have {size} channels, which runs of {group} do not divide. Give "
                f"group={fitting}, or a format by token."
            )


def row_format(text: str) -> Format:
    """The format of a vector per token: `int8(token)`, `int4(group=32)`, `nf4`, `fp8_e4m3(channel)` …

    Raises: UsageError where vectors cannot be stored one by one.
    """
    form = parse_format(text)
    if isinstance(form, IntGrid | FloatGrid) and form.group == "token":
        form = replace(form, group="channel")  # a row of the matrix that is stored is a token
    if isinstance(form, Lookup) and form.table in FIXED and not form.double:
        return replace(form, flat=False)  # blocks of one vector, so that no two tokens share one
    if getattr(form, "outliers", None) is not None:
        raise UsageError(f"{text}: outliers are of activations. Take int8(token).")
    if form.row_params is None or form.holders or form.shares_peak or getattr(form, "group", "") in ("tensor", "head"):
        raise UsageError(f"{text}: tokens would share a scale, but they come one by one. Take int8(token).")
    return form
