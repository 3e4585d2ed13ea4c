"""Where a rank is in the model. Engine and model write it; errors, ledger and trace read it."""

from dataclasses import dataclass


@dataclass
class Where:
    """One per rank, shared by all its groups. -1: not inside a step, not inside a layer."""

    step: int = -1
    layer: int = -1

    def __str__(self) -> str:
        """ "step 12, layer 3", or less where less is known; "" outside of steps."""
        parts = [f"step {self.step}"] if self.step >= 0 else []
        return ", ".join(parts + ([f"layer {self.layer}"] if self.layer >= 0 else []))
