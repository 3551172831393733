"""Continuing prompts with an artifact: batches, streams, samples, chats, ends; and the command."""

import io
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compress
from compress import manifest
from compress.__main__ import main
from compress.errors import InputError, UsageError
from compress.export import find
from compress.inputs.prompts import Reader
from compress.runtime.engine import Engine
from compress.runtime.generation import continue_prompts
from compress.runtime.sampling import Sampling

PROMPTS = ["the river", "a stone runs over the blue tree and sees", "x"]


@pytest.fixture(scope="module", params=["onnx", "checkpoint"])
def engine(request: pytest.FixtureRequest, lm_out: Path) -> Engine:
    return compress.load(lm_out, engine=request.param, threads=1)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def onnx(lm_out: Path) -> Engine:
    return compress.load(lm_out, threads=1)  # type: ignore[return-value]


def slow_greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest token each time, everything read anew."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def edited(out: Path, to: Path, **files: str | None) -> Path:
    """A copy of an artifact's onnx folder with other JSON files (None: removed), under a manifest of its own."""
    import shutil

    shutil.copytree(out, to)
    for name, text in files.items():
        path = to / "onnx" / name.replace("__", ".")
        path.unlink() if text is None else path.write_text(text)
    facts = {key: value for key, value in manifest.read(out).items() if key in ("task", "profile")}
    manifest.write(to, facts, ["onnx", "checkpoint"])
    return to


def test_a_batch_of_unlike_prompts_gives_what_each_gives_alone_and_what_the_model_gives(
    engine: Engine, llama: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama)
    together = engine.generate(PROMPTS, max_new_tokens=12)
    for prompt, row in zip(PROMPTS, together.rows, strict=True):
        alone = engine.generate(prompt, max_new_tokens=12).rows[0]
        assert row == alone and len(row.prompt_tokens) == len(prompt)
        assert list(row.tokens) == slow_greedy(model, list(row.prompt_tokens), len(row.tokens))


def test_rows_that_are_done_take_no_positions_of_a_model_that_has_few(
    make_artifact: Callable[..., Path], save_random: Callable[..., Path]
) -> None:
    """Learned positions: one beyond the last would be an index error, and a shifted one another text."""
    from transformers import AutoModelForCausalLM, GPT2Config

    folder = save_random("gpt2-few", GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2))
    from compress.export.onnx.runtime import PORTABLE
    from compress.export.onnx.runtime import Session as Onnx

    out, model = make_artifact(folder, "onnx", "checkpoint"), AutoModelForCausalLM.from_pretrained(folder)
    prompts = [[5, 9, 3, 7, 1, 2, 8, 4, 6, 11, 12, 13, 14], [3], [9, 8]]
    sessions = {name: find(name).session(out / name, 1) for name in ("onnx", "checkpoint")}
    for name, session in (*sessions.items(), ("onnx", Onnx(out / "onnx", 1, graph=PORTABLE))):
        runner = find(name).runner(session, out / name)  # type: ignore[attr-defined]
        rows, _ = continue_prompts(runner, Reader("x", None, 64, 16), prompts, count=50, sampling=Sampling())
        assert [len(row.tokens) for row in rows] == [3, 15, 14]
        assert {row.finish for row in rows} == {"length"}
        for prompt, row in zip(prompts, rows, strict=True):
            assert list(row.tokens) == slow_greedy(model, prompt, len(row.tokens))


def test_both_graphs_of_the_folder_and_the_session_s_own_loop_give_the_same_tokens(lm_out: Path) -> None:
    from compress.export.onnx.runtime import PORTABLE, Session

    prompts, reader, found = [[1, 2, 3], [9, 8, 7, 6, 5, 4, 3]], Reader("here", None, 256, 128), []
    for session in (Session(lm_out / "onnx", 1, graph=PORTABLE), find("onnx").session(lm_out / "onnx", 1)):
        runner = find("onnx").runner(session, lm_out / "onnx")  # type: ignore[attr-defined]
        rows, _ = continue_prompts(runner, reader, prompts, count=10, sampling=Sampling())
        assert [list(row.tokens) for row in rows] == [session.greedy(prompt, 10) for prompt in prompts]
        found.append([row.tokens for row in rows])
    assert found[0] == found[1]


def test_streamed_pieces_add_up_to_the_text_of_each_row(onnx: Engine) -> None:
    pieces: dict[int, list[str]] = {0: [], 1: []}
    made = onnx.generate(PROMPTS[:2], max_new_tokens=16, stream=lambda row, piece: pieces[row].append(piece))
    for place, row in enumerate(made.rows):
        assert "".join(pieces[place]) == row.text and len(pieces[place]) > 1 and all(pieces[place])


def test_samples_are_the_same_for_a_seed_and_others_for_another(engine: Engine) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 16, "temperature": 1.5, "top_k": 50, "top_p": 0.95}
    first, again = (engine.generate(PROMPTS, seed=1, **settings).rows for _ in range(2))
    assert first == again != engine.generate(PROMPTS, seed=2, **settings).rows
    assert first != engine.generate(PROMPTS, max_new_tokens=16).rows
    assert (
        engine.generate("the", max_new_tokens=9, temperature=2.0, top_k=1).rows
        == engine.generate("the", max_new_tokens=9).rows
    )


def test_a_row_ends_at_the_end_token_of_generation_config_which_is_not_shown(
    onnx: Engine, lm_out: Path, tmp_path: Path
) -> None:
    plain = onnx.generate("the river", max_new_tokens=8).rows[0]
    end = plain.tokens[3]
    expected = plain.tokens[: plain.tokens.index(end)]
    text = json.dumps({"eos_token_id": [end, 999]})
    changed = compress.load(edited(lm_out, tmp_path / "out", generation_config__json=text), threads=1)
    row = changed.generate("the river", max_new_tokens=8).rows[0]  # type: ignore[union-attr]
    assert row.finish == "stop" and row.tokens == expected and plain.finish == "length"


def test_a_row_ends_before_a_stop_text_and_the_others_go_on(onnx: Engine) -> None:
    plain = onnx.generate(PROMPTS, max_new_tokens=20).rows
    stop = next(char for char in plain[0].text[2:] if char not in plain[1].text)
    made = onnx.generate(PROMPTS, max_new_tokens=20, stop=["never to be seen", stop]).rows
    assert made[0].text == plain[0].text.split(stop)[0] and made[0].finish == "stop"
    assert made[1].text == plain[1].text and made[1].finish == "length"


def test_a_prompt_that_leaves_room_for_two_tokens_gets_two(onnx: Engine) -> None:
    row = onnx.generate([7] * 126, max_new_tokens=64).rows[0]
    assert len(row.tokens) <= 2 and (row.finish == "length") == (len(row.tokens) == 2)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([7] * 128, "128 tokens; the model has positions for 128"),
        ("", "prompt is empty"),
        ([1, 256], "token 256, but the vocabulary has 256"),
        ([-1], "token -1"),
        (["the", ""], "Prompt 2 is empty"),
        ([], "No prompt"),
        ([[7, "a"]], "A prompt is a text, a list of token ids, or a chat"),
        ([{"role": "user", "content": "hello"}], "has no chat template"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_a_usage_error(onnx: Engine, prompt: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        onnx.generate(prompt)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"stop": ""}, "stop text is empty"),
        ({"top_p": 0.5}, "draws nothing"),
    ],
)
def test_settings_that_make_no_sense_are_usage_errors(onnx: Engine, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        onnx.generate("the", **settings)


TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_chat_goes_through_the_tokenizer_s_template(lm_out: Path, onnx: Engine, tmp_path: Path) -> None:
    out = edited(lm_out, tmp_path / "out", chat_template__jinja=TEMPLATE)
    chatty: Engine = compress.load(out, threads=1)  # type: ignore[assignment]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    made = chatty.generate(messages, max_new_tokens=5).rows[0]
    assert made == onnx.generate("<system>be brief\n<user>hello\n<assistant>", max_new_tokens=5).rows[0]
    both = chatty.generate([messages, messages[1:]], max_new_tokens=5).rows
    assert both[0] == made and both[1] != made
    with pytest.raises(UsageError, match="refuses these messages: no tools here"):
        chatty.generate([{"role": "tool", "content": "x"}])
    with pytest.raises(UsageError, match="'role' and 'content'"):
        chatty.generate([{"role": "user"}])


def test_without_a_tokenizer_prompts_and_texts_are_token_ids(lm_out: Path, onnx: Engine, tmp_path: Path) -> None:
    out = edited(lm_out, tmp_path / "out", tokenizer__json=None)
    bare: Engine = compress.load(out, threads=1)  # type: ignore[assignment]
    row = bare.generate("1 2 3", max_new_tokens=4).rows[0]
    assert row.tokens == onnx.generate([1, 2, 3], max_new_tokens=4).rows[0].tokens
    assert row.text == "".join(f" {token}" for token in row.tokens)
    with pytest.raises(UsageError, match="no tokenizer: give token ids"):
        bare.generate("hello")


def test_marks_that_a_tokenizer_puts_before_a_text_are_kept_and_those_behind_it_are_not() -> None:
    class Marking:
        def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
            return {"input_ids": [1, *text.encode(), 2] if add_special_tokens else [*text.encode()]}

    reader = Reader("here", Marking(), 256, 64, ends=(2,))
    assert reader.prompt("ab") == [1, 97, 98]
    assert reader.prompt("ab\x02") == [1, 97, 98, 2], "an end that was typed stays"
    assert reader.text("ab", "Text 1") == [1, 97, 98, 2]


def run(capsys: pytest.CaptureFixture[str], *given: object) -> tuple[int, str, str]:
    code = main([str(item) for item in given])
    return code, *capsys.readouterr()


def test_the_command_prints_prompt_and_text_and_says_where_it_ran_on_stderr(
    lm_out: Path, onnx: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    text = onnx.generate("the river", max_new_tokens=8).text
    given = ["generate", lm_out, "--prompt", "the river", "-n", 8, "--threads", 1]
    code, shown, told = run(capsys, *given)
    assert (code, shown) == (0, f"the river{text}\n")
    assert "onnxruntime" in told and "CPU, 1 thread, onnx/" in told and "tokens/s" in told
    assert run(capsys, *given, "--no-echo", "-q") == (0, text + "\n", "")
    several = run(capsys, *given, "--prompt", "x", "-q")[1]
    assert several.startswith(f"the river{text}\n---\nx")


def test_the_command_says_where_the_context_ended_a_text(lm_out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["generate", lm_out, "--prompt", "the river", "-n"]
    assert "(ended by the model's context, which " in run(capsys, *given, 100_000)[2]
    assert "(ended by length)" in run(capsys, *given, 4)[2]


def test_the_command_writes_text_as_it_comes(lm_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    class Recorder(io.StringIO):
        def flush(self) -> None:
            written.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Recorder())
    assert main(["generate", str(lm_out), "--prompt", "the river", "-n", "8", "-q"]) == 0
    assert len(set(written)) > 4 and all(later.startswith(early) for early, later in pairwise(written))


def test_the_command_gives_one_json_object(
    lm_out: Path, onnx: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = onnx.generate("größe", max_new_tokens=6).rows[0]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("größe".encode())))
    code, shown, _ = run(capsys, "generate", lm_out, "--prompt", "-", "-n", 6, "--json")
    found = json.loads(shown)
    assert code == 0 and found["prompt"] == "größe" and found["text"] == row.text
    assert found["tokens"] == list(row.tokens) and found["finish_reason"] == row.finish
    assert found["placement"]["provider"] == "CPU" and found["placement"]["file"].startswith("onnx/model")
    assert found["prompt_tokens"] == 7 and found["pace"]["tokens_per_s"] > 0
    rows = json.loads(run(capsys, "generate", lm_out, "--prompt", "a", "--prompt", "b", "--json")[1])["rows"]
    assert [each["prompt"] for each in rows] == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", "x", "--chat"], "no chat template"),
        (["--prompt", "x", "--system", "y"], "Add --chat"),
        (["--prompt", "-", "--prompt", "-"], "only once"),
        (["--prompt", "x", "--top-p", "0.5"], "temperature 0 draws nothing"),
        (["--prompt", "x", "--engine", "tensor"], "no engine 'tensor'"),
        (["--prompt", "x", "--stop", ""], "stop text is empty"),
    ],
)
def test_wrong_options_are_one_paragraph_with_exit_code_2(
    lm_out: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    code, shown, told = run(capsys, "generate", lm_out, *options)
    assert code == 2 and words in told and shown == "" and "Traceback" not in told


def test_stdin_that_is_no_text_is_malformed_input(
    lm_out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\x00")))
    assert run(capsys, "generate", lm_out, "--prompt", "-")[0] == 5


def test_logits_that_are_not_numbers_stop_the_generation() -> None:
    class Broken:
        def start(self, ids: Any, mask: Any) -> Any:
            return np.full((len(ids), 8), np.nan, np.float32)

    with pytest.raises(InputError, match="NaN"):
        continue_prompts(Broken(), Reader("x", None, 8, 8), [[1]], count=2, sampling=Sampling())  # type: ignore[arg-type]
