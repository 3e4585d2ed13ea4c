"""AdamW for a BF16 model: fp32 master weights live in the optimiser, the model stays as served."""

import torch
from torch import nn


class MasterAdamW:
    """AdamW on fp32 copies of BF16 parameters; weight decay on matrices only."""

    def __init__(self, model: nn.Module, weight_decay: float) -> None:
        self.params: list[torch.Tensor] = list(model.parameters())
        self.masters = [p.detach().float().requires_grad_() for p in self.params]
        groups = [
            {
                "params": [m for m in self.masters if (m.dim() > 1) == is_matrix],
                "weight_decay": weight_decay if is_matrix else 0.0,
            }
            for is_matrix in (True, False)
        ]
        fused = self.params[0].device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=fused)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for master, param in zip(self.masters, self.params, strict=True):
            master.grad = param.grad.float() if param.grad is not None else None
            param.grad = None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        torch._foreach_copy_(self.params, self.masters)
