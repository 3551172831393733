"""The file of a user's own classifier: what it may hold, what is refused, and what is told of its module."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress import load
from compress.engine.image_stream import image_logits
from compress.errors import CompressError, InputError, UnsupportedError, UsageError

HEADER = (
    "import torch\nfrom torch import nn\n\n\ndef sample_inputs(batch=2):\n    return torch.randn(batch, 3, 8, 8)\n\n\n"
)


def written(path: Path, body: str, header: str = HEADER) -> str:
    path.write_text(header + body)
    return f"{path}:make"


TIED = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.second.weight = self.first.weight
        self.direct = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 2)
        self.circular = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
        self.head = nn.Linear(256, 3)

    def forward(self, x):
        x = self.second(self.first(x))
        x = nn.functional.linear(x, self.direct.weight)
        return self.head(self.circular(x).flatten(1))


def make():
    torch.manual_seed(0)
    return Net().half()
"""


def test_what_is_no_layer_of_its_own_is_left_alone_and_told(tmp_path: Path) -> None:
    model = load(written(tmp_path / "tied.py", TIED))
    assert {name: spec.users for name, spec in model.structure.layers.items()} == {
        "first": ("first", "second"),
        "head": ("head",),
    }
    assert {spec.source_dtype for spec in model.structure.layers.values()} == {torch.float16}
    assert any("left as they are: direct.weight" in text for text in model.warnings)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    (found,) = image_logits(model, [images])
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model.image.factory.build().float()(images)  # type: ignore[union-attr]
    assert torch.allclose(found, expected, atol=1e-5)


FINE = "def make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))\n"


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ("def other():\n    return 1\n", UsageError, "no callable 'make'"),
        ("def make():\n    return 3\n", UsageError, "returned a int"),
        ("def make():\n    raise KeyError('gone')\n", InputError, "KeyError: 'gone'"),
        ("raise SystemExit(3)\n", InputError, "SystemExit"),
        (FINE.replace("192", "7"), InputError, r"failed on sample_inputs\(2\)"),
        (FINE.replace("nn.Flatten(), ", ""), InputError, "failed on sample_inputs"),
        (FINE.replace("nn.Linear(192, 4)", "nn.Identity()") + "\nMEAN = [0.5]\n", UsageError, "belong together"),
        (FINE + "\nMEAN = STD = [1, 2]\n", UsageError, "2 figures, but images have 3 channels"),
        (FINE + "\nMEAN, STD = 0, 0\n", UsageError, "above 0"),
        (FINE.replace("nn.Flatten(), nn.Linear(192, 4)", "nn.Conv2d(3, 4, 1)"), UnsupportedError, "logits"),
        (FINE + "\nsample_inputs = lambda batch: torch.randn(batch, 192)\n", UnsupportedError, "batch, channels, h, w"),
        (FINE + "\nsample_inputs = lambda batch: 3\n", UsageError, "one tensor of floats"),
        (FINE + "\nsample_inputs = None\n", UsageError, "has no sample_inputs"),
        (FINE.replace("nn.Flatten()", "nn.Flatten(), Noise()"), UnsupportedError, "random numbers"),
        (FINE.replace("nn.Flatten()", "nn.Flatten(), Broken()"), InputError, "NaN"),
    ],
)
def test_a_file_that_gives_no_classifier_is_refused_naming_why(
    tmp_path: Path, body: str, kind: type[CompressError], words: str
) -> None:
    more = "class Noise(nn.Module):\n    def forward(self, x):\n        return x + torch.randn_like(x)\n\n\n"
    more += "class Broken(nn.Module):\n    def forward(self, x):\n        return x / 0 * 0\n\n\n"
    with pytest.raises(kind, match=words):
        load(written(tmp_path / "odd.py", body, HEADER + more))


def test_a_reference_to_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load(f"{tmp_path / 'gone.py'}:make")


def test_a_file_may_import_its_neighbours_and_bring_its_own_preprocessing(tmp_path: Path) -> None:
    (tmp_path / "beside_the_model.py").write_text("CLASSES = 4\n")
    body = "from beside_the_model import CLASSES\n\n" + FINE.replace("4", "CLASSES")
    body += "\n\ndef preprocess(pixels):\n    return pixels.double() - 100\n"
    model = load(written(tmp_path / "main.py", body))
    assert model.image is not None and model.image.classes == 4
    assert model.image.preprocess.text == "main.py: preprocess"
    found = model.image.preprocess(torch.full((1, 3, 8, 8), 101, dtype=torch.uint8))
    assert found.dtype == torch.float32 and bool((found == 1).all())


SPARE = """
class Net(nn.Sequential):
    pass


def make():
    net = Net(nn.Flatten(), nn.Linear(192, 4))
    net.spare = nn.Parameter(torch.tensor([float("inf")]))
    return net
"""


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = load(written(tmp_path / "spare.py", SPARE))
    with pytest.raises(InputError, match=r"spare of .* holds NaN or infinite"):
        model.plain(0)
