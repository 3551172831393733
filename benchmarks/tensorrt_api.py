"""What TensorRT's Python bindings offer, of the classes that compress uses: name → parameters, null for an attribute.

    python benchmarks/tensorrt_api.py tensorrt --write tests/data/tensorrt_api.json    # adds the installed version

Needs the bindings only: of the wheels tensorrt-cu13-bindings, beside libraries that are not there to be called, all
names and parameters are read.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

CLASSES = (
    *("Builder", "BuilderFlag", "ComputeCapability", "DataType", "HardwareCompatibilityLevel", "IBuilderConfig"),
    *("ICudaEngine", "IExecutionContext", "IHostMemory", "ILogger", "IOptimizationProfile", "ITimingCache"),
    *("NetworkDefinitionCreationFlag", "OnnxParser", "ParserError", "Runtime", "TensorIOMode"),
)


def parameters(member: Any) -> list[str] | None:
    """Names of what a method takes, of its first overload; None for what is no method."""
    if not callable(member) or isinstance(member, type):
        return None
    signature = re.search(r"\w+\(self: [^,)]+(?:, )?([^)]*)\)", member.__doc__ or "")
    return re.findall(r"(\w+): ", signature.group(1)) if signature else []


def api(module: Any) -> dict[str, dict[str, list[str] | None]]:
    """Class → member → parameters."""
    found = {}
    for name in CLASSES:
        if kind := getattr(module, name, None):
            members = [each for each in dir(kind) if not each.startswith("_")]
            found[name] = {each: parameters(getattr(kind, each)) for each in members}
    return found


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", choices=("tensorrt", "tensorrt_rtx"))
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    module = import_module(given.module)
    key = f"{given.module} {module.__version__}"
    found = api(module)
    if not given.write:
        print(json.dumps({key: found}, indent=1))
        return
    table = json.loads(given.write.read_text()) if given.write.is_file() else {}
    table[key] = found
    blocks = []
    for version, classes in sorted(table.items()):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(members)}" for name, members in classes.items())
        blocks.append(f" {json.dumps(version)}: {{\n{lines}\n }}")
    given.write.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


if __name__ == "__main__":
    sys.exit(main())
