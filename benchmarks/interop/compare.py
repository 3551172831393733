"""Do onnxruntime, onnxruntime-genai and optimum generate the same greedy tokens from an exported folder?

    python benchmarks/interop/compare.py ARTIFACT... [--envs FOLDER] [--json FILE]

Runs with the project's own python. Each row of the table is one runtime on the same prompts. `alone`: one prompt at a
time, against our `Session.greedy`. `padded`: all prompts in one batch; ours against its own tokens alone, a client
against ours on the same batch, up to the first end of a row.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from build_envs import DEFAULT
from clients import CLIENTS, run_client
from tokens import COUNT, Difference, Prompts, Settings, choose_prompts, compare, greedy_batch, settings, until_end

from compress import manifest
from compress.errors import CompressError, InputError
from compress.export.onnx.runtime import PORTABLE, SHARED, Session
from compress.hwprofiles import machine_summary

RESULT = Path(__file__).resolve().parents[1] / "results" / "interop.json"
NEAR = "allowed: near ties"


@dataclass(frozen=True)
class Row:
    """One runtime on the prompts of one artifact. refusal: why it did not run. excuse: why it may differ."""

    runtime: str
    batch: str
    versions: dict[str, str]
    tokens: int = 0
    differences: tuple[Difference, ...] = ()
    refusal: str = ""
    excuse: str = ""
    graph: str = PORTABLE

    @property
    def passes(self) -> bool:
        """Whether all tokens were the same, or need not be."""
        return not self.refusal and (not self.differences or bool(self.excuse))

    def text(self) -> str:
        """'equal', or the first thing that is not."""
        if self.refusal:
            return f"refused: {self.refusal}"
        if not self.differences:
            return f"equal ({self.tokens} tokens)"
        return f"{self.differences[0].text()}{'; ' * bool(self.excuse)}{self.excuse}"


class Artifact:
    """One artifact, its prompts, and what our own runtime generates after them."""

    def __init__(self, path: Path) -> None:
        self.folder, self.facts = path / "onnx", manifest.read(path)
        self.known: Settings = settings(self.folder)
        self.prompts = choose_prompts(self.facts["verification"]["ids"], self.known.context, COUNT)
        self.session = Session(self.folder, threads=1)
        self.versions = {"onnxruntime": self.session.name.split()[1]}
        self.alone = [self.session.greedy(prompt, COUNT) for prompt in self.prompts]
        both = (self.folder / SHARED).is_file()
        self.shared = Session(self.folder, threads=1, graph=SHARED) if both else None

    def row(self, runtime: str, batch: str, versions: dict[str, str], ours: Prompts, theirs: Prompts) -> Row:
        """Compare their tokens with ours; in a padded batch up to the first end of a row."""
        if batch != "alone":  # rows that ended are filled up, each runtime in its own way
            end = min(len(until_end(tokens, self.known.eos)) for tokens in ours)
            ours, theirs = [tokens[:end] for tokens in ours], [tokens[:end] for tokens in theirs]
        found = compare(self.session, self.prompts, ours, theirs)
        excuse = self._excuse(found) if runtime == "onnxruntime" and batch != "alone" else ""
        return Row(runtime, batch, versions, sum(map(len, ours)), found, excuse=excuse)

    def _excuse(self, found: tuple[Difference, ...]) -> str:
        """Why a graph gives a prompt other tokens in a padded batch than alone, where that is not a wrong mask."""
        if not found:
            return ""
        if b"DynamicQuantizeMatMul" in (self.folder / "model.onnx").read_bytes():
            return "allowed: DynamicQuantizeMatMul rounds a whole batch, padding too, on one grid"
        return NEAR if all(difference.is_tie for difference in found) else ""

    def rows(self, envs: Path) -> Iterator[Row]:
        """Our own runtime, then each client."""
        stated = self.facts["verification"].get("greedy_tokens")
        if stated:
            yield self.row("onnxruntime", "alone", self.versions, self.alone[:1], [list(stated)])
        batches = {side: greedy_batch(self.session, self.prompts, self.known.pad, side) for side in ("left", "right")}
        for side, tokens in batches.items():
            yield self.row("onnxruntime", f"padded {side}", self.versions, self.alone, tokens)
        for name, side in CLIENTS.items():
            graph = PORTABLE if name == "genai" and self.shared else None
            yield self._client_row(envs, name, "alone", self.alone, graph)
            yield self._client_row(envs, name, f"padded {side}", batches[side], graph)
        if self.shared is not None:
            yield from self._shared_rows(self.shared, envs)

    def _shared_rows(self, shared: Session, envs: Path) -> Iterator[Row]:
        """The graph that genai_config.json names where there are two: our runtime on it, and genai on the folder as
        it is."""
        tokens = [shared.greedy(prompt, COUNT) for prompt in self.prompts]
        padded = greedy_batch(shared, self.prompts, self.known.pad, "right")
        alone = self.row("onnxruntime", "alone", self.versions, self.alone, tokens)
        near = bool(alone.differences) and all(difference.is_tie for difference in alone.differences)
        yield replace(alone, graph=SHARED, excuse=NEAR * near)
        yield replace(self.row("onnxruntime", "padded right", self.versions, tokens, padded), graph=SHARED)
        for batch, ours in (("alone", tokens), ("padded right", padded)):
            yield replace(self._client_row(envs, "genai", batch, ours), graph=SHARED)

    def _client_row(self, envs: Path, name: str, batch: str, ours: Prompts, graph: str | None = None) -> Row:
        pad = None if batch == "alone" else self.known.pad
        try:
            versions, theirs = run_client(envs, name, self.folder, self.prompts, COUNT, pad, graph)
        except InputError as error:
            return Row(name, batch, {}, refusal=str(error))
        return self.row(name, batch, versions, ours, theirs)


def compare_artifact(path: Path, envs: Path) -> dict[str, Any]:
    """Print the table of an artifact; its rows as JSON."""
    artifact, rows = Artifact(path), []
    name = path.resolve().name
    for row in artifact.rows(envs):
        version = next(iter(row.versions.values()), "")
        print(f"{name:<20} {row.runtime:<12}{version:<9}{row.graph:<15}{row.batch:<13} {row.text()}", flush=True)
        rows.append(asdict(row) | {"passes": row.passes})
    recipe = artifact.facts.get("recipe")
    lengths = [len(prompt) for prompt in artifact.prompts]
    return {"artifact": name, "recipe": recipe, "prompt_lengths": lengths, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifacts", type=Path, nargs="+", help="folders written by `compress run -o`")
    parser.add_argument("--envs", type=Path, default=DEFAULT, help="folder made by build_envs.py")
    parser.add_argument("--json", type=Path, default=RESULT, help="where the result is written")
    given = parser.parse_args()
    try:
        results = [compare_artifact(path, given.envs) for path in given.artifacts]
    except CompressError as error:
        print(error, file=sys.stderr)
        return 1
    passes = all(row["passes"] for result in results for row in result["rows"])
    facts = {"machine": machine_summary(), "versions": manifest.versions(), "count": COUNT, "passes": passes}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps({**facts, "artifacts": results}, indent=1) + "\n", encoding="utf8")
    return 0 if passes else 1


if __name__ == "__main__":
    sys.exit(main())
