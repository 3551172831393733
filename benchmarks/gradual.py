"""Gradual magnitude pruning: large and sparse against small and dense at equal stored bytes, and ResNet-20 to 80 %.

    python benchmarks/gradual.py mnist|lstm|resnet|resnet-pass ASSETS

`mnist` and `lstm` are the comparison of "To prune, or not to prune" (arXiv 1710.01878): a network trained from scratch
while its masks are raised, against a narrower one trained as long that takes no fewer bytes. Of a sparse weight a bit
mask of all and float32 of what is left count, which the paper does not count; everything else counts in float32. Both
are the last iterate. Differences are paired by seed, with Student's interval over the seeds. `resnet` prunes all
weights of a trained network, with training images only, in a loop of one's own (distillation at temperature 3, flips
and shifts), `resnet-pass` by the pass, and at once; the change of accuracy is paired by test image as in cifar.py.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar import SETS, judged
from digits import rounded
from torch import Tensor, nn
from torch.nn import functional as F

import compress
from compress.engine.image_stream import image_logits
from compress.inputs import images
from compress.inputs.images import Images
from compress.pipeline import Pipeline
from compress.quality.classification import score_batch, summarize_images
from compress.training.gradual import GradualSchedule, Masks

RESULT = Path(__file__).parent / "results" / "gradual.json"
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Of 95 % on both sides, by the number of seeds."""
SPARSITIES = (0.8, 0.9)
Draw = Callable[[torch.Generator], Any]
Loss = Callable[[nn.Module, Any], Tensor]


def train(
    module: nn.Module, draw: Draw, loss: Loss, steps: int, lr: float, seed: int, sparsity: float = 0.0
) -> nn.Module:
    """Adam, its rate to 0 along a cosine; masks raised over the first 60 % of the steps."""
    maker = torch.Generator().manual_seed(seed)
    schedule = GradualSchedule(sparsity, int(0.6 * steps), every=max(1, steps // 50)) if sparsity else None
    masks = Masks.of(module, schedule, ignore=("embed.*",) if hasattr(module, "embed") else ()) if schedule else None
    descent = torch.optim.Adam(module.parameters(), lr)
    module.train()
    for step in range(steps):
        if masks is not None:
            masks.step(step)
        for group in descent.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        descent.zero_grad()
        loss(module, draw(maker)).backward()
        descent.step()
        if masks is not None:
            masks.apply()
    return module.eval()


def stored(module: nn.Module) -> int:
    """Bytes: of a weight with zeros a bit for each value and float32 for what is left, else float32."""
    return sum(math.ceil(each.numel() / 8) + 4 * int(each.count_nonzero()) if (each == 0).any() and each.ndim > 1
               else 4 * each.numel() for each in module.parameters())  # fmt: skip


def planned_bytes(module: nn.Module, sparsity: float) -> int:
    """What `stored` will be once it is pruned."""
    schedule = GradualSchedule(sparsity, 1)
    masks = Masks.of(module, schedule, ignore=("embed.*",) if hasattr(module, "embed") else ())
    sparse = {each.name: each for each in masks.weights}
    masks.remove()
    return sum(math.ceil(each.numel() / 8) + 4 * sparse[name].kept(1) if name in sparse else 4 * each.numel()
               for name, each in module.named_parameters())  # fmt: skip


class Cnn(nn.Module):
    """Two convolutions with stride 2 and a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, width, 3, 2, 1), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.head = nn.Linear(98 * width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.head(F.relu(self.second(F.relu(self.first(pixels)))).flatten(1))
        return found


class Lstm(nn.Module):
    """Next characters from characters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(65, 32), nn.LSTM(32, width, batch_first=True)
        self.head = nn.Linear(width, 65)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.lstm(self.embed(ids))[0])
        return found


def mnist(assets: Path) -> tuple[Draw, Loss, Callable[[nn.Module], float]]:
    """Batches of 64 training images; the share of 10,000 test images that is wrong, in percent."""

    def read(name: str, head: int) -> Tensor:
        raw = gzip.decompress((assets / "mnist" / name).read_bytes())
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=head).copy())

    pixels, labels = read("train-images-idx3-ubyte.gz", 16).view(-1, 1, 28, 28), read("train-labels-idx1-ubyte.gz", 8)
    test, truth = read("t10k-images-idx3-ubyte.gz", 16).view(-1, 1, 28, 28), read("t10k-labels-idx1-ubyte.gz", 8)

    def draw(maker: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(pixels), (64,), generator=maker)
        return pixels[rows] / 127.5 - 1, labels[rows].long()

    def wrong(module: nn.Module) -> float:
        with torch.no_grad():
            found = torch.cat([module(each / 127.5 - 1).argmax(-1) for each in test.split(500)])
        return 100 * float((found != truth).float().mean())

    return draw, lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]), wrong


def shakespeare(assets: Path) -> tuple[Draw, Loss, Callable[[nn.Module], float]]:
    """Batches of 32 runs of 64 characters from the first nine tenths; nats per character of the last tenth."""
    text = gzip.decompress((assets / "text" / "tinyshakespeare" / "input.txt.gz").read_bytes()).decode()
    known = {char: place for place, char in enumerate(sorted(set(text)))}
    ids = torch.tensor([known[char] for char in text])
    cut = len(ids) * 9 // 10
    first, last = ids[:cut], ids[cut : cut + (len(ids) - cut) // 129 * 129].view(-1, 129)

    def draw(maker: torch.Generator) -> Tensor:
        starts = torch.randint(cut - 65, (32, 1), generator=maker)
        return first[starts + torch.arange(65)]

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(module(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def nats(module: nn.Module) -> float:
        with torch.no_grad():
            return sum(float(loss(module, rows)) * len(rows) for rows in last.split(32)) / len(last)

    return draw, loss, nats


def compared(
    make: Callable[[int], nn.Module], width: int, kind: Any, steps: int, lr: float, seeds: int
) -> dict[str, Any]:
    """Large and sparse against small and dense, by seed."""
    draw, loss, metric = kind

    def trained(size: int, seed: int, sparsity: float = 0.0) -> tuple[float, int]:
        torch.manual_seed(seed)
        module = train(make(size), draw, loss, steps, lr, seed, sparsity)
        return metric(module), stored(module)

    dense = [trained(width, seed) for seed in range(seeds)]
    rows = [{"name": "large, dense", "width": width, "bytes": dense[0][1], "metric": [each for each, _ in dense]}]
    for sparsity in SPARSITIES:
        room = planned_bytes(make(width), sparsity)
        narrow = next(size for size in range(1, width) if 4 * sum(p.numel() for p in make(size).parameters()) >= room)
        sparse = [trained(width, seed, sparsity) for seed in range(seeds)]
        small = [trained(narrow, seed) for seed in range(seeds)]
        differences = [one - other for (one, _), (other, _) in zip(sparse, small, strict=True)]
        row = {"name": f"large, {100 * sparsity:g} % sparse", "width": width, "bytes": sparse[0][1]}
        rows.append({**row, "metric": [each for each, _ in sparse]})
        row = {"name": "small, dense", "width": narrow, "bytes": small[0][1]}
        rows.append({**row, "metric": [each for each, _ in small]})
        rows.append({"name": f"difference at {100 * sparsity:g} %", **interval(differences)})
        print(json.dumps(rounded(rows[-3:])), flush=True)
    return {"steps": steps, "seeds": seeds, "lr": lr, "rows": rows}


def interval(values: list[float]) -> dict[str, float]:
    """Mean and Student's interval of 95 %."""
    mean, half = statistics.mean(values), STUDENT_T[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def resnet(assets: Path, steps: int, count: int, by_hand: bool) -> dict[str, Any]:
    """ResNet-20 to 80 %, by the pass or in a loop of one's own. count: test images, evenly drawn."""
    folder = assets / "cifar10"
    model = compress.load(f"{folder / 'resnet_cifar.py'}:resnet20")
    assert model.image is not None
    samples = compress.inputs.datasets.calibrate(model, folder / "cifar10_train_exact_7044.npz", samples=7044)
    test = images.read_images(folder / SETS["jpeg"], model.image)
    test = test.at(range(0, len(test), len(test) // count))
    images.check_disjoint(samples.windows, test)
    reference = list(image_logits(model, test.batches()))
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    if by_hand:
        module = own_loop(model.image.factory.build, torch.cat(samples.batches()), steps)  # type: ignore[attr-defined]
        kept = sum(int(each.count_nonzero()) for each in module.parameters() if each.ndim > 1)
        whole = sum(each.numel() for each in module.parameters() if each.ndim > 1)
        row = {"name": "own loop", "sparsity": 1 - kept / whole, "bytes": stored(module), "steps": steps}
        row["seconds"] = time.perf_counter() - started
        rows.append({**row, "jpeg": of_module(reference, module, test)})
        told(rows)
    gradual = f"gradual_magnitude(sparsity=0.8, steps={steps}, temperature=3)"
    for text in () if by_hand else (gradual, "magnitude(sparsity=0.8)"):
        started = time.perf_counter()
        made = Pipeline.parse(text).run(model, samples)
        row = {"name": text, "seconds": time.perf_counter() - started, "notes": made.passes[0].layers[0].notes}
        rows.append({**row, "jpeg": judged(reference, made.model, test)})
        told(rows)
    return {"calibration": samples.summary(), "test_images": len(test), "rows": rows}


def told(rows: list[dict[str, Any]]) -> None:
    change = rows[-1]["jpeg"]["accuracy_change"]
    ends = change["interval"]
    print(f"{rows[-1]['name']}: {change['value']:+.2f} ({ends['low']:+.2f} to {ends['high']:+.2f})", flush=True)


def own_loop(factory: Callable[[], nn.Module], pixels: Tensor, steps: int) -> nn.Module:
    """Distillation from the network as it was, its normalisations in training mode."""
    teacher, student = factory(), factory().requires_grad_(True)

    def draw(maker: torch.Generator) -> Tensor:
        batch = pixels[torch.randint(len(pixels), (32,), generator=maker)]
        turned = torch.rand(32, 1, 1, 1, generator=maker) < 0.5
        batch = F.pad(torch.where(turned, batch.flip(-1), batch), (4, 4, 4, 4))
        down, right = torch.randint(9, (2,), generator=maker).tolist()
        return batch[:, :, down : down + 32, right : right + 32]

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = (teacher(batch) / 3).log_softmax(-1)
        return 9 * F.kl_div((module(batch) / 3).log_softmax(-1), wanted, reduction="batchmean", log_target=True)

    return train(student, draw, loss, steps, 3e-3, 0, 0.8)


def of_module(reference: list[Tensor], module: nn.Module, test: Images) -> dict[str, Any]:
    """The metrics of a module on one set."""
    with torch.no_grad():
        found = [module(batch) for batch in test.batches()]
    labels = torch.split(test.labels, images.BATCH)
    scores = [score_batch(*each) for each in zip(reference, found, labels, strict=True)]
    metrics = summarize_images(scores, "compressed", "torch", test.protocol, test.digest).metrics
    return {name: metric.model_dump() for name, metric in metrics.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description="Gradual magnitude pruning.")
    parser.add_argument("part", choices=["mnist", "lstm", "resnet", "resnet-pass"])
    parser.add_argument("assets", type=Path)
    parser.add_argument("--steps", type=int, default=0, help="of training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=5000, help="test images of resnet")
    given = parser.parse_args()
    started = time.perf_counter()

    def keep(found: dict[str, Any]) -> None:
        facts = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
        facts["machine"] = platform.processor() or platform.machine()
        facts["versions"] = {"torch": torch.__version__, "python": platform.python_version()}
        facts[given.part] = {**found, "seconds": time.perf_counter() - started}
        RESULT.write_text(json.dumps(rounded(facts), indent=1) + "\n")

    if given.part.startswith("resnet"):
        keep(resnet(given.assets, given.steps or 400, given.images, given.part == "resnet"))
    elif given.part == "mnist":
        keep(compared(Cnn, 16, mnist(given.assets), given.steps or 800, 3e-3, given.seeds))
    else:
        keep(compared(Lstm, 128, shakespeare(given.assets), given.steps or 300, 1e-2, given.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
