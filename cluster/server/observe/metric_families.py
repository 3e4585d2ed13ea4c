"""Metrics that are read off something when somebody scrapes, in the shape that Prometheus wants."""

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

PREFIX = "expertmesh:"

Values = Mapping[tuple[str, ...], float]
"""By the values of the labels, in their order."""


@dataclass(frozen=True)
class Families:
    """Makes the metrics of one model; all of them have the label `model_name`."""

    model_name: str

    def gauge(self, name: str, help_text: str, labels: tuple[str, ...], values: Values) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, help_text, labels=("model_name", *labels))
        return self._filled(family, values)

    def counter(self, name: str, help_text: str, labels: tuple[str, ...], values: Values) -> Metric:
        """Its samples get the suffix `_total`."""
        family = CounterMetricFamily(PREFIX + name, help_text, labels=("model_name", *labels))
        return self._filled(family, values)

    def info(self, name: str, help_text: str, facts: Mapping[str, object]) -> Metric:
        """Facts as labels, the value is always 1."""
        return self.gauge(name, help_text, tuple(facts), {tuple(map(str, facts.values())): 1})

    def _filled(self, family: CounterMetricFamily | GaugeMetricFamily, values: Values) -> Metric:
        for labels, value in values.items():
            family.add_metric((self.model_name, *labels), value)
        return family
