"""Codecs and the associative sum, measured: bytes, error per row, speed, escapes.

Rows come from a normal and a heavy-tailed distribution and from a real checkpoint, whose model reads
a page of English and a page of code. Errors are relative L2 norms per row. All on one thread.

Legend: T tokens, K experts per token, H hidden, E experts, R rows, N nodes.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.config import ServeConfig
from cluster.engine.plan import Logits, PlanItem, StepPlan, block_table
from cluster.engine.runner import Runner
from cluster.model.config import ModelConfig
from cluster.server.tokenizer import load_tokenizer
from comms.codecs import CODECS, Codec
from comms.fixed import add_rows, fixed_sum, pack_sums, steps_per_range, unpack_sums
from comms.groups import ParallelGroups
from comms.launch import RankPool
from comms.routes import Pairs
from comms.topology import Topology
from experts.gains import expert_gains, token_ranges
from experts.grouped import run_experts
from experts.linear import stable_linear
from experts.moe import MoELayer

MARGINS = (4, 8, 16, 32, 64)
NODES = (2, 4)
PROMPT_TOKENS = 400
SYNTHETIC_TOKENS, SYNTHETIC_HIDDEN, SYNTHETIC_TOPK, SYNTHETIC_EXPERTS = 256, 2048, 8, 64
SPEED_ROWS, SPEED_HIDDEN, SPEED_ROUNDS = 512, 7168, 7
SUM_CODECS = ("bfloat16", "int10", "logfmt10", "int8", "float8")
TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What the experts of one layer gave: y_TKH in bfloat16, gains as known before."""

    x_TH: Tensor
    experts_TK: Tensor
    weights_TK: Tensor
    y_TKH: Tensor
    gains_E: Tensor

    def exact(self, node: Tensor | None = None) -> Tensor:
        """fp64 weighted sums, of all experts or where node_TK is true."""
        weights_TK = self.weights_TK.double()
        if node is not None:
            weights_TK = weights_TK.masked_fill(~node, 0.0)
        return torch.einsum("tkh,tk->th", self.y_TKH.double(), weights_TK)

    def nodes(self, num_nodes: int) -> Iterable[Tensor]:
        """For each node, which (token, k) it computes: experts are placed contiguously."""
        node_TK = self.experts_TK * num_nodes // len(self.gains_E)
        return [node_TK == node for node in range(num_nodes)]


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """What came of partial sums that crossed between nodes."""

    errors_T: Tensor
    bytes_per_element: float
    escape_rate: float = 0.0
    refused_rows: int = 0


def run(model: Path) -> dict[str, Any]:
    """What `expertmesh bench codecs` writes as JSON:

    codecs.<name>: bytes_per_element; relative_l2.<source>.{median,p95,worst}
    speed.<name>.{encode,decode}: GB/s of bfloat16 rows; speed.copy.copy beside them
    sums.<source>.<nodes>.<way>: relative_l2, bytes_per_element, escape_rate, refused_rows
    """
    torch.set_num_threads(1)
    layers = capture(model)
    sources: dict[str, Sequence[Outputs]] = {
        "normal": [synthetic("normal")],
        "student_t3": [synthetic("student_t3")],
        model.name: layers,
    }
    rows = {name: [sources[name][0].x_TH] for name in ("normal", "student_t3")}
    rows[f"{model.name} inputs"] = [layer.x_TH for layer in layers]
    for num_nodes in NODES:
        rows[f"{model.name} sums of {num_nodes} nodes"] = [
            layer.exact(node)[node.any(dim=1)].float()
            for layer in layers
            for node in layer.nodes(num_nodes)
        ]
    return {
        "model": str(model),
        "codecs": {name: _errors_of(codec, rows) for name, codec in CODECS.items()},
        "speed": _speeds(),
        "sums": {
            source: {str(n): _sums(outputs, n) for n in NODES}
            for source, outputs in sources.items()
        },
    }


def synthetic(kind: str) -> Outputs:
    """Independent outputs of rms 1, random experts, weights that sum to one."""
    rng = np.random.default_rng(0)
    tokens, topk, hidden = SYNTHETIC_TOKENS, SYNTHETIC_TOPK, SYNTHETIC_HIDDEN

    def draw(*shape: int) -> Tensor:
        if kind == "normal":
            return torch.from_numpy(rng.standard_normal(shape)).bfloat16()
        return torch.from_numpy(rng.standard_t(3, shape) / np.sqrt(3)).bfloat16()

    weights_TK = rng.random((tokens, topk))
    experts = [rng.permutation(SYNTHETIC_EXPERTS)[:topk] for _ in range(tokens)]
    return Outputs(
        x_TH=draw(tokens, hidden),
        experts_TK=torch.from_numpy(np.stack(experts)),
        weights_TK=torch.from_numpy(weights_TK / weights_TK.sum(axis=1, keepdims=True)).float(),
        y_TKH=draw(tokens, topk, hidden),
        gains_E=torch.ones(SYNTHETIC_EXPERTS),
    )


def capture(model: Path) -> list[Outputs]:
    """Inputs and expert outputs of every expert layer of a checkpoint that reads some text."""
    config = ServeConfig.from_dict({"model": str(model), "dtype": "bfloat16"})
    vocabulary = ModelConfig.from_dir(model).vocab_size
    with RankPool(1) as pool:
        one = Topology(num_nodes=1, ranks_per_node=1)
        prompts = _prompts(model, vocabulary)
        outputs: list[Outputs] = pool.run(_capture, one, config, prompts, timeout_s=TIMEOUT_S)[0]
        return outputs


def _capture(
    groups: ParallelGroups, config: ServeConfig, prompts: Sequence[Sequence[int]]
) -> list[Outputs]:
    runner = Runner.load(config, groups)
    layers = [layer for layer in runner.model.layers if isinstance(layer.mlp, MoELayer)]
    recorders = []
    for layer in layers:
        assert isinstance(layer.mlp, MoELayer)
        layer.mlp.shared_expert = _Recorder(layer.mlp.shared_expert)
        recorders.append(layer.mlp.shared_expert)
    for prompt in prompts:
        blocks = block_table(range(-(-len(prompt) // runner.cache.block_size)))
        runner.execute(StepPlan.of([PlanItem(0, tuple(prompt), 0, blocks, Logits.NONE)]))
    runner.close()
    return [
        _outputs(layer.mlp, layer.mlp_norm.weight, torch.cat(recorder.inputs))
        for layer, recorder in zip(layers, recorders, strict=True)
        if isinstance(layer.mlp, MoELayer)
    ]


class _Recorder:
    """Stands where the shared expert is, and keeps what it is given: the layer's input."""

    def __init__(self, shared_expert: Callable[[Tensor], Tensor] | None) -> None:
        self.shared_expert = shared_expert
        self.inputs: list[Tensor] = []

    def __call__(self, x_TH: Tensor) -> Tensor:
        self.inputs.append(x_TH)
        return self.shared_expert(x_TH) if self.shared_expert else torch.zeros_like(x_TH)


def _outputs(moe: MoELayer, norm_weight_H: Tensor, x_TH: Tensor) -> Outputs:
    experts_TK, weights_TK = moe.gate(x_TH, stable_linear)
    slots_TK = moe.layer_placement.choose_slots(experts_TK, moe.rank)
    gains_S = expert_gains(moe.slots, norm_weight_H)
    gains_E = torch.zeros(len(moe.gate.weight_EH)).index_copy_(
        0, experts_TK.flatten(), gains_S[slots_TK.flatten()]
    )
    return Outputs(
        x_TH=x_TH,
        experts_TK=experts_TK,
        weights_TK=weights_TK,
        y_TKH=run_experts(x_TH, slots_TK, moe.slots).view(*slots_TK.shape, -1),
        gains_E=gains_E,
    )


def _prompts(model: Path, vocabulary: int) -> list[list[int]]:
    """A page of English (the model's card) and one of Python, or random ids without a tokenizer."""
    tokenizer, card = load_tokenizer(model), model / "README.md"
    if tokenizer is None or not card.exists():
        rng = np.random.default_rng(0)
        return [rng.integers(0, vocabulary, PROMPT_TOKENS).tolist() for _ in range(2)]
    pages = [card.read_text(encoding="utf-8"), Path(__file__).read_text(encoding="utf-8")]
    return [tokenizer.encode(page).ids[:PROMPT_TOKENS] for page in pages]


def _errors_of(codec: Codec, rows: dict[str, list[Tensor]]) -> dict[str, Any]:
    errors = {}
    for source, parts in rows.items():
        found = [_relative_l2(_decoded(codec, x_RH), x_RH) for x_RH in parts]
        errors[source] = _summary(torch.cat(found))
    hidden = SPEED_HIDDEN
    return {
        "bytes_per_element": codec.row_bytes(hidden, torch.bfloat16) / hidden,
        "relative_l2": errors,
    }


def _decoded(codec: Codec, x_RH: Tensor) -> Tensor:
    """fp32 rows lose nothing but what the codec takes; "bfloat16" rounds them."""
    if codec.name == "bfloat16":
        return x_RH.bfloat16().float()
    x_RH = x_RH.float()
    return codec.decode(codec.encode(x_RH), x_RH.shape[1], torch.float32)


def _sums(layers: Sequence[Outputs], num_nodes: int) -> dict[str, Any]:
    """Each way that partial sums may cross between nodes: its error before the result is rounded,
    and its bytes an element."""
    ways: dict[str, Callable[[Outputs], Crossing]] = {
        name: partial(_float_sum, num_nodes=num_nodes, codec=CODECS[name]) for name in SUM_CODECS
    }
    for margin in MARGINS:
        ways[f"fixed, margin {margin}"] = partial(_grid_sum, num_nodes=num_nodes, margin=margin)
    report = {}
    for name, way in ways.items():
        crossings = [way(layer) for layer in layers]
        report[name] = {
            "relative_l2": _summary(torch.cat([c.errors_T for c in crossings])),
            "bytes_per_element": statistics.fmean(c.bytes_per_element for c in crossings),
            "escape_rate": statistics.fmean(c.escape_rate for c in crossings),
            "refused_rows": sum(c.refused_rows for c in crossings),
        }
    return report


def _float_sum(layer: Outputs, num_nodes: int, codec: Codec) -> Crossing:
    """fp32 partial sums of each node, encoded, decoded and added in fp32."""
    total_TH = torch.zeros(layer.x_TH.shape)
    for node_TK in layer.nodes(num_nodes):
        total_TH += _decoded(codec, layer.exact(node_TK).float())
    return Crossing(
        errors_T=_relative_l2(total_TH, layer.exact()),
        bytes_per_element=codec.row_bytes(SPEED_HIDDEN, torch.bfloat16) / SPEED_HIDDEN,
    )


def _grid_sum(layer: Outputs, num_nodes: int, margin: float) -> Crossing:
    """`comms/fixed.py` from pairs to the total, messages included."""
    num_tokens, _, hidden = layer.y_TKH.shape
    range_T = token_ranges(layer.experts_TK, layer.weights_TK, layer.gains_E, margin)
    total_TC = torch.zeros((num_tokens, hidden + 1), dtype=torch.int32)
    num_rows = num_bytes = num_escapes = 0
    for node_TK in layer.nodes(num_nodes):
        rows_V = node_TK.any(dim=1).nonzero()[:, 0].numpy()
        local_VK = node_TK[rows_V].long().numpy() - 1
        pairs = Pairs.of(local_VK, layer.weights_TK[rows_V].numpy())
        part_VC = fixed_sum(layer.y_TKH[node_TK], pairs, range_T[rows_V])
        message = pack_sums(part_VC, layer.y_TKH.dtype)
        add_rows(total_TC, unpack_sums(message, len(rows_V), hidden), rows_V)
        num_rows += len(rows_V)
        num_bytes += len(message)
        num_escapes += int((part_VC[:, :-1] != part_VC[:, :-1].to(torch.int16)).sum())
    step_T1 = range_T.double()[:, None] / steps_per_range(layer.y_TKH.dtype)
    return Crossing(
        errors_T=_relative_l2(total_TC[:, :-1] * step_T1, layer.exact()),
        bytes_per_element=num_bytes / (num_rows * hidden),
        escape_rate=num_escapes / (num_rows * hidden),
        refused_rows=int((total_TC[:, -1] > 0).sum()),
    )


def _speeds() -> dict[str, dict[str, float]]:
    """GB/s of bfloat16 rows in and out, each codec in turn, beside a copy; the best of the rounds."""
    rng = np.random.default_rng(0)
    x_RH = torch.from_numpy(rng.standard_normal((SPEED_ROWS, SPEED_HIDDEN))).bfloat16()
    out_RH = torch.empty_like(x_RH)
    calls: dict[tuple[str, str], Callable[[], Any]] = {("copy", "copy"): lambda: out_RH.copy_(x_RH)}
    for codec in CODECS.values():
        rows = codec.encode(x_RH)
        calls[codec.name, "encode"] = partial(codec.encode, x_RH)
        calls[codec.name, "decode"] = partial(codec.decode, rows, SPEED_HIDDEN, x_RH.dtype)
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(SPEED_ROUNDS):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            best[key] = min(best[key], time.perf_counter() - start)
    speeds: dict[str, dict[str, float]] = {}
    for (name, what), seconds in best.items():
        if name != "bfloat16":  # a view
            speeds.setdefault(name, {})[what] = x_RH.nbytes / seconds / 1e9
    return speeds


def _relative_l2(y_RH: Tensor, exact_RH: Tensor) -> Tensor:
    exact_RH = exact_RH.double()
    norm_R = exact_RH.norm(dim=1)
    errors_R: Tensor = (y_RH.double() - exact_RH).norm(dim=1) / norm_R
    return errors_R[norm_R > 0]


def _summary(errors_R: Tensor) -> dict[str, float]:
    median, p95 = (float(errors_R.quantile(q)) for q in (0.5, 0.95))
    return {"median": median, "p95": p95, "worst": float(errors_R.max())}
