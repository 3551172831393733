"""Recipes and a profile small enough to sweep."""

from __future__ import annotations

from typing import Any

from compress import hwprofiles, recipe
from helpers.runs import PROFILE

EIGHT, FOUR = "rtn(format=int8(channel))", "rtn(format=int4(group=32))"


def recipes(*texts: str, **quality: Any) -> tuple[recipe.Recipe, ...]:
    """Recipes small enough for the tiny model."""
    cal = recipe.CalibrationSettings(samples=8, length=32)
    qual = recipe.QualitySettings(samples=8, length=32, generation=1, generation_tokens=2, **quality)
    return tuple(recipe.of_passes(text).model_copy(update={"calibration": cal, "quality": qual}) for text in texts)


def small_profile() -> hwprofiles.Profile:
    profile = hwprofiles.load(PROFILE)
    return profile.model_copy(update={"grid": profile.grid.model_copy(update={"prefill": (), "decode": ((1, 16),)})})
