"""A whole model on one rank inside the test process, over groups of one."""

import torch

from cluster.config import CommsConfig
from cluster.model.batch import ForwardBatch
from cluster.model.config import ModelConfig
from cluster.model.kv_cache import KVCache
from cluster.model.transformer import Transformer
from comms.groups import ParallelGroups
from comms.solo import SoloGroup
from comms.topology import Topology
from router.placement import Placement

TOPOLOGY = Topology(num_nodes=1, ranks_per_node=1)


def solo_groups() -> ParallelGroups:
    names = ("world", "node", "rail", "tp", "leaders")
    groups = {name: SoloGroup(name=name, rank=0) for name in names}
    return ParallelGroups(topology=TOPOLOGY, rank=0, epoch=0, **groups)


def load_solo(directory, dtype=torch.float32) -> Transformer:
    config = ModelConfig.from_dir(directory)
    placement = Placement.contiguous(config.num_moe_layers, config.num_experts, 1)
    return Transformer.load(directory, config, solo_groups(), placement, dtype, CommsConfig())


def new_cache(model: Transformer, num_blocks: int, block_size: int, dtype=torch.float32) -> KVCache:
    return KVCache(model.config, TOPOLOGY, num_blocks, block_size, dtype)


def make_batch(parts, block_size: int) -> ForwardBatch:
    """`parts`: (token_ids, first position, block table, positions in token_ids wanting logits).

    Tables are cut to the blocks in use, so their width differs from step to step as in the engine.
    """
    parts = [
        (ids, start, table[: -(-(start + len(ids)) // block_size)], wanted)
        for ids, start, table, wanted in parts
    ]
    ids, positions, slots, sequence, rows = [], [], [], [], []
    for idx, (token_ids, start, table, wanted) in enumerate(parts):
        rows += [len(ids) + w for w in wanted]
        for offset, token in enumerate(token_ids):
            position = start + offset
            ids.append(token)
            positions.append(position)
            slots.append(int(table[position // block_size]) * block_size + position % block_size)
            sequence.append(idx)
    width = max((len(table) for _, _, table, _ in parts), default=0)
    tables = torch.zeros(len(parts), width, dtype=torch.int64)
    for idx, (_, _, table, _) in enumerate(parts):
        tables[idx, : len(table)] = torch.as_tensor(table)

    def as_int64(values):
        return torch.tensor(values, dtype=torch.int64)

    return ForwardBatch(
        token_ids_T=as_int64(ids),
        positions_T=as_int64(positions),
        kv_slots_T=as_int64(slots),
        block_tables_NB=tables,
        sequence_T=as_int64(sequence),
        logit_rows=as_int64(rows),
    )
