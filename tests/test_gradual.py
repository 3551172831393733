"""Gradual magnitude pruning: the paper's schedule, exact masks in any training loop, and the pass."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import compress
from compress.engine.journal import Journal
from compress.engine.training_cost import saved_bytes
from compress.errors import InputError, UsageError
from compress.inputs.batches import Batches
from compress.inputs.datasets import Calibration, calibrate
from compress.inputs.images import Images
from compress.inputs.windows import Windows
from compress.maths.masks import Pattern
from compress.models.model import Model
from compress.models.placing import whole_module
from compress.pipeline import Pipeline, Result
from compress.progress import Progress
from compress.training import checkpoint
from compress.training.checkpoint import STATE
from compress.training.distill import Budget, Group, fit
from compress.training.gradual import GradualSchedule, Masks, prune
from compress.training.masked import Masked


def test_the_schedule_is_the_papers_and_flat_before_between_and_after_its_raises() -> None:
    plan = GradualSchedule(0.8, end=107, begin=20, every=10, start=0.1)
    for step in range(200):
        reached = min(8, (step - 20) // 10) * 10  # t - t0 at the last raise up to here
        wanted = 0.8 + (0.1 - 0.8) * (1 - reached / 80) ** 3 if step >= 20 else 0.0
        assert plan.sparsity(step) == pytest.approx(wanted, abs=1e-12)
    assert (plan.raises, plan.last) == (8, 100) and plan.sparsity(100) == plan.sparsity(10_000) == 0.8


@pytest.mark.parametrize(
    "given", [(0.0, 10), (1.0, 10), (0.5, 0), (0.5, 10, -1), (0.5, 10, 0, 11), (0.5, 9, 0, 1, 0.5)]
)
def test_a_schedule_that_cannot_be_is_refused(given: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="A schedule from"):
        GradualSchedule(*given)  # type: ignore[arg-type]


def test_each_raise_takes_the_smallest_of_what_weights_are_or_were_when_pruned() -> None:
    maker = torch.Generator().manual_seed(0)
    tensor = torch.randn(6, 8, generator=maker)
    one = Masked("w", tensor, GradualSchedule(0.75, end=5), Pattern.parse("layer"))
    values, gone = tensor.flatten().tolist(), [False] * 48  # the slow twin
    came_back = 0
    for step in range(9):
        one.raise_to(one.schedule.level(step))
        if step <= 5:
            order = sorted(range(48), key=lambda place: abs(values[place]))
            smallest = set(order[: round(48 * one.schedule.sparsity(step))])
            came_back += sum(was and place not in smallest for place, was in enumerate(gone))
            gone = [place in smallest for place in range(48)]
        assert one.gone.flatten().tolist() == gone
        assert tensor.flatten().tolist() == [0.0 if out else value for value, out in zip(values, gone, strict=True)]
        tensor.mul_(torch.rand(6, 8, generator=maker))  # an optimizer: what is left moves, some below what is gone
        values = [value if out else float(new) for value, new, out in zip(values, tensor.flatten(), gone, strict=True)]
    assert came_back > 0


@pytest.mark.parametrize(("pattern", "final"), [("layer", 0.7), ("row", 0.7), ("2:4", 0.5), ("4x4", 0.7)])
def test_the_final_count_is_that_of_the_pattern_exactly(pattern: str, final: float) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 12))
    masks, form = Masks.of(module, GradualSchedule(final, end=4), pattern=pattern), Pattern.parse(pattern)
    for step in range(5):
        masks.step(step)
    for name, weight in module.named_parameters():
        if weight.ndim == 1:
            assert weight.count_nonzero() == weight.numel()
            continue
        shape, kept = (weight.shape[0], weight.shape[1]), form.kept((weight.shape[0], weight.shape[1]), final)
        assert int(weight.count_nonzero()) * form.rivals(shape) == kept * weight.numel()
        assert masks.sparsity[name] == pytest.approx(1 - kept / form.rivals(shape))


def test_runs_of_four_lose_one_weight_then_two() -> None:
    tensor = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    one = Masked("w", tensor, GradualSchedule(0.5, end=10), Pattern.parse("2:4"))
    left = []
    for step in range(11):
        one.raise_to(one.schedule.level(step))
        left.append({int(count) for count in tensor.reshape(-1, 4).count_nonzero(1)})
    assert left[0] == {4} and {3} in left and left[-1] == {2}


class Reader(nn.Module):
    """Next symbols from symbols."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(12, 8), nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 12)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.lstm(self.embed(ids))[0])
        return found


def next_symbol(module: nn.Module, batch: list[Tensor]) -> Tensor:
    ids = batch[0]
    return nn.functional.cross_entropy(module(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def sequences(count: int, seed: int) -> Tensor:
    """(count, 9): each counts on by 1, 2 or 3."""
    maker = torch.Generator().manual_seed(seed)
    start, step = torch.randint(12, (count, 1), generator=maker), torch.randint(1, 4, (count, 1), generator=maker)
    return (start + step * torch.arange(9)) % 12


def test_a_loop_of_ones_own_with_a_data_loader_and_any_optimizer_prunes_an_lstm() -> None:
    torch.manual_seed(0)
    module = Reader()
    masks = Masks.of(module, GradualSchedule(0.8, end=40, every=4), ignore=["embed.*"])
    descent = torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=0.1)
    loader = DataLoader(TensorDataset(sequences(96, 0)), batch_size=32, shuffle=True)
    step, before = 0, float(next_symbol(module, [sequences(64, 1)]).detach())
    for _ in range(20):
        for batch in loader:
            masks.step(step)
            descent.zero_grad()
            next_symbol(module, batch).backward()  # type: ignore[no-untyped-call]
            for each in masks.weights:
                assert each.tensor.grad is not None and not each.tensor.grad[each.gone].any()
            descent.step()
            masks.apply()
            step += 1
    assert {each.name for each in masks.weights} == {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "head.weight"}
    for each in masks.weights:
        assert int(each.tensor.count_nonzero()) == each.tensor.numel() - round(0.8 * each.tensor.numel())
    assert float(next_symbol(module, [sequences(64, 1)]).detach()) < 0.8 * before


def test_masks_go_on_from_where_their_state_was_kept() -> None:
    torch.manual_seed(0)
    first = nn.Linear(8, 8)
    masks = Masks.of(first, GradualSchedule(0.5, end=6))
    masks.step(3)
    second = nn.Linear(8, 8)
    second.load_state_dict(first.state_dict())
    resumed = Masks.of(second, GradualSchedule(0.5, end=6))
    resumed.load_state_dict(masks.state_dict())
    for each, module in ((masks, first), (resumed, second)):
        with torch.no_grad():
            module.weight.mul_(0.1)  # now smaller than what is gone, which comes back
        each.apply()
        assert not each.step(3) and each.step(6)
    assert torch.equal(first.weight, second.weight) and int(second.weight.count_nonzero()) == 32
    with pytest.raises(UsageError, match="other weights"):
        Masks.of(nn.Sequential(second), GradualSchedule(0.5, end=6)).load_state_dict(masks.state_dict())


class Judged(nn.Module):
    """A line with a normalisation, whose running mean is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.line, self.fixed = nn.BatchNorm1d(8), nn.Linear(8, 4), nn.Linear(4, 4).requires_grad_(False)

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = self.fixed(self.line(self.norm(values)))
        return found


def squares(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (module(batch[0]) - batch[1]).square().mean()


def test_any_module_and_loss_is_pruned_in_place_and_the_best_at_the_final_sparsity_kept() -> None:
    torch.manual_seed(0)
    module = Judged()
    batches = [(torch.randn(16, 8) + 1, torch.randn(16, 4)) for _ in range(6)]
    done = prune(
        module, squares, batches[:5], batches[5:], GradualSchedule(0.5, end=10), Budget(30, check=5), lr=0.05,
        ignore=["fixed.*"],
    )  # fmt: skip
    assert 10 <= done.outcome.best <= 30 and done.outcome.after <= done.outcome.before
    assert int(module.line.weight.count_nonzero()) == 16 and done.masks.sparsity == {"line.weight": 0.5}
    with torch.no_grad():
        module.eval()
        assert float(squares(module, batches[5])) == pytest.approx(done.outcome.after)  # its running mean too
    assert module.line.weight.requires_grad and not module.fixed.weight.requires_grad


def test_where_time_is_up_before_the_last_raise_the_rest_is_pruned_at_once() -> None:
    module = nn.Linear(8, 4)
    batch = (torch.randn(16, 8), torch.randn(16, 4))
    done = prune(module, squares, [batch], [batch], GradualSchedule(0.5, end=50), Budget(100, minutes=1e-9))
    assert (done.outcome.stopped, done.outcome.steps, int(module.weight.count_nonzero())) == ("minutes", 1, 16)
    assert done.outcome.before == done.outcome.after


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"targets": ["nothing.*"]}, "names no weight"),
        ({"ignore": ["*"]}, "No weight is left"),
        ({"pattern": "3:5"}, "runs of 5"),
        ({"pattern": "2:4"}, "is a sparsity of 0.5, not 0.6"),
        ({"schedule": GradualSchedule(0.6, end=20)}, "last raise is at step 20 of 20"),
        ({"schedule": GradualSchedule(0.999, end=5)}, "rounds to nothing or to all"),
        ({"batches": iter([])}, "no batch to train on"),
        ({"held": []}, "held has no batch"),
    ],
)
def test_what_cannot_be_pruned_so_is_refused_in_words(settings: dict[str, object], told: str) -> None:
    batch = (torch.randn(4, 8), torch.randn(4, 4))
    given = {"batches": [batch], "held": [batch], "schedule": GradualSchedule(0.6, end=5), "budget": Budget(20)}
    with pytest.raises(UsageError, match=told):
        prune(nn.Linear(8, 4), squares, **{**given, **settings})  # type: ignore[arg-type]


def test_taps_of_a_kernel_are_no_runs_and_weights_that_are_nan_stop_it() -> None:
    with pytest.raises(UsageError, match="taps of a kernel"):
        Masks.of(nn.Conv2d(4, 8, 2), GradualSchedule(0.5, end=5), pattern="2:4")
    module = nn.Linear(8, 4)
    masks = Masks.of(module, GradualSchedule(0.5, end=5))
    module.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="weight holds NaN"):
        masks.step(3)


def test_the_training_loop_keeps_no_iterate_from_before_its_first() -> None:
    point, told = torch.zeros(1), list[int]()
    outcome = fit(
        [Group([point], 0.1)],
        lambda place: (point - place).square().mean(),  # trains away from 0, where the held-out loss is least
        [5],
        [0],
        Budget(20, check=1, first=8),
        schedule="constant",
        ready=lambda: told.append(1),
    )
    assert outcome.best == 8 and told == [1] and float(point) > 0.5
    assert outcome.before == outcome.after == pytest.approx(float(point) ** 2)


TEXT = "gradual_magnitude(sparsity=0.7, steps=40, end=15, every=3, lr=0.02)"


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path]) -> Model:
    return compress.load(make_llama("gradual", num_hidden_layers=1, dtype="float16"))


@pytest.fixture(scope="module")
def calibration(model: Model, text_file: Path) -> Calibration:
    return calibrate(model, text_file, samples=192, length=64)


@pytest.fixture(scope="module")
def pruned(model: Model, calibration: Calibration) -> Result:
    return Pipeline.parse(f"{TEXT}, rtn(format=int8(group=32))").run(model, calibration)


def divergence(model: Model, other: Model) -> float:
    """On the words of the text in another order."""
    maker = random.Random(7)
    words = ["tree", "river", "stone", "the", "a", "runs", "over", "under", "blue", "and", "sees", "window"]
    text = " ".join(maker.choice(words) for _ in range(200))
    tokenizer = model.tokenizer()
    ids = torch.tensor(tokenizer(text)["input_ids"][:768]).reshape(12, 64)
    with torch.no_grad():
        p, q = (whole_module(each)(input_ids=ids).logits.log_softmax(-1) for each in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_language_model_is_nearer_to_the_original_than_pruned_at_once(model: Model, pruned: Result) -> None:
    at_once = Pipeline.parse("magnitude(sparsity=0.7)").run(model)
    assert divergence(model, pruned.model) < 0.5 * divergence(model, at_once.model)
    notes = next(row.notes for row in pruned.passes[0].layers if row.changed)
    assert "70 % of the weights are zero" in notes[0] and "pruned in 5 raises up to step 15: held-out" in notes[1]


def test_each_layer_has_the_share_that_was_asked_for_after_rounding_too(pruned: Result) -> None:
    for spec in pruned.model.structure.layers.values():
        weight = pruned.model.layer(spec).float_weight()
        if spec.segment >= 0:
            assert int((weight != 0).sum()) <= weight.numel() - round(0.7 * weight.numel())


def test_layers_may_have_shares_and_patterns_of_their_own_and_the_seed_decides_the_bytes(
    model: Model, calibration: Calibration
) -> None:
    own = '{"*.up_proj": {sparsity: 0.4}, "*.o_proj": {pattern: "2:4"}}'
    text = f"gradual_magnitude(steps=3, end=2, every=1, targets=[*.up_proj, *.o_proj, *.q_proj], overrides={own})"
    first, second = (Pipeline.parse(text).run(model, calibration).model for _ in range(2))
    for name, zeros in (("mlp.up_proj", 0.4), ("self_attn.o_proj", 0.5), ("self_attn.q_proj", 0.5)):
        weight = first.layer(first.structure.layers[f"model.layers.0.{name}"]).weight
        assert isinstance(weight, Tensor) and weight.dtype == torch.float16
        assert int((weight == 0).sum()) == round(zeros * weight.numel())
    assert first.digest == second.digest
    assert first.plain(0)["model.layers.0.input_layernorm.weight"].dtype == torch.float16


@pytest.mark.parametrize("killed", [3, 6])
def test_a_killed_run_goes_on_within_its_training_to_the_same_bytes(
    killed: int, model: Model, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While masks rise, and after the last raise."""
    pipeline = Pipeline.parse("gradual_magnitude(steps=10, end=5, every=2, begin=1)")
    whole = pipeline.run(model, calibration, folder=tmp_path / "whole").model.digest
    monkeypatch.setattr(checkpoint, "MINUTES", 0.0)
    seen: list[int] = []

    class Killed(Progress):
        def tick(self, text: str, done: int, count: int) -> None:
            seen.extend([done] if text == "Pruning steps" else [])
            if len(seen) == killed + 1:
                raise MemoryError("killed")

    folder, journal = tmp_path / "killed", tmp_path / "journal"
    with pytest.raises(MemoryError):
        pipeline.run(model, calibration, folder=folder, journal=Journal(journal), progress=Killed(quiet=True))
    predicted = saved_bytes(model.structure.layers.values(), pipeline.passes)
    assert predicted == pytest.approx((folder / STATE).stat().st_size, rel=0.05)
    result = pipeline.run(model, calibration, folder=folder, journal=Journal(journal), progress=Killed(quiet=True))
    assert seen[killed + 1] == killed and result.model.digest == whole and not (folder / STATE).exists()


@pytest.mark.parametrize("loss", ["distill", "labels"])
def test_an_image_classifier_is_pruned_by_its_outputs_or_by_labels(loss: str, cnn: str, images_file: Path) -> None:
    model = compress.load(cnn)
    data = calibrate(model, images_file)
    softer = ", temperature=2" if loss == "distill" else ""
    text = f"gradual_magnitude(loss={loss}, steps=12, end=6, every=2, sparsity=0.6{softer})"
    result = Pipeline.parse(text).run(model, data)
    for spec in result.model.structure.layers.values():
        weight = result.model.layer(spec).float_weight()
        assert int((weight == 0).sum()) == round(0.6 * weight.numel())
    assert next(row.error_after for row in result.passes[0].layers if row.changed)


def test_labels_follow_their_images_when_these_are_mixed(cnn: str, images_file: Path) -> None:
    windows = calibrate(compress.load(cnn), images_file).windows
    assert isinstance(windows, Images)
    mixed = Batches(windows, 1)
    before = zip(torch.cat(windows.batches()).sum((1, 2, 3)).tolist(), windows.labels.tolist(), strict=True)
    after: list[tuple[float, int]] = []
    for place in range(len(mixed)):
        labels = mixed.labels(place)
        assert labels is not None
        after += zip(mixed[place].sum((1, 2, 3)).tolist(), labels.tolist(), strict=True)
    assert len(after) == 80 and sorted(before) == sorted(after)
    assert Batches(Windows(torch.zeros(4, 8, dtype=torch.int64), (0,) * 4, "", ""), 0).labels(0) is None


def test_next_tokens_are_the_labels_of_a_text(model: Model, calibration: Calibration) -> None:
    result = Pipeline.parse("gradual_magnitude(loss=labels, steps=4, end=2, every=1)").run(model, calibration)
    note = next(row.notes[1] for row in result.passes[0].layers if row.changed)
    assert float(note.split("loss ")[1].split(" ")[0]) > 1  # nats per token of a model that was never trained
    assert "tokens of the calibration data" in note  # of which nothing was left over


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gradual_magnitude(steps=100, end=100)", "last raise is at step 100 of 100"),
        ("gradual_magnitude(begin=50, end=55)", "has no raise"),
        ("gradual_magnitude(start=0.6)", "0 <= start < final < 1"),
        ("gradual_magnitude(pattern=2:4, sparsity=0.7)", "contradict each other"),
        ('gradual_magnitude(overrides={"*.up_proj": {lr: 0.1}})', "same for all layers"),
        ("gradual_magnitude(loss=labels, temperature=2)", "labels have none"),
        ("gradual_magnitude, magnitude", "both set the weight values"),
        ("gradual_magnitude, hqq", "would not keep at zero"),
        ("rtn(format=int8(group=32)), gradual_magnitude", "must come before rtn"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_the_work(text: str, told: str, model: Model) -> None:
    with pytest.raises(UsageError, match=told):
        Pipeline.parse(text).resolve(model)


def test_an_encoder_has_neither_labels_nor_logits(save_random: Callable[..., Path]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = compress.load(save_random("bert", transformers.BertConfig(vocab_size=256, **sizes), "AutoModel"))
    with pytest.raises(UsageError, match="have no labels"):
        Pipeline.parse("gradual_magnitude(loss=labels)").resolve(model)
    with pytest.raises(UsageError, match="divides logits"):
        Pipeline.parse("gradual_magnitude(temperature=2)").resolve(model)
