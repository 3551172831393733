"""AQLM's and VPTQ's files: read back by the tools themselves, where they are installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

import compress
from compress.export.checkpoint import codebook_readers, readers, runtime
from compress.export.checkpoint.layout import Packed
from compress.export.checkpoint.target import AQLM, VPTQ
from compress.formats.codebook import Codebook
from compress.models.model import Model
from helpers.layouts import COLUMNS, layer_of, spec_of, verified, written

NO_AQLM = "aqlm, the reader of this layout, is not installed"
NO_VPTQ = "vptq, the reader of this layout, is not installed (or something that it imports)"
WIDTHS = range(1, 17)


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path]) -> Model:
    return compress.load(make_llama(num_hidden_layers=1, attention_bias=True))


@pytest.mark.parametrize("bits", WIDTHS)
def test_aqlm_itself_decodes_the_very_weights(bits: int) -> None:
    aqlm = pytest.importorskip("aqlm", reason=NO_AQLM)
    layer = layer_of(Codebook(vector=3, entries=1 << bits, stages=2))
    rows, columns = layer.shape
    sizes = {"in_group_size": 3, "out_group_size": 1, "num_codebooks": 2, "nbits_per_codebook": bits}
    reader = aqlm.QuantizedLinear(columns, rows, **sizes, bias=False, dtype=torch.float32)
    reader.load_state_dict(AQLM.layout.tensors(layer))
    holder = torch.nn.Sequential(reader)
    codebook_readers.decode_aqlm(holder)
    assert torch.equal(holder[0].weight, layer.float_weight())
    if bits != 8:  # whose kernel sums in another order: see below
        assert torch.equal(reader(torch.eye(columns)).T, layer.float_weight())


@pytest.mark.parametrize("form", ["codebook(vector=8, entries=16)", "codebook(vector=4, entries=512, stages=1)"])
def test_transformers_runs_an_aqlm_folder(model: Model, tmp_path: Path, form: str) -> None:
    pytest.importorskip("aqlm", reason=NO_AQLM)
    pytest.importorskip("accelerate", reason="accelerate, which transformers needs for aqlm, is not installed")
    found = verified(model, AQLM, form, tmp_path)
    assert found.level == "ran" and "with aqlm" in found.runtime
    assert_loads_as_any_model(tmp_path)


@pytest.mark.usefixtures("one_numba_thread")
def test_aqlms_own_kernel_for_256_entries_gives_the_logits_within_float32(model: Model, tmp_path: Path) -> None:
    pytest.importorskip("aqlm", reason=NO_AQLM)
    written(AQLM, model, "rtn(format=codebook(vector=8, entries=256, stages=1))", tmp_path)
    assert_loads_as_any_model(tmp_path)


def assert_loads_as_any_model(folder: Path) -> None:
    """As a user would have it, by aqlm's own forward pass."""
    user = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(3, 256, (1, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = user(ids).logits
    expected = torch.from_numpy(runtime.Session(folder, 1).logits(ids.numpy()))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def one_numba_thread() -> Iterator[None]:
    """aqlm's kernel adds into one output from all of its threads."""
    numba = pytest.importorskip("numba", reason="numba, which aqlm computes with on a CPU, is not installed")
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    yield
    numba.set_num_threads(before)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("stages", "groups", "scale"), [(1, 1, "none"), (2, 1, "column"), (2, 2, "column")])
def test_vptqs_own_layer_decodes_the_very_weights(bits: int, stages: int, groups: int, scale: str) -> None:
    pytest.importorskip("vptq", reason=NO_VPTQ, exc_type=ImportError)
    form = Codebook(vector=4, entries=1 << bits, stages=stages, axis="out", groups=groups, scale=scale)
    layer = layer_of(form)
    config = VPTQ.layout.config([Packed("m", spec_of(form, *layer.shape))], [])
    tensors = {f"m.{name}": tensor for name, tensor in VPTQ.layout.tensors(layer).items()}
    assert torch.equal(codebook_readers.decode_vptq(tensors, config)["m.weight"], layer.float_weight())
    from vptq import VQuantLinear

    reader = VQuantLinear(**config["config_for_layers"]["m"], enable_proxy_error=False, dtype=torch.float32)
    reader.load_state_dict(VPTQ.layout.tensors(layer))
    if not torch.cuda.is_available():  # where its kernels take over, which a CPU has not
        assert torch.equal(reader(torch.eye(COLUMNS)).T, layer.float_weight())


def test_vptqs_layers_read_all_of_a_folder(model: Model, tmp_path: Path) -> None:
    pytest.importorskip("vptq", reason=NO_VPTQ, exc_type=ImportError)
    found = verified(model, VPTQ, "codebook(vector=6, entries=16, stages=2, out)", tmp_path)
    assert found.level == "checked" and found.notes[0] == readers.VPTQ_BY_LAYERS and "by vptq" in found.runtime
