"""config.json and tokenizers: those that ask for code, and those that no parser or machine survives."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hostile import Attack, Place

CODE = "asks for code of its own"
EVIL = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"


def config(**changes: object) -> Callable[[Place], list[Any]]:
    """A model whose config.json has other values, beside a file of code."""

    def make(place: Place) -> list[Any]:
        folder = place.copied_model()
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        (folder / "evil.py").write_text(EVIL)
        return place.run(folder)

    return make


def text(content: str) -> Callable[[Place], list[Any]]:
    """A model whose config.json is another text."""

    def make(place: Place) -> list[Any]:
        folder = place.copied_model()
        (folder / "config.json").write_text(content)
        return place.run(folder)

    return make


def tokenizer(name: str, content: Callable[[dict[str, Any]], object]) -> Callable[[Place], list[Any]]:
    """A model with another file of its tokenizer."""

    def make(place: Place) -> list[Any]:
        folder = place.copied_model()
        found = content(json.loads((folder / name).read_text()))
        (folder / name).write_text(found if isinstance(found, str) else json.dumps(found))
        (folder / "evil.py").write_text(EVIL)
        return place.run(folder)

    return make


TOKENIZER = "tokenizer_config.json"

ATTACKS = (
    Attack("a config with auto_map", config(auto_map={"AutoModelForCausalLM": "evil.Model"}), 5, CODE),
    Attack("a config that maps its class", config(auto_map={"AutoConfig": "evil.Config"}), 5, CODE),
    Attack("a config that trusts itself", config(trust_remote_code=True), 5, CODE),
    Attack("a config that hides it", config(a=[[{"b": {"auto_map": {"AutoConfig": "other/repo--evil.C"}}}]]), 5, CODE),
    Attack("a config with attention from a hub", config(_attn_implementation="someone/kernel"), 5, CODE),
    Attack("a config with attention of a revision", config(attn_implementation="someone/kernel@main:f"), 5, CODE),
    Attack("a config with other attention inside", config(text_config={"attn_implementation": "a/b"}), 5, CODE),
    Attack("a config with experts from a hub", config(_experts_implementation="someone/kernel"), 5, CODE),
    Attack("an architecture of its own", config(model_type="evil", architectures=["EvilForCausalLM"]), 5, "'evil'"),
    Attack("a model type that is a path", config(model_type="../../evil"), 5, "../../evil"),
    Attack("a model type that is a list", config(model_type=["llama"]), 5, "cannot be built"),
    Attack("architectures that are no names", config(architectures=[{"a": 1}]), 5, "not a list of names"),
    Attack("a thousand million layers", config(num_hidden_layers=10**9), 5, "num_hidden_layers"),
    Attack("layers beyond 64 bits", config(num_hidden_layers=10**30), 5, "num_hidden_layers"),
    Attack("a negative number of layers", config(num_hidden_layers=-1), 4, "no list of like blocks"),
    Attack("a width of 1e18", config(hidden_size=10**18), 5, "config.json"),
    Attack("a vocabulary of 1e18", config(vocab_size=10**18), 5, "config.json"),
    Attack("no attention heads", config(num_attention_heads=0), 5, "config.json"),
    Attack("a rope of another kind", config(rope_parameters={"rope_type": "evil"}), 5, "config.json"),
    Attack("a config nested deeply", text("[" * 100_000), 5, "is not JSON"),
    Attack("a config nested deeply in objects", text('{"a":' * 900 + "1" + "}" * 900), 5, "config.json"),
    Attack("a config with a number too long", text('{"a": ' + "9" * 5000 + "}"), 5, "is not JSON"),
    Attack("a config that is no number", text('{"model_type": "llama", "rms_norm_eps": NaN}'), 5, "config.json"),
    Attack(
        "a tokenizer with auto_map",
        tokenizer(TOKENIZER, lambda c: {**c, "auto_map": {"AutoTokenizer": "e.T"}}),
        5,
        CODE,
    ),
    Attack("a tokenizer that trusts itself", tokenizer(TOKENIZER, lambda c: {**c, "trust_remote_code": True}), 5, CODE),
    Attack("a tokenizer config that is a list", tokenizer(TOKENIZER, lambda _: [1]), 5, "tokenizer"),
    Attack("a tokenizer config nested deeply", tokenizer(TOKENIZER, lambda _: "[" * 100_000), 5, "tokenizer"),
    Attack("a tokenizer that is no object", tokenizer("tokenizer.json", lambda _: [1]), 5, "tokenizer"),
    Attack("a tokenizer nested deeply", tokenizer("tokenizer.json", lambda _: "[" * 100_000), 5, "tokenizer"),
    Attack(
        "a tokenizer with ids beyond the model",
        tokenizer(
            "tokenizer.json",
            lambda c: {
                **c,
                "model": {**c["model"], "vocab": {key: value + 10**6 for key, value in c["model"]["vocab"].items()}},
            },
        ),
        5,
        "vocabulary",
    ),
)
