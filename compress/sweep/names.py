"""What the variants of a sweep are called: a folder each, so a name is a plain one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from compress.errors import UsageError
from compress.recipe import Recipe

LONGEST = 60
OF_PASSES = "passes"
"""The name of a recipe that was given as `--passes`."""


def named(recipes: Sequence[Recipe]) -> dict[str, Recipe]:
    """Recipes by variant, in their order: the recipe's own name, or its passes where it has none.

    Raises: UsageError for a recipe that was given twice, or recipes that judge differently.
    """
    _require_alike(recipes)
    found: dict[str, Recipe] = {}
    for recipe in recipes:
        if any(recipe.passes == other.passes and _plain(recipe) == _plain(other) for other in found.values()):
            raise UsageError(f"The recipe {recipe.name} ({recipe.passes}) is given twice. Give each recipe once.")
        base = slug(recipe.passes if recipe.name == OF_PASSES else recipe.name)
        name, number = base, 2
        while name in found:
            name, number = f"{base}-{number}", number + 1
        found[name] = recipe
    return found


def slug(text: str) -> str:
    """`gptq(bits=4), act_quant` → `gptq-bits-4-act_quant`: letters, digits, `.`, `_` and `-`, no leading dot."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")
    return plain[:LONGEST].rstrip("-.") or "variant"


def _plain(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"name": "", "summary": ""})


def _require_alike(recipes: Sequence[Recipe]) -> None:
    """One seed and one way to judge; gates are each recipe's own."""
    first = recipes[0]
    for other in recipes[1:]:
        before, now = (each.quality.model_dump(exclude={"gates"}) for each in (first, other))
        differing = [f"quality.{key}" for key in before if before[key] != now[key]]
        differing += ["seed"] if first.seed != other.seed else []
        if differing:
            raise UsageError(
                f"The recipes {first.name} and {other.name} differ in {', '.join(differing)}, so their results could "
                "not be compared. Make them alike, or give the option that sets it for all (--length, "
                "--quality-samples, --seed)."
            )
