"""Batches through a session of the portable graph: padded on the left, with the cache that the graph hands back."""

from __future__ import annotations

from compress.export.onnx.cache import Concatenated
from compress.export.onnx.runtime import Session
from compress.runtime.left_padded import Floats, Ids, LeftPadded
from compress.target import Placement


class Runner(LeftPadded[Session]):
    """See compress.target.Runner. Positions and what may be seen follow from the mask, inside the graph."""

    @property
    def placement(self) -> Placement:
        """See compress.target.Runner; every provider that onnxruntime may place a node on, in its order."""
        loaded = self._session.session
        providers = ", ".join(name.removesuffix("ExecutionProvider") for name in loaded.get_providers())
        threads = int(loaded.get_session_options().intra_op_num_threads)
        version = " ".join(self._session.name.split()[:2])
        return Placement(version, providers, threads, f"{self._folder.name}/{self._session.graph}")

    def hidden(self, ids: Ids, mask: Ids) -> Floats:
        """See compress.target.Runner."""
        feeds = {"input_ids": ids, "attention_mask": mask}
        result: Floats = self._session.session.run([self._session.outputs[0]], feeds)[0]
        return result

    def _empty(self, ids: Ids) -> Concatenated:
        return Concatenated(self._session)

    def _run(self, ids: Ids) -> Floats:
        last: Floats = self._cache.run(ids, self._mask)[:, -1]
        return last
