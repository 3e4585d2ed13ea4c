"""Auxiliary-loss-free balance, kept light: the rule that moves the gates' correction bias.

DeepSeek-V3 (section 2.1.2 of its report) adds a small step to the bias of every expert below the
mean load and takes it from every expert above. Here an expert inside a tolerance band around the
mean is left alone, and the load is that of the whole mixture of domains: a domain may prefer its
own experts as long as no expert starves.
"""

from typing import Any

import torch


class LoadBalancer:
    """Counts what each gate chooses and nudges its bias once a step.

    `band` 0.5 leaves experts between half and one and a half times the mean load alone; 0 is
    DeepSeek-V3's rule.
    """

    def __init__(self, gates: dict[int, Any], step_size: float, band: float) -> None:
        self.gates = gates
        self.step_size = step_size
        self.band = band
        self.counts: dict[int, torch.Tensor] = {}
        for layer, gate in gates.items():
            gate.register_forward_hook(self._counter(layer))

    def update(self) -> None:
        """One step of every bias from the counts since the last step."""
        for layer, gate in self.gates.items():
            count_E = self.counts.pop(layer)
            load_E = count_E / count_E.mean()
            outside_E = (load_E - 1).abs() > self.band
            bias_E = gate.e_score_correction_bias
            bias_E.sub_(self.step_size * torch.sign(load_E - 1) * outside_E)
            bias_E.sub_(bias_E.mean())

    def round_biases(self) -> None:
        """Makes the biases exact in BF16, so that no loader's dtype can change the routing."""
        for gate in self.gates.values():
            bias_E = gate.e_score_correction_bias
            bias_E.copy_(bias_E.to(torch.bfloat16).float())

    def _counter(self, layer: int) -> Any:
        def count(gate: Any, _args: object, output: tuple[torch.Tensor, ...]) -> None:
            if gate.training:
                ids = output[2].flatten()
                num_experts = len(gate.e_score_correction_bias)
                count_E = torch.zeros(num_experts, device=ids.device)
                count_E.scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.float32))
                self.counts[layer] = count_E

        return count
