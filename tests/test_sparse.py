"""Pruned weights stored without their zeros: every value comes back, every byte counts, nothing is called faster."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import compress
from compress import export, hwprofiles
from compress.engine.layer_stats import LayerStats
from compress.engine.store import open_store
from compress.errors import InputError, UsageError
from compress.formats import parse_format
from compress.formats.base import QuantTensor
from compress.formats.sparse import Sparse
from compress.hwprofiles import Profile
from compress.layer import Layer, LayerKind, LayerSpec, Zeros
from compress.maths.masks import Pattern
from compress.models.model import Model
from compress.passes.magnitude import Magnitude
from compress.passes.pack_sparse import PackSparse
from compress.pipeline import Pipeline, planned
from compress.plan import latency_arms
from compress.profiles import as_profile
from compress.quality import verification
from compress.target import DENSE, plan_layers

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def pruned(pattern: str, rows: int = 7, columns: int = 36, dtype: torch.dtype = torch.float32, seed: int = 0) -> Layer:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    one = Layer("block.linear", LayerKind.LINEAR, weight, users=("block.linear",))
    return Magnitude(pattern=pattern).layer(one, LayerStats())


def packed(one: Layer, text: str = "sparse") -> QuantTensor:
    found = PackSparse(format=text).layer(one, LayerStats()).weight
    assert isinstance(found, QuantTensor)
    return found


def slow_bitmask(weight: torch.Tensor) -> tuple[list[list[int]], list[float]]:
    """Bytes of the mask and the values, weight by weight."""
    masks, values = [], []
    for row in weight.tolist():
        mask = [0] * ((len(row) + 7) // 8)
        for place, value in enumerate(row):
            if value != 0:
                mask[place // 8] |= 1 << (place % 8)
                values.append(value)
        masks.append(mask)
    return masks, values


def slow_two_of_four(weight: torch.Tensor) -> tuple[list[list[int]], list[list[float]]]:
    """Bytes of the places and the values, run by run: those that are not zero, then zeros from the left."""
    all_places, all_values = [], []
    for row in weight.tolist():
        row = [*row, *[0.0] * (-len(row) % 4)]
        places, values = [], []
        for start in range(0, len(row), 4):
            run = row[start : start + 4]
            chosen = sorted(range(4), key=lambda place: (run[place] == 0, place))[:2]
            places += sorted(chosen)
            values += [run[place] for place in sorted(chosen)]
        bits = [0] * ((2 * len(places) + 7) // 8)
        for number, place in enumerate(places):
            bits[number // 4] |= place << 2 * (number % 4)
        all_places.append(bits)
        all_values.append(values)
    return all_places, all_values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 3, 36, 70])
def test_a_bitmask_holds_each_weight_that_is_not_zero_where_it_stands(columns: int, dtype: torch.dtype) -> None:
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[torch.rand(5, columns, generator=torch.Generator().manual_seed(2)) < 0.4] = 0
    found = packed(Layer("a", LayerKind.LINEAR, weight))
    masks, values = slow_bitmask(weight)
    assert found.tensors["bitmask"].tolist() == masks
    assert found.tensors["values"].dtype == dtype
    assert found.tensors["values"].tolist()[: len(values)] == values
    assert torch.equal(found.dequantize().to(dtype), weight)
    assert len(found.tensors["values"]) - len(values) <= 1  # density in steps of 1/10000


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [4, 8, 36, 100])
def test_two_of_four_holds_two_values_and_their_places_of_each_run(columns: int, dtype: torch.dtype) -> None:
    one = pruned("2:4", columns=columns, dtype=dtype)
    assert isinstance(one.weight, torch.Tensor)
    one.weight[0, :4], one.weight[1, :3] = 0, 0  # runs with fewer
    found = packed(one, "sparse(mask=2:4)")
    places, values = slow_two_of_four(one.weight)
    assert found.tensors["places"].tolist() == places and found.tensors["values"].tolist() == values
    assert torch.equal(found.dequantize().to(dtype), one.weight)


def test_columns_that_are_no_multiple_of_four_are_filled_up() -> None:
    weight = torch.tensor([[0.0, 3.0, 0.0, 4.0, 5.0, 6.0], [0.0, 0.0, 0.0, 0.0, 0.0, 7.0]])
    found = packed(Layer("a", LayerKind.LINEAR, weight), "sparse(mask=2:4)")
    assert torch.equal(found.dequantize(), weight) and found.tensors["values"].shape == (2, 4)


def test_every_byte_is_counted_and_half_of_16_bits_is_9_bits_in_either_layout() -> None:
    one = pruned("2:4", 64, 128, torch.float16)
    for text in ("sparse", "sparse(mask=2:4)"):
        found = packed(one, text)
        assert found.nbytes == sum(tensor.nbytes for tensor in found.tensors.values()) == 64 * 128 * 9 // 8
        assert found.nbytes == found.format.stored_bytes(found.shape)
        assert found.bits_per_weight == 9.0


def test_negative_zero_is_a_zero_and_what_is_not_a_number_is_kept() -> None:
    weight = torch.tensor([[-0.0, float("nan"), 1.0, 0.0]])
    found = parse_format("sparse(density=0.5, values=float32)")
    assert isinstance(found, Sparse)
    decoded = found.packed(weight).dequantize()
    assert bool(decoded[0, 1].isnan()) and decoded[0, 2] == 1 and not torch.signbit(decoded[0, 0])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sparse(mask=csr)", "unknown mask 'csr'"),
        ("sparse(density=0)", "no share of the weights"),
        ("sparse(density=1.0)", "no share of the weights"),
        ("sparse(density=0.12345)", "steps of 0.0001"),
        ("sparse(density=half)", "no share of the weights"),
        ("sparse(mask=2:4, density=0.5)", "Leave density=0.5 out"),
        ("sparse(values=int8)", "unknown values 'int8'"),
        ("sparse(bitmask)", "settings by name"),
        ("sparse(group=8)", "unknown setting 'group'"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_words(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse_format(text)


def test_a_mask_that_names_more_values_than_are_stored_is_a_damaged_file() -> None:
    found = packed(pruned("layer"))
    found.tensors["bitmask"].fill_(255)
    with pytest.raises(InputError, match="The file is damaged"):
        found.dequantize()


def spec(zeros: Zeros | None = None) -> LayerSpec:
    return LayerSpec("a", LayerKind.LINEAR, (8, 16), ("a",), zeros=zeros)


def test_a_plan_knows_the_size_where_a_pass_before_says_how_much_is_left() -> None:
    found = PackSparse().plan(Magnitude(sparsity=0.75).plan(spec()))
    assert str(found.format) == "sparse(mask=bitmask, density=0.25, values=float32)"
    for pattern, kept in [("row", 8 * 8), ("1:4", 32), ("4x4", 64), ("layer", 64)]:
        assert Magnitude(pattern=pattern).plan(spec()).zeros == Zeros(Pattern.parse(pattern), kept)


def test_two_of_four_is_known_by_its_pattern() -> None:
    holding = {"2:4", "1:4", "1:2", "2:8", "1:12"}
    for text in ("2:4", "1:4", "1:2", "2:8", "1:12", "3:4", "4:8", "2:6", "2:3", "layer", "row", "4x4"):
        assert Pattern.parse(text).is_two_of_four == (text in holding), text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("pack_sparse", "no pass before it prunes layer"),
        ("magnitude(targets=[*.mlp.*]), pack_sparse", "no pass before it prunes layer .*self_attn.*ignore="),
        ("magnitude, pack_sparse(format=sparse(mask=2:4))", "pattern=layer, which may leave more than two of four"),
        ("magnitude, pack_sparse(format=int4)", "format=int4.* is no layout for pruned weights"),
        ("magnitude, rtn(format=int4(group=32)), pack_sparse", "both set the weight format"),
        ("magnitude, pack_sparse, gptq(format=int4(group=32))", "both set the weight format"),
        ("pack_sparse(format=sparse(density=0.5)), magnitude", "magnitude must come before pack_sparse"),
        ("rtn(format=sparse)", "says no density"),
    ],
)
def test_what_cannot_be_packed_is_refused_before_the_work(text: str, told: str, model: Model) -> None:
    with pytest.raises(UsageError, match=told):
        planned(Pipeline.parse(text).resolve(model))


@pytest.mark.parametrize(
    ("one", "text", "told"),
    [
        (pruned("layer"), "sparse(mask=2:4)", r"not 2:4: \d+ of its 63 runs .*50 % of its weights are zero"),
        (pruned("layer"), "sparse(density=0.4)", "not pruned so far: 50 % .* for at least 60 %.*overrides"),
        (pruned("layer"), "sparse(values=float16)", "values=float16 would change 126 weights of block.linear"),
        (replace(pruned("layer"), weight=torch.ones(2, 4).double()), "sparse", "weights are float64"),
    ],
)
def test_a_weight_that_is_not_as_it_is_to_be_stored_is_refused_with_what_was_found(
    one: Layer, text: str, told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        PackSparse(format=text).layer(one, LayerStats())


def test_it_says_what_it_came_to_and_where_dense_would_be_smaller() -> None:
    one = pruned("layer", 8, 64, torch.float16)
    told = PackSparse().layer(one, LayerStats()).notes[0]
    assert told.startswith("50 % of the weights are zero, stored in 576 bytes, 0.562 of the dense weight's; size only")
    few = Magnitude(sparsity=0.02).layer(replace(one, weight=one.float_weight().half() + 9), LayerStats())
    told = PackSparse().layer(few, LayerStats()).notes[0]
    assert "stored in 1070 bytes; dense they are 1024, which is no more: leave the layer out" in told


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path]) -> Model:
    return compress.load(make_llama("sparse", num_hidden_layers=1, intermediate_size=96, tie_word_embeddings=False))


@pytest.fixture(scope="module")
def packed_model(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("store")
    text = "magnitude(pattern=2:4, targets=[*.self_attn.*])"
    text += ", pack_sparse(format=sparse(mask=2:4), targets=[*.self_attn.*])"
    text += ", magnitude(sparsity=0.75, targets=[*.mlp.*, lm_head]), pack_sparse(targets=[*.mlp.*, lm_head])"
    return Pipeline.parse(text).run(model, folder=folder).model


def test_a_store_holds_it_smaller_and_gives_it_back(packed_model: Model, model: Model) -> None:
    again = open_store(packed_model.path)
    assert packed_model.source_bytes < 0.75 * model.source_bytes
    for name, spec in again.structure.layers.items():
        weight, source = again.layer(spec).float_weight(), model.layer(model.structure.layers[name]).float_weight()
        assert torch.equal(weight[weight != 0], source[weight != 0]), name
        assert spec.format is None or float((weight == 0).float().mean()) >= 0.5


def here(name: str) -> Profile:
    """A CPU's profile for a target."""
    found = as_profile(hwprofiles.load("cpu-x86-avx2"), name)
    assert found.cpu is not None
    return found.model_copy(update={"cpu": found.cpu.model_copy(update={"threads": 1})})


@pytest.mark.parametrize("name", ["onnx", "native", "checkpoint"])
def test_each_target_writes_it_and_says_what_it_gains(
    name: str, packed_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, profile = export.find(name), here(name)
    answers = plan_layers(target, packed_model.structure.layers, profile)
    notes = {layer: answer.note for layer, answer in answers.items()}  # type: ignore[union-attr]
    sparse = {layer for layer, spec in packed_model.structure.layers.items() if spec.format is not None}
    wanted = "size only" if name == "native" else DENSE
    assert len(sparse) == 8 and all((wanted in note) == (layer in sparse) for layer, note in notes.items())
    assert ("sparse-24-bitmask are gone" in notes["lm_head"]) == (name == "checkpoint")
    lowered = target.write(packed_model, profile, tmp_path / "out")
    monkeypatch.setattr(verification, "GREEDY_TOKENS", 4)
    ids = torch.randint(0, packed_model.vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    found = verification.verify_export(packed_model, lowered.folder, profile, ids, lowered.bounds)
    assert found.agrees and found.level == "ran"
    size = sum(path.stat().st_size for path in lowered.folder.rglob("*") if path.is_file())
    predicted = target.predict_bytes(packed_model.structure.layers.values(), packed_model, profile)
    assert predicted == pytest.approx(size, rel=0.02 if name != "onnx" else 0.2)


def test_only_the_target_that_leaves_zeros_out_is_smaller(packed_model: Model, model: Model) -> None:
    sizes = {}
    for name in ("onnx", "native", "checkpoint"):
        target, profile = export.find(name), here(name)
        for each in (packed_model, model):
            sizes[name, each is model] = target.predict_bytes(each.structure.layers.values(), each, profile)
    assert sizes["native", False] < 0.8 * sizes["native", True]
    assert sizes["onnx", False] == sizes["onnx", True] and sizes["checkpoint", False] == sizes["checkpoint", True]


@pytest.mark.parametrize("name", ["onnx", "native", "checkpoint"])
@pytest.mark.parametrize("rest", ["", ", pack_sparse", ", pack_sparse(format=sparse(mask=2:4))"])
def test_no_speed_is_predicted_of_zeros(name: str, rest: str, model: Model) -> None:
    """No kernel here reads fewer bytes or multiplies less by them."""
    resolution = Pipeline.parse(f"magnitude(pattern=2:4){rest}").resolve(model)
    specs, profile = planned(resolution), here(name)
    variant, baseline = latency_arms(model, specs, plan_layers(export.find(name), specs, profile), profile)
    assert variant.parts == baseline.parts


def test_compressed_tensors_has_no_reader_of_sparse_weights() -> None:
    """When it has one again, `checkpoint` can write for it."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    known = {name.replace("_", "-") for name in compressors.BaseCompressor.registered_names()}
    assert "pack-quantized" in known and not [name for name in known if "sparse" in name or "24" in name]
