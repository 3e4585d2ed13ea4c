"""Everything a user can set for a cluster, in one nested, frozen, validated configuration.

A configuration comes from a YAML file and dotted overrides (`scheduler.max_num_seqs=8`). What is
not known or not allowed is refused with the name of the field, the value, and what is allowed; a
misspelt key is answered with the nearest one. Option names follow what vLLM users know.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from cluster.config_reading import read_section, read_yaml
from cluster.config_section import ConfigError as ConfigError  # what users of a configuration catch
from cluster.config_section import Section
from comms.dispatcher import CombineMode, WireDtype
from comms.topology import Topology
from experts.balance import SplitMode

Count = Annotated[int, Field(ge=1, le=1 << 20)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Imbalance = Annotated[float, Field(ge=1, le=1000)]
"""max / mean over ranks."""


class ParallelConfig(Section):
    """Nodes, ranks per node, and how many consecutive ranks of a node share one attention."""

    num_nodes: Annotated[int, Field(ge=1, le=4096)] = 1
    """Machines, or logical nodes that share one."""
    ranks_per_node: Annotated[int, Field(ge=1, le=256)] = 1
    """Processes of each node, one a device."""
    tensor_parallel_size: Annotated[int, Field(ge=1, le=256)] | None = None
    """Ranks of one TP group, which is one DP replica. None: all ranks of a node."""

    @model_validator(mode="after")
    def _tensor_parallel_size_divides_a_node(self) -> Self:
        if self.ranks_per_node % self.tp_size:
            raise ValueError(
                f"tensor_parallel_size must divide ranks_per_node: {self.ranks_per_node} % "
                f"{self.tp_size} = {self.ranks_per_node % self.tp_size}, not 0"
            )
        return self

    @property
    def topology(self) -> Topology:
        return Topology(
            num_nodes=self.num_nodes,
            ranks_per_node=self.ranks_per_node,
            tensor_parallel_size=self.tp_size,
        )

    @property
    def tp_size(self) -> int:
        return self.tensor_parallel_size or self.ranks_per_node

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.ranks_per_node

    @property
    def num_replicas(self) -> int:
        """Number of DP replicas: TP groups in the world."""
        return self.world_size // self.tp_size


class CommsConfig(Section):
    """How tokens travel between ranks."""

    all2all_backend: Literal["hierarchical", "low_latency", "flat"] = "hierarchical"
    """hierarchical: one copy of a token to each node, then to its ranks. low_latency: fixed capacity in one
    exchange, for decoding. flat: every rank to every rank."""
    node_backend: Literal["shm", "gloo"] = "shm"
    """Inside a node: shared memory, or (gloo) the same as between nodes."""
    inter_node_backend: Literal["tcp", "gloo"] = "tcp"
    """Between nodes: our TCP transport, or gloo's."""
    dispatch_dtype: WireDtype = "bfloat16"
    """How tokens travel. bfloat16: rows as they are (fp32 stays fp32). float8: e4m3 with one scale
    per 128 channels. Between GPUs they travel as experts take them: in float8 where weights are."""
    combine: CombineMode = "fixed"
    """How a token's expert outputs add up. fixed: in integers, the same bits wherever experts are.
    node: in floating point, each node's sum carried by combine_dtype. exact: every expert row
    returns, which moves the most bytes."""
    combine_dtype: WireDtype = "bfloat16"
    """What carries the sums of combine node: any of the names of dispatch_dtype; bfloat16 between GPUs."""
    timeout_s: Seconds = 60.0
    """How long a rank waits for another before the step fails, naming both."""


class ExpertsConfig(Section):
    """Physical copies of experts."""

    num_redundant_experts: Annotated[int, Field(ge=0, le=1 << 16)] = 0
    """Slots beyond one for each expert, over all ranks, for second copies of busy experts."""
    split: SplitMode = "auto"
    """How tokens divide over an expert's copies. static: by the rank they come from. balanced: so
    that ranks end up as even as each batch allows. activated: so that they end up with alike many
    experts to read, for decoding bound by memory. nodes: so that each token visits few nodes, and
    ranks are even. auto: balanced by the step's own counts where it is large enough to gain by it and
    by recent ones elsewhere, and static with comms.combine node."""


class EplbConfig(Section):
    """Which rank holds which experts while serving. The load is recorded always; experts move by
    themselves only if `enabled`, and otherwise when an admin asks for it."""

    enabled: bool = False
    """Whether experts move by themselves."""
    interval_s: Seconds = 1.0
    """Between two looks at the load of the experts."""
    window_size: Count = 64
    """Looks that the recorded load spans."""
    min_tokens: Count = 256
    """Tokens that must have been recorded before anything is planned."""
    threshold: Imbalance = 1.05
    """Imbalance of a layer, after the best division of its tokens over copies, that is put right."""
    target: Imbalance = 1.02
    """Imbalance that a plan is to reach."""
    node_traffic: Annotated[float, Field(ge=0, le=100)] = 0.0
    """What a token's visit to another node weighs in plans from scratch, against even ranks; 0:
    nothing. To go with experts.split nodes. Such plans take about a second per layer."""
    horizon_s: Seconds = 60.0
    """How long the present load is expected to last: within it moving experts must pay."""
    bandwidth_mib_s: Annotated[float, Field(gt=0, le=1 << 20)] = 64.0
    """MiB/s of weights that each rank sends at most while it serves."""
    prepare_timeout_s: Seconds = 60.0
    """For the weights of one layer to reach all ranks; later the change is abandoned."""

    @model_validator(mode="after")
    def _what_is_reached_is_not_put_right_again(self) -> Self:
        if self.target > self.threshold:
            raise ValueError(
                "target must not exceed threshold, or each rebalance would ask for the next: "
                f"{self.target:g} > {self.threshold:g}"
            )
        return self


class CacheConfig(Section):
    """The paged KV cache of each rank."""

    block_size: Literal[1, 2, 4, 8, 16, 32, 64, 128] = 16
    """Tokens of one block."""
    num_blocks: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    """Blocks per rank. None: as many as fit into memory_gib."""
    memory_gib: Annotated[float, Field(gt=0, le=4096)] = 0.25
    """Of the cache of each rank, unless num_blocks is given."""
    enable_prefix_caching: bool = True
    """Keep computed blocks of prompts and completions for requests that begin with the same tokens."""


class SchedulerConfig(Section):
    """Limits of one DP replica's steps, and of the whole front end's queue."""

    max_num_seqs: Count = 32
    """Sequences that a replica computes at once."""
    max_num_batched_tokens: Count = 512
    """Tokens of one step of a replica, prompts and completions together."""
    max_num_queued_reqs: Count = 256
    """Requests waiting and running, all replicas together; one more is RESOURCE_EXHAUSTED."""
    max_num_queued_tokens: Annotated[int, Field(ge=1, le=1 << 32)] | None = None
    """Prompt tokens of these requests, all replicas together. None: no limit of their own."""
    async_scheduling: bool = True
    """Plan the next step while the model computes this one."""

    @model_validator(mode="after")
    def _a_step_holds_one_token_of_every_sequence(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                "max_num_batched_tokens must hold one token of every running sequence: "
                f"{self.max_num_batched_tokens} < max_num_seqs = {self.max_num_seqs}"
            )
        return self


class ServerConfig(Section):
    """The front ends, gRPC and HTTP, and their limits.

    Beyond loopback they listen only with TLS and a token.
    """

    host: Annotated[str, Field(min_length=1, max_length=255)] = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 50_051
    """Of gRPC. 0: any free port."""
    http_port: Annotated[int, Field(ge=0, le=65_535)] | None = None
    """Of the OpenAI-compatible HTTP front end, /metrics and the live page (extra: http). 0: any free
    port. None: no HTTP."""
    max_message_mib: Annotated[int, Field(ge=1, le=256)] = 4
    """Largest request."""
    max_metadata_kib: Annotated[int, Field(ge=1, le=1024)] = 16
    """Largest headers of a request."""
    max_concurrent_rpcs: Count = 4096
    """Calls at once, streams among them; one more is refused."""
    default_max_tokens: Count = 256
    """For requests that do not set max_tokens."""
    max_stop_strings: Annotated[int, Field(ge=0, le=256)] = 16
    """Stop strings of a request."""
    max_stop_chars: Annotated[int, Field(ge=1, le=65_536)] = 256
    """Characters of a stop string."""
    max_stop_token_ids: Annotated[int, Field(ge=0, le=65_536)] = 128
    """Stop tokens of a request."""
    max_bad_words: Annotated[int, Field(ge=0, le=65_536)] = 128
    """Bad words of a request, each of at most max_stop_chars characters."""
    max_buffered_tokens: Count = 4096
    """Tokens kept for a client that does not read; beyond it that stream alone is ended."""
    replica_timeout_s: Seconds = 60.0
    """A request whose replica has sent nothing for this long fails with UNAVAILABLE."""
    retry_after_s: Seconds = 1.0
    """What RetryInfo tells a client whose request found the queue full, as long as no request has ended
    lately; then it follows how fast requests end."""
    drain_timeout_s: Seconds = 30.0
    """How long requests in flight may go on after the server was told to stop."""
    token_file: str | None = None
    """File with the tokens, one a line, of which every call needs one. None: no call needs any."""
    admin_token_file: str | None = None
    """File with the token that admin calls need. None: they are for loopback clients only."""
    tls_cert_file: str | None = None
    """PEM chain of the server's certificate. None: no TLS."""
    tls_key_file: str | None = None
    """PEM key that belongs to tls_cert_file."""
    tls_client_ca_file: str | None = None
    """PEM certificates of the authorities whose clients are let in (mTLS). None: all clients."""
    max_choices: Annotated[int, Field(ge=1, le=1024)] = 16
    """Completions that one request may ask for (`n`)."""
    max_logprobs: Annotated[int, Field(ge=0, le=1024)] = 20
    """Alternatives for each token that one request may ask for."""


class PresetConfig(Section):
    """A task: what chat requests that name it begin with, and how their tokens are chosen."""

    system: Annotated[str, Field(min_length=1, max_length=65_536)]
    """The system message, put before the request's own messages if they have none."""
    sampling: dict[str, Any] = Field(default={})
    """Defaults of SamplingParams for requests that do not set them."""


class ChatConfig(Section):
    """How messages of a chat become a prompt."""

    template: str | None = None
    """File with a jinja2 template, or `plain` for a base model. None: the one in the checkpoint."""
    presets: dict[str, PresetConfig] = Field(default={})
    """Tasks by name (see below), besides the built-in ones; a name of those takes its place."""


class ObservabilityConfig(Section):
    """What the cluster tells of itself, besides /metrics."""

    log_format: Literal["text", "json"] = "text"
    """json: one object a line, for collectors of logs."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lines below it are not written."""
    log_dir: str | None = None
    """Where each process also writes its lines: controller.log, rank-0.log, ... None: to stderr alone,
    which Ray keeps among its own files."""
    log_requests: bool = False
    """One line for each request that ends: its id, tokens and times. Never its text."""
    otlp_traces_endpoint: str | None = None
    """Where OpenTelemetry spans of requests go (OTLP over gRPC, extra: otel). None: nowhere."""


class RayConfig(Section):
    """Where Ray places the ranks, and how long it may take."""

    placement_strategy: Literal["PACK", "STRICT_SPREAD"] = "PACK"
    """STRICT_SPREAD: one host per node. PACK: logical nodes may share a host."""
    cpus_per_rank: Annotated[float, Field(ge=0, le=1024)] = 1.0
    """Logical CPUs that Ray sets aside for each rank."""
    wait_for_hosts_s: Annotated[float, Field(ge=0, le=86_400)] = 0.0
    """How long the job waits for hosts to join Ray. 0: a cluster that is too small is refused at once."""
    startup_timeout_s: Seconds = 300.0
    """From placing the ranks to the first request."""


class ServeConfig(Section):
    """One cluster that serves one model."""

    model: Annotated[str, Field(min_length=1)]
    """A Hugging Face checkpoint directory."""
    served_model_name: Annotated[str, Field(min_length=1)] | None = None
    """Name that requests use. None: the directory's name."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights, activations and KV cache."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What computes. cuda: one NVIDIA GPU for each rank (extra: gpu), in bfloat16."""
    quantization: Literal["fp8", "bfloat16"] | None = None
    """Of large matrices, as they are loaded, with device cuda. fp8: e4m3 with one scale for each 128 x 128
    weights, and for each 128 channels of what they are multiplied with. bfloat16: an FP8 checkpoint is
    dequantised, as device cpu does. None: as the checkpoint has them."""
    max_model_len: Annotated[int, Field(ge=2, le=1 << 24)] | None = None
    """Longest prompt plus completion, in tokens. None: the checkpoint's own limit."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """From which requests that bring no seed are given theirs."""
    parallel: ParallelConfig = ParallelConfig()
    comms: CommsConfig = CommsConfig()
    experts: ExpertsConfig = ExpertsConfig()
    eplb_config: EplbConfig = EplbConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    server: ServerConfig = ServerConfig()
    chat: ChatConfig = ChatConfig()
    observability: ObservabilityConfig = ObservabilityConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _sums_do_not_depend_on_copies_that_the_batch_chooses(self) -> Self:
        split = self.experts.split
        if split not in ("auto", "static") and self.comms.combine == "node":
            raise ValueError(
                f"experts.split = {split!r} with comms.combine = 'node': the batch would decide "
                "where sums are rounded, so a request's tokens would depend on its company; set "
                "comms.combine to 'fixed' or 'exact', or experts.split to 'auto' or 'static'"
            )
        return self

    @model_validator(mode="after")
    def _a_gpu_has_what_it_is_asked_for(self) -> Self:
        if self.device == "cpu" and self.quantization is not None:
            raise ValueError(f"quantization = {self.quantization!r} needs device = 'cuda'")
        if self.device == "cuda" and self.dtype != "bfloat16":
            raise ValueError(f"device = 'cuda' needs dtype = 'bfloat16', not {self.dtype!r}")
        if self.device == "cuda":
            self._a_layout_is_one_of_gpus()
        return self

    def _a_layout_is_one_of_gpus(self) -> None:
        parallel, comms = self.parallel, self.comms
        if parallel.world_size > 1 and comms.combine == "exact":
            raise ValueError(
                "device = 'cuda' with several ranks needs comms.combine = 'fixed' or 'node', not 'exact'"
            )
        if self.experts.split not in ("auto", "static"):
            raise ValueError(
                f"device = 'cuda' needs experts.split = 'auto' or 'static', not {self.experts.split!r}"
            )

    @property
    def model_name(self) -> str:
        return self.served_model_name or Path(self.model).resolve().name

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Self:
        """Validate nested values after applying `a.b=c` overrides (c is read as YAML)."""
        return read_section(cls, values, overrides)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file; raises ConfigError naming the file when it cannot be used."""
        values = read_yaml(path)
        try:
            return cls.from_dict(values, overrides)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_yaml(self) -> str:
        """Every option with the value in force; `from_yaml` of this text gives an equal config."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)
