"""What errors about settings say: a user's words, not those of the library that checks them."""

from __future__ import annotations

from typing import Any

import pytest

from compress.errors import UsageError, nearest
from compress.passes import find


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        (
            "vptq",
            {"share": "blocks"},
            "vptq: share='blocks' is not allowed. Did you mean 'block'? Allowed: block, none.",
        ),
        ("gptq", {"order": "up"}, "gptq: order='up' is not allowed. Allowed: given, static."),
        ("vptq", {"damp": 2}, "vptq: damp=2: it should be less than or equal to 1."),
    ],
)
def test_a_setting_that_cannot_be_is_told_with_what_is_allowed(name: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as refused:
        find(name).build(settings)
    assert str(refused.value) == says


def test_one_of_a_list_is_told_by_the_name_of_the_list() -> None:
    with pytest.raises(UsageError, match=r"^block_tune: parts='codebook' is not allowed. Did you mean 'codebooks'\?"):
        find("block_tune").build({"parts": ["codebook"]})


def test_a_name_that_several_begin_with_is_taken_for_one_of_them() -> None:
    names = ("nvidia-h100-sxm", "nvidia-h100-pcie", "nvidia-h200")
    assert nearest("nvidia-h100", names).startswith(" Did you mean 'nvidia-h100-pcie'?")
    assert nearest("nvidia-h20", names).startswith(" Did you mean 'nvidia-h200'?")
    assert nearest("q", names).startswith(" Allowed")
