"""What Prometheus scrapes at /metrics: requests here, more in `replica_metrics.py` and `expert_metrics.py`.

Names, labels and histogram buckets are those of vLLM (docs/design/metrics.md there) under the prefix
"expertmesh:", so that its dashboards need no more than another prefix; where buckets begin earlier than
vLLM's, its own are among them. An engine is a data-parallel replica. docs/operations.md says what each
metric tells an operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from cluster.config import ServeConfig
from cluster.server import wire
from cluster.server.errors import Code
from cluster.server.in_flight import InFlight
from cluster.server.leaders import Replica
from cluster.server.observe.expert_metrics import ExpertMetrics
from cluster.server.observe.metric_families import PREFIX
from cluster.server.observe.observer import Observer
from cluster.server.observe.replica_metrics import ReplicaMetrics
from cluster.server.request import FinishReason, ModelInfo

FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
BETWEEN_TOKENS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5,
    7.5, 10, 20, 40, 80,
)  # fmt: skip
REQUEST_S = (
    0.005, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120,
    240, 480, 960, 1920, 7680,
)  # fmt: skip
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHOICES = (1, 2, 5, 10, 20)

if TYPE_CHECKING:
    from cluster.rebalancer import Rebalancer
    from cluster.server.gateway import Gateway

M = TypeVar("M", bound=MetricWrapperBase)


class Metrics(Observer):
    """One exposition for one server, with a registry of its own; any thread may ask for it.

    Without a gateway and a rebalancer, which may come later by `watch`, it has requests only.
    """

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(
        self,
        config: ServeConfig,
        model_info: ModelInfo,
        rebalancer: Rebalancer | None = None,
        gateway: Gateway | None = None,
    ) -> None:
        self.registry = CollectorRegistry()
        self._model = model_info.name
        self._num_engines = config.parallel.num_replicas
        self._replicas = ReplicaMetrics(config, model_info.name)
        self._experts = ExpertMetrics(model_info.name)
        self._steps = [0] * self._num_engines
        self._make_counters()
        self._make_histograms(_one_two_five(model_info.max_model_len))
        self.registry.register(self._replicas)
        self.registry.register(self._experts)
        ProcessCollector(registry=self.registry)
        self.watch(gateway, rebalancer)

    def watch(self, gateway: Gateway | None, rebalancer: Rebalancer | None) -> None:
        """Whose replicas and whose experts the exposition is of, from now on."""
        self._replicas.gateway = gateway
        self._experts.rebalancer = rebalancer

    def exposition(self) -> bytes:
        """All metrics in Prometheus's text format, to be sent as `content_type`."""
        return generate_latest(_WithoutCreationTimes(self.registry))

    # What the gateway tells ---------------------------------------------------------------------

    def refused(self, code: Code) -> None:
        self._refused[code].inc()

    def admitted(self, request: InFlight) -> None:
        engine = request.info.replica
        self._prompt_tokens[engine].inc(request.info.num_tokens)
        self._choices[engine].observe(request.num_choices)
        self._max_tokens[engine].observe(request.info.max_tokens)

    def progressed(self, request: InFlight, num_tokens: int, since_last_s: float | None) -> None:
        engine = request.info.replica
        self._generation_tokens[engine].inc(num_tokens)
        if since_last_s is not None:
            self._between_tokens_s[engine].observe(since_last_s)
        elif request.last_token_at is not None:
            self._first_token_s[engine].observe(request.last_token_at - request.arrived)

    def ended(self, request: InFlight, outcome: str) -> None:
        engine = request.info.replica
        self._cached_tokens[engine].inc(request.cached_tokens)
        if outcome in self._finished:
            self._finished[FinishReason(outcome)][engine].inc()
        else:
            self._failed[Code(outcome)].inc()
        if outcome in (FinishReason.STOP, FinishReason.LENGTH):
            self._completed(request, engine)

    def heard(self, replica: Replica, frame: wire.StepFrame) -> None:
        stats = frame.stats
        if stats.step != self._steps[replica.idx] and stats.step_tokens:
            self._steps[replica.idx] = stats.step
            self._step_tokens[replica.idx].observe(stats.step_tokens)

    def _completed(self, request: InFlight, engine: int) -> None:
        """The times of a request that came to its end, from `arrived` to its last token."""
        num_tokens = request.num_completion_tokens
        self._request_prompt_tokens[engine].observe(request.info.num_tokens)
        self._request_generation_tokens[engine].observe(num_tokens)
        first, last = request.first_token_at, request.last_token_at
        if first is None or last is None:
            return
        queue_s = min((request.queue_ms or 0.0) / 1e3, first - request.arrived)
        prefill_s = first - request.arrived - queue_s
        self._request_s[engine].observe(last - request.arrived)
        self._queue_s[engine].observe(queue_s)
        self._prefill_s[engine].observe(prefill_s)
        self._decode_s[engine].observe(last - first)
        self._inference_s[engine].observe(prefill_s + last - first)
        if num_tokens > request.num_choices:
            between = (last - first) * request.num_choices / (num_tokens - request.num_choices)
            self._request_between_tokens_s[engine].observe(between)

    # The metrics --------------------------------------------------------------------------------

    def _make_counters(self) -> None:
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of admitted prompts.")
        self._cached_tokens = self._counter(
            "prompt_tokens_cached", "Tokens of prompts found in the cache instead of computed."
        )
        self._generation_tokens = self._counter("generation_tokens", "Tokens of completions.")
        success = Counter(
            f"{PREFIX}request_success",
            "Requests that ended without an error, by reason.",
            ("model_name", "engine", "finished_reason"),
            registry=self.registry,
        )
        self._finished = {reason: self._each(success, reason) for reason in FinishReason}
        self._failed = self._by_code(
            "request_failed", "Requests that ended with an error after they were admitted."
        )
        self._refused = self._by_code(
            "request_refused", "Requests that ended with an error before an engine had them."
        )

    def _make_histograms(self, lengths: Sequence[float]) -> None:
        self._first_token_s = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN_S
        )
        self._between_tokens_s = self._histogram(
            "inter_token_latency_seconds", "From one token to the next.", BETWEEN_TOKENS_S
        )
        self._request_between_tokens_s = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean of a request's times from one token to the next.",
            BETWEEN_TOKENS_S,
        )
        self._request_s = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last token.", REQUEST_S
        )
        self._queue_s = self._histogram(
            "request_queue_time_seconds", "From arrival until the engine began with it.", REQUEST_S
        )
        self._prefill_s = self._histogram(
            "request_prefill_time_seconds", "From there to the first token.", REQUEST_S
        )
        self._decode_s = self._histogram(
            "request_decode_time_seconds", "From the first token to the last.", REQUEST_S
        )
        self._inference_s = self._histogram(
            "request_inference_time_seconds", "Prefill and decode together.", REQUEST_S
        )
        self._request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", lengths
        )
        self._request_generation_tokens = self._histogram(
            "request_generation_tokens", "Completion tokens of a request.", lengths
        )
        self._max_tokens = self._histogram(
            "request_params_max_tokens", "The limit in force for a request's completion.", lengths
        )
        self._choices = self._histogram(
            "request_params_n", "Completions that a request asks for.", CHOICES
        )
        self._step_tokens = self._histogram(
            "iteration_tokens_total", "Tokens computed in a step.", STEP_TOKENS
        )

    def _counter(self, name: str, help_text: str) -> list[Counter]:
        counter = Counter(
            PREFIX + name, help_text, ("model_name", "engine"), registry=self.registry
        )
        return self._each(counter)

    def _by_code(self, name: str, help_text: str) -> dict[Code, Counter]:
        """All codes from the start: the first error of a kind must show as an increase."""
        counter = Counter(PREFIX + name, help_text, ("model_name", "code"), registry=self.registry)
        return {code: counter.labels(self._model, code) for code in Code}

    def _histogram(self, name: str, help_text: str, buckets: Sequence[float]) -> list[Histogram]:
        histogram = Histogram(
            PREFIX + name,
            help_text,
            ("model_name", "engine"),
            buckets=buckets,
            registry=self.registry,
        )
        return self._each(histogram)

    def _each(self, metric: M, *labels: str) -> list[M]:
        """By engine, found once: tokens come by the thousand a second."""
        return [metric.labels(self._model, str(i), *labels) for i in range(self._num_engines)]


class _WithoutCreationTimes(CollectorRegistry):
    """As much again of time series, which nobody reads."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__()
        self._inner = registry

    def collect(self) -> Iterable[Metric]:
        for metric in self._inner.collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric


def _one_two_five(largest: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to `largest`."""
    steps = (m * 10**e for e in range(len(str(largest))) for m in (1, 2, 5))
    return [step for step in steps if step <= largest]
