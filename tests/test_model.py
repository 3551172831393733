"""Loading: configs that no module can be built of, heads that would be lost, what is fetched from a hub."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.errors import CompressError, UnsupportedError, UsageError
from compress.models.folder import positions


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": "four"},
        {"hidden_act": "no_such_function"},
        {"rope_parameters": {"rope_type": "no_such_rope", "rope_theta": 1e4}},
        {"num_hidden_layers": 0},
        {"hidden_size": -4},
        {"vocab_size": "many"},
        {"architectures": "LlamaForCausalLM"},
    ],
)
def test_a_config_with_a_senseless_value_is_the_users_error_not_ours(copy: Path, changes: dict[str, object]) -> None:
    edit_config(copy, **changes)
    with pytest.raises(CompressError) as caught:
        compress.load(copy)
    assert caught.value.exit_code in (4, 5), caught.value


def test_a_config_without_quantization_may_say_so(copy: Path) -> None:
    edit_config(copy, quantization_config=None)
    assert compress.load(copy).structure.blocks


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "LlamaForTokenClassification"])
def test_a_task_head_is_refused_rather_than_dropped(copy: Path, name: str) -> None:
    edit_config(copy, architectures=[name])
    with pytest.raises(UnsupportedError, match="task head would be lost"):
        compress.load(copy)


def test_stored_tensors_that_the_model_has_no_place_for_are_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    save_file({**tensors, "adapter.weight": torch.ones(2)}, copy / "model.safetensors")
    assert "adapter.weight" in compress.load(copy).warnings[0]


def test_weights_in_a_dtype_that_is_already_compressed_are_refused(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.mlp\.up_proj\.weight is stored as F8_E4M3"):
        compress.load(copy)


@pytest.mark.parametrize("weights", [True, False])
def test_a_hub_id_fetches_weights_only_when_they_are_needed(
    llama: Path, monkeypatch: pytest.MonkeyPatch, weights: bool
) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def fake(source: str, **settings: Any) -> str:
        asked.update(settings, source=source)
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    model = compress.load("org/name", revision="abc", weights=weights)
    assert (asked["source"], asked["revision"]) == ("org/name", "abc")
    assert ("*.safetensors" in asked["allow_patterns"]) is weights
    assert not any(name.endswith((".py", ".bin", ".pt")) for name in asked["allow_patterns"])
    assert model.source == "org/name"


def test_a_config_alone_is_enough_to_plan_but_not_to_read(llama: Path, tmp_path: Path) -> None:
    shutil.copyfile(llama / "config.json", tmp_path / "config.json")
    model = compress.load(tmp_path, weights=False)
    assert model.source_bytes == pytest.approx((llama / "model.safetensors").stat().st_size, rel=0.02)
    with pytest.raises(CompressError, match="no weights"):
        model.layers(0)


def test_every_block_and_layer_is_found(make_llama: Callable[..., Path]) -> None:
    model = compress.load(make_llama("survey", num_hidden_layers=2, tie_word_embeddings=False))
    assert model.structure.blocks == ("model.layers.0", "model.layers.1")
    assert len(model.structure.layers) == 16
    assert model.structure.head == "lm_head"
    assert model.structure.layers["model.layers.1.mlp.down_proj"].shape == (64, 96)
    with pytest.raises(UsageError, match=r"no config\.json"):
        compress.load(Path(__file__).parent)


def test_position_ids_that_begin_after_the_padding_shorten_the_longest_text() -> None:
    from transformers import BertConfig, RobertaConfig

    assert positions(RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512
    assert positions(BertConfig(max_position_embeddings=512)) == 512
