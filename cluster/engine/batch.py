"""What one engine step computes, as tensors (`ForwardBatch`) for the model below."""

from __future__ import annotations

from cluster.model.batch import ForwardBatch

__all__ = ["ForwardBatch"]
