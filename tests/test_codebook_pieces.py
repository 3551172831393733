"""Codebooks with outlier columns, a bias and an order of columns: stored, counted, decoded, solved, run and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress import hwprofiles
from compress.engine.layer_stats import LayerStats
from compress.errors import UsageError
from compress.export.checkpoint import codebook_readers
from compress.export.checkpoint.layout import Choice, Packed
from compress.export.checkpoint.target import AQLM, VPTQ
from compress.export.native import loading, modules
from compress.export.native import target as native
from compress.formats import codebook_columns, parse_format
from compress.formats.base import QuantTensor
from compress.formats.codebook import Codebook
from compress.inputs.datasets import Calibration, calibrate
from compress.kernels import GpuProduct, Part, PiecedProduct, kernel_paths
from compress.layer import Layer, LayerKind
from compress.models.model import Model
from compress.passes.aqlm import Aqlm
from compress.passes.vptq import Vptq
from compress.pipeline import Pipeline, planned
from compress.profiles import as_profile
from compress.quality.verification import verify_export
from compress.speed.footprint import deployable_bytes
from compress.target import Refusal
from compress.training.soft_codebook import SoftCodebook
from helpers import coded
from helpers.coded import IN, OUT, layer, proxy, stats
from helpers.gptq_twin import inputs, moments
from helpers.layouts import layer_of, spec_of

NO_VPTQ = "vptq, the reader of this layout, is not installed (or something that it imports)"
FORMS = (
    "codebook(vector=4, entries=16, stages=2, bias=row)",
    "codebook(vector=4, entries=16, stages=2, bias=column)",
    "codebook(vector=3, entries=8, stages=1, permuted)",
    "codebook(vector=3, entries=8, stages=1, outliers=0.05, outlier_vector=3, bias=row)",
    "codebook(vector=2, entries=8, stages=2, scale=column, outliers=0.3, bias=column, permuted)",
    "codebook(vector=5, entries=4, stages=1, out, outliers=0.1, outlier_vector=4, outlier_entries=16)",
    "codebook(vector=4, entries=512, stages=1, out, groups=3, outliers=0.07, bias=column, permuted, share=4)",
    "codebook(vector=4, entries=8, stages=2, out, scale=none, outliers=0.07, outlier_entries=1024, bias=row)",
)


def form_of(text: str) -> Codebook:
    form = parse_format(text)
    assert isinstance(form, Codebook)
    return form


def weight_of(found: Layer) -> QuantTensor:
    assert isinstance(found.weight, QuantTensor)
    return found.weight


def sample(text: str) -> tuple[Codebook, QuantTensor]:
    """13 rows that no vector divides, and a number of columns that fits."""
    form = form_of(text)
    columns = next(size for size in range(42, 60) if form.fits(size) and size % form.main.step == 0)
    return form, weight_of(layer_of(form, 13, columns))


@pytest.mark.parametrize("text", FORMS)
def test_the_text_tells_all_and_every_stored_byte_is_counted(text: str) -> None:
    form, stored = sample(text)
    assert str(form) == text and parse_format(str(form)) == form
    found = {name: (tuple(each.shape), each.dtype) for name, each in stored.tensors.items()}
    assert found == form.tensor_specs(stored.shape)
    assert stored.nbytes == form.stored_bytes(stored.shape)
    assert sum(each.nbytes for each in stored.tensors.values()) >= stored.nbytes
    assert all(each.is_contiguous() for each in stored.tensors.values())


@pytest.mark.parametrize("text", FORMS)
def test_every_weight_decodes_as_the_plain_formula_says(text: str) -> None:
    form, stored = sample(text)
    (rows, columns), tensors = stored.shape, stored.tensors
    order = codebook_columns.order_of(form, tensors, columns)
    assert sorted(order.tolist()) == list(range(columns))
    count = codebook_columns.outlier_count(form, columns)
    main = form.main.unpack(form.pieces(tensors, stored.shape)[-1].tensors, (rows, columns - count))
    aside = form.pieces(tensors, stored.shape)[0]
    outliers = aside.form.unpack(aside.tensors, aside.shape)
    expected = torch.empty(rows, columns)
    for place, column in enumerate(order.tolist()):
        own, at = (outliers, place) if place < count else (main, place - count)
        vector, width = own.codebook.shape[3], (count if place < count else columns - count)
        for row in range(rows):
            across, unit, along = (
                (row, at // vector, at % vector) if form.axis == "in" else (row // vector, at, row % vector)
            )
            group = at // (width // len(own.codebook))
            codes = own.codes[across, unit]
            value = sum(float(own.codebook[group, stage, int(code), along]) for stage, code in enumerate(codes))
            if form.scale == "column":
                value *= float(tensors["scale"][column])
            elif form.scale == "row" and place >= count:
                value *= float(tensors["scale"][row])
            if form.bias == "column" or (form.bias == "row" and place >= count):
                value += float(tensors["bias"][column if form.bias == "column" else row])
            expected[row, column] = value
    assert torch.allclose(stored.dequantize(), expected, atol=1e-5)


@pytest.mark.parametrize("text", FORMS)
def test_what_is_taken_to_pieces_is_joined_again_to_the_same_bytes(text: str) -> None:
    form, stored = sample(text)
    again = codebook_columns.joined(form, form.pieces(stored.tensors, stored.shape))
    assert again.keys() == stored.tensors.keys()
    assert all(torch.equal(again[name], each) for name, each in stored.tensors.items())
    with pytest.raises(ValueError, match="would be lost"):
        form.unpack(stored.tensors, stored.shape)


def test_more_columns_than_half_of_two_bytes_keep_their_places() -> None:
    form = Codebook(vector=1, entries=2, stages=1, permuted=True)
    order = torch.randperm(40000, generator=torch.Generator().manual_seed(0))
    piece = form.pieces(weight_of(layer_of(form, 1, 40000)).tensors, (1, 40000))[0]._replace(columns=order)
    stored = codebook_columns.joined(form, [piece])
    assert stored["order"].dtype == torch.int16 and torch.equal(codebook_columns.order_of(form, stored, 40000), order)


def test_outliers_are_so_many_that_the_others_make_whole_groups_of_whole_vectors() -> None:
    count = codebook_columns.outlier_count
    assert count(form_of("codebook(vector=8, outliers=0.01)"), 256) == 8
    assert count(form_of("codebook(vector=8, out, outliers=0.01)"), 256) == 3
    assert count(form_of("codebook(vector=8, out, groups=4, outliers=0.01)"), 256) == 4
    with pytest.raises(UsageError, match=r"outliers, rounded up .* are all 64. Give a smaller share"):
        form_of("codebook(vector=8, outliers=0.9999)").run(64)
    assert count(form_of("codebook(vector=8)"), 256) == 0
    assert not form_of("codebook(vector=8, outliers=0.99)").fits(16)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("codebook(outliers=1)", "the share of the input columns"),
        ("codebook(outliers=-0.1)", "the share of the input columns"),
        ("codebook(outlier_vector=4)", "there are none"),
        ("codebook(outliers=0.1, outlier_entries=24)", "no power of two"),
        ("codebook(outliers=0.1, outlier_vector=0)", "1 to 64"),
        ("codebook(bias=both)", "is not allowed"),
        ("codebook(permuted, permuted=true)", "given twice"),
        ("codebook(permuted=3)", "true, false"),
    ],
)
def test_settings_that_cannot_be_are_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_format(text)


def mean_proxy(**settings: Any) -> float:
    """Over layers whose inputs differ in size as those of language models do, each with a mean."""
    errors = []
    for seed in range(2):
        source, sizes = layer(seed=seed), torch.rand(32, generator=torch.Generator().manual_seed(seed)).mul(4).exp()
        known = LayerStats(hessian=moments(inputs(400, 32, seed) * sizes), tokens=400)
        source = replace(source, weight=source.float_weight() + 3 * torch.linspace(-1, 1, 48)[:, None])
        (found,) = coded.solved(Vptq.build({**settings, "mismatch": 0}), [source], known)
        errors.append(proxy(source, found, known))
    return sum(errors) / len(errors)


def test_each_lowers_the_error_where_a_layer_is_what_it_is_for() -> None:
    plain, across = mean_proxy(format=IN), mean_proxy(format=OUT)
    assert mean_proxy(format=IN, outliers=0.1) < 0.8 * plain
    assert mean_proxy(format=IN, bias="row") < 0.8 * plain
    assert mean_proxy(format=OUT, outliers=0.1) < 0.8 * across
    assert mean_proxy(format=IN, outliers=0.1, bias="row", permute="hessian") < 0.6 * plain


def test_columns_are_sorted_by_their_second_moments() -> None:
    source, known = layer(), stats()
    assert known.hessian is not None
    (found,) = coded.solved(Vptq.build({"format": IN, "permute": "hessian", "mismatch": 0}), [source], known)
    order = weight_of(found).tensors["order"].long()
    assert torch.equal(order, torch.argsort(known.hessian.diagonal(), descending=True))
    assert proxy(source, found, known) < 0.2


def test_the_outliers_are_the_columns_of_the_largest_second_moments() -> None:
    source, known = layer(), stats()
    assert known.hessian is not None
    (found,) = coded.solved(Vptq.build({"format": OUT, "outliers": 0.1, "mismatch": 0}), [source], known)
    chosen = set(weight_of(found).tensors["order"].tolist())
    assert chosen == set(known.hessian.diagonal().topk(4).indices.tolist())
    assert "4 of 32 input columns are outliers" in found.notes


def test_aqlm_solves_them_too() -> None:
    source, known = layer(), stats()
    item = Aqlm.build({"format": IN.replace(")", ", outliers=0.1, bias=column, permuted)"), "mismatch": 0})
    (found,) = coded.solved(item, [source], known)
    (plain,) = coded.solved(Aqlm.build({"format": IN, "mismatch": 0}), [source], known)
    assert str(weight_of(found).format) == str(item.codebook)
    assert proxy(source, found, known) < proxy(source, plain, known)


def test_guided_groups_of_rows_have_one_order_and_outliers_in_common() -> None:
    source, known = layer(), stats()
    known = replace(known, guided=torch.stack([moments(inputs(400, 32, 20 + group)) for group in range(3)]))
    settings = {"format": IN, "mismatch": 0, "guided": 3, "outliers": 0.1, "bias": "row", "permute": "hessian"}
    (found,) = coded.solved(Vptq.build(settings), [source], known)
    stored = weight_of(found)
    assert stored.nbytes == stored.format.stored_bytes(stored.shape) and proxy(source, found, known) < 0.1


def test_layers_of_a_block_share_entries_and_have_outliers_of_their_own() -> None:
    layers = [layer("block.a"), layer("block.b", rows=16, seed=2)]
    first, second = map(
        weight_of,
        coded.solved(Vptq.build({"format": IN, "share": "block", "outliers": 0.1, "mismatch": 0}), layers, stats()),
    )
    assert first.tensors["codebook"] is second.tensors["codebook"]
    assert not torch.equal(first.tensors["outlier_codebook"], second.tensors["outlier_codebook"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"format": IN.replace(")", ", outliers=0.2)"), "outliers": 0.1}, "contradict each other"),
        ({"format": IN.replace(")", ", bias=row)"), "bias": "column"}, "contradict each other"),
        ({"format": OUT, "permute": "hessian"}, "changes nothing"),
        ({"format": IN, "guided": 2, "bias": "column"}, "one for all rows"),
        ({"format": IN, "outliers": 1}, "outliers"),
    ],
)
def test_settings_of_the_pass_that_cannot_be_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Vptq.build(settings)


def test_passes_that_do_not_look_at_the_inputs_refuse_what_is_chosen_by_them(one_block: Path) -> None:
    with pytest.raises(UsageError, match="outliers and permuted are chosen by the inputs"):
        planned(
            Pipeline.parse("rtn(format=codebook(vector=4, outliers=0.1, permuted))").resolve(compress.load(one_block))
        )


@pytest.mark.parametrize("path", kernel_paths())
@pytest.mark.parametrize("text", FORMS)
def test_the_kernels_compute_it_from_the_codes(text: str, path: str) -> None:
    form, stored = sample(text)
    product = loading.product_of(form, stored.tensors, stored.shape, path)
    assert isinstance(product, PiecedProduct) and product.nbytes > 0
    weight = stored.dequantize()
    assert torch.allclose(product.dequantize(2, 9), weight[2:9], atol=1e-5)
    for tokens in (1, 3, 40):
        x = torch.randn(2, tokens, stored.shape[1], generator=torch.Generator().manual_seed(tokens))
        expected = x @ weight.T
        assert float((product(x) - expected).norm() / expected.norm()) < 1e-2
    ids = torch.tensor([[12, 0, 5], [5, 5, 11]])
    assert torch.allclose(modules.CodebookEmbedding(form, stored.tensors, stored.shape)(ids), weight[ids], atol=1e-6)


@pytest.mark.parametrize("text", FORMS[3:5])
def test_products_for_gpus_are_added_as_those_for_the_cpu(text: str) -> None:
    form, stored = sample(text)
    parts = []
    for piece in form.pieces(stored.tensors, stored.shape):
        unpacked = piece.form.unpack(piece.tensors, piece.shape)
        own = GpuProduct(*unpacked, piece.shape, form.axis, device="cpu", path="torch")
        parts.append(Part(own, piece.columns, piece.bias))
    x = torch.randn(3, stored.shape[1], generator=torch.Generator().manual_seed(0))
    found = PiecedProduct(parts, stored.shape)(x)
    torch.testing.assert_close(found, x @ stored.dequantize().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", FORMS)
def test_training_moves_entries_and_scales_and_leaves_the_rest(text: str) -> None:
    stored = sample(text)[1]
    source = Layer("l", LayerKind.LINEAR, stored, users=("l",))
    soft = SoftCodebook(source, stored.tensors["codebook"].float().requires_grad_())
    assert torch.equal(soft.weight(), source.float_weight())
    again = weight_of(soft.rounded())
    assert all(torch.equal(again.tensors[name], each) for name, each in stored.tensors.items())
    soft.weight().square().sum().backward()
    assert soft.book.grad is not None and bool((soft.book.grad != 0).any())


@pytest.mark.parametrize("text", FORMS[:5])
def test_codes_are_chosen_again_beside_a_bias_and_in_any_order(text: str) -> None:
    stored = sample(text)[1]
    source = Layer("l", LayerKind.LINEAR, stored, users=("l",))
    soft = SoftCodebook(source, stored.tensors["codebook"].float())
    wish = source.float_weight() + 0.3 * torch.randn(stored.shape, generator=torch.Generator().manual_seed(1))
    before = float((wish - soft.weight()).square().sum())
    soft.reencode(wish, 1.0, 8)
    assert float((wish - soft.weight()).square().sum()) < before


VPTQ_FORMS = (
    "codebook(vector=6, entries=256, stages=2, out, outliers=0.05, outlier_vector=4, outlier_entries=512, bias=column)",
    "codebook(vector=4, entries=1024, stages=1, out, groups=3, permuted)",
    "codebook(vector=2, entries=16, stages=1, out, scale=none, groups=2, outliers=0.1, outlier_vector=4, permuted)",
)


@pytest.mark.parametrize("text", VPTQ_FORMS)
def test_vptq_takes_them_as_planned(text: str) -> None:
    form = form_of(text)
    spec = spec_of(form, 26, 48)
    choice = VPTQ.layout.choose(spec)
    assert isinstance(choice, Choice)
    found = VPTQ.layout.tensors(layer_of(form, 26, 48))
    assert {name: (tuple(each.shape), each.dtype) for name, each in found.items()} == choice.tensors


@pytest.mark.parametrize("text", VPTQ_FORMS)
def test_vptqs_own_layer_decodes_the_very_weights(text: str) -> None:
    pytest.importorskip("vptq", reason=NO_VPTQ, exc_type=ImportError)
    form = form_of(text)
    made = layer_of(form, 26, 48)
    config = VPTQ.layout.config([Packed("m", spec_of(form, 26, 48))], [])
    tensors = {f"m.{name}": each for name, each in VPTQ.layout.tensors(made).items()}
    assert torch.equal(codebook_readers.decode_vptq(tensors, config)["m.weight"], made.float_weight())
    from vptq import VQuantLinear

    reader = VQuantLinear(**config["config_for_layers"]["m"], enable_proxy_error=False, dtype=torch.float32)
    reader.load_state_dict(VPTQ.layout.tensors(made))
    if not torch.cuda.is_available():  # where its kernels take over, which a CPU has not
        torch.testing.assert_close(reader(torch.eye(48)).T, made.float_weight(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("text", "target", "says"),
    [
        ("codebook(vector=8, entries=256, stages=1, bias=row)", AQLM, "Leave out bias"),
        ("codebook(vector=8, entries=256, stages=1, permuted, outliers=0.1)", AQLM, "Leave out outliers and permuted"),
        ("codebook(vector=8, entries=256, stages=1, out, bias=row)", VPTQ, "Give bias=column"),
        ("codebook(vector=8, entries=256, stages=1, out, outliers=0.1)", VPTQ, "Give outlier_vector=4"),
    ],
)
def test_layouts_that_cannot_store_a_setting_name_it(text: str, target: Any, says: str) -> None:
    found = target.layout.choose(spec_of(form_of(text)))
    assert isinstance(found, Refusal) and says in found.reason


@pytest.fixture(scope="module")
def model(one_block: Path) -> Model:
    return compress.load(one_block)


@pytest.fixture(scope="module")
def calibration(model: Model, text_file: Path) -> Calibration:
    return calibrate(model, text_file, samples=4, length=32)


def test_a_model_is_stored_as_planned_and_runs_from_its_codes(
    model: Model, calibration: Calibration, tmp_path: Path
) -> None:
    form = "codebook(vector=4, entries=16)"
    pipeline = Pipeline.parse(f"vptq(format={form}, share=block, outliers=0.02, permute=hessian, refit=0)")
    profile = as_profile(hwprofiles.load("cpu-x86-avx512-vnni"), "native")
    expected = planned(pipeline.resolve(model))
    made = pipeline.run(model, calibration).model
    specs = made.structure.layers
    assert {name: spec.format for name, spec in specs.items()} == {name: each.format for name, each in expected.items()}
    ids = torch.randint(0, model.vocabulary, (2, 16), generator=torch.Generator().manual_seed(1))
    lowered = native.write(made, profile, tmp_path / "native")
    found = verify_export(made, lowered.folder, profile, ids, lowered.bounds)
    assert found.agrees and found.exact_relative_difference is not None and found.exact_relative_difference < 1e-5
    predicted = native.predict_bytes(specs.values(), made, profile)
    assert deployable_bytes(lowered.folder) == pytest.approx(predicted, rel=0.01)
