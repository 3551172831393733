"""The second graph of a decoder: GroupQueryAttention on the portable graph's weights, with a cache in one buffer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers

import compress
from compress import hwprofiles
from compress.export.onnx import angles, graphs, target
from compress.export.onnx.cache import Shared
from compress.export.onnx.runtime import PORTABLE, REASON, SHARED, Session
from compress.models.model import Model
from compress.pipeline import Pipeline
from compress.quality.verification import verify_export
from helpers import models

PROFILE = hwprofiles.load("cpu-x86-avx512-vnni")
ROWS = ([5, 6, 7, 8, 9, 10, 11], [40, 41, 42], [99])
SIZES = {**models.SIZES, **models.SPECIAL, "head_dim": 8}
WINDOWED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path]) -> Model:
    return compress.load(make_llama("gqa", num_hidden_layers=2))


@pytest.fixture(scope="module")
def graph(model: Model) -> bytes:
    return target.capture(model, PROFILE)


@pytest.fixture(scope="module")
def folder(model: Model, graph: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Pipeline.parse("rtn(format=int4(group=32))").run(model).model
    return target.write(made, PROFILE, tmp_path_factory.mktemp("gqa"), graph).folder


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Session, Session]:
    """The portable graph and the other one, both in exact arithmetic."""
    return Session(folder, 1, exact=True), Session(folder, 1, exact=True, graph=SHARED)


def tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 96, (rows, length))


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_both_graphs_read_the_same_weights_from_one_file(folder: Path) -> None:
    assert not (folder / f"{SHARED}_data").exists()
    places = []
    for name in (PORTABLE, SHARED):
        onnx.checker.check_model(str(folder / name))
        document = onnx.load(str(folder / name), load_external_data=False)
        places.append(
            {
                tensor.name: sorted((entry.key, entry.value) for entry in tensor.external_data)
                for tensor in document.graph.initializer
                if tensor.data_location == onnx.TensorProto.EXTERNAL
            }
        )
        inline = [one for one in document.graph.initializer if one.data_location != onnx.TensorProto.EXTERNAL]
        assert max(one.ByteSize() for one in inline) < 512
    assert places[0].items() <= places[1].items() and len(places[0]) > 14
    assert all(name.startswith(angles.NAME) for name in places[1].keys() - places[0].keys())
    assert {dict(entry)["location"] for entry in places[1].values()} == {target.DATA}


def test_the_second_graph_has_the_names_and_operators_that_genai_asks_for(folder: Path) -> None:
    document = onnx.load(str(folder / SHARED), load_external_data=False).graph
    assert sum(node.op_type == "GroupQueryAttention" for node in document.node) == 2
    assert not [node for node in document.node if node.op_type == "Softmax"]
    names = [[item.name for item in getattr(Session(folder, 1, graph=name).session, part)()]
             for name in (PORTABLE, SHARED) for part in ("get_inputs", "get_outputs")]  # fmt: skip
    assert names[:2] == names[2:]
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["decoder"]["filename"] == SHARED
    assert config["search"]["past_present_share_buffer"] is True


def test_the_graphs_agree_on_whole_prompts_and_through_their_caches(pair: tuple[Session, Session]) -> None:
    ids = tokens(3, 20)
    assert_close(pair[1].logits(ids), pair[0].logits(ids))
    assert pair[0].greedy([3, 4, 5], 40) == pair[1].greedy([3, 4, 5], 40)
    first, second = pair[0].cache(1, 20), pair[1].cache(1, 20)
    for start, stop in ((0, 6), (6, 7), (7, 15), (15, 20)):  # one row may take many tokens after a past
        mask = np.ones((1, stop), np.int64)
        assert_close(second.run(ids[:1, start:stop], mask), first.run(ids[:1, start:stop], mask))


def test_rows_padded_on_the_right_give_what_each_gives_alone(pair: tuple[Session, Session]) -> None:
    """As onnxruntime-genai pads: the mask ends early, and a row goes on in its own next place."""
    width = max(map(len, ROWS))
    ids = np.asarray([[*row, *[0] * (width - len(row))] for row in ROWS], np.int64)
    lengths = np.asarray([len(row) for row in ROWS])
    alone = [pair[0].greedy(row, 6) for row in ROWS]
    cache, found = pair[1].cache(3, width), []
    logits = cache.run(ids, (np.arange(width) < lengths[:, None]).astype(np.int64))[np.arange(3), lengths - 1]
    for _ in range(6):
        found.append(logits.argmax(-1))
        lengths = lengths + 1
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        logits = cache.run(found[-1][:, None], mask)[:, -1]  # passes the room of the buffer, which then grows
    assert np.stack(found, 1).tolist() == alone


def test_a_runner_turns_rows_padded_on_the_left(folder: Path, pair: tuple[Session, Session]) -> None:
    width = max(map(len, ROWS))
    ids = np.asarray([[*[0] * (width - len(row)), *row] for row in ROWS], np.int64)
    mask = np.asarray([[0] * (width - len(row)) + [1] * len(row) for row in ROWS], np.int64)
    first, second = (target.runner(session, folder) for session in pair)
    assert_close(second.start(ids, mask), first.start(ids, mask))
    for alive in ([True, True, True], [True, False, True], [True, False, True]):
        chosen, rows = np.asarray([7, 8, 9]), np.asarray(alive)
        left, right = first.step(chosen, rows), second.step(chosen, rows)
        assert_close(right[rows], left[rows])
    assert second.placement.file.endswith(SHARED)


def test_decoding_writes_into_one_buffer_and_a_timed_call_repeats_itself(pair: tuple[Session, Session]) -> None:
    session, ids = pair[1], tokens(2, 1)
    call = session.call(ids, past=5)
    call()
    call()
    cache = Shared(session, 2, 8)
    cache.run(tokens(2, 5), np.ones((2, 5), np.int64))
    values = cache.binding.get_outputs()
    buffer = next(iter(cache._buffers.values()))
    assert values[1].data_ptr() == buffer.data_ptr()
    assert np.any(buffer.numpy()[:, :, 4]) and not np.any(buffer.numpy()[:, :, 5:])


def test_the_graph_that_decodes_faster_is_the_one_that_is_used(folder: Path) -> None:
    assert target.session(folder, 1).graph == SHARED
    assert Session(folder, 1).graph == PORTABLE


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ("Gemma2Config", {"sliding_window": 5, "query_pre_attn_scalar": 16}),  # soft caps
        ("Gemma3TextConfig", {**WINDOWED, "query_pre_attn_scalar": 16}),
        ("Qwen3Config", {}),  # norms of queries and keys
    ],
)
def test_windows_soft_caps_and_scales_of_their_own_are_kept(
    save_random: Callable[..., Path], tmp_path: Path, config: str, changes: dict[str, object]
) -> None:
    source = save_random(config, getattr(transformers, config)(**{**SIZES, **changes}))
    target.write(compress.load(source), PROFILE, tmp_path)
    first, second = Session(tmp_path, 1), Session(tmp_path, 1, graph=SHARED)
    ids = tokens(2, 24)
    assert_close(second.logits(ids), first.logits(ids))
    assert first.greedy([3, 4, 5], 24) == second.greedy([3, 4, 5], 24)


def test_where_the_operator_cannot_the_folder_has_one_graph_and_says_why(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / SHARED).write_bytes(b"of an earlier model")
    odd = compress.load(make_llama("odd-heads", num_hidden_layers=1, head_dim=12))
    lowered = target.write(odd, PROFILE, tmp_path)
    assert not (tmp_path / SHARED).exists()
    config = json.loads((tmp_path / "genai_config.json").read_text())
    assert config["model"]["decoder"]["filename"] == PORTABLE
    assert config["search"]["past_present_share_buffer"] is False
    document = onnx.load(str(tmp_path / PORTABLE), load_external_data=False)
    assert {entry.key: entry.value for entry in document.metadata_props}[REASON].startswith("heads of 12;")
    session = target.session(tmp_path, 1)
    found = verify_export(odd, tmp_path, PROFILE, torch.from_numpy(tokens(4, 128)), lowered.bounds)
    assert found.agrees and found.notes == session.notes == (
        f"no {SHARED}: heads of 12; GroupQueryAttention takes multiples of 8",
    )  # fmt: skip


def test_another_provider_gets_the_portable_graph_alone(model: Model, graph: bytes, tmp_path: Path) -> None:
    runtime = PROFILE.runtime("onnxruntime").model_copy(update={"provider": "CUDAExecutionProvider"})
    target.write(model, PROFILE.model_copy(update={"runtimes": {"onnxruntime": runtime}}), tmp_path, graph)
    assert not (tmp_path / SHARED).exists()


def test_verification_covers_both_graphs(model: Model, graph: bytes, tmp_path: Path) -> None:
    lowered = target.write(model, PROFILE, tmp_path, graph)
    ids = torch.from_numpy(tokens(4, 128))
    found = verify_export(model, tmp_path, PROFILE, ids, lowered.bounds)
    assert found.agrees and "the same 32 greedy tokens" in found.notes[0]
    content = onnx.load(str(tmp_path / PORTABLE), load_external_data=False)
    scaled = next(node for node in content.graph.node if node.op_type == "Softmax")
    scaled.attribute[0].i = 1  # over heads, not keys: only the graph that is not used by default is wrong
    (tmp_path / PORTABLE).write_bytes(content.SerializeToString())
    wrong = verify_export(model, tmp_path, PROFILE, ids, lowered.bounds)
    assert not wrong.agrees and wrong.max_relative_difference == found.max_relative_difference
    assert not graphs.compare_graphs(*(target.session(tmp_path, 1),) * 2, ids.numpy(), 1e-3, 128)[0]
