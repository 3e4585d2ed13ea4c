from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "model", "ready", "draining", "num_nodes", "ranks_per_node", "tensor_parallel_size", "num_replicas", "uptime_s", "rebalancing", "presets")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    NUM_NODES_FIELD_NUMBER: _ClassVar[int]
    RANKS_PER_NODE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    REBALANCING_FIELD_NUMBER: _ClassVar[int]
    PRESETS_FIELD_NUMBER: _ClassVar[int]
    version: str
    model: str
    ready: bool
    draining: bool
    num_nodes: int
    ranks_per_node: int
    tensor_parallel_size: int
    num_replicas: int
    uptime_s: float
    rebalancing: str
    presets: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[str] = ..., model: _Optional[str] = ..., ready: _Optional[bool] = ..., draining: _Optional[bool] = ..., num_nodes: _Optional[int] = ..., ranks_per_node: _Optional[int] = ..., tensor_parallel_size: _Optional[int] = ..., num_replicas: _Optional[int] = ..., uptime_s: _Optional[float] = ..., rebalancing: _Optional[str] = ..., presets: _Optional[_Iterable[str]] = ...) -> None: ...

class GetModelInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelInfoResponse(_message.Message):
    __slots__ = ("model", "architecture", "dtype", "vocab_size", "max_model_len", "eos_token_ids", "has_tokenizer")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    HAS_TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    model: str
    architecture: str
    dtype: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    has_tokenizer: bool
    def __init__(self, model: _Optional[str] = ..., architecture: _Optional[str] = ..., dtype: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., has_tokenizer: _Optional[bool] = ...) -> None: ...

class GetLoadsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadsResponse(_message.Message):
    __slots__ = ("replicas",)
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaLoad]
    def __init__(self, replicas: _Optional[_Iterable[_Union[ReplicaLoad, _Mapping[str, object]]]] = ...) -> None: ...

class ReplicaLoad(_message.Message):
    __slots__ = ("replica", "in_flight", "running", "waiting", "kv_usage", "step", "last_heard_s", "kv_blocks_used", "kv_blocks_cached", "kv_blocks_total", "preemptions", "prefix_queries", "prefix_hits")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_USAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LAST_HEARD_S_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_QUERIES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HITS_FIELD_NUMBER: _ClassVar[int]
    replica: int
    in_flight: int
    running: int
    waiting: int
    kv_usage: float
    step: int
    last_heard_s: float
    kv_blocks_used: int
    kv_blocks_cached: int
    kv_blocks_total: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    def __init__(self, replica: _Optional[int] = ..., in_flight: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., kv_usage: _Optional[float] = ..., step: _Optional[int] = ..., last_heard_s: _Optional[float] = ..., kv_blocks_used: _Optional[int] = ..., kv_blocks_cached: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., preemptions: _Optional[int] = ..., prefix_queries: _Optional[int] = ..., prefix_hits: _Optional[int] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ("aborted",)
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    aborted: bool
    def __init__(self, aborted: _Optional[bool] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_s",)
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    timeout_s: float
    def __init__(self, timeout_s: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("num_cut_off",)
    NUM_CUT_OFF_FIELD_NUMBER: _ClassVar[int]
    num_cut_off: int
    def __init__(self, num_cut_off: _Optional[int] = ...) -> None: ...

class GetExpertPlacementRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetExpertPlacementResponse(_message.Message):
    __slots__ = ("epoch", "num_experts", "num_ranks", "ranks_per_node", "slots_per_rank", "layers")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    NUM_RANKS_FIELD_NUMBER: _ClassVar[int]
    RANKS_PER_NODE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_PER_RANK_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    num_experts: int
    num_ranks: int
    ranks_per_node: int
    slots_per_rank: int
    layers: _containers.RepeatedCompositeFieldContainer[LayerSlots]
    def __init__(self, epoch: _Optional[int] = ..., num_experts: _Optional[int] = ..., num_ranks: _Optional[int] = ..., ranks_per_node: _Optional[int] = ..., slots_per_rank: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[LayerSlots, _Mapping[str, object]]]] = ...) -> None: ...

class LayerSlots(_message.Message):
    __slots__ = ("layer", "experts")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ...) -> None: ...

class GetBalanceRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetBalanceResponse(_message.Message):
    __slots__ = ("epoch", "window_s", "ranks", "layers", "balancedness_mean", "balancedness_min", "balancedness_p50", "rebalances", "enabled_reason")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WINDOW_S_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    BALANCEDNESS_MEAN_FIELD_NUMBER: _ClassVar[int]
    BALANCEDNESS_MIN_FIELD_NUMBER: _ClassVar[int]
    BALANCEDNESS_P50_FIELD_NUMBER: _ClassVar[int]
    REBALANCES_FIELD_NUMBER: _ClassVar[int]
    ENABLED_REASON_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    window_s: float
    ranks: _containers.RepeatedCompositeFieldContainer[RankBalance]
    layers: _containers.RepeatedCompositeFieldContainer[LayerBalance]
    balancedness_mean: float
    balancedness_min: float
    balancedness_p50: float
    rebalances: RebalanceStats
    enabled_reason: str
    def __init__(self, epoch: _Optional[int] = ..., window_s: _Optional[float] = ..., ranks: _Optional[_Iterable[_Union[RankBalance, _Mapping[str, object]]]] = ..., layers: _Optional[_Iterable[_Union[LayerBalance, _Mapping[str, object]]]] = ..., balancedness_mean: _Optional[float] = ..., balancedness_min: _Optional[float] = ..., balancedness_p50: _Optional[float] = ..., rebalances: _Optional[_Union[RebalanceStats, _Mapping[str, object]]] = ..., enabled_reason: _Optional[str] = ...) -> None: ...

class RankBalance(_message.Message):
    __slots__ = ("rank", "node", "served", "served_total", "intra_node_bytes", "inter_node_bytes", "intra_node_bytes_per_s", "inter_node_bytes_per_s", "step_ms")
    RANK_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    SERVED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    INTRA_NODE_BYTES_FIELD_NUMBER: _ClassVar[int]
    INTER_NODE_BYTES_FIELD_NUMBER: _ClassVar[int]
    INTRA_NODE_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    INTER_NODE_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    STEP_MS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    node: int
    served: _containers.RepeatedScalarFieldContainer[int]
    served_total: int
    intra_node_bytes: int
    inter_node_bytes: int
    intra_node_bytes_per_s: float
    inter_node_bytes_per_s: float
    step_ms: float
    def __init__(self, rank: _Optional[int] = ..., node: _Optional[int] = ..., served: _Optional[_Iterable[int]] = ..., served_total: _Optional[int] = ..., intra_node_bytes: _Optional[int] = ..., inter_node_bytes: _Optional[int] = ..., intra_node_bytes_per_s: _Optional[float] = ..., inter_node_bytes_per_s: _Optional[float] = ..., step_ms: _Optional[float] = ...) -> None: ...

class LayerBalance(_message.Message):
    __slots__ = ("layer", "balancedness", "planned")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    BALANCEDNESS_FIELD_NUMBER: _ClassVar[int]
    PLANNED_FIELD_NUMBER: _ClassVar[int]
    layer: int
    balancedness: float
    planned: float
    def __init__(self, layer: _Optional[int] = ..., balancedness: _Optional[float] = ..., planned: _Optional[float] = ...) -> None: ...

class RebalanceStats(_message.Message):
    __slots__ = ("started", "finished", "abandoned", "moves", "bytes", "seconds", "stall_ms", "running", "doing", "last_reason", "last_error")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    ABANDONED_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    STALL_MS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    DOING_FIELD_NUMBER: _ClassVar[int]
    LAST_REASON_FIELD_NUMBER: _ClassVar[int]
    LAST_ERROR_FIELD_NUMBER: _ClassVar[int]
    started: int
    finished: int
    abandoned: int
    moves: int
    bytes: int
    seconds: float
    stall_ms: float
    running: bool
    doing: str
    last_reason: str
    last_error: str
    def __init__(self, started: _Optional[int] = ..., finished: _Optional[int] = ..., abandoned: _Optional[int] = ..., moves: _Optional[int] = ..., bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., stall_ms: _Optional[float] = ..., running: _Optional[bool] = ..., doing: _Optional[str] = ..., last_reason: _Optional[str] = ..., last_error: _Optional[str] = ...) -> None: ...

class RebalanceRequest(_message.Message):
    __slots__ = ("dry_run", "target", "from_scratch")
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    FROM_SCRATCH_FIELD_NUMBER: _ClassVar[int]
    dry_run: bool
    target: float
    from_scratch: bool
    def __init__(self, dry_run: _Optional[bool] = ..., target: _Optional[float] = ..., from_scratch: _Optional[bool] = ...) -> None: ...

class RebalanceResponse(_message.Message):
    __slots__ = ("started", "epoch", "layers", "bytes", "reason")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    started: bool
    epoch: int
    layers: _containers.RepeatedCompositeFieldContainer[LayerEffect]
    bytes: int
    reason: str
    def __init__(self, started: _Optional[bool] = ..., epoch: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[LayerEffect, _Mapping[str, object]]]] = ..., bytes: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class LayerEffect(_message.Message):
    __slots__ = ("layer", "imbalance_before", "imbalance_after", "lower_bound", "moves", "bytes", "reason")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    IMBALANCE_BEFORE_FIELD_NUMBER: _ClassVar[int]
    IMBALANCE_AFTER_FIELD_NUMBER: _ClassVar[int]
    LOWER_BOUND_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    layer: int
    imbalance_before: float
    imbalance_after: float
    lower_bound: float
    moves: int
    bytes: int
    reason: str
    def __init__(self, layer: _Optional[int] = ..., imbalance_before: _Optional[float] = ..., imbalance_after: _Optional[float] = ..., lower_bound: _Optional[float] = ..., moves: _Optional[int] = ..., bytes: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class DumpExpertStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DumpExpertStatsChunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class FlushCacheRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FlushCacheResponse(_message.Message):
    __slots__ = ("num_replicas",)
    NUM_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    num_replicas: int
    def __init__(self, num_replicas: _Optional[int] = ...) -> None: ...

class TraceStepsRequest(_message.Message):
    __slots__ = ("num_steps", "timeout_s")
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    num_steps: int
    timeout_s: float
    def __init__(self, num_steps: _Optional[int] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class TraceStepsChunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...
