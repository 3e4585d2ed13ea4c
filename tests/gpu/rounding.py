"""Triton's interpreter with the roundings of the hardware: its own cut bfloat16 off and half-round e4m3.

Call `round_as_hardware` in a process that interprets kernels, before any runs.
"""

import numpy as np
import torch


def round_as_hardware() -> None:
    """fp32 to bfloat16 and e4m3: to nearest, ties to even, as GPUs and torch do."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float
    targets = {tl.bfloat16: (torch.bfloat16, torch.uint16, np.uint16)}
    targets[tl.float8e4nv] = (torch.float8_e4m3fn, torch.uint8, np.uint8)

    def convert(data, input_dtype, output_dtype, rounding_mode):
        if input_dtype != tl.float32 or output_dtype not in targets:
            return original(data, input_dtype, output_dtype, rounding_mode)
        dtype, bits, array = targets[output_dtype]
        values = torch.from_numpy(np.array(data, dtype=np.float32))
        return values.to(dtype).view(bits).numpy().astype(array).reshape(data.shape)

    interpreter._convert_float = convert
