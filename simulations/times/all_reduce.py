"""How long tensor parallelism's all-reduce takes, by the alpha-beta model of messages.

A message of n bytes takes alpha + n / beta; a rank sends and receives at once, and p ranks are joined
without conflicts (a switch). Then an all-reduce of n bytes takes, adding being free:

    one shot    alpha + (p - 1) n / beta                    everybody sends everything to everybody
    two shots   2 alpha + 2 (p - 1) / p  n / beta           reduce-scatter, then all-gather
    ring        2 (p - 1) alpha + 2 (p - 1) / p  n / beta

One and two shots are what vLLM's and TensorRT-LLM's own all-reduces do over NVLink. The ring, and the
proof that no algorithm moves fewer than 2 (p - 1) / p n bytes per rank: Patarasuk and Yuan, "Bandwidth
optimal all-reduce algorithms for clusters of workstations" (2009). Recursive doubling (Thakur,
Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH", 2005, section 4.5),
log2 p (alpha + n / beta), is never faster here than the faster of one shot and two.

Several nodes of p ranks: reduce-scatter inside the node, all-reduce of one p-th over the nodes, each
rank through its own network card, all-gather inside the node. So the network carries 2 (g - 1) / g n/p.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulations.times.network import Link

Algorithm = Literal["best", "ring"]
"""best: the faster of one shot and two at each size; a favour to the baseline that uses it."""


def all_reduce_seconds(
    num_bytes: ArrayLike,
    *,
    ranks_per_node: int,
    num_nodes: int,
    node: Link,
    network: Link,
    algorithm: Algorithm = "best",
) -> NDArray[np.float64]:
    """Seconds to all-reduce messages of so many bytes over all ranks; of the shape of `num_bytes`.

    Raises ValueError for no ranks.
    """
    if ranks_per_node < 1 or num_nodes < 1:
        raise ValueError(
            f"an all-reduce needs a rank, got num_nodes={num_nodes}, ranks_per_node={ranks_per_node}"
        )
    size = np.asarray(num_bytes, dtype=np.float64)
    if num_nodes == 1:
        return _one_tier(size, ranks_per_node, node, algorithm)
    across = _one_tier(size / ranks_per_node, num_nodes, network, algorithm)
    if ranks_per_node == 1:
        return across
    rounds = 1 if algorithm == "best" else ranks_per_node - 1
    scattered = _steps(rounds, size * (ranks_per_node - 1) / ranks_per_node, node)
    return across + 2 * scattered


def _one_tier(
    size: NDArray[np.float64], ranks: int, link: Link, algorithm: Algorithm
) -> NDArray[np.float64]:
    if ranks == 1:
        return np.zeros_like(size)
    least = 2 * size * (ranks - 1) / ranks
    if algorithm == "ring":
        return _steps(2 * (ranks - 1), least, link)
    return np.minimum(_steps(1, size * (ranks - 1), link), _steps(2, least, link))


def _steps(rounds: int, num_bytes: NDArray[np.float64], link: Link) -> NDArray[np.float64]:
    """So many rounds of messages, which together are so many bytes."""
    return rounds * link.alpha_s + num_bytes / link.beta
