"""Decode steps as CUDA graphs: each shape is captured once and then replayed.

A replay does in one launch what was captured, on the same memory. So all that a step reads and
writes stays where it is for the whole run: weights, cache, the batch's tensors. The price is memory
that is not free while the model trains; `--cuda_graphs false` frees it after each rollout, and a
step is then launched operation by operation.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from models.decoding.cache import Cache
from models.decoding.step import DecodeStep
from models.mixer import Layout
from models.qwen_vl import QwenVL

MOST = 48  # graphs; with more of them all are captured anew


class Decoding:
    """Decode steps launched operation by operation: a cache, and the weights of this moment."""

    def __init__(self, model: QwenVL):
        self.cache = Cache(model.config, model.dtype, model.device)

    def prepare(self, model: QwenVL, layout: Layout) -> None:
        """Before a prefill. layout: of the cache."""
        self.cache.prepare(layout)
        self.decode = DecodeStep(model)

    def step(self, key: Hashable, batch: Any, function: Callable[[Any], None]) -> Any:
        """function(batch), which changes `batch.tensors` in place. Returns the batch to go on with.

        key: what, besides the shapes of these tensors, decides what the function does.
        """
        function(batch)
        return batch


class Graphs(Decoding):
    """Decode steps replayed, for the life of a model on a CUDA device."""

    def __init__(self, model: QwenVL):
        super().__init__(model)
        self._forget()

    def _forget(self) -> None:
        """All graphs at once, with the memory that they share: torch does not take a pool again
        whose graphs are gone, and the graphs of a stream share its workspace."""
        self.decode, self._weights = None, []
        self._batches: dict[Hashable, Any] = {}
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def prepare(self, model: QwenVL, layout: Layout) -> None:
        weights = [parameter.data_ptr() for parameter in model.parameters()]
        stay = self.cache.holds(layout) and weights == self._weights
        if not stay or len(self._graphs) > MOST:
            self._forget()
        self.cache.prepare(layout)
        if self.decode is None:
            self.decode, self._weights = DecodeStep(model), weights
        else:
            self.decode.refresh(model)

    def step(self, key: Hashable, batch: Any, function: Callable[[Any], None]) -> Any:
        shapes = tuple(tensor.shape for tensor in batch.tensors)
        kept = self._batches.setdefault(shapes, batch)
        _set(kept, batch.tensors)
        if graph := self._graphs.get((key, shapes)):
            graph.replay()
            return kept
        before = [tensor.clone() for tensor in kept.tensors]
        function(kept)  # launched: it loads kernels and makes handles, which no capture may
        after = [tensor.clone() for tensor in kept.tensors]
        _set(kept, before)  # the emulated device executes what it captures, and restores it then
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            function(kept)
        self._graphs[key, shapes] = graph
        _set(kept, after)
        return kept


def _set(batch: Any, values: Sequence[Tensor]) -> None:
    for tensor, value in zip(batch.tensors, values, strict=True):
        if tensor is not value:
            tensor.copy_(value)
