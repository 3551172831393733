"""The report as a model card: a README.md with the front matter that the Hugging Face hub reads.

https://huggingface.co/docs/hub/model-cards tells the keys. What the report does not know, such as the licence, is left
to the uploader and said to be missing; nothing is guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from compress.records import Report
from compress.report.format import clean, clean_block
from compress.report.markdown import escaped, fenced, table_markdown
from compress.report.rows import build_page

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PIPELINES = {
    "causal-lm": "text-generation",
    "encoder": "feature-extraction",
    "image-classifier": "image-classification",
}
_LIBRARIES = {"onnx": "onnx", "checkpoint": "transformers", "openvino": "openvino"}
_SHOWN = ("quality", "gates", "speed", "footprint")
_TRANSFORMERS = """from transformers import {maker}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = {maker}.from_pretrained("FOLDER")"""
_OPTIMUM = """from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = ORTModelForCausalLM.from_pretrained("FOLDER")"""
_RUNTIME = """import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
print([(each.name, each.shape) for each in session.get_inputs()])"""


def to_model_card(report: Report) -> str:
    """Front matter, verdict, figures, how it was made, and how to load it; every text of the model's is escaped."""
    page = build_page(report)
    parts = [
        _front_matter(report),
        f"# {escaped(page.title) or 'Compressed model'}",
        _origin(report),
        f"**{escaped(page.verdict)}**",
        *(table_markdown(table) for table in page.main if table.key in _SHOWN and table.rows),
        _making(report),
        _loading(report),
        _missing(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(report: Report) -> str:
    """YAML between two lines of dashes. JSON is YAML: quoted and escaped, no name can end the block or add a key."""
    kind = report.target.partition("-")[0]
    found: dict[str, object] = {"tags": ["compress", *([kind] if kind in _LIBRARIES else []), "quantized"]}
    if kind in _LIBRARIES:
        found["library_name"] = _LIBRARIES[kind]
    if _task(report) in _PIPELINES:
        found["pipeline_tag"] = _PIPELINES[_task(report)]
    if base := _base(report):
        found |= {"base_model": base, "base_model_relation": "quantized"}
    lines = [f"{key}: {json.dumps(value)}" for key, value in sorted(found.items())]
    return "\n".join(["---", *lines, "---"])


def _task(report: Report) -> str:
    return report.request.task if report.request else ""


def _base(report: Report) -> str:
    """The hub id of the source; empty where it was a folder, or an older report that does not say."""
    is_hub = report.request is not None and not report.request.is_local
    return report.source if is_hub and _HUB_ID.fullmatch(report.source) else ""


def _origin(report: Report) -> str:
    # a path of the machine that made it is no one else's business
    name = _base(report) or report.source.rstrip("/").rpartition("/")[2]
    versions = f"compress {report.versions['compress']}" if "compress" in report.versions else "compress"
    return (
        f"`{_code(name)}`, compressed by {escaped(clean(versions))} for {escaped(clean(report.profile))} "
        f"({escaped(clean(report.target))})."
    )


def _making(report: Report) -> str:
    calibration: Mapping[str, object] = report.calibration
    facts = [f"- {escaped(clean(name))}: {escaped(clean(str(value)))}" for name, value in sorted(calibration.items())]
    recipe = clean_block(report.recipe) or "not recorded"
    parts = [
        "## How it was made",
        fenced(recipe),
        "Calibrated on:\n\n" + "\n".join(facts) if facts else "No data were needed.",
        f"Seed {report.seed}. Digest of the source weights: `{_code(report.source_digest)}`.",
    ]
    return "\n\n".join(parts)


def _loading(report: Report) -> str:
    task, kind = _task(report), report.target.partition("-")[0]
    code = ""
    if kind == "checkpoint" and task in ("causal-lm", "encoder"):
        code = _TRANSFORMERS.format(maker="AutoModelForCausalLM" if task == "causal-lm" else "AutoModel")
    elif kind == "onnx":
        code = _OPTIMUM if task == "causal-lm" else _RUNTIME
    verb = "generate" if task == "causal-lm" else "predict"
    whole = (
        f"With the whole artifact (`manifest.json` and the exported folder), `compress {verb} OUT` runs it and "
        "`compress verify OUT` checks it."
    )
    shown = f"FOLDER holds the exported files.\n\n```python\n{code}\n```" if code else ""
    return "\n\n".join(part for part in ("## How to load it", shown, whole) if part)


def _missing(report: Report) -> str:
    lacking = ["`license` (that of the base model applies)"]
    if not _base(report):
        lacking.append("`base_model`")
    return f"Not known to the report, to be added to the front matter: {' and '.join(lacking)}."


def _code(text: str) -> str:
    """For a span of code, in which nothing can be escaped."""
    return clean(text, limit=120).replace("`", "'").replace("|", "/").replace("<", "(").replace(">", ")")
