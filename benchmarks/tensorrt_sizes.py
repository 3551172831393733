"""One TensorRT-RTX engine per format of a decoder, an encoder and a CNN: bytes, beside what the bits predict.

    python benchmarks/tensorrt_sizes.py --decoder DIR --decoder-data TEXT --cnn FILE.py:callable --cnn-data FILE.npz \
        [--profile nvidia-rtx-5090] [--write benchmarks/results/tensorrt_sizes.json]

Needs the extra tensorrt-rtx, no GPU: nothing is timed. The encoder has the shape of MiniLM-L6 and random weights, whose
values do not change a size. `saved` is what an engine is smaller by than the float one, over what its stored weights
are smaller by; code, of which an engine holds megabytes, differs a little too. Each graph is compared with the model in
memory in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from compress import hwprofiles
from compress.errors import CompressError
from compress.export.tensorrt import record, target
from compress.hwprofiles import Profile
from compress.inputs.datasets import calibrate
from compress.manifest import versions
from compress.models.model import Model
from compress.opening import load
from compress.pipeline import Pipeline
from compress.quality.verification import read_inputs, verification_ids, verify_export

FORMATS = ("int8(channel)", "int4(group=128)", "int4(channel)", "fp8_e4m3(channel)", "nvfp4")
ROUNDED = (("int8(channel)", "int8(tensor)"), ("fp8_e4m3(channel)", "fp8_e4m3(tensor)"), ("nvfp4", "nvfp4"))
SHAPE = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}


def recipes(decoder: bool) -> list[str]:
    """The float model first; of a decoder also with its embedding and head in 8 and 4 bits."""
    found = ["", *(f"rtn(format={each})" for each in FORMATS)]
    found += [f"rtn(format={weight}), act_quant(format={inputs}, static=true)" for weight, inputs in ROUNDED]
    both = "targets=[kind:embedding, kind:head]"
    tables = ("int8(channel)", "int4(group=32)") if decoder else ()
    return found + [f"rtn(format=int4(group=128)), rtn(format={each}, {both})" for each in tables]


def encoder(folder: Path) -> tuple[str, Path]:
    """A BERT of MiniLM-L6's shape, saved, and random ids in a file."""
    torch.manual_seed(0)
    ids = folder.with_suffix(".json")
    ids.write_text(json.dumps(torch.randint(0, 30522, (24, 128)).tolist()))
    config = transformers.BertConfig(vocab_size=30522, max_position_embeddings=512, **SHAPE)
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder), ids


def weight_bytes(model: Model, profile: Profile) -> int:
    """Of all layers, as an engine holds them: what no pass touched in the type that it computes in."""
    total = 0
    for spec in model.structure.layers.values():
        choice: Any = target.plan_layer(spec, profile)
        total += choice.stored_bytes + choice.decoded_bytes
    return total


def row(made: Model, profile: Profile, ids: torch.Tensor) -> dict[str, Any]:
    """One engine."""
    with tempfile.TemporaryDirectory() as place:
        started = time.monotonic()
        lowered = target.write(made, profile, Path(place))
        seconds = time.monotonic() - started
        found = verify_export(made, lowered.folder, profile, ids, lowered.bounds)
        kept = record.read(Path(place))
    return {
        "builder": kept.builder,
        "operators": lowered.operators,
        "graph_bytes": kept.graph_bytes,
        "engine_bytes": kept.engine_bytes,
        "predicted_engine_bytes": target.predict_deployed_bytes(made.structure.layers.values(), made, profile),
        "weight_bytes": weight_bytes(made, profile),
        "export_s": round(seconds, 1),
        "largest_relative_difference": found.max_relative_difference,
        "same_top_token": found.top1_agreement,
        "agrees": found.agrees,
    }


def table(name: str, source: str, data: Path, profile: Profile) -> list[dict[str, Any]]:
    """All formats of one model; what the rules refuse is told with the reason."""
    model: Any = load(source)
    kept = calibrate(model, data, samples=16, **({} if model.image else {"length": 128}))
    empty = torch.zeros((0, 128), dtype=torch.int64)
    ids = read_inputs(model, []) if model.image is not None else verification_ids(model, empty)
    rows: list[dict[str, Any]] = []
    for text in recipes(name == "decoder"):
        made = Pipeline.parse(text).run(model, kept).model if text else model
        told: dict[str, Any] = {"model": name, "passes": text or "none"}
        try:
            told |= row(made, profile, ids)
        except CompressError as error:
            told["refused"] = str(error)
        else:
            first = told if not rows else rows[0]
            less = first["weight_bytes"] - told["weight_bytes"]
            told["saved"] = round((first["engine_bytes"] - told["engine_bytes"]) / less, 3) if less else None
        print(json.dumps(told), flush=True)
        rows.append(told)
    return rows


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decoder")
    parser.add_argument("--decoder-data", type=Path)
    parser.add_argument("--cnn")
    parser.add_argument("--cnn-data", type=Path)
    parser.add_argument("--profile", default="nvidia-rtx-5090")
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    profile, rows = hwprofiles.load(given.profile), []
    if given.cnn and given.cnn_data:
        rows += table("cnn", given.cnn, given.cnn_data, profile)
    with tempfile.TemporaryDirectory() as scratch:
        rows += table("encoder", *encoder(Path(scratch) / "encoder"), profile)
    if given.decoder and given.decoder_data:
        rows += table("decoder", given.decoder, given.decoder_data, profile)
    if given.write:
        content = {"profile": profile.id, "versions": versions(), "rows": rows}
        given.write.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
