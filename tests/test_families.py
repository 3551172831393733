"""Every model family end to end: load, walk block by block, compress, export, run in ONNX Runtime.

transformers' own forward is what all of it is compared with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

import compress
from compress import hwprofiles
from compress.errors import UnsupportedError
from compress.export.onnx import target
from compress.export.onnx.runtime import Session
from compress.hwprofiles import Profile
from compress.inputs.datasets import Calibration
from compress.inputs.windows import Windows
from compress.models.experts import is_experts
from compress.models.model import Model, Task
from compress.models.skeleton import OUTER
from compress.quality.evaluate import stream_logits
from compress.quality.verification import agreement
from helpers.models import SPECIAL, UNGROUPED

VOCABULARY = UNGROUPED["vocab_size"]
SIZES = {**UNGROUPED, **SPECIAL}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "eos_token_id": 2}
# two kinds of layers, so two masks and two rotary embeddings
GEMMA3 = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16}
MIXTURE = {"num_experts_per_tok": 2}
LOCAL = {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}


@dataclass(frozen=True)
class Family:
    """A config, how many layers there are to compress, and which of them share the embedding's weight."""

    config: str
    settings: dict[str, Any]
    layers: int
    tied: bool = False
    maker: str = "AutoModelForCausalLM"
    changes: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "llama": Family("LlamaConfig", GROUPED, 16),
    "llama-bfloat16": Family("LlamaConfig", GROUPED, 16, changes={"dtype": torch.bfloat16}),
    "qwen3": Family("Qwen3Config", GROUPED, 16, changes={"head_dim": 16}),
    "mistral": Family("MistralConfig", GROUPED, 16, changes={"sliding_window": 5}),
    "gemma2": Family("Gemma2Config", GROUPED, 15, tied=True, changes={"head_dim": 8, "sliding_window": 5}),
    "gemma3": Family("Gemma3TextConfig", GROUPED, 15, tied=True, changes={"head_dim": 16, **GEMMA3}),
    "phi3": Family("Phi3Config", GROUPED, 10),
    "gpt2": Family("GPT2Config", GPT2, 9, tied=True),
    "opt": Family("OPTConfig", SIZES, 13, tied=True, changes={"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "mixtral": Family("MixtralConfig", GROUPED, 26, changes={"num_local_experts": 4, **MIXTURE}),
    "qwen2-moe": Family(
        "Qwen2MoeConfig",
        {**GROUPED, "dtype": torch.bfloat16},
        34,
        changes={"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, **MIXTURE},
    ),
    "bert-decoder": Family("BertConfig", SIZES, 14, tied=True, changes={"is_decoder": True}),  # its head has a bias
    "bert": Family("BertConfig", SIZES, 14, maker="AutoModel"),
    "bert-for-masked-lm": Family("BertConfig", SIZES, 13, maker="AutoModelForMaskedLM"),
    "modernbert": Family("ModernBertConfig", SIZES, 9, maker="AutoModelForMaskedLM", changes=LOCAL),
    "mistral-without-a-head": Family("MistralConfig", GROUPED, 15, maker="AutoModel", changes={"sliding_window": 5}),
}


def exact(profile: Profile) -> Profile:
    """The same machine, computing with the activations as they are."""
    runtime = profile.runtimes["onnxruntime"]
    formats = tuple(entry.model_copy(update={"accuracy_level": None}) for entry in runtime.formats)
    return profile.model_copy(update={"runtimes": {"onnxruntime": runtime.model_copy(update={"formats": formats})}})


PROFILE = hwprofiles.load("cpu-x86-avx512-vnni")
EXACT = exact(PROFILE)


@dataclass(frozen=True)
class Case:
    """A family's model, transformers' own, the graph captured once, and the float graph in its runtime."""

    family: Family
    folder: Path
    model: Model
    reference: Any
    graph: bytes
    session: Session

    def expected(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            output = self.reference(ids)
        result: torch.Tensor = output.logits if "logits" in output else output.last_hidden_state
        return result

    @property
    def is_decoder(self) -> bool:
        return self.model.task is Task.CAUSAL_LM


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two runtimes take turns here; their waiting threads would take each other's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest, save_random: Callable[..., Path]) -> Case:
    family = FAMILIES[request.param]
    config = getattr(transformers, family.config)(**{**family.settings, **family.changes})
    folder = save_random(request.param, config, family.maker)
    model = compress.load(folder)
    auto = transformers.AutoModelForCausalLM if model.task is Task.CAUSAL_LM else transformers.AutoModel
    graph = target.capture(model, PROFILE)
    target.write(model, PROFILE, folder / "onnx", graph)
    reference = auto.from_pretrained(folder, dtype=torch.float32)
    return Case(family, folder, model, reference, graph, Session(folder / "onnx", 1))


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids that are no special token."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def difference(found: Any, expected: Any) -> float:
    """Largest difference over the largest value."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_each_linear_layer_embedding_and_expert_is_found_with_its_shape(case: Case) -> None:
    wanted = {}
    without = {"pooler.dense"} if case.family.maker == "AutoModelForMaskedLM" else set()
    for name, module in case.reference.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and name not in without:
            wanted[name] = tuple(module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape)
        if is_experts(module):
            wanted |= {f"{name}.gate_up_proj.{i}": tuple(w.shape) for i, w in enumerate(module.gate_up_proj)}
            wanted |= {f"{name}.down_proj.{i}": tuple(w.shape) for i, w in enumerate(module.down_proj)}
    layers = case.model.structure.layers
    found = {user: spec.shape for spec in layers.values() for user in spec.users if spec.kind != "embedding"}
    embedding = next(spec for spec in layers.values() if spec.kind == "embedding")
    assert embedding.shape == (VOCABULARY, 32) and embedding.segment == OUTER
    assert len(embedding.users) == (2 if case.family.tied else 1)
    assert found == {name: shape for name, shape in wanted.items() if name not in embedding.users}
    assert len(layers) == case.family.layers
    assert len(case.model.structure.blocks) == 2


def test_walking_block_by_block_gives_what_the_whole_model_gives(case: Case) -> None:
    windows = tokens(3, 12)
    assert difference(torch.stack(list(stream_logits(case.model, windows))), case.expected(windows)) < 1e-5


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 12), (3, 7), (3, 1)])
def test_the_runtime_agrees_at_sizes_that_the_export_never_saw(case: Case, rows: int, length: int) -> None:
    ids = tokens(rows, length)
    assert difference(case.session.logits(ids.numpy()), case.expected(ids)) < 1e-4


def test_decoding_with_the_cache_gives_the_tokens_of_decoding_without(case: Case) -> None:
    if not case.is_decoder:
        pytest.skip("an encoder has no cache")
    ids = tokens(1, 5, seed=1)
    for _ in range(20):
        ids = torch.cat([ids, case.expected(ids)[:, -1:].argmax(-1)], 1)
    assert case.session.greedy(ids[0, :5].tolist(), 20) == ids[0, 5:].tolist()


def test_pieces_fed_through_the_cache_give_the_logits_of_the_whole(case: Case) -> None:
    if not case.is_decoder:
        pytest.skip("an encoder has no cache")
    ids, parts, feeds = tokens(2, 15), [], {}
    for start, stop in ((0, 4), (4, 5), (5, 12), (12, 15)):
        now = case.session.feeds(ids[:, start:stop].numpy(), past=start) | feeds
        logits, *present = case.session.session.run(case.session.outputs, now)
        feeds = dict(zip(case.session.cache_names, present, strict=True))
        parts.append(logits)
    assert difference(np.concatenate(parts, 1), case.expected(ids)) < 1e-4


def test_padded_rows_give_what_they_give_alone(case: Case) -> None:
    rows = [tokens(1, length, seed=length) for length in (9, 4, 1)]
    ids, mask = np.zeros((3, 9), np.int64), np.zeros((3, 9), np.int64)
    for place, row in enumerate(rows):  # decoders go on at the right, so they are padded on the left
        part = slice(9 - row.shape[1], 9) if case.is_decoder else slice(0, row.shape[1])
        ids[place, part], mask[place, part] = row.numpy(), 1
    feeds = case.session.feeds(ids) | {"attention_mask": mask}
    found = case.session.session.run(case.session.outputs[:1], feeds)[0]
    for place, row in enumerate(rows):
        last = -1 if case.is_decoder else row.shape[1] - 1
        assert difference(found[place, last], case.expected(row)[0, -1]) < 1e-4


def test_what_gptq_left_in_the_store_is_what_the_exported_graph_computes(case: Case, tmp_path: Path) -> None:
    windows = Windows(tokens(16, 32, seed=2), tuple(range(16)), "ppl/disjoint-32", "")
    result = compress.Pipeline.parse("gptq(format=int4(group=16))").run(case.model, Calibration(windows, 0, "random"))
    done = [item for item in result.passes[0].layers if item.changed]
    assert {item.layer for item in done} == {
        name for name, spec in case.model.structure.layers.items() if spec.segment != OUTER and not spec.routed
    }
    # against the reference stream the errors of all layers before count too
    worst = {"same inputs": 0.02, "reference stream": 0.5}
    assert all(item.output_error is not None and item.output_error < worst[item.output_reference] for item in done)
    for place, profile in enumerate((EXACT, PROFILE)):
        written = target.write(result.model, profile, tmp_path / str(place), case.graph)
        session = Session(written.folder, 1)
        found = agreement(session, result.model, tokens(16, 32, seed=3), written.bounds)
        assert found.agrees, found
        assert found.max_relative_difference < (1e-4 if profile is EXACT else written.bounds.shipped)


def config_folder(folder: Path, config: str, architecture: str, **settings: Any) -> Path:
    """A folder with config.json alone."""
    made = getattr(transformers, config)(**settings)
    made.architectures = [architecture]
    made.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "architecture", "settings", "sentence"),
    [
        ("T5Config", "T5ForConditionalGeneration", {"num_layers": 2}, "encoder-decoder and multi-modal models"),
        ("LlavaConfig", "LlavaForConditionalGeneration", {}, "encoder-decoder and multi-modal models"),
        ("ViTConfig", "ViTModel", {"num_hidden_layers": 1}, "takes pixel_values, not token ids"),
        ("JambaConfig", "JambaForCausalLM", {**GROUPED, "attn_layer_offset": 1}, "no list of like blocks"),
        ("AlbertConfig", "AlbertModel", {**SIZES, "embedding_size": 16}, r"has 1 block\(s\) .* but 2 layers"),
        ("Llama4TextConfig", "Llama4ForCausalLM", GROUPED, "computes its experts by itself"),
    ],
)
def test_a_model_of_another_kind_is_refused_when_it_is_loaded(
    tmp_path: Path, config: str, architecture: str, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UnsupportedError, match=sentence):
        compress.load(config_folder(tmp_path, config, architecture, **settings), weights=False)


@pytest.mark.parametrize(
    ("config", "architecture", "settings", "sentence"),
    [
        ("GptOssConfig", "GptOssForCausalLM", {**GROUPED, "num_local_experts": 4}, "passes s_aux to its attention"),
        ("FalconConfig", "FalconForCausalLM", SIZES, "'falcon' computes attention by itself"),
        ("BloomConfig", "BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "attention by itself"),
        ("MambaConfig", "MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2}, "no attention heads"),
        ("DeepseekV3Config", "DeepseekV3ForCausalLM", {**SIZES, "n_routed_experts": 8}, "caches 4 heads of"),
    ],
)
def test_attention_that_the_onnx_target_does_not_know_is_refused(
    tmp_path: Path, config: str, architecture: str, settings: dict[str, Any], sentence: str
) -> None:
    model = compress.load(config_folder(tmp_path, config, architecture, **settings), weights=False)
    with pytest.raises(UnsupportedError, match=sentence):
        target.capture(model, PROFILE)


def test_a_mask_with_chunks_is_refused_by_the_onnx_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compress.load(config_folder(tmp_path, "LlamaConfig", "LlamaForCausalLM", **GROUPED), weights=False)
    masks = transformers.masking_utils
    chunks = masks.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64))
    monkeypatch.setattr(masks, "causal_mask_function", chunks)
    with pytest.raises(UnsupportedError, match="a mask of another kind"):
        target.capture(model, PROFILE)


def test_an_architecture_is_named_in_the_config_or_guessed_from_its_type(tmp_path: Path) -> None:
    folder = config_folder(tmp_path, "BertConfig", "", **SIZES)
    raw = json.loads((folder / "config.json").read_text())
    for kind, task in (("bert", Task.ENCODER), ("llama", Task.CAUSAL_LM)):
        (folder / "config.json").write_text(json.dumps({**raw, "architectures": None, "model_type": kind}))
        assert compress.load(folder, weights=False).task is task
