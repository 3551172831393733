"""Batches through a session in torch: padded on the left, with transformers' own cache."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from compress.runtime.left_padded import Floats, Ids, LeftPadded
from compress.runtime.torch_session import TorchSession, using_threads
from compress.target import Placement


class TorchRunner(LeftPadded[TorchSession]):
    """See compress.target.Runner."""

    def __init__(self, session: TorchSession, folder: Path) -> None:
        super().__init__(session, folder)
        self._takes_last = "logits_to_keep" in inspect.signature(session.model.forward).parameters

    @property
    def placement(self) -> Placement:
        """See compress.target.Runner."""
        name = self._session.name.replace(" CPU", "", 1)
        return Placement(name, self._session.provider, self._session.threads, self._folder.name)

    @torch.no_grad()
    def hidden(self, ids: Ids, mask: Ids) -> Floats:
        """See compress.target.Runner."""
        with using_threads(self._session.threads):
            output = self._session.model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
        result: Floats = output.last_hidden_state.float().numpy()
        return result

    def _empty(self, ids: Ids) -> Any:
        return self._session.fresh_cache()

    @torch.no_grad()
    def _run(self, ids: Ids) -> Floats:
        more: dict[str, Any] = {"logits_to_keep": 1} if self._takes_last else {}
        with using_threads(self._session.threads):
            output = self._session.read(torch.from_numpy(ids), self._cache, torch.from_numpy(self._mask), **more)
        self._cache = output.past_key_values
        result: Floats = output.logits[:, -1].float().numpy()
        return result
