"""How a token looks on the wire: one uint8 row of payload, scales, slots and weights.

Legend: R rows, H hidden, K top-k, B blocks of 128 channels (the last may be short).

FP8 is e4m3 with one fp32 scale per token and block: scale = max(amax, 1e-4) / 448 and
q = e4m3(x / scale), the cast of DeepSeek-V3 (arXiv:2412.19437, section 3.3). A row is quantised once,
where the token lives; whoever forwards it forwards these bytes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from comms.sizes import as_bytes

BLOCK = 128  # channels that share a scale
FP8_MAX = 448.0
MIN_AMAX = 1e-4


def quantize(x_RH: Tensor) -> tuple[Tensor, Tensor]:
    """Returns q_RH (float8_e4m3fn) and scales_RB (fp32)."""
    rows, hidden = x_RH.shape
    blocks = num_blocks(hidden)
    x_RBC = pad(x_RH.float(), (0, blocks * BLOCK - hidden)).view(rows, blocks, BLOCK)
    scales_RB = x_RBC.abs().amax(dim=2).clamp(min=MIN_AMAX) / FP8_MAX
    scaled_RBC = (x_RBC / scales_RB[:, :, None]).clamp(-FP8_MAX, FP8_MAX)  # NaN stays NaN
    q_RH = scaled_RBC.flatten(1)[:, :hidden].to(torch.float8_e4m3fn)
    return q_RH, scales_RB


def dequantize(q_RH: Tensor, scales_RB: Tensor, dtype: torch.dtype) -> Tensor:
    hidden = q_RH.shape[1]
    scales_RH = scales_RB.repeat_interleave(BLOCK, dim=1)[:, :hidden]
    return (q_RH.float() * scales_RH).to(dtype)


def num_blocks(hidden: int) -> int:
    return -(-hidden // BLOCK)


@dataclass(frozen=True, kw_only=True)
class WireFormat:
    """Layout of a row, the same on every rank. Fields are contiguous, in order of declaration.

    Payload (H elements of `dtype`, or H float8 padded to 4 bytes, then B scales), then K slots
    (int32) and K weights (fp32).
    """

    hidden: int
    num_topk: int
    dtype: torch.dtype
    float8: bool

    @property
    def payload_bytes(self) -> int:
        if not self.float8:
            return -(-self.hidden * self.dtype.itemsize // 4) * 4
        return -(-self.hidden // 4) * 4 + 4 * num_blocks(self.hidden)

    @property
    def row_bytes(self) -> int:
        return self.payload_bytes + 8 * self.num_topk

    def pack(self, x_RH: Tensor, slots_RK: Tensor, weights_RK: Tensor) -> Tensor:
        """Rows [R, row_bytes] uint8."""
        rows = torch.zeros((x_RH.shape[0], self.row_bytes), dtype=torch.uint8)
        if self.float8:
            q_RH, scales_RB = quantize(x_RH)
            rows[:, : self.hidden] = q_RH.view(torch.uint8)
            first = self.payload_bytes - 4 * scales_RB.shape[1]
            rows[:, first : self.payload_bytes] = _bytes_of(scales_RB)
        else:
            rows[:, : self.hidden * self.dtype.itemsize] = _bytes_of(x_RH)
        middle = self.payload_bytes + 4 * self.num_topk
        rows[:, self.payload_bytes : middle] = _bytes_of(slots_RK.to(torch.int32))
        rows[:, middle:] = _bytes_of(weights_RK.float())
        return rows

    def unpack_x(self, rows: Tensor) -> Tensor:
        """x_RH in the model's dtype."""
        if not self.float8:
            return _elements(rows[:, : self.hidden * self.dtype.itemsize], self.dtype)
        first = self.payload_bytes - 4 * num_blocks(self.hidden)
        q_RH = _elements(rows[:, : self.hidden], torch.float8_e4m3fn)
        scales_RB = _elements(rows[:, first : self.payload_bytes], torch.float32)
        return dequantize(q_RH, scales_RB, self.dtype)

    def unpack_slots(self, rows: Tensor) -> Tensor:
        """slots_RK, int64."""
        middle = self.payload_bytes + 4 * self.num_topk
        return _elements(rows[:, self.payload_bytes : middle], torch.int32).long()

    def unpack_weights(self, rows: Tensor) -> Tensor:
        """weights_RK, fp32."""
        return _elements(rows[:, self.payload_bytes + 4 * self.num_topk :], torch.float32)


def _bytes_of(x_RC: Tensor) -> Tensor:
    return as_bytes(x_RC).view(x_RC.shape[0], x_RC.shape[1] * x_RC.element_size())


def _elements(rows: Tensor, dtype: torch.dtype) -> Tensor:
    flat = rows.contiguous().reshape(-1)
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()  # a single row stays a view into the packed row
    return flat.view(dtype).view(rows.shape[0], rows.shape[1] // dtype.itemsize)
