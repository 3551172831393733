"""What the harness would ask of a model, against torch; answers that are kept; no harness needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress import artifact as artifacts
from compress.errors import InputError, UsageError
from compress.inputs.prompts import Reader, read_reader
from compress.progress import Progress
from compress.quality.harness_model import Answers, HarnessModel


@dataclass
class Request:
    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def reader(lm_out: Path) -> Reader:
    return read_reader(lm_out / "onnx")


@pytest.fixture(scope="module")
def model(lm_out: Path, reader: Reader) -> HarnessModel:
    artifact = artifacts.open_artifact(lm_out)
    session = artifact.session()
    runner = artifact.target.runner(session, artifact.deployable)  # type: ignore[attr-defined]
    return HarnessModel(session, runner, reader, Answers(None), "variant", Progress(quiet=True))


@pytest.fixture(scope="module")
def original(llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(llama).eval()


def log_probabilities(original: Any, ids: list[int]) -> torch.Tensor:
    """(length, vocabulary), of what follows each token."""
    with torch.no_grad():
        logits: torch.Tensor = original(torch.tensor([ids])).logits[0]
    return logits.double().log_softmax(-1)


def test_a_continuation_has_the_log_probability_that_torch_gives_it(
    model: HarnessModel, original: Any, reader: Reader
) -> None:
    before, after = reader.encode("the blue "), reader.encode("river")
    # the space belongs to what follows
    before, after = before[:-1], [before[-1], *after]
    table = log_probabilities(original, before + after)
    expected = sum(float(table[len(before) - 1 + place, token]) for place, token in enumerate(after))
    [(found, greedy)] = model.loglikelihood([Request(("the blue ", "river"))])
    assert found == pytest.approx(expected, abs=1e-4) and greedy is False
    likeliest = int(table[len(before) - 1].argmax())
    [(_, greedy)] = model.loglikelihood([Request(("the blue", reader.decode([likeliest])))])
    assert greedy is (reader.encode("the blue" + reader.decode([likeliest]))[len(before) :] == [likeliest])


def test_without_a_context_the_end_token_stands_before(model: HarnessModel, original: Any, reader: Reader) -> None:
    ids = reader.encode("stone")
    table = log_probabilities(original, [reader.ends[0], *ids])
    expected = sum(float(table[place, token]) for place, token in enumerate(ids))
    assert model.loglikelihood([Request(("", "stone"))])[0][0] == pytest.approx(expected, abs=1e-4)
    assert model.loglikelihood_rolling([Request(("stone",))])[0] == pytest.approx(expected, abs=1e-4)


def test_a_long_text_is_scored_each_token_once_with_as_much_before_it_as_fits(
    model: HarnessModel, original: Any, reader: Reader
) -> None:
    text = "the tree sees a river under blue stone " * 8
    ids, longest = reader.encode(text), reader.longest
    assert longest < len(ids) < 3 * longest
    whole, expected, done = [reader.ends[0], *ids], 0.0, 0
    while done < len(ids):
        count = min(longest, len(ids) - done)
        window = whole[: done + count][-longest:]
        table = log_probabilities(original, window)[-count:]
        expected += sum(float(row[token]) for row, token in zip(table, ids[done : done + count], strict=True))
        done += count
    assert model.loglikelihood_rolling([Request((text,))])[0] == pytest.approx(expected, rel=1e-5)


def test_what_is_generated_ends_before_a_stop_text(model: HarnessModel, reader: Reader) -> None:
    whole = model.generate_until([Request(("the blue river", {"max_gen_toks": 12, "until": []}))])[0]
    assert whole
    stop = whole[3:5]
    cut = model.generate_until([Request(("the blue river", {"max_gen_toks": 12, "until": [stop]}))])[0]
    assert cut == whole[: whole.index(stop)]


def test_a_context_that_is_too_long_loses_its_beginning(model: HarnessModel, reader: Reader) -> None:
    text = "the tree sees a river under blue stone " * 8
    short = reader.decode(reader.encode(text)[-(reader.longest - 4) :])
    settings = {"max_gen_toks": 4}
    long, cut = model.generate_until([Request((text, settings)), Request((short, settings))])
    assert long == cut


def test_settings_and_continuations_that_cannot_be_honoured_are_refused(model: HarnessModel, reader: Reader) -> None:
    with pytest.raises(UsageError, match="num_beams"):
        model.generate_until([Request(("a", {"num_beams": 4}))])
    with pytest.raises(UsageError, match="positions for 128"):
        model.generate_until([Request(("a", {"max_gen_toks": 128}))])
    with pytest.raises(InputError, match="no token of its own"):
        model.loglikelihood([Request(("a", ""))])
    with pytest.raises(InputError, match="positions for 128"):
        model.loglikelihood([Request(("a", "b" * 200))])
    with pytest.raises(UsageError, match="no chat template"):
        model.apply_chat_template([{"role": "user", "content": "a"}])


def test_answers_are_kept_by_kind_and_request_and_survive_a_torn_line(tmp_path: Path) -> None:
    path, made = tmp_path / "a.jsonl", []

    def make() -> list[Any]:
        made.append(1)
        return [-1.5, True]

    assert Answers(path).get("loglikelihood", ("a", "b"), make) == [-1.5, True]
    with path.open("a") as file:
        file.write('["torn')
    again = Answers(path)
    assert again.get("loglikelihood", ("a", "b"), make) == [-1.5, True] and len(made) == 1
    again.get("loglikelihood", ("a", "c"), make)
    again.get("generate_until", ("a", "b"), make)
    assert len(made) == 3
