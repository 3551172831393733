"""benchmarks/kv: tasks whose needed tokens are known, bounds of what a cache can do, outliers that change nothing."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from compress.kv.cache import KvCache
from compress.kv.spec import KvSpec

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "kv"
TASKS = ("passkey", "needles", "recall", "induction", "most", "recency")
LENGTH = 96


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of benchmarks/kv by its name."""
    if not FOLDER.is_dir():
        pytest.skip("the benchmarks are not here")
    monkeypatch.syspath_prepend(str(FOLDER))
    return import_module


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=192, num_key_value_heads=2, initializer_range=0.2, **sizes)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("name", TASKS)
def test_examples_begin_with_the_first_token_and_are_the_same_for_a_seed(load: Any, name: str) -> None:
    tasks = load("tasks")
    first, again, other = (tasks.batch(name, seed, 8, LENGTH) for seed in (1, 1, 2))
    assert (first.context[:, 0] == tasks.BOS).all()
    assert first.context.shape == (8, LENGTH)
    for field in dataclasses.fields(first):
        assert np.array_equal(getattr(first, field.name), getattr(again, field.name))
    assert not np.array_equal(first.context, other.context)
    tokens = np.concatenate([first.context, first.question, first.answer], 1)
    assert tokens.min() >= 0 and tokens.max() < tasks.VOCABULARY


@pytest.mark.parametrize("name", TASKS)
def test_the_needed_tokens_hold_the_answer_and_nothing_else_does(load: Any, name: str) -> None:
    tasks = load("tasks")
    asked = tasks.batch(name, 3, 32, LENGTH)
    for context, question, answer, needed in zip(
        asked.context, asked.question, asked.answer, asked.needed, strict=True
    ):
        assert set(answer) <= set(context[needed])
        if name in ("passkey", "needles", "recall", "induction"):
            whole = [*question, *answer]
            found = [at for at in range(LENGTH - len(whole) + 1) if list(context[at : at + len(whole)]) == whole]
            same_question = [at for at in range(LENGTH) if list(context[at : at + len(question)]) == list(question)]
            assert found == same_question, "one place alone answers the question"
            assert list(np.flatnonzero(needed)) == list(range(found[0], found[0] + len(whole)))


def test_the_most_frequent_value_is_alone_at_the_top(load: Any) -> None:
    tasks = load("tasks")
    asked = tasks.batch("most", 0, 32, LENGTH)
    for context, answer, needed in zip(asked.context, asked.answer, asked.needed, strict=True):
        counts = np.bincount(context, minlength=tasks.VOCABULARY)[tasks.VALUES.start : tasks.VALUES.stop]
        assert counts.argmax() + tasks.VALUES.start == answer[0]
        assert counts.max() == needed.sum() > np.sort(counts)[-2]


@pytest.mark.parametrize("name", TASKS)
def test_lessons_mark_answers_alone(load: Any, name: str) -> None:
    tasks = load("tasks")
    ids, is_answer = tasks.lesson(np.random.default_rng(0), name, LENGTH)
    assert ids.shape == is_answer.shape == (LENGTH,)
    assert is_answer.any() and not is_answer[: 2 * LENGTH // 3].any()
    assert ids[is_answer].min() >= tasks.KEYS.start


@pytest.mark.parametrize("name", TASKS)
def test_the_oracle_keeps_what_is_needed_in_every_head(load: Any, model: LlamaForCausalLM, name: str) -> None:
    protocol, tasks = load("protocol"), load("tasks")
    asked = tasks.batch(name, 0, 4, LENGTH)
    specs = [KvSpec(scorer="position", budget=24, sinks=1, recent=1)] * 2
    cache = protocol.oracle(model, specs, asked, 2)(slice(0, 4))
    with torch.no_grad():
        model(torch.from_numpy(asked.context), past_key_values=cache)
    for layer in cache.layers:
        assert layer.position.shape == (4, 2, 24)
        for row in range(4):
            for head in range(2):
                assert set(np.flatnonzero(asked.needed[row])) <= set(layer.position[row, head].tolist())


def test_chance_keeps_as_many_tokens_and_differs_by_head_unless_it_is_one_choice(
    load: Any, model: LlamaForCausalLM
) -> None:
    protocol, tasks = load("protocol"), load("tasks")
    asked = tasks.batch("passkey", 0, 4, LENGTH)
    specs = [KvSpec(scorer="position", budget=24, sinks=4, recent=6)] * 2
    kept = {}
    for shared in (False, True):
        cache = protocol.chance(model, specs, asked, 2, shared, 0)(slice(0, 4))
        with torch.no_grad():
            model(torch.from_numpy(asked.context), past_key_values=cache)
        kept[shared] = [layer.position.sort(-1).values for layer in cache.layers]
        assert all(held.shape == (4, 2, 24) for held in kept[shared])
    assert torch.equal(kept[True][0][:, 0], kept[True][0][:, 1]) and torch.equal(*kept[True])
    assert not torch.equal(kept[False][0][:, 0], kept[False][0][:, 1])


@pytest.mark.parametrize("way", ["blind", "aware"])
def test_with_room_for_everything_answers_are_those_of_greedy_generation(
    load: Any, model: LlamaForCausalLM, way: str
) -> None:
    protocol, tasks = load("protocol"), load("tasks")
    asked = tasks.batch("induction", 0, 8, LENGTH)
    ids = torch.from_numpy(np.concatenate([asked.context, asked.question], 1))
    model.set_attn_implementation("eager")
    for _ in range(asked.answer.shape[1]):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    said = ids[:, -asked.answer.shape[1] :].numpy()
    for answer, want in ((said, True), ((said + 1) % 192, False)):
        given = dataclasses.replace(asked, answer=answer)
        found = protocol.examine(model, given, protocol.plain(model, [KvSpec()] * 2), way)
        assert (found.right == want).all()


def test_a_cache_that_keeps_less_holds_less(load: Any, model: LlamaForCausalLM) -> None:
    protocol, tasks, methods = load("protocol"), load("tasks"), load("methods")
    asked = tasks.batch("passkey", 0, 8, LENGTH)
    full = protocol.examine(model, asked, protocol.plain(model, [KvSpec()] * 2), "blind").nbytes
    for specs in methods.evicting(2, 24).values():
        assert protocol.examine(model, asked, protocol.plain(model, specs), "blind").nbytes < full / 2


@pytest.mark.parametrize("budget", [16, 40, 80])
def test_every_method_keeps_its_budget_and_lets_scores_choose(load: Any, budget: int) -> None:
    for specs in load("methods").evicting(2, budget).values():
        assert {spec.budget for spec in specs} == {budget}
        assert all(spec.sinks + spec.recent <= budget // 2 for spec in specs)


def test_injected_outliers_leave_the_model_as_it_was(load: Any, model: LlamaForCausalLM) -> None:
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 192, (4, LENGTH)))
    changed = LlamaForCausalLM(model.config).eval()
    changed.load_state_dict(model.state_dict())
    load("inject").inject(changed)
    with torch.no_grad():
        expected, found = (
            model(ids, past_key_values=_float(model)).logits,
            changed(ids, past_key_values=_float(changed)).logits,
        )
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    assert not torch.equal(
        changed.model.layers[0].self_attn.k_proj.weight, model.model.layers[0].self_attn.k_proj.weight
    )


def test_outliers_cost_scales_per_token_much_and_scales_per_channel_little(load: Any, model: LlamaForCausalLM) -> None:
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 192, (4, 160)))
    changed = LlamaForCausalLM(model.config).eval()
    changed.load_state_dict(model.state_dict())
    load("inject").inject(changed, channels=0)
    four = "int4(group=32, float_zero)"
    by_token, by_channel = KvSpec(keys="int4(token)"), KvSpec(keys=four, keys_by="channel", residual=32)
    worse = {}
    for name, spec in (("token", by_token), ("channel", by_channel)):
        plain, hard = (_error(each, ids, spec) for each in (model, changed))
        worse[name] = hard / plain
    assert worse["token"] > 2
    assert worse["channel"] < 1.2


def test_a_model_that_normalizes_its_keys_is_refused(load: Any) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=16, num_key_value_heads=1, head_dim=16, **sizes)
    with pytest.raises(ValueError, match="normalizes queries and keys"):
        load("inject").inject(Qwen3ForCausalLM(config))


def test_where_a_cache_of_fixed_size_begins_to_pay_lies_on_the_line_between_two_contexts(load: Any) -> None:
    crossing = load("break_even").crossing
    assert crossing([1000, 3000, 9000], [0.5, 1.5, 4.5]) == 2000
    assert crossing([1000, 3000], [1.2, 1.5]) == 1000, "always"
    assert crossing([1000, 3000], [0.5, 0.9]) is None, "never, as far as was measured"


def test_a_method_is_worse_only_where_the_interval_of_the_paired_difference_says_so(load: Any) -> None:
    paired = load("against_kvpress").paired
    theirs = np.ones(100, bool)
    few, many = theirs.copy(), theirs.copy()
    few[:1], many[:20] = False, False
    assert not paired(few, theirs)["shown worse"]
    assert paired(many, theirs)["shown worse"] and not paired(theirs, many)["shown worse"]


def _float(model: LlamaForCausalLM) -> KvCache:
    return KvCache.attach(model, [KvSpec()] * 2)


@torch.no_grad()
def _error(model: LlamaForCausalLM, ids: torch.Tensor, spec: KvSpec) -> float:
    """Relative error of the logits of the last 32 tokens, which attend to what was stored of those before."""
    found = []
    for each in (KvSpec(), spec):
        cache = KvCache.attach(model, [each] * 2)
        model(ids[:, :-32], past_key_values=cache)
        found.append(model(ids[:, -32:], past_key_values=cache).logits)
    return float((found[1] - found[0]).norm() / found[0].norm())
