"""What a user's own words and files may hold: recipes, hardware profiles, patterns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hostile import Attack, Place

LAUGHS = "a0: &a0 [ha]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 12))


def recipe(content: str | bytes) -> Callable[[Place], list[Any]]:
    """A run by a recipe file."""
    return lambda place: place.run(recipe=place.write("recipe.yaml", content))


def profile(content: str) -> Callable[[Place], list[Any]]:
    """A run for a hardware profile in a file."""
    return lambda place: place.run(profile=place.write("hardware.yaml", content))


def passes(text: str) -> Callable[[Place], list[Any]]:
    """A run of passes on the command line."""
    return lambda place: place.run(passes=text)


YAML = "is not YAML"

ATTACKS = (
    Attack("a recipe that builds an object", recipe("!!python/object/apply:os.system ['touch ran']"), 2, YAML),
    Attack("a recipe that names a module", recipe("passes: !!python/name:os.system"), 2, YAML),
    Attack("a recipe of a thousand laughs", recipe(LAUGHS + "passes: *a11\n"), 2, "alias"),
    Attack("a recipe of laughs in a setting", recipe(LAUGHS + "passes: [rtn]\nseed: *a11\n"), 2, "alias"),
    Attack("a recipe that merges without end", recipe(MERGES + "passes: [rtn]\n"), 2, "alias"),
    Attack("a recipe that holds itself", recipe("passes: &p [*p]\n"), 2, "alias"),
    Attack("a recipe nested deeply", recipe("passes: " + "[" * 5000), 2, YAML),
    Attack("a recipe nested in one line", recipe(f"passes: '{'a(b=' * 5000}'"), 2, "nested"),
    Attack("a recipe with a key twice", recipe("passes: [rtn]\npasses: [gptq]\n"), 2, "twice"),
    Attack("a recipe with a number too long", recipe("passes: [rtn]\nseed: " + "9" * 5000), 2, YAML),
    Attack("a recipe with a seed beyond 64 bits", recipe("passes: [rtn]\nseed: " + "9" * 30), 2, "seed"),
    Attack("a recipe with a negative seed", recipe("passes: [rtn]\nseed: -1"), 2, "seed"),
    Attack("a recipe with a date that is none", recipe("passes: [rtn]\nseed: 2026-99-99"), 2, YAML),
    Attack("a recipe with a date for a setting", recipe("passes: [{gptq: {damp: 2026-01-01}}]"), 2, "is no value"),
    Attack("a recipe with bytes for a setting", recipe("passes: [{gptq: {damp: !!binary aGk=}}]"), 2, "is no value"),
    Attack("a recipe with a set for a setting", recipe("passes: [{gptq: {damp: !!set {a, b}}}]"), 2, "is no value"),
    Attack("a recipe with a number that is none", recipe("passes: [{gptq: {damp: .nan}}]"), 2, "damp"),
    Attack("a recipe with an endless number", recipe("passes: [{gptq: {damp: .inf}}]"), 2, "damp"),
    Attack("a recipe of 1e9 samples", recipe("passes: [rtn]\ncalibration: {samples: 1.5e300}"), 2, "samples"),
    Attack("a recipe keyed by a list", recipe("? [a]\n: b\n"), 2, YAML),
    Attack("a recipe that is no UTF-8", recipe(b"\xff\xfe\x00"), 2, YAML),
    Attack("a recipe too large", recipe(b"#" * (1 << 20) + b"##"), 2, "at most"),
    Attack("a recipe that drives the terminal", recipe('"\\e[2J\\e]0;owned\\a": 1'), 2, "x1b[2J"),
    Attack("a recipe that is a device", lambda place: place.run(recipe="/dev/zero"), 2, "No recipe"),
    Attack("a recipe that is a folder", lambda place: place.run(recipe=place.model), 2, "No recipe"),
    Attack("a profile of a thousand laughs", profile(LAUGHS + "id: *a11\n"), 2, "hardware.yaml"),
    Attack("a profile that merges without end", profile(MERGES), 2, "hardware.yaml"),
    Attack("a profile that holds itself", profile("id: &p [*p]\n"), 2, "hardware.yaml"),
    Attack("a profile with a number too long", profile("id: " + "9" * 5000), 2, "hardware.yaml"),
    Attack("passes nested deeply", passes("rtn(format=" + "[" * 5000), 2, "nested"),
    Attack("passes nested in calls", passes("a(b=" * 5000), 2, "nested"),
    Attack("passes of a number too long", passes(f"rtn(format=int4(group={'9' * 5000}))"), 2, "Cannot read"),
    Attack("passes of groups without end", passes("rtn(format=int4(group=1000000000000000000000))"), 2, "group"),
    Attack("passes that drive the terminal", passes("rtn\x1b[2J"), 2, "x1b[2J"),
    Attack(
        "a pattern that never ends",
        passes('rtn(targets=["re:([a-z.]|[a-z0-9.]|.)*[A-Z]"])'),
        2,
        "takes too long",
        (("compress.engine.matching:LONGEST_S", 0.1),),
    ),
    Attack("a pattern that is none", passes('rtn(targets=["re:(((("])'), 2, "not a regular expression"),
    Attack("a pattern that repeats without end", passes('rtn(targets=["re:(a{9999}){9999}"])'), 2, "re:(a"),
    Attack("a glob of stars", passes(f'rtn(targets=["{"*a" * 300}X"])'), 2, "matches no layer"),
    Attack("a kind of its own", passes('rtn(targets=["kind:../x"])'), 2, "Unknown layer kind"),
)
