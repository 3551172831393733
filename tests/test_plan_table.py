"""The plan on a terminal: grouped, short, and never mistaken for a measurement."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from compress.records import Plan, PlannedLayer
from compress.report.plan_table import MAX_KINDS, plan_tables, show_plan
from compress.report.table import Table

GPTQ, RTN = "gptq(format=int4(group=32))", "rtn(format=int8(group=32), targets=[kind:embedding])"
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")


def layer(name: str, **changes: Any) -> PlannedLayer:
    base = PlannedLayer(
        layer=name,
        users=(name,),
        kind="linear",
        shape=(2048, 2048),
        passes=(GPTQ,),
        format="int4(group=32)",
        operator="MatMulNBits",
        kernel="fast",
        stored_bytes=2_359_296,
    )
    return base.model_copy(update=changes)


def untouched(name: str, reason: str = "outside the blocks", **changes: Any) -> PlannedLayer:
    plain = {"passes": (), "reason": reason, "format": "float32", "operator": "MatMul", "stored_bytes": 16_000_000}
    return layer(name, **(plain | changes))


def blocks(count: int) -> tuple[PlannedLayer, ...]:
    return tuple(layer(f"model.layers.{index}.{part}") for index in range(count) for part in PARTS)


def embedding() -> PlannedLayer:
    users = ("model.embed_tokens", "lm_head")
    as_stored = {"passes": ("rtn(format=int8(group=32))",), "format": "int8(group=32)", "kernel": "works"}
    return layer("model.embed_tokens", users=users, operator="GatherBlockQuantized+MatMulNBits", **as_stored)


def plan(*layers: PlannedLayer, **changes: Any) -> Plan:
    found = layers or (embedding(), *blocks(25), untouched("score"))
    base = Plan(
        model="org/large",
        profile="cpu-x86",
        recipe=f"{GPTQ}, {RTN}",
        layers=found,
        matches={GPTQ: {"default": len(found) - 2}, RTN: {"kind:embedding": 1}},
        source_bytes=1_920_000_000,
        predicted_artifact_bytes=640_000_000,
        predicted_model_bytes=630_000_000,
        predicted_peak_memory_bytes=4_100_000_000,
        predicted_disk_bytes=5_600_000_000,
        predicted_seconds=3000.0,
    )
    return base.model_copy(update=changes)


def shown(found: Plan, width: int = 120, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    show_plan(found, Console(file=stream, width=width, force_terminal=False, color_system=None, legacy_windows=False))
    stream.flush()
    return raw.getvalue().decode(encoding)


def tables(found: Plan) -> dict[str, Table]:
    return {table.key: table for table in plan_tables(found)}


def test_layers_of_one_kind_share_a_row() -> None:
    rows = tables(plan())["layers"].rows
    assert rows[0] == (
        "model.embed_tokens", "1", "rtn", "int8(group=32)", "GatherBlockQuantized+MatMulNBits", "works", "2.36 MB",
    )  # fmt: skip
    assert rows[1] == (
        "model.layers.*.self_attn.q_proj", "25", "gptq", "int4(group=32)", "MatMulNBits", "fast", "59 MB",
    )  # fmt: skip
    assert rows[-1] == ("score", "1", "-", "float32", "MatMul", "fast", "16 MB")
    assert len(rows) == 2 + len(PARTS)


def test_a_layer_that_is_treated_otherwise_has_a_row_of_its_own() -> None:
    wide = layer("model.layers.1.mlp.up_proj", passes=("gptq(damp=0.1)",), format="int8(group=32)")
    rows = tables(plan(*blocks(1), wide))["layers"].rows
    assert [row[:4] for row in rows[-2:]] == [
        ("model.layers.0.mlp.up_proj", "1", "gptq", "int4(group=32)"),
        ("model.layers.1.mlp.up_proj", "1", "gptq", "int8(group=32)"),
    ]


def test_a_setting_that_the_format_does_not_show_is_spelled_out() -> None:
    damped = layer("model.layers.1.mlp.up_proj", passes=("gptq(damp=0.1)",))
    rows = tables(plan(*blocks(1), damped))["layers"].rows
    assert [row[2] for row in rows[-2:]] == [GPTQ, "gptq(damp=0.1)"]


def test_every_cost_is_in_a_column_called_predicted() -> None:
    costs = tables(plan())["cost"]
    assert costs.columns == ("quantity", "predicted")
    assert costs.rows == (
        ("artifact size", "640 MB (3x smaller than the source, 1.92 GB)"),
        ("compressed model size", "630 MB"),
        ("peak memory of the run", "4.1 GB"),
        ("disk needed by the run", "5.6 GB"),
        ("time", "50.0 min on idle cores of this machine"),
    )
    for table in plan_tables(plan()):
        for index, title in enumerate(table.columns):
            has_bytes = any(re.search(r"\d [kMG]?B\b", row[index]) for row in table.rows)
            assert not has_bytes or "predicted" in title, (table.key, title)
    assert "measured" not in shown(plan())


def test_matches_are_counted_per_pass_and_pattern() -> None:
    found = tables(plan())["matches"]
    assert found.rows == ((GPTQ, "default", "150"), (RTN, "kind:embedding", "1"))
    assert "every linear layer, convolution and expert inside the blocks" in found.notes[0]
    assert tables(plan(matches={RTN: {"kind:embedding": 1}}))["matches"].notes == ()


def test_untouched_layers_are_grouped_by_reason() -> None:
    gates = [untouched(f"model.layers.{index}.mlp.gate", "a router", stored_bytes=1000) for index in range(4)]
    rows = tables(plan(*blocks(1), *gates, untouched("lm_head")))["untouched"].rows
    assert rows == (
        ("a router", "4", "4 kB", "model.layers.*.mlp.gate (4)"),
        ("outside the blocks", "1", "16 MB", "lm_head"),
    )
    assert "a pass touches every layer" in shown(plan(*blocks(1)))


def test_tied_layers_and_notes_of_fast_kernels_are_told() -> None:
    noted = layer("lm_head", note="only where batch is 1")
    text = shown(plan(embedding(), noted))
    assert "model.embed_tokens also serves lm_head." in text
    assert "MatMulNBits: only where batch is 1." in text


def test_refusals_come_first_and_have_no_size() -> None:
    refused = layer("lm_head", kernel="no", operator="", stored_bytes=0, note="no kernel for 3 bit")
    reasons = ("1 layer(s), first lm_head: no kernel for 3 bit",)
    found = plan(*blocks(1), refused, refusals=reasons, warnings=("slow",), other_targets=("native", "checkpoint"))
    text = shown(found)
    assert text.index("A run would stop here") < text.index("refused: 1 layer(s), first lm_head") < text.index("slow")
    assert tables(found)["layers"].rows[-1] == ("lm_head", "1", "gptq", "int4(group=32)", "-", "no", "-")
    assert "smaller" not in text
    assert "would be stored with: --target native or checkpoint" in text
    assert not {"cost", "latency"} & set(tables(found))


def test_equal_warnings_are_shown_once() -> None:
    assert shown(plan(warnings=("no fast kernel", "no fast kernel"))).count("no fast kernel") == 1


@pytest.mark.parametrize(("width", "lines"), [(120, 45), (80, 60)])
def test_a_model_of_150_layers_takes_a_screen_or_two(width: int, lines: int) -> None:
    found = plan(notes=("1 layer(s) in int8(group=32) run through MatMulNBits: " + "they are rounded. " * 12,))
    assert len(found.layers) > 150
    assert len(shown(found, width).splitlines()) <= lines


def test_layers_without_numbers_do_not_make_an_endless_page() -> None:
    rows = tables(plan(*[layer(f"block_{chr(97 + index // 26)}{chr(97 + index % 26)}") for index in range(150)]))
    assert len(rows["layers"].rows) == MAX_KINDS
    assert "126 more rows are in `compress plan --json`." in rows["layers"].notes


@pytest.mark.parametrize("width", [110, 60, 40])
def test_a_narrow_terminal_shows_every_figure_within_its_width(width: int) -> None:
    text = shown(plan(), width)
    assert max(map(len, text.splitlines())) <= width
    flat = re.sub(r"\s+", " ", text)
    for words in ("640 MB", "4.1 GB", "50.0 min", "59 MB", "works", "150", "16 MB"):
        assert words in flat, (width, words)


def test_hostile_names_do_not_drive_the_terminal() -> None:
    name = "[bold red]x[/] \x1b]0;owned\x07"
    for width in (160, 40):
        text = shown(plan(layer(name), warnings=(name,), refusals=(name,), model=name), width)
        assert not {"\x1b", "\x07"} & set(text)
        assert "[bold red]x[/]" in text


def test_an_ascii_terminal_is_served() -> None:
    assert "mod\\xe8le" in shown(plan(model="modèle"), encoding="ascii")


def test_every_table_is_as_wide_as_its_header() -> None:
    for table in plan_tables(plan()):
        assert len(table.align) == len(table.columns), table.key
        assert {len(row) for row in table.rows} <= {len(table.columns)}, table.key
