"""What a hardware profile may say: frozen records, closed to unknown keys, units in the names of the numbers."""

from __future__ import annotations

import math
from collections import Counter
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

# weight_and_activation rounds inputs at each call; weight_and_static_activation to a grid fixed beforehand
Use = Literal["weight_only", "weight_and_activation", "weight_and_static_activation", "lookup", "embedding", "float"]
Evidence = Literal["measured", "vendor", "derived", "unchecked"]
# tf32: float32 matrices multiplied with 10 bits of mantissa; float8 and float4: matrices of E4M3 and E2M1
Dtype = Literal["float32", "tf32", "float16", "bfloat16", "float8", "int8", "int4", "float4"]
Element = Literal["integer", "float"]

Count = Annotated[int, Field(strict=True, ge=1)]
Bits = Annotated[int, Field(strict=True, ge=1, le=64)]
Text = Annotated[str, Field(min_length=1)]
Word = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
Ident = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
# YAML reads a bare `no` as false.
State = Annotated[Literal["fast", "works", "no"], BeforeValidator(lambda found: "no" if found is False else found)]


class ProfileError(ValueError):
    """A profile that does not exist, cannot be read or says something it may not; the message says what to do."""


def nearest(name: str, allowed: tuple[str, ...]) -> str:
    """A sentence that offers what is allowed: ' Did you mean X? Allowed: …'."""
    close = get_close_matches(name, allowed, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"{hint} Allowed: {', '.join(sorted(allowed)) or 'none'}."


def _without_empty(told: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in told.items() if value or key not in keys}


class Closed(BaseModel):
    """Frozen and without keys of its own invention."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Figure(Closed):
    """One number, in the unit its key names, with where it comes from."""

    value: Annotated[float, Field(strict=True, gt=0)]
    state: Evidence
    source: Text


class Match(Closed):
    """How `detect` recognises the machine, beside the flags of `Profile.isa`. The highest priority that fits wins.

    cpu: patterns, with `*`, of which the name of its processor must fit one; empty: any name.
    """

    architecture: tuple[Literal["x86_64", "aarch64"], ...] = Field(min_length=1)
    cpu: tuple[Text, ...] = ()
    forbidden: tuple[Text, ...] = ()
    priority: Annotated[int, Field(strict=True, ge=0)] = 0


class Cpu(Closed):
    """Cores. `threads` null: every physical core that the process may use (`machine()["threads"]`)."""

    threads: Count | None = None
    clock_ghz: Figure


class Gpu(Closed):
    """NVIDIA's name for what a GPU can execute: "8.9" is SM 89."""

    compute_capability: Annotated[str, Field(pattern=r"^[0-9]{1,2}\.[0-9]$")]

    @property
    def sm(self) -> int:
        """The same as one number: 89, 120."""
        return int(self.compute_capability.replace(".", ""))

    @property
    def has_sparse_cores(self) -> bool:
        """Whether its tensor cores multiply 2:4 weights: PTX's mma.sp "requires sm_80 or higher". That a chip has them
        is no figure of speed: peaks are dense."""
        return self.sm >= 80


class Memory(Closed):
    """Main memory. `capacity_bytes` null: of a class of machines, so unknown here."""

    capacity_bytes: Figure | None = None
    bandwidth_gb_s: Figure


class Peak(Closed):
    """Dense peaks: a multiply-add counts as two operations, for int8 as well; never a figure for sparse weights.

    Of a CPU per core, of a GPU for the whole device.
    """

    dense_gflops_per_core: dict[Dtype, Figure] = Field(default_factory=dict)
    dense_gflops: dict[Dtype, Figure] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_of_both(self) -> Peak:
        if bool(self.dense_gflops_per_core) == bool(self.dense_gflops):
            raise ValueError("give dense_gflops_per_core (of a CPU) or dense_gflops (of a GPU), one of the two")
        return self


class KernelSpeed(Closed):
    """How fast a kernel is, on the whole machine and with layers that no cache holds. A product of r rows takes stored
    bytes / kernel_gb_s, plus the operations of r - 1 rows / kernel_gflops.

    kernel_gb_s: stored bytes a second at one row; kernel_gflops: billions of operations a second of the rows beyond
    the first, a multiply-add being two. block: input columns per scale that it was measured with; null: one scale per
    output channel, or none.
    """

    block: Count | None = None
    kernel_gb_s: Figure
    kernel_gflops: Figure


class Lowering(Closed):
    """One operator of a runtime and how well it runs.

    `fast` pays off; `works` runs, and may save size only; `no` is refused.
    `blocks`: input columns per scale that the kernel knows; empty: one scale per output channel.
    `accuracy_level`: the operator's attribute of that name, to be written as it stands here.
    `speeds`: what predictions go by instead of the machine's peaks, one per block; empty where it was not measured.
    """

    state: State
    kernel: str
    blocks: tuple[Count, ...] = ()
    accuracy_level: Annotated[int, Field(strict=True, ge=0, le=4)] | None = None
    evidence: Evidence
    note: str = ""
    source: Text
    speeds: tuple[KernelSpeed, ...] = ()

    def speed(self, block: int = 0) -> KernelSpeed | None:
        """The figures of the measured block that is nearest by ratio, the smaller of two; block 0: a scale per output
        channel, or none."""
        far = ((abs(math.log((one.block or 1) / (block or 1))), one.block or 0, one) for one in self.speeds)
        return min(far, key=lambda each: each[:2], default=(0, 0, None))[2]


class FormatSupport(Lowering):
    """A lowering for some widths of code. `stored_bits` null: each code takes the bits that it has.

    element: what a code stands for, an integer or a small float (FP8, FP4).
    format: the one format that the entry is for, named as recipes do without settings (`nf4`, `vptq`), where two of
    the same width run on different kernels. It goes before an entry without one, which is for all others; its state
    `no` refuses that format alone.
    """

    use: Use
    format: Word | None = None
    element: Element = "integer"
    bits: tuple[Bits, ...] = Field(min_length=1)
    stored_bits: Bits | None = None

    @model_validator(mode="after")
    def _consistent(self) -> FormatSupport:
        if self.state != "no" and not self.kernel:
            raise ValueError(f"state '{self.state}' needs the name of its kernel")
        if self.stored_bits is not None and self.stored_bits < max(self.bits):
            raise ValueError(f"stored_bits {self.stored_bits} cannot hold codes of {max(self.bits)} bits")
        if self.state == "no" and self.speeds:
            raise ValueError("state 'no' is refused, so it has no speeds")
        timed = [one.block for one in self.speeds]
        if len(set(timed)) < len(timed):
            raise ValueError("speeds lists a block twice")
        if foreign := [block for block in timed if (block not in self.blocks if self.blocks else block is not None)]:
            raise ValueError(f"speeds: block {foreign[0]} is none of blocks, {list(self.blocks)}")
        return self

    @model_serializer(mode="wrap")
    def _dumped(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `format` and `speeds` where there are none, so that digests are those of before the keys."""
        return _without_empty(dump(self), "format", "speeds")

    def describe(self) -> str:
        """`weight_only 4 bit (MatMulNBits, block 16, 32)`."""
        bits = ", ".join(map(str, self.bits))
        blocks = ", block " + ", ".join(map(str, self.blocks)) if self.blocks else ""
        element = " float" if self.element == "float" else ""
        form = f" {self.format}" if self.format else ""
        return f"{self.use}{form} {bits} bit{element} ({self.kernel}{blocks})"


class Support(Lowering):
    """The answer for one use and width of code. `stored_bits`: the container that a code takes in the file; format: of
    the entry that answered."""

    use: Use
    format: Word | None = None
    bits: int
    stored_bits: int
    element: Element = "integer"


class Runtime(Closed):
    """One runtime on this machine: its ceilings, and the operator for each use of a weight.

    node_us: microseconds that a node of a graph takes beyond what it computes; null where it was not measured.
    """

    opset: Count
    ir_version: Count
    provider: Text
    float_dtype: Dtype
    min_version: Text
    checked_with: str = ""
    node_us: Figure | None = None
    formats: tuple[FormatSupport, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_answer(self) -> Runtime:
        count = Counter((entry.use, entry.format, bits, entry.element) for entry in self.formats for bits in entry.bits)
        twice = [
            f"{' '.join(filter(None, (use, form)))} {bits} bit"
            for (use, form, bits, _), times in count.items()
            if times > 1
        ]
        if twice:
            raise ValueError(f"formats lists twice: {', '.join(twice)}")
        return self

    @model_serializer(mode="wrap")
    def _dumped(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As of a line of `formats`."""
        return _without_empty(dump(self), "node_us")

    def support(self, use: Use, bits: int, element: Element = "integer", format: str | None = None) -> Support:
        """Which operator a weight of this use and width runs on: the entry for the format of that name, else the one
        without a name. What is not listed is `no`, naming what is fast."""
        for named in dict.fromkeys((format, None)):
            for entry in self.formats:
                if (entry.use, entry.element, entry.format) == (use, element, named) and bits in entry.bits:
                    told = entry.model_dump(exclude={"bits", "stored_bits"})
                    return Support(**told, bits=bits, stored_bits=entry.stored_bits or bits)
        what = f"{bits} bit{' float' if element == 'float' else ''}"
        return Support(
            use=use,
            format=format,
            bits=bits,
            stored_bits=bits,
            element=element,
            state="no",
            kernel="",
            evidence="derived",
            note=f"no {use} kernel for {what}. Fast here: {self._fast(use)}.",
            source="not listed in the profile",
        )

    def _fast(self, use: Use) -> str:
        fast = [entry for entry in self.formats if entry.state == "fast"]
        same = [entry for entry in fast if entry.use == use]
        return "; ".join(entry.describe() for entry in same or fast) or "nothing"


class Grid(Closed):
    """What to time, as (batch, prompt length)."""

    prefill: tuple[tuple[Count, Count], ...] = ()
    decode: tuple[tuple[Count, Count], ...] = ()


class Profile(Closed):
    """One machine, or a class of machines. `isa`: the flags, as Linux spells them, that it must have.

    `detect` null: never picked by itself. `cpu` and `gpu`: what the model runs on there; the other may be left out.
    """

    schema_version: Literal[1]
    id: Ident
    name: Text
    vendor: Text
    kind: Literal["cpu", "gpu", "soc"]
    isa: tuple[Text, ...] = ()
    detect: Match | None = None
    cpu: Cpu | None = None
    gpu: Gpu | None = None
    memory: Memory
    peak: Peak
    target: Ident
    grid: Grid
    runtimes: dict[Ident, Runtime] = Field(min_length=1)

    @model_validator(mode="after")
    def _has_its_processor(self) -> Profile:
        if self.kind != "gpu" and self.cpu is None and (self.kind == "cpu" or self.gpu is None):
            raise ValueError(f"a profile of kind {self.kind} needs the key cpu")
        if self.kind == "gpu" and self.gpu is None:
            raise ValueError("a profile of kind gpu needs the key gpu")
        return self

    def runtime(self, name: str) -> Runtime:
        """The runtime of this name, or a `ProfileError` that lists those there are."""
        if name not in self.runtimes:
            raise ProfileError(f"profile {self.id} has no runtime '{name}'.{nearest(name, tuple(self.runtimes))}")
        return self.runtimes[name]
