"""The README and the program keep each other honest."""

import re
from pathlib import Path

import pytest
import typer.main

from compress import hwprofiles, recipe
from compress.cli.main import app
from compress.errors import CompressError
from compress.formats import NAMES
from compress.passes import table
from compress.pipeline import Pipeline
from compress.quality.metrics import METRICS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
GROUP = typer.main.get_command(app)


def test_every_command_is_in_the_readme_and_has_help() -> None:
    for name, command in GROUP.commands.items():
        assert f"`compress {name}" in README, name
        assert command.help or command.callback.__doc__, name


def test_every_command_of_the_readme_exists() -> None:
    named = set(re.findall(r"`compress ([a-z]+)", README)) | set(
        re.findall(r"^(?:\S*/)?compress ([a-z]+)", README, re.M)
    )
    assert named <= set(GROUP.commands)


def test_every_option_has_help() -> None:
    for name, command in GROUP.commands.items():
        for parameter in command.params:
            assert parameter.name == "help" or getattr(parameter, "help", None), f"{name}: {parameter.name}"


@pytest.mark.parametrize("name", sorted(table()))
def test_every_pass_is_in_the_readme_with_its_summary(name: str) -> None:
    assert f"| `{name}` | {table()[name].summary} |" in README


@pytest.mark.parametrize("name", sorted(recipe.presets()))
def test_every_preset_is_in_the_readme(name: str) -> None:
    assert f"| `{name}` | {recipe.load(name).summary} |" in README


def test_every_format_is_in_the_readme() -> None:
    rows = README.split("| format | settings |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    cells = [row.split(" | ")[0] for row in rows]
    named = {text.partition("(")[0] for cell in cells for text in re.findall(r"`([^`]+)`", cell)}
    for first, last in re.findall(r"`int(\d)` … `int(\d)`", "\n".join(cells)):
        named |= {f"int{bits}" for bits in range(int(first), int(last) + 1)}
    assert "fpN_eXmY" in named  # which stands for all of its kind
    assert [name for name in NAMES if name not in named and not re.fullmatch(r"fp\d_e\dm\d", name)] == []


def test_the_recipe_of_the_readme_parses() -> None:
    import yaml

    text = re.search(r"```yaml\n(.*?)```", README, re.S)
    assert text is not None
    found = recipe.parse(yaml.safe_load(text.group(1)), "readme", "README.md")
    assert len(Pipeline.parse(found.passes).passes) == 2


def test_the_one_line_recipe_of_the_readme_parses() -> None:
    text = re.search(r'--passes "(.*?)"', README)
    assert text is not None
    assert str(Pipeline.parse(text.group(1))) == text.group(1)


def test_the_exit_codes_of_the_readme_are_those_of_the_errors() -> None:
    codes = {int(code) for line in re.findall(r"^\| ([\d, ]+) \|", README, re.M) for code in line.split(",")}
    kinds = {kind.exit_code for kind in CompressError.__subclasses__()}
    assert kinds <= codes and {0, 1} <= codes


def test_profiles_named_in_the_readme_exist() -> None:
    for name in re.findall(r"cpu-[a-z0-9-]+", README):
        assert name in hwprofiles.names()


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "\nscripts/test\n" in README
    assert re.search(r"^COMPRESS_VENV=\S+ scripts/test$", (ROOT / ".ci" / "run").read_text(), re.M)


def test_every_quality_figure_is_explained() -> None:
    page = (ROOT / "docs" / "quality.md").read_text()
    for names in METRICS.values():
        for name in names:
            assert f"`{name}`" in page, name
