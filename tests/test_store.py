"""The store, the block stream and resuming."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress.engine import segment_files, store
from compress.engine.journal import Journal
from compress.engine.workspace import Workspace
from compress.errors import InputError, Interrupted, UsageError
from compress.inputs.datasets import calibrate
from compress.layer import Layer, LayerKind
from compress.models.loading import load
from compress.models.skeleton import OUTER
from compress.pipeline import Pipeline
from compress.progress import Progress
from compress.quality.evaluate import stream_logits

RECIPE = "gptq(format=int4(group=32)), rtn(format=int8(group=32), targets=[kind:embedding, kind:head])"


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_a_stored_model_holds_exactly_what_the_passes_made(llama: Path, text_file: Path, tmp_path: Path) -> None:
    model = compress.load(llama)
    result = Pipeline.parse(RECIPE).run(model, calibrate(model, text_file, samples=8, length=64), folder=tmp_path / "m")
    again = store.open_store(tmp_path / "m")
    for name, spec in again.structure.layers.items():
        assert str(spec.format) in ("int4(group=32)", "int8(group=32)")
        assert torch.equal(again.layer(spec).float_weight(), result.model.layer(spec).float_weight()), name
    plain = model.plain(OUTER)
    assert all(torch.equal(plain[name], tensor) for name, tensor in again.plain(OUTER).items())


def test_a_store_is_described_without_reading_its_files_whole_or_again_for_each_layer(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Pipeline.parse("rtn(format=int4(group=32))").run(compress.load(llama), folder=tmp_path / "m").model
    opened: list[str] = []
    open_file = store.open_file
    monkeypatch.setattr(store, "open_file", lambda path: opened.append(path.name) or open_file(path))
    monkeypatch.setattr(store, "digest_files", lambda _files: pytest.fail("read whole"))
    again = store.open_store(tmp_path / "m", hashed=False)
    assert again.structure.layers == made.structure.layers and again.digest == ""
    assert sorted(opened) == sorted(map(segment_files.segment_file, made.structure.segments))


def test_the_stored_bytes_are_those_of_the_formats(llama: Path, tmp_path: Path) -> None:
    result = Pipeline.parse("rtn(format=int3(group=32, asymmetric))").run(compress.load(llama), folder=tmp_path / "m")
    for spec in result.model.structure.segment_layers(0):
        layer = result.model.layer(spec)
        assert layer.weight.nbytes == spec.format.stored_bytes(spec.shape)
        groups = -(-spec.shape[1] // 32)
        expected = spec.shape[0] * (-(-spec.shape[1] * 3 // 8) + 2 * groups + -(-groups * 3 // 8))
        assert layer.weight.nbytes == expected


def test_streaming_block_by_block_equals_the_whole_model(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(0))
    whole = AutoModelForCausalLM.from_pretrained(llama).eval()
    with torch.no_grad():
        expected = whole(ids).logits
    for row, logits in enumerate(stream_logits(compress.load(llama), ids)):
        assert torch.allclose(logits, expected[row], atol=1e-4)


def test_the_same_run_gives_the_same_bytes(llama: Path, text_file: Path, tmp_path: Path) -> None:
    model = compress.load(llama)
    calibration = calibrate(model, text_file, samples=8, length=64)
    for name in ("a", "b"):
        Pipeline.parse(RECIPE).run(model, calibration, folder=tmp_path / name)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


class StopAfter(Progress):
    """Asks for a stop once so many blocks are done."""

    def __init__(self, blocks: int) -> None:
        super().__init__(quiet=True)
        self.blocks = blocks

    def tick(self, stage: str, done: int, total: int) -> None:
        if done == self.blocks:
            self.signal_number = 2
        super().tick(stage, done, total)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_stopped_run_resumes_to_the_same_bytes_without_repeating_blocks(
    llama: Path, text_file: Path, tmp_path: Path, blocks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model = compress.load(llama)
    calibration = calibrate(model, text_file, samples=8, length=64)
    Pipeline.parse(RECIPE).run(model, calibration, folder=tmp_path / "whole")
    journal = tmp_path / "journal.jsonl"
    with pytest.raises(Interrupted):
        Pipeline.parse(RECIPE).run(
            model, calibration, folder=tmp_path / "m", journal=Journal(journal), progress=StopAfter(blocks)
        )
    written = {
        index: (tmp_path / "m" / segment_files.segment_file(index)).stat().st_mtime_ns for index in range(blocks)
    }
    capsys.readouterr()
    again = Progress()
    result = Pipeline.parse(RECIPE).run(
        model, calibration, folder=tmp_path / "m", journal=Journal(journal), progress=again
    )
    assert capsys.readouterr().err.splitlines()[0] == f"Resuming {tmp_path}: {blocks} of 3 blocks are done"
    assert bytes_of(tmp_path / "m") == bytes_of(tmp_path / "whole")
    for index, moment in written.items():
        assert (tmp_path / "m" / segment_files.segment_file(index)).stat().st_mtime_ns == moment
    assert len([layer for layer in result.passes[0].layers if layer.changed]) == 21


def test_a_torn_last_line_of_the_journal_counts_as_not_written(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.add("one", {"x": 1})
    journal.add("two")
    with path.open("a") as stream:
        stream.write('{"step": "three", "da')
    again = Journal(path)
    assert list(again.steps) == ["one", "two"]
    again.add("three")
    assert list(Journal(path).steps) == ["one", "two", "three"]


def test_an_unfinished_run_of_another_recipe_is_refused_naming_what_differs(tmp_path: Path) -> None:
    first = Workspace(tmp_path / "out")
    first.open({"model": "a", "recipe": "gptq"})
    first.close()
    with pytest.raises(UsageError, match="differs in: recipe"), Workspace(tmp_path / "out") as second:
        second.open({"model": "a", "recipe": "rtn"})


def test_two_runs_cannot_write_one_output(tmp_path: Path) -> None:
    first = Workspace(tmp_path / "out")
    first.open({"model": "a"})
    with pytest.raises(UsageError, match="Another run is writing"):
        Workspace(tmp_path / "out").open({"model": "a"})
    first.close()


def test_a_commit_keeps_what_is_named_and_renames(tmp_path: Path) -> None:
    space = Workspace(tmp_path / "out")
    space.open({"model": "a"})
    (space.folder / "keep").mkdir()
    (space.folder / "keep" / "file").write_text("x")
    (space.folder / "scratch").mkdir()
    space.commit(("keep",))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["keep"]
    assert not space.folder.exists()


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("structure.json", b"{", "malformed"),
        ("block-0001.safetensors", b"\x10", "cannot be read as safetensors"),
        ("outer.safetensors", None, "cannot be read as safetensors"),
    ],
)
def test_a_damaged_store_is_refused_naming_the_file(
    llama: Path, tmp_path: Path, file: str, content: bytes | None, told: str
) -> None:
    Pipeline.parse("rtn").run(load(llama), folder=tmp_path / "m")
    target = tmp_path / "m" / file
    target.write_bytes(content if content is not None else target.read_bytes()[:200])
    with pytest.raises(InputError, match=told) as caught:
        store.open_store(tmp_path / "m")
    assert file in str(caught.value)


def test_changing_one_user_of_a_tied_weight_unties_it_and_is_reported(llama: Path, tmp_path: Path) -> None:
    model = compress.load(llama)
    result = Pipeline.parse("rtn(format=int8(group=32), targets=[kind:head])").run(model, folder=tmp_path / "m")
    again = store.open_store(tmp_path / "m")
    assert result.untied == ("lm_head",)
    assert str(again.structure.layers["lm_head"].format) == "int8(group=32)"
    assert again.structure.layers["model.embed_tokens"].format is None
    ids = torch.arange(20)[None]
    changed, before = next(stream_logits(again, ids)), next(stream_logits(model, ids))
    assert 0 < float((changed - before).abs().max()) < 0.1 * float(before.abs().max())


def test_names_of_one_tensor_are_each_stored_with_it(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    layers = {name: Layer(name, LayerKind.LINEAR, shared, users=(name,)) for name in ("a", "b")}
    segment_files.write_segment(tmp_path, 0, layers, {"c": shared, "empty": torch.zeros(0)})
    found = load_file(tmp_path / "block-0000.safetensors")
    assert all(torch.equal(found[name], shared) for name in ("a.weight", "b.weight", "c"))


def test_settings_for_single_layers_override_the_pass(llama: Path, tmp_path: Path) -> None:
    text = "rtn(format=int4(group=32), ignore=[*.o_proj], overrides={*.down_proj: {format: int8(channel)}})"
    result = Pipeline.parse(text).run(compress.load(llama), folder=tmp_path / "m")
    formats = {name.rpartition(".")[2]: str(spec.format) for name, spec in result.model.structure.layers.items()}
    assert formats["down_proj"] == "int8(channel)"
    assert formats["q_proj"] == "int4(group=32)"
    assert formats["o_proj"] == "None"
    assert result.passes[0].matches == {"ignore *.o_proj": 3, "override *.down_proj": 3, "default": 18}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rtn(targets=[*.w_proj])", "matches no layer"),
        ("rtn(ignore=[*.w_proj])", "matches no layer"),
        ("rtn(overrides={*.w_proj: {bits: 3}})", "matches no layer"),
        ("rtn(targets=[kind:heads])", "Did you mean 'head'"),
        ("rtn(targets=['re:(']) ".replace("'", '"'), "not a regular expression"),
        ("rtn, gptq", "both set the weight format of layer model.layers.0"),
        ("rtn(overrides={*.q_proj: {bit: 3}})", "Did you mean 'bits'"),
        ("gptq(targets=[kind:embedding])", "no layer is left"),
    ],
)
def test_a_pipeline_that_does_not_fit_the_model_is_refused(llama: Path, text: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        Pipeline.parse(text).resolve(compress.load(llama))
    assert told in str(caught.value)


def test_a_pass_that_needs_data_says_so(llama: Path) -> None:
    with pytest.raises(UsageError, match="needs calibration data"):
        Pipeline.parse("gptq").run(compress.load(llama))


def test_gptq_can_quantize_an_untied_head_from_its_own_inputs(
    make_llama: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    model = compress.load(make_llama("untied", tie_word_embeddings=False))
    calibration = calibrate(model, text_file, samples=8, length=64)
    result = Pipeline.parse("gptq(format=int4(group=32), targets=[lm_head])").run(
        model, calibration, folder=tmp_path / "m"
    )
    assert [layer.layer for layer in result.passes[0].layers if layer.changed] == ["lm_head"]
    assert json.loads((tmp_path / "m" / "structure.json").read_text())["blocks"] == 3
