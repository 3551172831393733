"""The blockwise backward pass against one through the whole model at once, and what runs make of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

import compress
from compress import hwprofiles, plan, recipe
from compress.engine import backward, codebook_pass
from compress.engine.backward import saliency
from compress.engine.codebook_tasks import Task
from compress.engine.journal import Journal
from compress.errors import InputError, Interrupted, UnsupportedError
from compress.inputs.datasets import Calibration
from compress.inputs.windows import Windows
from compress.layer import LayerKind
from compress.maths import activations
from compress.models.model import Model
from compress.models.placing import whole_module
from compress.pipeline import Pipeline
from compress.progress import Progress

NAMES = [f"model.layers.{block}.{part}" for block in (0, 2) for part in ("self_attn.k_proj", "mlp.down_proj")]


@pytest.fixture(scope="module")
def model(llama: Path) -> Model:
    return compress.load(llama)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (2, 12), generator=generator), torch.randint(0, 256, (1, 12), generator=generator)]


def whole(model: Model, ids: Tensor) -> dict[str, Tensor]:
    """Gradients of the summed loss by the layers' outputs, by torch's own backward pass."""
    module = whole_module(model)
    outputs: dict[str, Tensor] = {}
    for name in NAMES:
        module.get_submodule(name).weight.requires_grad_(True)
        module.get_submodule(name).register_forward_hook(
            lambda _m, _i, output, name=name: outputs.update({name: output})
        )
    logits = module(input_ids=ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    return dict(zip(NAMES, torch.autograd.grad(loss, [outputs[name] for name in NAMES]), strict=True))


def test_squared_gradients_are_those_of_the_whole_model(model: Model) -> None:
    found = saliency(model, batches(), NAMES, 4)
    assert [len(part) for part in found[NAMES[0]]] == [24, 12]
    for name in NAMES:
        rows = torch.cat([whole(model, ids)[name].flatten(0, 1) for ids in batches()])
        expected = torch.stack([part.square().mean(1) for part in rows.tensor_split(4, dim=1)], 1)
        torch.testing.assert_close(torch.cat(found[name]), expected / expected.mean(0), rtol=1e-3, atol=1e-5)


def test_the_last_token_of_a_window_guides_nothing(model: Model) -> None:
    last = saliency(model, batches(), NAMES[2:3], 2)[NAMES[2]][0].reshape(2, 12, 2)[:, -1]
    assert float(last.abs().max()) == 0.0  # its output predicts nothing, and no later token sees it in the last block


def test_a_loss_that_is_not_finite_is_told_with_the_layer(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda logits, *_a, **_k: logits.sum() * torch.nan)
    with pytest.raises(InputError, match="no finite gradient at model"):
        saliency(model, batches(), NAMES, 2)


def test_what_is_spilled_to_disk_is_the_same(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = saliency(model, batches(), NAMES, 4)
    monkeypatch.setattr(activations, "SPILL_BYTES", 0)
    spilled = saliency(model, batches(), NAMES, 4, spill=tmp_path)
    assert all(torch.equal(torch.cat(spilled[name]), torch.cat(kept[name])) for name in NAMES)
    assert not list(tmp_path.iterdir())


def test_layers_that_the_loss_does_not_feel_are_left_out(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda logits, *_a, **_k: logits.sum() * 0)
    assert saliency(model, batches(), NAMES, 2) == {}


def test_a_layer_with_fewer_rows_than_groups_has_one_for_each(model: Model) -> None:
    found = saliency(model, batches(), NAMES[:1], 1000)
    assert found[NAMES[0]][0].shape == (24, 32)
    torch.testing.assert_close(torch.cat(found[NAMES[0]]).mean(0), torch.ones(32))


def calibration() -> Calibration:
    ids = torch.randint(0, 96, (12, 24), generator=torch.Generator().manual_seed(1))
    return Calibration(Windows(ids, (0,) * 12, "test", ""), 0, "test")


def block(model: Model, passes: str, index: int = 0) -> dict[str, Tensor]:
    """Weights of one block after a run."""
    made = Pipeline.parse(passes).run(model, calibration()).model
    return {name: layer.float_weight() for name, layer in made.layers(index).items()}


VECTORS = "format=codebook(vector=4, entries=16, stages=1), mismatch=0"


@pytest.mark.parametrize(
    "text",
    [
        "gptq(format=int3(group=32), sequential=true",
        "gptq(format=int3(group=32), sequential=false",
        f"vptq({VECTORS}, refit=1",
        f"aqlm({VECTORS}, sweeps=1, sequential=false",
    ],
)
def test_a_run_is_guided_but_where_an_override_says_otherwise(model: Model, text: str) -> None:
    plain = block(model, f"{text})")
    kept = "*.q_proj: {guided: 0}"
    found = block(model, f"{text}, guided=2, overrides={{{kept}}})")
    for name, weight in found.items():
        if name.endswith("q_proj"):  # its inputs are those of the plain run
            torch.testing.assert_close(weight, plain[name])
        else:
            assert float((weight != plain[name]).float().mean()) > 0.01, name


def test_a_codebook_for_a_block_is_learned_by_guided_hessians_from_all_of_its_layers(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []
    learned = codebook_pass._learned

    def noting(tasks: list[Task], *given: object) -> Tensor:
        seen.append({task.layer.name for task in tasks if task.stats.guided is not None})
        return learned(tasks, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(codebook_pass, "_learned", noting)
    names = set(block(model, f"vptq({VECTORS}, share=block, refit=0, guided=2)"))
    assert seen[0] == names


def test_a_run_in_which_every_token_weighs_the_same_is_that_without_guides(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alike(
        _model: Model, batches: list[Tensor], names: list[str], groups: int, **_named: object
    ) -> backward.Saliency:
        return {name: [torch.ones(batch.numel(), groups) for batch in batches] for name in names}

    monkeypatch.setattr(backward, "saliency", alike)
    guided, plain = (block(model, f"gptq(format=int4(group=32), guided={groups})") for groups in (3, 0))
    for name in plain:  # sums in another order may tip a weight that lies between two points
        assert float(torch.isclose(guided[name], plain[name], rtol=1e-3).float().mean()) > 0.98, name


def test_experts_keep_the_plain_hessian_and_say_so(save_random: Callable[..., Path]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.MixtralConfig(vocab_size=96, num_key_value_heads=2, num_local_experts=2, **sizes)
    mixture = compress.load(save_random("backward-mixtral", config))
    (found,) = Pipeline.parse("gptq(format=int4(group=32), guided=2)").run(mixture, calibration()).passes
    for row in found.layers:
        expert = row.changed and mixture.structure.layers[row.layer].kind is LayerKind.EXPERT
        assert any("not guided" in note for note in row.notes) == expert, row


def test_models_without_a_loss_on_the_next_token_are_refused_by_name(
    save_random: Callable[..., Path], cnn: str
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    encoder = compress.load(save_random("backward-bert", transformers.BertConfig(vocab_size=96, **sizes), "AutoModel"))
    for one, kind in ((encoder, "encoder"), (compress.load(cnn), "image classifier")):
        with pytest.raises(UnsupportedError, match=f"{kind}: it has no loss on the next token.*guided=0"):
            Pipeline.parse("gptq(guided=2)").resolve(one)
        with pytest.raises(UnsupportedError, match=kind):
            saliency(one, [], [], 2)


def test_a_plan_counts_what_the_backward_pass_takes(model: Model) -> None:
    profile = hwprofiles.load("cpu-x86-avx512-vnni")
    made = [
        plan.make_plan(model, recipe.of_passes(f"gptq(format=int4(group=32), {text})"), profile)
        for text in ("guided=0", "guided=4", "guided=4, sequential=false")
    ]
    given = recipe.of_passes("gptq").calibration
    doors = given.samples * given.length * (3 * 64 + 4 * 21) * 4
    assert made[1].predicted_disk_bytes - made[0].predicted_disk_bytes == doors
    hessians = [6 * 64**2 * 4 * 4, (6 * 64**2 + 96**2) * 4 * 4]
    memory = [each.predicted_peak_memory_bytes - made[0].predicted_peak_memory_bytes for each in made[1:]]
    assert memory == [held + min(doors, 2 * activations.SPILL_BYTES) for held in hessians]
    assert made[1].predicted_seconds > made[0].predicted_seconds


class Stop(Progress):
    """Stops a run after its first block."""

    def tick(self, stage: str, done: int, total: int) -> None:
        if (stage, done) == ("Compressing blocks", 1):
            raise Interrupted("stopped here")


def test_a_stopped_run_goes_back_again_and_ends_in_the_same_bytes(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, calls = Pipeline.parse("gptq(format=int3(group=32), guided=2)"), []
    once = backward.saliency
    monkeypatch.setattr(backward, "saliency", lambda *given, **named: calls.append(1) or once(*given, **named))
    clean = pipeline.run(model, calibration(), folder=tmp_path / "clean")
    journal, folder = tmp_path / "journal", tmp_path / "again"
    with pytest.raises(Interrupted):
        pipeline.run(model, calibration(), folder=folder, journal=Journal(journal), progress=Stop(quiet=True))
    resumed = pipeline.run(model, calibration(), folder=folder, journal=Journal(journal))
    assert resumed.model.digest == clean.model.digest and len(calls) == 3
    pipeline.run(model, calibration(), folder=folder, journal=Journal(journal))
    assert len(calls) == 3  # nothing is left to guide
