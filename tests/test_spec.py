"""The one-line grammar of passes and formats."""

import pytest

from compress.engine.quantizing import QuantPass
from compress.errors import UsageError
from compress.pipeline import Pipeline
from compress.spec import Call, parse_call, parse_pipeline


@pytest.mark.parametrize(
    "text",
    [
        "gptq(bits=4)",
        "rtn",
        "rtn(format=int4(group=32)), act_quant(format=int8(tensor, asymmetric))",
        "gptq(format=int8(channel), overrides={*.down_proj: {format: int8(channel)}})",
        "rtn(targets=[kind:embedding, re:.*q.*, model.layers.0.*])",
        'x(a="two words", b=null, c=[1, 2.5, true], d="true", e="1")',
    ],
)
def test_text_is_printed_back_as_it_was_written(text: str) -> None:
    assert ", ".join(call.text() for call in parse_pipeline(text)) == text


def test_white_space_and_quotes_do_not_matter() -> None:
    assert parse_call('gptq( bits = 4 ,format="int4(group=32)" )') == Call(
        "gptq", (), {"bits": 4, "format": "int4(group=32)"}
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gptq(", "character 6"),
        ("gptq(bits=4", "','"),
        ("gptq)", "character 5"),
        ("", "a name was expected"),
        ("a(b=1, b=2)", "given twice"),
        ("gptq(bits==4)", "character 11"),
        ('gptq(x="open)', "character"),
        ("gptq(bits=04)", "character 11 a number"),
        ("gptq(damp=1.)", "character 11 a number"),
        ("gptq(damp=-.5)", "character 11 a number"),
        (r'gptq(targets=["\x"])', "character 15 a text"),
        ("gptq(overrides={[a]: 1})", "character 17 a name"),
        ("gptq(overrides={a: {}, a: {}})", "given twice"),
        ("gptq(overrides={a(b): {}})", "is no name"),
    ],
)
def test_an_error_says_where_the_text_stops_making_sense(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told.replace("(", r"\(")):
        parse_pipeline(text)


@pytest.mark.parametrize(
    "text",
    [
        "gptq(bits=4)",
        "gptq(format=int4(group=128), damp=0.02)",
        "gptq(format=int4(group=32), bits=4, group_size=32, targets=[*.q_proj])",
        "rtn(clip=true), act_quant",
    ],
)
def test_a_pipeline_prints_the_settings_that_were_given(text: str) -> None:
    assert str(Pipeline.parse(text)) == text


def test_the_shorthand_of_the_issue_is_printed_back_identically() -> None:
    assert str(Pipeline.parse("gptq(bits=4)")) == "gptq(bits=4)"


@pytest.mark.parametrize(
    ("text", "override", "expected"),
    [
        ("rtn(bits=4, group_size=32)", {"format": "int8(channel)"}, "int8(channel)"),
        ("rtn(bits=4, group_size=32)", {"group_size": 64}, "int4(group=64)"),
        ("rtn(format=int4(group=32, asymmetric))", {"bits": 8}, "int8(group=32, asymmetric)"),
        ("rtn(format=int4(group=32), bits=4)", {"bits": 8}, "int8(group=32)"),
        ("rtn(format=int4(channel))", {"bits": "8", "group_size": 16}, "int8(group=16)"),
        ("rtn(clip=true)", {"bits": 8}, "int8(group=128)"),
    ],
)
def test_what_an_override_says_of_the_format_beats_the_pass(
    text: str, override: dict[str, object], expected: str
) -> None:
    (item,) = Pipeline.parse(text).passes
    changed = item.with_settings(override)
    assert isinstance(changed, QuantPass)
    assert str(changed.resolved_format()) == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gptk(bits=4)", "Did you mean 'gptq'"),
        ("gptq(bit=4)", "Did you mean 'bits'"),
        ("gptq(bits=9)", "2 to 8 bits, found 9"),
        ("gptq(format=int12)", "Unknown format 'int12'"),
        ("gptq(format=int4(grop=32))", "Did you mean 'group'"),
        ("gptq(format=int4(grop=32))", "symmetric, tensor, token. Such as int4"),
        ("gptq(format=int4(chanel))", "Did you mean 'channel'"),
        ("gptq(damp=0)", "greater than 0"),
        ("gptq(4)", "given by name"),
        ("act_quant(format=int8(channel))", "cannot round activations"),
        ("rtn(format=int8(channel), bits=4)", "format=int8(channel) and bits=4 contradict each other"),
        ("rtn(format=int4(group=32), bits=4, group_size=64)", "group_size=64 contradict"),
        ("rtn(overrides={a: {format: int8(channel), bits: 4}})", "In the overrides of 'a': rtn: format=int8(channel)"),
        ("rtn(overrides={a: {bits: many}})", "In the overrides of 'a': rtn: bits='many'"),
        ("rtn(format=int8(channel), overrides={a: {bits: 12}})", "2 to 8 bits, found 12"),
        ("rtn(overrides={a: {targets: [b]}})", "may not set targets"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_is_allowed(text: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        Pipeline.parse(text)
    assert told in str(caught.value)
