"""The verbs that use an artifact: generate and predict. Results on stdout, where it ran and how fast on stderr."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compress.cli.options import ArtifactArg, DebugOpt, JsonOpt, OverwriteOpt, QuietOpt
from compress.errors import InputError, UsageError, visible
from compress.export import TARGETS

if TYPE_CHECKING:
    from compress.runtime.engine import Engine, Generated
    from compress.runtime.generation import Continuation
    from compress.runtime.predictions import Rows

FOLDERS = tuple(dict.fromkeys(name.partition("-")[0] for name in TARGETS))
"""What the targets write into: that of `checkpoint-gptq` is `checkpoint`."""
EngineOpt = Annotated[
    str | None,
    typer.Option("--engine", help=f"Folder of the artifact to load: {', '.join(FOLDERS)} [default: what runs here]."),
]
ThreadsOpt = Annotated[int | None, typer.Option("--threads", min=1, help="Threads [default: the profile's].")]
AnywayOpt = Annotated[
    bool, typer.Option("--anyway", help="Also load what was made for another kind of machine; it may be slow or fail.")
]
SEPARATOR = "---"
"""Printed between the results of several prompts."""


def generate(
    artifact: ArtifactArg,
    prompt: Annotated[
        list[str],
        typer.Option(
            "--prompt",
            help="Text to continue, - for stdin as it is; token ids where there is no tokenizer. Several: one batch.",
        ),
    ],
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="At most so many new tokens per prompt.")] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", help="0 takes the likeliest token; above, tokens are drawn.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Draw from so many of the likeliest [0: all].")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw from the likeliest that reach this sum.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of what is drawn.")] = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this text; may be repeated.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message; needs a chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option("--system", help="With --chat: the system's message.")] = None,
    echo: Annotated[bool, typer.Option("--echo/--no-echo", help="Print the prompt before what follows.")] = True,
    engine: EngineOpt = None,
    threads: ThreadsOpt = None,
    anyway: AnywayOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> int:
    """Continue prompts with a language model's artifact.

    In its runtime; text is printed as it comes."""
    from compress.runtime.sampling import Sampling

    if system is not None and not chat:
        raise UsageError("--system is a message of a chat. Add --chat.")
    Sampling(temperature, top_k, top_p, seed)  # a wrong option is told before anything is loaded
    texts, settings = _prompts(prompt), {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    loaded = _open(artifact, engine, threads, anyway, quiet)
    asked: list[Any] = [_messages(text, system) for text in texts] if chat else list(texts)
    shown = [text if echo and not chat else "" for text in texts]
    stream = None if as_json else _writer(shown, len(texts))
    made = loaded.generate(asked, max_new_tokens=tokens, stop=tuple(stop or ()), stream=stream, **settings)  # type: ignore[arg-type]
    if as_json:
        print(json.dumps(_as_object(made, texts)))
    else:
        _finish(made, shown)
    if not quiet:
        print(_summary(made, tokens), file=sys.stderr)
    return 0


def predict(
    artifact: ArtifactArg,
    source: Annotated[
        Path | None,
        typer.Option(
            "--input",
            "-i",
            help="An image, a folder of images, or .npz; for texts .txt (a text per line), .jsonl.",
        ),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="A text, for a model that takes texts; may be repeated.")
    ] = None,
    pool: Annotated[
        Literal["mean", "cls", "none"] | None,
        typer.Option("--pool", help="What an encoder's tokens become [default: mean]."),
    ] = None,
    top: Annotated[int | None, typer.Option("--top", min=1, help="Classes to print per input [default: 5].")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Inputs that go through at once.")] = 1,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write an .npz instead of printing.")] = None,
    overwrite: OverwriteOpt = False,
    engine: EngineOpt = None,
    threads: ThreadsOpt = None,
    anyway: AnywayOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> int:
    """Classes of images, or embeddings of texts, by an artifact."""
    from compress.runtime.predictions import write_arrays

    if (source is None) == (not text):
        raise UsageError("Give --input FILE, or --text TEXT for a model of texts.")
    if out is not None and (out.suffix != ".npz" or (out.exists() and not overwrite)):
        what = "exists; --overwrite replaces it" if out.suffix == ".npz" else "is no name of an .npz"
        raise UsageError(f"-o {out}: this {what}.")
    loaded = _open(artifact, engine, threads, anyway, quiet)
    arrays, rows, lines = _rows(loaded, source, text or [], pool, top, batch, truncate)
    if out is not None:
        write_arrays(out, arrays)
    content = {"artifact": str(artifact), "placement": asdict(loaded.placement), "count": len(rows)}
    if as_json:
        print(json.dumps(content | ({"rows": rows} if out is None else {"written": str(out)})))
    elif out is None:
        print("\n".join(lines))
    if not quiet:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        print(f"{where(loaded)}; {shapes}{f' in {out}' if out else ''}", file=sys.stderr)
    return 0


def _rows(
    loaded: Engine,
    source: Path | None,
    texts: list[str],
    pool: Literal["mean", "cls", "none"] | None,
    top: int | None,
    batch: int,
    truncate: bool,
) -> Rows:
    """What a model makes of what it takes. Raises: UsageError for options that are of another kind of model."""
    from compress.runtime.predictions import array_rows, image_rows, text_rows

    artifact = loaded.folder
    if loaded.takes_images:
        if source is None:
            raise UsageError(f"{artifact} is an image classifier. Give --input with an image, a folder or an .npz.")
        if pool is not None or truncate:
            raise UsageError(f"{artifact} is an image classifier: --pool and --truncate are for texts. Leave them out.")
        return image_rows(loaded, source, top, batch)
    if loaded.takes_arrays:
        if pool is not None:
            raise UsageError(f"{artifact} is an ONNX graph, whose outputs are given as they are: leave --pool out.")
        return array_rows(loaded, source or texts, top, batch, truncate)
    if top is not None:
        raise UsageError(f"{artifact} takes texts: --top is for the classes of images. Leave it out.")
    return text_rows(loaded, source, texts, pool or "mean", batch, truncate)


def _open(artifact: Path, engine: str | None, threads: int | None, anyway: bool, quiet: bool) -> Engine:
    from compress.opening import open_engine

    loaded = open_engine(artifact, engine=engine, threads=threads, anyway=anyway)
    for note in loaded.notes if not quiet else ():
        print(f"Note: {visible(note)}", file=sys.stderr)
    return loaded


def where(loaded: Engine | Generated) -> str:
    """`onnxruntime 1.31.1 on CPU, 2 threads, onnx/model.onnx`."""
    found = loaded.placement
    on = "" if found.runtime.endswith(found.provider) else f" on {found.provider}"
    return f"{found.runtime}{on}, {found.threads} thread{'s'[: found.threads > 1]}, {found.file}"


def _prompts(given: list[str]) -> list[str]:
    """The prompts, `-` read from stdin. Raises: UsageError, InputError."""
    if given.count("-") > 1:
        raise UsageError("--prompt - reads stdin, which there is only once.")
    return [_read_stdin() if prompt == "-" else prompt for prompt in given]


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf8")
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt -: stdin is not UTF-8 ({error}).") from error


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system is not None else []
    return [*first, {"role": "user", "content": text}]


def _writer(shown: list[str], rows: int) -> Callable[[int, str], None] | None:
    """Prints a single row as it comes; several are printed one after the other in the end."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # where it is not UTF-8, what it cannot show becomes a question mark
        sys.stdout.reconfigure(errors="replace")
    if rows > 1:
        return None
    begun = False

    def write(_row: int, piece: str) -> None:
        nonlocal begun
        sys.stdout.write(piece if begun else shown[0] + piece)
        sys.stdout.flush()
        begun = True

    return write


def _finish(made: Generated, shown: list[str]) -> None:
    if len(made.rows) == 1:
        print("" if made.text else shown[0])
        return
    print(f"\n{SEPARATOR}\n".join(text + row.text for text, row in zip(shown, made.rows, strict=True)))


def _as_object(made: Generated, prompts: list[str]) -> dict[str, Any]:
    """For one prompt its fields, for several `rows` of them."""
    rows = [
        {"prompt": prompt, "text": row.text, "tokens": list(row.tokens), "finish_reason": row.finish,
         "prompt_tokens": len(row.prompt_tokens)}
        for prompt, row in zip(prompts, made.rows, strict=True)
    ]  # fmt: skip
    pace = {"prompt_s": made.pace.prompt_s, "decode_s": made.pace.decode_s, "tokens_per_s": made.pace.tokens_per_s}
    shared = {"placement": asdict(made.placement), "pace": pace}
    return {**rows[0], **shared} if len(rows) == 1 else {"rows": rows, **shared}


def _summary(made: Generated, wanted: int) -> str:
    read = sum(len(row.prompt_tokens) for row in made.rows)
    new, pace = sum(len(row.tokens) for row in made.rows), made.pace
    rate = "" if pace.tokens_per_s is None else f", {pace.tokens_per_s:.1f} tokens/s"
    reasons = ", ".join(sorted({_ended(row, wanted) for row in made.rows}))
    return (
        f"{where(made)}; {read} prompt tokens in {pace.prompt_s:.2f} s, {new} new in {pace.decode_s:.2f} s{rate} "
        f"(ended by {reasons})"
    )


def _ended(row: Continuation, wanted: int) -> str:
    """Of what a text ended by: a length below the wanted one is that of the model's context."""
    if row.finish == "length" and len(row.tokens) < wanted:
        return f"the model's context, which {len(row.prompt_tokens) + len(row.tokens)} tokens fill"
    return row.finish
