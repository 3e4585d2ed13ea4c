"""A dispatcher for one rank that owns every slot: the contract in its plainest form."""

import torch

from comms.dispatcher import DispatchHandle, Received


class LoopbackDispatcher:
    def dispatch(self, x_TH, slots_TK, weights_TK):
        self.slots_TK, self.dtype = slots_TK, x_TH.dtype
        handle = DispatchHandle(num_pairs=slots_TK.numel(), weights_TK=weights_TK)
        return Received(x_RH=x_TH, local_slots_RK=slots_TK), handle

    def combine(self, y_PH, handle):
        num_tokens, num_choices = handle.weights_TK.shape
        y_TKH = y_PH.float().view(num_tokens, num_choices, y_PH.shape[1])
        out_TH = torch.zeros(num_tokens, y_PH.shape[1])
        for k in range(num_choices):
            out_TH += handle.weights_TK[:, k, None] * y_TKH[:, k]
        return out_TH.to(self.dtype)
