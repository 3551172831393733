"""Which users of a tied weight a pass treats, and which layers its overrides reach."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import compress
from compress.engine.matching import Resolution, resolve
from compress.errors import UsageError
from compress.layer import LayerKind, LayerSpec
from compress.models.skeleton import OUTER, Structure
from compress.pipeline import Pipeline, planned

BOTH = "format=int8(group=32), targets=[kind:embedding, kind:head]"


def structure_of(*users: str) -> Structure:
    """One block with two linear layers, and an embedding whose weight all `users` share."""
    inner = [LayerSpec(name, LayerKind.LINEAR, (64, 64), (name,), segment=0) for name in ("h.0.up", "h.0.down")]
    tied = LayerSpec(users[0], LayerKind.EMBEDDING, (256, 64), users, segment=OUTER)
    return Structure("h", ("h.0",), {spec.name: spec for spec in (tied, *inner)}, {}, {}, "head")


def laid(text: str, *users: str) -> Resolution:
    return resolve(Pipeline.parse(text).passes, structure_of(*(users or ("embed", "head"))))


def formats(found: Resolution) -> dict[str, str]:
    return {name: str(spec.format) for name, spec in planned(found).items() if spec.segment == OUTER}


@pytest.mark.parametrize(
    ("text", "untied", "expected"),
    [
        (f"rtn({BOTH})", (), {"embed": "int8(group=32)"}),
        (f"rtn({BOTH}, ignore=[head])", ("head",), {"embed": "int8(group=32)", "head": "None"}),
        (f"rtn({BOTH}, ignore=[kind:embedding])", ("head",), {"embed": "None", "head": "int8(group=32)"}),
        (
            f"rtn({BOTH}, overrides={{head: {{format: int4(group=32)}}}})",
            ("head",),
            {"embed": "int8(group=32)", "head": "int4(group=32)"},
        ),
        (
            f"rtn({BOTH}, overrides={{kind:embedding: {{bits: 4}}}})",
            ("head",),
            {"embed": "int4(group=32)", "head": "int8(group=32)"},
        ),
        (f"rtn({BOTH}, overrides={{head: {{format: int8(group=32)}}}})", (), {"embed": "int8(group=32)"}),
        (f"rtn({BOTH}, overrides={{*e*: {{bits: 4}}}})", (), {"embed": "int4(group=32)"}),
        ("rtn(format=int8(group=32), targets=[head])", ("head",), {"embed": "None", "head": "int8(group=32)"}),
    ],
)
def test_users_of_a_tied_weight_part_where_a_pass_treats_them_unlike(
    text: str, untied: tuple[str, ...], expected: dict[str, str]
) -> None:
    found = laid(text)
    assert found.untied == untied
    assert formats(found) == expected


def test_users_that_are_treated_alike_stay_together() -> None:
    found = laid("rtn(format=int8(group=32), targets=[embed, head, late], ignore=[embed])", "embed", "head", "late")
    assert found.untied == ("head",)
    assert found.structure.layers["head"].users == ("head", "late")
    assert found.structure.layers["head"].kind is LayerKind.LINEAR
    assert formats(found) == {"embed": "None", "head": "int8(group=32)"}


@pytest.mark.parametrize("more", ["", ", ignore=[head]"])
def test_a_pass_that_does_not_treat_embeddings_parts_nothing_for_nothing(more: str) -> None:
    found = laid(f'gptq(format=int4(group=32), targets=["*"]{more})')
    assert found.untied == ()
    assert formats(found) == {"embed": "None"}
    assert found.skipped[0]["embed"] == "gptq does not treat embedding layers"


def test_a_head_that_an_override_singles_out_is_treated_by_a_pass_for_linear_layers() -> None:
    found = laid('gptq(format=int4(group=32), targets=["*"], overrides={head: {bits: 8}})')
    assert formats(found) == {"embed": "None", "head": "int8(group=32)"}


def test_an_ignored_head_of_a_real_model_stays_in_float_and_the_embedding_does_not(llama: Path, tmp_path: Path) -> None:
    model = compress.load(llama)
    result = Pipeline.parse(f"rtn({BOTH}, ignore=[lm_head])").run(model, folder=tmp_path / "m")
    layers = result.model.structure.layers
    assert result.untied == ("lm_head",)
    assert str(layers["model.embed_tokens"].format) == "int8(group=32)"
    source = model.layer(model.structure.layers["model.embed_tokens"]).float_weight()
    assert torch.equal(result.model.layer(layers["lm_head"]).float_weight(), source)


def test_the_shorthand_of_a_pass_does_not_change_the_format_of_an_override() -> None:
    found = laid("rtn(bits=4, group_size=32, overrides={*.down: {format: int8(channel)}})")
    specs = planned(found)
    assert str(specs["h.0.down"].format) == "int8(channel)"
    assert str(specs["h.0.up"].format) == "int4(group=32)"
    assert found.matches == ({"override *.down": 1, "default": 2},)


def test_of_two_overrides_of_a_layer_the_later_one_counts() -> None:
    text = "rtn(format=int4(group=32), overrides={h.*: {bits: 3}, *.down: {format: int8(channel)}, re:.*n: {bits: 5}})"
    specs = planned(laid(text))
    assert str(specs["h.0.up"].format) == "int3(group=32)"
    assert str(specs["h.0.down"].format) == "int5(channel)"


@pytest.mark.parametrize(
    "text",
    [
        "rtn(format=int4(group=32), overrides={head: {bits: 8}})",
        "rtn(format=int4(group=32), targets=[*.up], overrides={*.down: {bits: 8}})",
        "rtn(format=int4(group=32), ignore=[*.down], overrides={*.down: {bits: 8}})",
    ],
)
def test_an_override_that_reaches_no_layer_of_its_pass_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="in overrides names only layers that this pass leaves alone"):
        laid(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("adaquant, rtn", "rtn stands after it. Change the order"),
        ("adaquant", "there is none. Add one before it"),
        ("adaquant(targets=[*.up]), rtn(targets=[*.down])", "there is none. Add one before it"),
    ],
)
def test_a_pass_before_the_one_it_needs_is_told_to_change_places_with_it(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        laid(text)


def test_a_model_without_embeddings_says_what_it_has_and_what_suits_it() -> None:
    inner = LayerSpec("up", LayerKind.LINEAR, (64, 64), ("up",), segment=0)
    graph = Structure("h", ("h.0",), {"up": inner}, {}, {}, "")
    with pytest.raises(UsageError, match=r"the model has linear layers only.*encoder-int8"):
        resolve(Pipeline.parse("rtn(targets=[kind:embedding])").passes, graph)


def test_overrides_are_counted_inside_the_pass_only() -> None:
    found = laid("rtn(format=int4(group=32), targets=[*.up], overrides={h.*: {bits: 8}})")
    assert found.matches == ({"*.up": 1, "override h.*": 1},)


def test_settings_of_an_override_are_checked_before_any_model_is_known() -> None:
    with pytest.raises(UsageError, match=r"In the overrides of '\*\.down': rtn: unknown setting 'bit'"):
        Pipeline.parse("rtn(overrides={*.down: {bit: 8}})")
