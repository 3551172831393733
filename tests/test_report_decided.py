"""A finished report says on its first screen what passes over the whole model decided, and no more what was open."""

from compress.records import REMOVED, UNDECIDED, LayerResult, PassResult, Plan
from helpers.full_report import plan, report, terminal


def of_pass(text: str, *rows: tuple[str, str, str]) -> PassResult:
    """rows: layer, format, note."""
    layers = tuple(
        LayerResult(layer=name, users=(), pass_text=text, changed=True, format=form, notes=(note,))
        for name, form, note in rows
    )
    return PassResult(pass_text=text, matches={}, layers=layers, seconds=1.0)


def notes() -> str:
    passes = (
        of_pass("drop_blocks(count=1)", ("model.layers.2", REMOVED, "KL 0.93 per token without it, the least of 5")),
        of_pass("heal", *((name, "float16", "held-out loss 0.9 → 0.3, step 9 of 9") for name in ("a", "b"))),
    )
    open_then: Plan = plan().model_copy(update={"notes": (f"which block leaves {UNDECIDED} (by=kl)", "kept as it is")})
    shown = terminal(report().model_copy(update={"passes": passes, "plan": open_then}), width=400, full=False)
    return " ".join(shown.split())


def test_what_left_and_what_training_regained_stand_on_the_first_screen_once() -> None:
    told = notes()
    assert "model.layers.2 left: KL 0.93 per token without it, the least of 5" in told
    assert told.count("heal: held-out loss 0.9 → 0.3, step 9 of 9") == 1
    assert "kept as it is" in told and UNDECIDED not in told
