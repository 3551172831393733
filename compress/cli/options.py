"""The options and arguments of the command line, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from compress.defaults import IMAGES, LENGTH, QUALITY_SAMPLES, SAMPLES, SEED
from compress.export import TARGETS

ModelArg = Annotated[
    str,
    typer.Argument(
        help="A model folder (config.json, *.safetensors), a hub id org/name, file.py:callable for an image "
        "classifier of your own (that file is run), or model.onnx, also as the folder that an exporter wrote."
    ),
]
ArtifactArg = Annotated[Path, typer.Argument(help="The -o folder of an earlier run.")]
RECIPE_HELP = "A preset (`compress recipes` lists them) or a recipe file (YAML)"
RecipeOpt = Annotated[str | None, typer.Option("--recipe", "-r", help=f"{RECIPE_HELP}.")]
PassesOpt = Annotated[str | None, typer.Option("--passes", help='Instead of --recipe: "gptq(bits=4), act_quant".')]
ProfileOpt = Annotated[
    str | None,
    typer.Option(
        "--profile",
        "-p",
        help="Hardware profile: an id (see `compress hardware list`) or a file [default: this machine].",
    ),
]
DataOpt = Annotated[
    str | None,
    typer.Option(
        "--data",
        "-d",
        help="For calibration and quality, split 80/20: text or token ids, labelled images (.npz or a folder per "
        "class), or for an ONNX file an .npz with an array per input.",
    ),
]
OutOpt = Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it must not exist.")]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output once the new one is done.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, on success and on failure.")]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
DebugOpt = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
SamplesOpt = Annotated[
    int | None,
    typer.Option(
        "--samples",
        min=1,
        help=f"Calibration windows, or images [default: the recipe's, else {SAMPLES} windows or {IMAGES} images].",
    ),
]
QualitySamplesOpt = Annotated[
    int | None,
    typer.Option(
        "--quality-samples",
        min=1,
        help=f"Quality windows, or images [default: the recipe's, else {QUALITY_SAMPLES} windows or all images].",
    ),
]
LengthOpt = Annotated[
    int | None, typer.Option("--length", min=2, help=f"Tokens per window [default: the recipe's, else {LENGTH}].")
]
DtypeOpt = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option("--calibration-dtype", help="What calibration computes in [default: the recipe's, else float32]."),
]
SeedOpt = Annotated[
    int | None,
    typer.Option(
        "--seed", min=0, max=(1 << 63) - 1, help=f"Seed of every random choice [default: the recipe's, else {SEED}]."
    ),
]
BudgetOpt = Annotated[float, typer.Option("--budget", min=0.1, help="Seconds of timing per setting.")]
ProcessesOpt = Annotated[
    int,
    typer.Option(
        "--processes",
        min=1,
        help="Repeat the timing in so many fresh processes, 3 or more: what differs between them counts.",
    ),
]
AgainstOpt = Annotated[str | None, typer.Option("--model", help="The uncompressed model [default: where it was].")]
TargetOpt = Annotated[
    str | None,
    typer.Option("--target", "-t", help=f"Export target: {', '.join(TARGETS)} [default: the profile's]."),
]
