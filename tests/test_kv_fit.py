"""A pass may fit caches to data: it observes the attention of the finished model, and what it finds goes with it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import compress
from compress.engine import store
from compress.engine.journal import Journal
from compress.engine.kv_pass import KvPass, Observed, Settled
from compress.errors import InputError, UsageError
from compress.inputs.datasets import Calibration, calibrate
from compress.kv import heads, static
from compress.kv.layer import KvLayer
from compress.kv.observed import attention_of, use_seen, watching
from compress.kv.spec import KvSpec
from compress.models import placing
from compress.models.cache_tensors import FILE, predict_bytes, read_tensors, wanted, write_tensors
from compress.models.model import Model
from compress.passes import Rtn
from compress.pipeline import Pipeline


class Fitted(KvPass):
    """The budget of a layer becomes what data say: here, how many tokens there were."""

    name: ClassVar[str] = "fitted"
    fills_cache: ClassVar[str] = "what is dropped"
    stop_after: int = 99

    @property
    def measures(self) -> bool:
        return True

    def fill(self, spec: KvSpec, layer: int) -> KvSpec:
        return replace(spec, scorer="key_norm", budget=40)

    def observe(self, spec: KvSpec, layer: int, seen: Observed) -> dict[str, Tensor]:
        if layer == self.stop_after:
            raise KeyboardInterrupt
        assert len(list(seen)) == len(list(seen)) == len(seen)
        return {"sum": sum((batch.key.sum((0, 2)) for batch in seen), torch.zeros(()))}

    def conclude(self, caches: Sequence[KvSpec], found: Sequence[Mapping[str, Tensor]]) -> Sequence[Settled]:
        return [
            Settled(replace(spec, budget=50 + layer), {"sum": taken["sum"]}, (f"layer {layer} of {len(found)}",))
            for layer, (spec, taken) in enumerate(zip(caches, found, strict=True))
        ]


@pytest.fixture(scope="module")
def model(llama: Path) -> Model:
    return compress.load(llama)


@pytest.fixture
def data(model: Model, tmp_path: Path) -> Calibration:
    torch.manual_seed(0)
    ids = [" ".join(str(int(each)) for each in row) for row in torch.randint(1, 250, (4, 32))]
    path = tmp_path / "ids.txt"
    path.write_text("\n".join(ids))
    return calibrate(model, path)


def test_what_data_settle_goes_with_the_model_and_into_the_report(
    model: Model, data: Calibration, tmp_path: Path
) -> None:
    result = Pipeline(Fitted(), Rtn(bits=8, group_size=32)).run(model, data, folder=tmp_path / "model")
    assert [spec.budget for spec in result.model.kv] == [50, 51, 52]
    assert [row.notes for row in result.passes[0].layers] == [(f"layer {layer} of 3",) for layer in range(3)]
    stored = store.open_store(tmp_path / "model")
    assert [spec.budget for spec in stored.kv] == [50, 51, 52]
    assert not list((tmp_path / "model").glob("*.tmp"))
    assert (tmp_path / "model" / FILE).is_file()
    assert stored.digest != Pipeline(Rtn(bits=8, group_size=32)).run(model).model.digest


def test_it_meets_the_finished_model(model: Model, data: Calibration, tmp_path: Path) -> None:
    """Keys are those of the compressed model, rotated as they are cached, whatever comes after the pass."""
    result = Pipeline(Fitted(), Rtn(bits=4, group_size=32)).run(model, data, folder=tmp_path / "model")
    whole = placing.whole_module(result.model)
    held: list[Tensor] = [torch.zeros(())] * 3
    with torch.no_grad():
        for batch in data.batches():
            cache = whole(input_ids=batch, use_cache=True).past_key_values
            held = [old + layer.keys.sum((0, 2)) for old, layer in zip(held, cache.layers, strict=True)]
    found = load_file(tmp_path / "model" / FILE)
    for layer, expected in enumerate(held):
        torch.testing.assert_close(found[f"{layer}.sum"], expected, rtol=1e-4, atol=1e-3)


def test_a_stopped_run_takes_up_what_was_observed(model: Model, data: Calibration, tmp_path: Path) -> None:
    whole = Pipeline(Fitted()).run(model, data, folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        Pipeline(Fitted(stop_after=2)).run(model, data, folder=tmp_path / "model", journal=Journal(tmp_path / "log"))
    assert len(list((tmp_path / "model").glob("cache-*.tmp"))) == 2
    again = Pipeline(Fitted(stop_after=0)).run(
        model, data, folder=tmp_path / "model", journal=Journal(tmp_path / "log")
    )
    assert again.model.digest == whole.model.digest
    assert not list((tmp_path / "model").glob("*.tmp"))


def test_a_run_that_stopped_after_the_caches_were_fitted_ends_as_it_would_have(
    model: Model, data: Calibration, tmp_path: Path
) -> None:
    whole = Pipeline(Fitted()).run(model, data, folder=tmp_path / "model", journal=Journal(tmp_path / "log"))
    again = Pipeline(Fitted()).run(model, data, folder=tmp_path / "model", journal=Journal(tmp_path / "log"))
    assert again.model.digest == whole.model.digest
    assert [spec.budget for spec in again.model.kv] == [50, 51, 52]


def test_without_data_it_is_refused(model: Model) -> None:
    with pytest.raises(UsageError, match="needs calibration data"):
        Pipeline(Fitted()).run(model)


def test_an_attention_is_watched_as_it_computes(llama: Path) -> None:
    """From what is told, the attention's own output follows."""
    module = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    use_seen(module)
    attention = attention_of(module.model.layers[1])
    ids = torch.randint(1, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    outputs: list[Tensor] = []
    attention.o_proj.register_forward_pre_hook(lambda _, given: outputs.append(given[0]))  # type: ignore[union-attr,arg-type]
    with torch.no_grad(), watching(attention) as seen:
        module(input_ids=ids)
        batch = seen[0]
        logits = batch.logits(slice(None))
        causal = torch.ones(12, 12, dtype=torch.bool).tril()
        weights = logits.masked_fill(~causal, -math.inf).softmax(-1)
        out = torch.einsum("bhgqk,bhkd->bqhgd", weights, batch.value).flatten(2)
        projected = batch.projected
    torch.testing.assert_close(out, outputs[0], rtol=1e-4, atol=1e-5)
    size = batch.key.shape[-1]
    assert projected.shape == (2, 12, (batch.query.shape[1] + 2 * batch.key.shape[1]) * size)
    torch.testing.assert_close(projected[..., -batch.key.shape[1] * size :], batch.value.transpose(1, 2).flatten(2))


def test_tensors_that_a_cache_wants_are_read_or_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needing: Callable[[], KvSpec]
) -> None:
    specs = [needing(), needing()]
    with pytest.raises(InputError, match=r"caches\.safetensors is missing: the cache of layer 0 needs its head"):
        read_tensors(tmp_path, specs)
    write_tensors(tmp_path, [{"head": torch.ones(2)}, {}])
    with pytest.raises(InputError, match=r"1\.head"):
        read_tensors(tmp_path, specs)
    with pytest.raises(UsageError, match="needs its tensor head, which only data give"):
        KvLayer(specs[0])
    write_tensors(tmp_path, [{}, {}])
    assert not (tmp_path / FILE).exists()


@pytest.fixture
def needing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], KvSpec]:
    monkeypatch.setattr(KvSpec, "wants", ("head",))
    return KvSpec


@pytest.mark.parametrize(
    "spec",
    [
        KvSpec(scorer="locret", budget=64, head_width=8),
        KvSpec(scorer="kvzap", budget=64),
        KvSpec(scorer="kvzap", budget=64, head_width=8, keys="int8(channel)", values="int8(head)", static=True),
        KvSpec(keys="int4(tensor)", values="int8(token)", static=True),
    ],
    ids=KvSpec.told,
)
def test_the_plan_knows_what_caches_need_before_it_is_there(spec: KvSpec, two_blocks: Path, tmp_path: Path) -> None:
    model = replace(compress.load(two_blocks), kv=(spec, KvSpec()))
    hidden, (attention, _) = model.config.hidden_size, model.attentions
    made = {name: torch.zeros(shape) for name, shape in wanted(spec, attention, hidden).items()}
    assert tuple(made) == spec.wants
    if spec.learned:
        count = hidden if spec.scorer == "kvzap" else (attention.heads + 2 * attention.kv_heads) * attention.size
        heads.check(torch.zeros(1, 1, count), attention.kv_heads, made)
    if "key_scale" in made:
        expected = static.scale_shape(static.static_format(spec.keys), attention.kv_heads, attention.size)
        assert made["key_scale"].shape == expected
    write_tensors(tmp_path, [made, {}])
    assert predict_bytes(model) == pytest.approx((tmp_path / FILE).stat().st_size, abs=20 * len(made) + 16)
    assert predict_bytes(replace(model, kv=(KvSpec(), KvSpec()))) == 0
