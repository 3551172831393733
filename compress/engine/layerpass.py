"""What every pass is: frozen, typed settings and one function. Their text is the recipe and command-line grammar."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from compress.engine.layer_stats import LayerStats, Stat
from compress.engine.part import LOSSY, Part
from compress.errors import UsageError, nearest
from compress.formats.base import Format
from compress.layer import Layer, LayerKind, LayerSpec
from compress.maths.histogram import Histogram
from compress.spec import Call, parse_call

if TYPE_CHECKING:
    from compress.models.model import Model


_PATTERNS = ("targets", "ignore", "overrides")


class Pass(BaseModel, ABC):
    """What every pass has: settings, the layers it is for, and what it asks of the engine.

    Settings: `targets` layer patterns (globs on module paths, `re:` for expressions, `kind:` for embedding, head,
    linear, conv, expert; none means every linear layer, convolution and expert inside the blocks but routers);
    `ignore` patterns to leave out; `overrides` {pattern: {setting: value}} for some layers.
    Class attributes: `name`; `needs` statistics (see also `wants`); `kinds` it can treat; `part` of the layer that it
    fills, which may be filled only once; `before` parts that may not be filled yet when it comes, `after` parts that
    must be; `also` further parts that it fills; `rescales` whether it multiplies or mixes rows or columns of weights,
    which it then does before any pass that sets their values; `any_dtype` whether blocks may compute in another type
    than float32 meanwhile; `inside` whether it treats layers inside the blocks only; `per_layer` whether overrides can
    hold, because its settings are taken layer by layer; `training` whether it has the original and the compressed model
    in memory, with gradients (see also `trained_copies`); `opaque` whether it can treat a model that can be run but not
    traced or differentiated (an ONNX graph); `prunes` whether it sets weights to zero that passes after it may not
    change; `keeps_zeros` whether it leaves such weights at zero (`Layer.mask`), as far as its format holds zero;
    `renews` whether it trains plain weights anew, also those that a pass before has pruned: what it makes is what later
    errors are taken against, and `VALUES` may be filled once more after it; `keeps_ties` whether it treats all users of
    a tied weight where it is for one of them; `trains_rest` whether it trains on the windows that statistics leave over
    (`Calibration.rest`); `reshapes` whether the model that it leaves has other blocks or layers
    (compress/engine/reshape.py); `caches` whether it is about the cache alone (compress/engine/kv_pass.py).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: ClassVar[str]
    needs: ClassVar[frozenset[Stat]] = frozenset()
    kinds: ClassVar[frozenset[LayerKind]] = frozenset(LayerKind)
    part: ClassVar[Part] = Part.WEIGHT
    also: ClassVar[frozenset[Part]] = frozenset()
    before: ClassVar[frozenset[Part]] = frozenset()
    after: ClassVar[frozenset[Part]] = frozenset()
    rescales: ClassVar[bool] = False
    any_dtype: ClassVar[bool] = True
    inside: ClassVar[bool] = False
    per_layer: ClassVar[bool] = True
    training: ClassVar[bool] = False
    opaque: ClassVar[bool] = True
    prunes: ClassVar[bool] = False
    keeps_zeros: ClassVar[bool] = False
    reshapes: ClassVar[bool] = False
    renews: ClassVar[bool] = False
    keeps_ties: ClassVar[bool] = False
    trains_rest: ClassVar[bool] = False
    caches: ClassVar[bool] = False

    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    overrides: dict[str, dict[str, Any]] = {}

    @model_validator(mode="after")
    def _check_overrides(self) -> Self:
        if self.overrides and not self.per_layer:
            raise UsageError(
                f"{self.name}: overrides would do nothing, since it treats its layers together. Leave them out; with "
                "targets, two passes can have settings of their own."
            )
        for pattern, settings in self.overrides.items():
            nested = sorted(set(settings) & set(_PATTERNS))
            if nested:
                raise UsageError(f"{self.name}: overrides of '{pattern}' may not set {nested[0]}. Move it to the pass.")
            try:
                self.with_settings(settings)
            except UsageError as error:
                raise UsageError(f"In the overrides of '{pattern}': {error}") from error
        return self

    @classmethod
    def chooses(cls) -> bool:
        """Whether it is for layers, which its targets choose; else it is about the model as a whole."""
        return not (cls.reshapes or cls.caches)

    @property
    def wants(self) -> frozenset[Stat]:
        """The statistics that these very settings need; `needs` where they do not matter."""
        return self.needs

    @property
    def needs_data(self) -> bool:
        """Whether it takes real inputs; how layers are wired shows on any."""
        return bool(self.wants - {Stat.SHARING})

    @property
    def whole(self) -> bool:
        """Whether it treats every layer there is, those outside the blocks and routers too, and each user of a tied
        weight by itself; then it has no targets."""
        return False

    @property
    def in_turn(self) -> bool:
        """Whether it takes the layers of a block in the order in which data reach them, those that share their input
        together, each time with statistics of the block as it then is. Such a pass changes layers only."""
        return False

    @property
    def surveys(self) -> bool:
        """Whether, taking its layers in turn, it is also told the second moments of those whose turn comes later, in
        the block before any has changed: to learn what they are to share (`Block.ahead`)."""
        return False

    @property
    def row_groups(self) -> int:
        """How many groups of a layer's output rows `Stat.GUIDED` tells apart; 0 where it is not asked for."""
        return 0

    @property
    def trained_copies(self) -> float:
        """How many float32 copies of the quantized weights that it treats, or of the plain ones that it `renews` (of a
        block's, unless `training`), it holds while it trains them, beside the model's own; fitted on runs, 0 where it
        trains none."""
        return 0.0

    @property
    def saved_copies(self) -> float:
        """How many float32 copies of the plain weights that it trains it keeps in a file, so that a killed run goes on
        from there."""
        return 0.0

    @property
    def trained_batches(self) -> int:
        """Calibration batches that it runs forward and back through what it treats; 0 where it does not train."""
        return 0

    def trained_rows(self, images: bool) -> int:
        """Tokens, or images, that it runs forward and back, where it is these that its settings bound, not batches."""
        return 0

    def fills(self) -> frozenset[Part]:
        """All parts of the layer that it fills."""
        return (self.also | {self.part}) - {Part.NONE}

    def precedes(self) -> frozenset[Part]:
        """All parts that may not be filled yet when it comes: `before`, and what rescaling would change. A pass that
        fills nothing comes before any that loses something, since errors are taken against what it makes, unless it
        trains again what they left."""
        if not self.part and not self.renews:
            return self.before | LOSSY
        return self.before | ({Part.VALUES} if self.rescales else frozenset())

    @property
    def held_models(self) -> float:
        """How many times the whole model is in memory in float32 while it works, beside what one batch keeps."""
        return 2.0 if self.training else 0.0

    def trials(self, blocks: int) -> tuple[float, float]:
        """How often it runs the calibration data through all of so many blocks, beside what `wants` takes, and through
        what comes after them."""
        return 0.0, 0.0

    @property
    def fits_outputs(self) -> bool:
        """Whether it fits a grid to what convolutions put out, once all passes are done (`with_outputs`)."""
        return False

    def with_outputs(self, layer: Layer, outputs: Histogram) -> Layer:
        """The finished layer with a grid for its outputs."""
        return layer

    def settle(self, chosen: Mapping[str, tuple[Pass, LayerSpec]]) -> Mapping[str, Pass]:
        """The passes, each with its overrides, for the layers of a segment that this one was chosen for, with what
        depends on all of them filled in: what layers share, say. Only those that change need be given back."""
        return {}

    @property
    def allots(self) -> bool:
        """Whether how much it does to a layer hangs on all the layers that it is for. Then the walk goes through the
        model once before, asks for a figure of each layer (`gauge`), and lets it settle its passes by these (`allot`).
        """
        return False

    def gauge(
        self, layers: Mapping[str, Layer], chosen: Mapping[str, Pass], stats: Mapping[str, LayerStats]
    ) -> dict[str, float]:
        """A figure for each of a segment's chosen layers that has one; stats: `Stat.MEAN_SQUARE` of the reached."""
        return {}

    def allot(self, chosen: Mapping[str, tuple[Pass, LayerSpec]], gauged: Mapping[str, float]) -> Mapping[str, Pass]:
        """The passes, each with its overrides, for all layers that this one was chosen for, settled by the figures of
        the whole model. Only those that change need be given back."""
        return {}

    def check(self, model: Model) -> None:
        """Raises: UnsupportedError for a kind of model that it cannot treat; asked before work starts."""

    @abstractmethod
    def plan(self, spec: LayerSpec) -> LayerSpec:
        """What the layer will be stored as, without its values."""

    @classmethod
    def build(cls, settings: Mapping[str, Any]) -> Self:
        """From settings as text or data. Raises: UsageError naming the setting, its value and what is allowed."""
        unknown = set(settings) - set(cls.model_fields)
        if unknown:
            name = sorted(unknown)[0]
            raise UsageError(f"{cls.name}: unknown setting '{name}'.{nearest(name, cls.model_fields)}")
        try:
            return cls(**settings)
        except ValidationError as error:
            raise UsageError(f"{cls.name}: {_wrong(error)}") from error

    def with_settings(self, settings: Mapping[str, Any]) -> Self:
        """The same pass with some settings changed and no patterns, for an override."""
        return self.build({**self._inherited(settings), **settings})

    def _inherited(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What was given to this pass and still counts beside an override's settings."""
        return {name: getattr(self, name) for name in self.model_fields_set - set(_PATTERNS)}

    def call(self) -> Call:
        """The pass as parsed text: the settings that were given, its own first, then the patterns."""
        order = sorted(type(self).model_fields, key=lambda name: name in Pass.model_fields)
        given = {name: getattr(self, name) for name in order if name in self.model_fields_set}
        return Call(self.name, (), {name: _printable(value) for name, value in given.items()})

    def __str__(self) -> str:
        return self.call().text()


def _wrong(error: ValidationError) -> str:
    """The first setting that cannot be, its value and what is allowed. Places in a list are those of the list."""
    first = error.errors()[0]
    where = ".".join(part for part in first["loc"] if isinstance(part, str)) or "settings"
    told, context = f"{where}={first['input']!r}", first.get("ctx", {})
    words: list[str] = []
    if first["type"] == "string_pattern_mismatch":
        words = str(context["pattern"]).strip("^()$").split("|")
    elif first["type"] == "literal_error":
        words = re.findall(r"'([^']*)'", str(context["expected"]))
    if words:
        return f"{told} is not allowed.{nearest(str(first['input']), words)}"
    return f"{told}: {first['msg'].replace('Input should', 'it should')}."


class LayerPass(Pass, ABC):
    """A pass that treats each layer by itself."""

    @abstractmethod
    def layer(self, layer: Layer, stats: LayerStats) -> Layer:
        """The changed layer. stats holds what `wants` asks for. Keeps name, users and shape."""


def _printable(value: Any) -> Any:
    if isinstance(value, Format):
        return parse_call(str(value))
    if isinstance(value, dict):
        return {key: _printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(item) for item in value]
    return value
