"""What a machine achieves, as data: a JSON file with its provenance, read once and checked.

    version            1
    name, provenance   {"hardware", "software", "date", "source", "notes"}
    memory_bytes       of one rank
    memory_bandwidth   bytes/s that large reads achieve
    peak_flops         {dtype: FLOP/s that a large product achieves}
    gemm               {dtype: {"overhead_s", "tile"}}: of one launch; rows are rounded up to tiles
    attention          optional {"decode_flops", "prefill_flops", "overhead_s"} of attention's core;
                       "absorbed_prompts" (false): prompts too are computed with in MLA's absorbed form
    tables             optional measurements, {name: {"axes", "unit": "s", "values", ...}}, see below
    links              {"node", "network"}: {"alpha_s", "beta"} of one rank, each way
    dispatch, combine  optional {"node", "network"}: links as these two see them
    low_latency        optional {"dispatch", "combine", "network_only"}: links as the low-latency
                       kernels see them; network_only: inside a node too they use the network
    overheads          {"step_s", "layer_s"}: what belongs to no operation, of a step and of a layer
                       (of each micro-batch): gaps between kernels
    overlap            {"sm_share", "supports_two_batch"}: computing units that messages hold;
                       optional "pipelined_stages" (true): stages of an exchange run at once,
                       "exchange_slowdown" (1): of an exchange that shares those units,
                       "held_s" (0): of a low-latency exchange, in which it holds all units
    range              {"tokens", "context", "ranks": [low, high]}: where the above was measured
    fidelity, measured optional, for readers

The tables that the cost model looks for, all in seconds; others may be there for readers:

    gemm/<dtype>/<n>x<k>                              by tokens
    bmm/bfloat16/<heads>/<n>x<k>                      by tokens; a product of each head
    grouped_gemm/<dtype>/<hidden>x<intermediate>      by experts, tokens_per_expert: gate, up, down
    active_experts/<dtype>/<hidden>x<intermediate>    the same by experts with tokens, activation and all
    shared_expert/<dtype>/<hidden>x<intermediate>     by tokens; what it adds to a layer
    mla_decode/<dtype>/<heads>x<latent + rotary>      by sequences, context; also ".../2_queries"
    gqa_decode/<dtype>/<heads>/<KV heads>x<channels>  the same of grouped queries
    attention_prefill/<heads>x<query + value>         by tokens of one causal prompt; of grouped
                                                      queries <heads>/<KV heads>x<channels>
    elementwise/attention/<hidden>                    by tokens; all but products and the core
    gate/<experts>x<hidden>                           by tokens; norm, product and choice
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulations.hardware.calibration_json import CalibrationError, read_values
from simulations.hardware.tables import Table
from simulations.times.network import Link

_DATA = Path(__file__).parent / "data"


NAMES: tuple[str, ...] = tuple(sorted(file.stem for file in _DATA.glob("*.json")))
"""The calibrations that come with us."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A matrix product: seconds before it starts, and the rows that it computes at a time."""

    overhead_s: float
    tile: int


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """`hash` names the content: 12 hex digits of the SHA-256 of the canonical JSON."""

    name: str
    hash: str
    provenance: Mapping[str, Any]
    memory_bytes: float
    memory_bandwidth: float
    peak_flops: Mapping[str, float]
    gemm: Mapping[str, Launch]
    decode_flops: float
    prefill_flops: float
    attention_overhead_s: float
    absorbed_prompts: bool
    tables: Mapping[str, Table]
    links: Mapping[str, Link]
    dispatch: Mapping[str, Link]
    combine: Mapping[str, Link]
    low_latency_dispatch: Mapping[str, Link]
    low_latency_combine: Mapping[str, Link]
    low_latency_network_only: bool
    step_s: float
    layer_s: float
    sm_share: float
    supports_two_batch: bool
    pipelined_stages: bool = True
    exchange_slowdown: float = 1.0
    held_s: float = 0.0
    range: Mapping[str, tuple[float, float]]

    @staticmethod
    def from_file(path: str | Path) -> Calibration:
        """Raises CalibrationError naming the file and the key."""
        file = Path(path)
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise CalibrationError(f"{file}: no such file") from error
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"{file}: not readable: {error}") from error
        return Calibration.from_json(text, str(file))

    @staticmethod
    def named(name: str) -> Calibration:
        """One of `NAMES`."""
        if name not in NAMES:
            raise CalibrationError(
                f"unknown calibration {name!r}: choose from {', '.join(NAMES)}, or give a file"
            )
        return Calibration.from_file(_DATA / f"{name}.json")

    @staticmethod
    def load(name_or_path: str) -> Calibration:
        """What a command's `--calibration` means: a name, or a file."""
        is_file = name_or_path.endswith(".json") or Path(name_or_path).is_file()
        return Calibration.from_file(name_or_path) if is_file else Calibration.named(name_or_path)

    @staticmethod
    def from_json(text: str, source: str) -> Calibration:
        values = read_values(text, source)
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        links = _links(values["links"])
        dispatch, combine = ({**links, **_links(values[way])} for way in ("dispatch", "combine"))
        low_latency = values["low_latency"]
        attention, bfloat16 = values["attention"], values["peak_flops"]["bfloat16"]
        return Calibration(
            name=values["name"],
            hash=hashlib.sha256(canonical.encode()).hexdigest()[:12],
            provenance=values["provenance"],
            memory_bytes=values["memory_bytes"],
            memory_bandwidth=values["memory_bandwidth"],
            peak_flops=values["peak_flops"],
            gemm={dtype: Launch(**launch) for dtype, launch in values["gemm"].items()},
            decode_flops=attention.get("decode_flops", bfloat16),
            prefill_flops=attention.get("prefill_flops", bfloat16),
            attention_overhead_s=attention.get(
                "overhead_s", values["gemm"]["bfloat16"]["overhead_s"]
            ),
            absorbed_prompts=attention.get("absorbed_prompts", False),
            tables={name: Table.from_json(table) for name, table in values["tables"].items()},
            links=links,
            dispatch=dispatch,
            combine=combine,
            low_latency_dispatch={**dispatch, **_links(low_latency.get("dispatch", {}))},
            low_latency_combine={**combine, **_links(low_latency.get("combine", {}))},
            low_latency_network_only=low_latency.get("network_only", False),
            **values["overheads"],
            **values["overlap"],
            range={key: (low, high) for key, (low, high) in values["range"].items()},
        )

    def outside(self, what: str, low: float, high: float) -> str | None:
        """A warning if what goes from `low` to `high` was not measured throughout."""
        first, last = self.range[what]
        if first <= low and high <= last:
            return None
        return f"extrapolated: {what} beyond {first:g} to {last:g} of calibration {self.name}"


def _links(values: Mapping[str, Mapping[str, float]]) -> dict[str, Link]:
    return {where: Link(**link) for where, link in values.items()}
