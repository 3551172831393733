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
        taken = inspect.signature(session.model.forward).parameters
        self._takes_positions, self._takes_last = "position_ids" in taken, "logits_to_keep" in taken

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
        whole, size = torch.from_numpy(self._mask), self._session.chunk or ids.shape[1]
        before = whole.shape[1] - ids.shape[1]
        more: dict[str, Any] = {"logits_to_keep": 1} if self._takes_last else {}
        with using_threads(self._session.threads):
            for at in range(0, ids.shape[1], size):
                piece, mask = torch.from_numpy(ids[:, at : at + size]), whole[:, : before + at + size]
                if self._takes_positions:
                    more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -piece.shape[1] :]
                output = self._session.model(
                    input_ids=piece, attention_mask=mask, past_key_values=self._cache, use_cache=True, **more
                )
                self._cache = output.past_key_values
        result: Floats = output.logits[:, -1].float().numpy()
        return result
