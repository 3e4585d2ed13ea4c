"""What came of comparing a replay with a recording, in words that name step, layer and rank."""

from __future__ import annotations

from dataclasses import dataclass, field

from simulations.twin.recording import Recording

SHOWN = 20
"""Mismatches of one check that are told in words."""


@dataclass(kw_only=True)
class Check:
    """`compared` numbers (or plans); of `num_wrong` of them the first are described."""

    name: str
    compared: int = 0
    num_wrong: int = 0
    wrong: list[str] = field(default_factory=list)

    def fail(self, message: str, count: int = 1) -> None:
        self.num_wrong += count
        if len(self.wrong) < SHOWN:
            self.wrong.append(message)


def layer_name(recording: Recording, layer: int) -> str:
    """Of an expert layer, by its number in the model."""
    return f"layer {recording.model.moe_layers[layer]}"
