"""Who is where: the arithmetic of nodes, ranks, tensor-parallel groups and rails.

A rank is `node * ranks_per_node + local_rank`. Tensor-parallel (TP) groups are consecutive local
ranks of one node, and each TP group is one replica of the model's attention. A *rail* is the set of
ranks with the same local rank, one on every node: what crosses between nodes crosses on a rail.

    2 nodes x 4 ranks, tensor_parallel_size 2

              local rank   0   1   2   3
        node 0             0   1 | 2   3      replicas 0 | 1
        node 1             4   5 | 6   7      replicas 2 | 3
                           rail 0 = ranks 0, 4
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Immutable layout of the cluster's ranks.

    `tensor_parallel_size` defaults to all ranks of a node. Raises ValueError for a layout that
    cannot exist.
    """

    num_nodes: int
    ranks_per_node: int
    tensor_parallel_size: int = 0

    def __post_init__(self) -> None:
        if self.num_nodes < 1 or self.ranks_per_node < 1:
            raise ValueError(
                f"a topology needs at least one node and one rank per node, got "
                f"num_nodes={self.num_nodes}, ranks_per_node={self.ranks_per_node}"
            )
        if self.tensor_parallel_size == 0:
            object.__setattr__(self, "tensor_parallel_size", self.ranks_per_node)
        if self.tensor_parallel_size < 1 or self.ranks_per_node % self.tensor_parallel_size:
            raise ValueError(
                "tensor_parallel_size must divide ranks_per_node, got ranks_per_node "
                f"% tensor_parallel_size = {self.ranks_per_node} % {self.tensor_parallel_size}"
            )

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.ranks_per_node

    @property
    def num_replicas(self) -> int:
        return self.world_size // self.tensor_parallel_size

    @property
    def leader_ranks(self) -> tuple[int, ...]:
        """The rank with tp_rank 0 of every replica, in replica order."""
        return tuple(range(0, self.world_size, self.tensor_parallel_size))

    def node_of(self, rank: int) -> int:
        return self._checked(rank) // self.ranks_per_node

    def local_rank_of(self, rank: int) -> int:
        return self._checked(rank) % self.ranks_per_node

    def replica_of(self, rank: int) -> int:
        return self._checked(rank) // self.tensor_parallel_size

    def tp_rank_of(self, rank: int) -> int:
        return self._checked(rank) % self.tensor_parallel_size

    def node_ranks(self, node: int) -> tuple[int, ...]:
        """Ranks of one node, by local rank."""
        if not 0 <= node < self.num_nodes:
            raise ValueError(f"node must be in [0, {self.num_nodes}), got {node}")
        first = node * self.ranks_per_node
        return tuple(range(first, first + self.ranks_per_node))

    def rail_ranks(self, local_rank: int) -> tuple[int, ...]:
        """Ranks with this local rank, by node."""
        if not 0 <= local_rank < self.ranks_per_node:
            raise ValueError(f"local_rank must be in [0, {self.ranks_per_node}), got {local_rank}")
        return tuple(range(local_rank, self.world_size, self.ranks_per_node))

    def tp_ranks(self, replica: int) -> tuple[int, ...]:
        """Ranks of one replica, by tp_rank."""
        if not 0 <= replica < self.num_replicas:
            raise ValueError(f"replica must be in [0, {self.num_replicas}), got {replica}")
        first = replica * self.tensor_parallel_size
        return tuple(range(first, first + self.tensor_parallel_size))

    def _checked(self, rank: int) -> int:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank must be in [0, {self.world_size}), got {rank}")
        return rank
