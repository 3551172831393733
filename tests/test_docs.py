"""The README and the program keep each other honest."""

import re
from pathlib import Path

import pytest
import torch
import typer.main

from compress import defaults, hwprofiles, recipe
from compress.__main__ import main
from compress.cli.engine import FOLDERS
from compress.cli.main import app
from compress.errors import CompressError
from compress.export import TARGETS, find
from compress.formats import NAMES
from compress.models.loading import load
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
    assert named <= {*GROUP.commands, "help"}


def test_every_option_has_help() -> None:
    for name, command in GROUP.commands.items():
        for parameter in command.params:
            assert parameter.name == "help" or getattr(parameter, "help", None), f"{name}: {parameter.name}"


def test_the_list_of_commands_has_whole_sentences_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0
    told = capsys.readouterr().out
    assert "..." not in told.partition("Commands:")[2] and "Example: compress run " in told
    assert main(["help", "plan"]) == 0
    assert "What a run would touch" in capsys.readouterr().out


def test_help_names_every_target_and_the_folders_they_write(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    told = re.sub(r"\s+", "", capsys.readouterr().out)
    assert "Exporttarget:" + ",".join(TARGETS) in told
    assert set(FOLDERS) == {find(name).FOLDER for name in TARGETS}


def test_the_defaults_of_the_readme_are_those_of_the_program() -> None:
    told = dict(re.findall(r"^\| `--([a-z-]+)` \| ([^|]+) \|", README, re.M))
    assert told["samples"] == f"{defaults.SAMPLES} windows, {defaults.IMAGES} images"
    assert told["quality-samples"] == f"{defaults.QUALITY_SAMPLES} windows, all images"
    assert told["length"] == str(defaults.LENGTH) and told["seed"] == str(defaults.SEED)
    assert float(told["budget"]) == defaults.BUDGET_S
    assert told["calibration-dtype"] == recipe.CalibrationSettings().dtype


def test_the_image_classifier_of_the_readme_is_one(tmp_path: Path) -> None:
    text = re.search(r"```python\n# net\.py\n(.*?)```", README, re.S)
    assert text is not None
    file = tmp_path / "net.py"
    file.write_text(text[1])
    net = re.search(r"net = (nn\.Sequential\(.*\))", text[1])
    assert net is not None
    torch.save(eval(net[1], {"nn": torch.nn}).state_dict(), tmp_path / "net.pt")
    model = load(f"{file}:make")
    assert model.image is not None and model.image.described()["output"]["classes"] == 10


def test_the_presets_are_listed_with_their_summaries(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    told = capsys.readouterr().out
    assert all(name in told and recipe.load(name).summary in told for name in recipe.presets())


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
