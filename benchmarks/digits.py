"""How results are written."""

from __future__ import annotations

from typing import Any


def rounded(content: Any) -> Any:
    """Floats to six digits."""
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items()}
    if isinstance(content, list):
        return [rounded(value) for value in content]
    return float(f"{content:.6g}") if isinstance(content, float) else content
