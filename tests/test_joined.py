"""Products of the same values as one operator: what comes out is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import transformers

import compress
from compress import hwprofiles
from compress.export.onnx import fusions, joined, target
from compress.export.onnx.runtime import PORTABLE, SHARED, Session
from compress.models.model import Model
from compress.pipeline import Pipeline
from helpers.models import ROTARY_SIZES as SIZES

PROFILE = hwprofiles.load("cpu-x86-avx512-vnni")
ALIKE = "rtn(format=int4(group=32))"
APART = "rtn(format=int4(group=16), targets=[*.q_proj]), rtn(format=int4(group=32), targets=[*.k_proj, *.v_proj])"


def products(folder: Path, name: str) -> list[onnx.NodeProto]:
    graph = onnx.load(str(folder / name), load_external_data=False).graph
    return [node for node in graph.node if node.op_type == "MatMulNBits"]


def weight_bytes(folder: Path) -> int:
    tensors = ir.load(folder / PORTABLE).graph.initializers.values()
    return sum(each.const_value.nbytes for each in tensors if each.const_value and ".weight" in str(each.name))


def made(source: Path, passes: str) -> Model:
    return Pipeline.parse(passes).run(compress.load(source)).model


def logits(folder: Path, name: str) -> np.ndarray:
    ids = np.random.default_rng(0).integers(3, 96, (2, 20))
    return Session(folder, 1, graph=name).logits(ids)


@pytest.mark.parametrize(
    ("config", "count"),
    [("LlamaConfig", 4), ("Qwen2Config", 6)],  # the second has biases at queries, keys and values
)
def test_products_of_the_same_values_are_one_and_give_the_same_to_the_bit(
    save_random: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, count: int
) -> None:
    model = made(save_random(config, getattr(transformers, config)(**SIZES)), ALIKE)
    graph = target.capture(model, PROFILE)
    target.write(model, PROFILE, tmp_path / "joined", graph)
    without = tuple(rewrite for rewrite in fusions.REWRITES if rewrite is not joined.join)
    monkeypatch.setattr(fusions, "REWRITES", without)
    target.write(model, PROFILE, tmp_path / "apart", graph)
    assert weight_bytes(tmp_path / "joined") == weight_bytes(tmp_path / "apart")
    for name in (PORTABLE, SHARED):
        onnx.checker.check_model(str(tmp_path / "joined" / name))
        assert len(products(tmp_path / "apart", name)) == 2 * 7
        assert len(products(tmp_path / "joined", name)) == 2 * count
        assert np.array_equal(logits(tmp_path / "joined", name), logits(tmp_path / "apart", name))


def test_attention_takes_the_joined_product_whole_where_nothing_comes_between(
    save_random: Callable[..., Path], tmp_path: Path
) -> None:
    for config, whole in (("LlamaConfig", True), ("Qwen2Config", False)):
        folder = tmp_path / config
        target.write(made(save_random(config, getattr(transformers, config)(**SIZES)), ALIKE), PROFILE, folder)
        nodes = onnx.load(str(folder / SHARED), load_external_data=False).graph.node
        attentions = [node for node in nodes if node.op_type == "GroupQueryAttention"]
        assert len(attentions) == 2 and all((node.input[1] == "") is whole for node in attentions)


def test_products_of_different_formats_stay_apart(save_random: Callable[..., Path], tmp_path: Path) -> None:
    target.write(made(save_random("apart", transformers.LlamaConfig(**SIZES)), APART), PROFILE, tmp_path)
    widths = sorted(next(item.i for item in node.attribute if item.name == "N") for node in products(tmp_path, SHARED))
    assert widths == [32, 32, 32, 32]  # queries, and keys with values, of two layers


def test_the_table_and_the_head_that_share_a_tensor_are_left_alone(
    save_random: Callable[..., Path], tmp_path: Path
) -> None:
    tied = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    passes = f"{ALIKE}, rtn(format=int4(group=32), targets=[kind:embedding, kind:head])"
    target.write(made(save_random("tied", tied), passes), PROFILE, tmp_path)
    kept = onnx.load(str(tmp_path / PORTABLE), load_external_data=False).graph.initializer
    assert not [item.name for item in kept if "+" in item.name and "embed" in item.name]
    assert len(products(tmp_path, PORTABLE)) == 2 * 4 + 1
