"""Data in shuffled batches for training, made as they are asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.inputs.datasets import Calibration, Samples
from compress.inputs.images import BATCH, Images


class Batches:
    """Token windows, (n, length) int64 of about 2048 tokens, or images, (n, channels, h, w) float32, in seeded order;
    windows of unlike lengths in the order of their lengths, since only rows of one length go together."""

    def __init__(self, samples: Samples, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images: Images | None = None
        self.windows: list[Tensor] = []
        if isinstance(samples, Images):
            self.images = samples.at(torch.randperm(len(samples), generator=generator).tolist())
        elif samples.lengths:
            self.windows = samples.batches()
        else:
            first = samples.batches()[0].shape[0]
            order = torch.randperm(len(samples.ids), generator=generator)
            self.windows = list(torch.split(samples.ids[order], first))

        self.left_over = False

    @classmethod
    def to_train_on(cls, calibration: Calibration, seed: int) -> Batches:
        """What statistics left of the data; where nothing is left, what they were taken over."""
        made = cls(calibration.rest or calibration.windows, seed)
        made.left_over = calibration.rest is not None
        return made

    def told(self, count: int) -> str:
        """For a report: '20,480 tokens of data that calibration left over (1,000 there are)'. count: trained on."""
        unit = "tokens" if self.images is None else "images"
        where = "of data that calibration left over" if self.left_over else "of the calibration data"
        return f"{count:,} {unit} {where} ({self.total:,} there are)"

    def __len__(self) -> int:
        return len(self.windows) if self.images is None else -(-len(self.images) // BATCH)

    def __getitem__(self, place: int) -> Tensor:
        return self.windows[place] if self.images is None else self.images.inputs(place * BATCH)

    def labels(self, place: int) -> Tensor | None:
        """Of a batch of images, (n,) int64; None of tokens, which have none."""
        start = place * BATCH
        return None if self.images is None else self.images.labels[start : start + BATCH]

    def rows(self, place: int) -> int:
        """Tokens, or images, of a batch."""
        if self.images is None:
            return self.windows[place].numel()
        return min(BATCH, len(self.images) - place * BATCH)

    def mean_rows(self, places: Sequence[int]) -> int:
        """Tokens, or images, of one of some batches on average, at least 1."""
        return max(1, sum(map(self.rows, places)) // len(places))

    @property
    def total(self) -> int:
        """Of all batches."""
        return sum(self.rows(place) for place in range(len(self)))
