"""What the `native` target takes, and how a layer is stored for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

from compress import hwprofiles
from compress.formats import name_of
from compress.formats.codebook import Codebook
from compress.formats.sparse import Sparse
from compress.formats.trellis import Trellis
from compress.honours import Honours
from compress.hwprofiles import KernelSpeed, Profile, Runtime
from compress.kernels.library import chosen_path
from compress.layer import LayerKind, LayerSpec
from compress.records import Bounds, Kernel
from compress.target import Refusal

RUNTIME = "torch"
TAKEN = frozenset({LayerKind.LINEAR, LayerKind.EMBEDDING, LayerKind.EXPERT})
HONOURS = Honours(TAKEN, bias=frozenset({LayerKind.LINEAR}))
# For few tokens the kernels look products of inputs and entries up in tables of 10 or 12 bits: 8e-4 (AVX-512 VBMI) and
# 4e-3 (AVX2) of the largest logit on a Llama of 8 blocks; more where a router of experts decides otherwise by them.
# With the path "torch" they are exact.
ROUNDED_TABLES = Bounds(shipped=0.25)
SPARSE = "size only: its zeros are filled in when it is loaded, so it takes as much memory and time as a dense weight"


@dataclass(frozen=True)
class Choice:
    """See compress.target.Choice."""

    operator: str
    kernel: Kernel
    stored_bytes: int
    note: str = ""
    rounds_inputs: bool = False
    decodes: bool = False
    speed: KernelSpeed | None = None
    bounds: Bounds = field(default_factory=Bounds)


def runtime_of(profile: Profile) -> Runtime | Refusal:
    """The profile's torch; refuses a profile without."""
    found = profile.runtimes.get(RUNTIME)
    if found is not None:
        return found
    return Refusal(f"{profile.id} has no runtime {RUNTIME}: take a profile that has it ({_having()})")


@cache
def _having() -> str:
    """The shipped profiles with the runtime."""
    return ", ".join(name for name in hwprofiles.names() if RUNTIME in hwprofiles.load(name).runtimes)


def choose(spec: LayerSpec, profile: Profile) -> Choice | Refusal:
    """How a layer is stored, or why it is not."""
    runtime = runtime_of(profile)
    if isinstance(runtime, Refusal):
        return runtime
    if lacking := HONOURS.lacking(spec):
        return Refusal(f"this target does not compute {lacking}; export for onnx (--target onnx)")
    form = spec.format
    if form is None:
        return Choice("dense", "fast", spec.source_bytes + spec.bias_bytes)
    if isinstance(form, Sparse):
        size = form.stored_bytes(spec.shape) + spec.bias_bytes
        return Choice("sparse, dense in memory", "works", size, SPARSE, decodes=True)
    if not isinstance(form, Codebook):
        other = "checkpoint-exl3" if isinstance(form, Trellis) else "onnx"
        return Refusal(f"{form}: this target takes codebooks and sparse weights; export for {other} (--target {other})")
    chosen_path()  # a wrong COMPRESS_KERNELS is told before the work
    if spec.kind is LayerKind.EXPERT:
        reason = f"{form}: a mixture's experts are computed from one dense tensor here; leave them in float"
        return Refusal(reason, usage=False)
    support = runtime.support("lookup", form.bits, format=name_of(form))
    if support.state == "no":
        return Refusal(f"{form}: {support.note.removesuffix('.')}", usage=False)
    size = form.stored_bytes(spec.shape) + spec.bias_bytes
    note = "" if support.state == "fast" else support.note
    return Choice(support.kernel, support.state, size, note, speed=support.speed(), bounds=ROUNDED_TABLES)
