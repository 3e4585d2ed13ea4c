"""The kernels around the experts where there is no GPU: all of them in one interpreting process."""

import torch


def checks() -> None:
    from experts.kernels import combine
    from tests.gpu import (
        test_choose,
        test_combine,
        test_cuda_moe,
        test_cuda_moe_ranks,
        test_quantize,
        test_sort,
    )
    from tests.gpu.rounding import round_as_hardware

    round_as_hardware()
    torch.manual_seed(1)
    cpu = torch.device("cpu")
    test_sort.check(cpu)
    test_quantize.check(cpu, [(5, 128), (7, 384)])
    test_quantize.check_swiglu(cpu, [(3, 64), (5, 192)])
    test_combine.check(cpu)
    test_combine.check_fixed(cpu)
    few, combine._FEW_ROWS = combine._FEW_ROWS, 0  # large summands in a second kernel
    test_combine.check_fixed(cpu)
    combine._FEW_ROWS = few
    test_choose.check(cpu, tokens=3)
    test_choose.check_the_rest(cpu)
    test_choose.check_parts(cpu, {3: 2})
    test_choose.check_large_ranges(cpu)
    test_cuda_moe.check_small(cpu)
    test_cuda_moe_ranks.check_small(cpu)


def test_kernels_around_the_experts(interpreted) -> None:
    interpreted("tests.gpu.test_cuda_moe_interpreted:checks", timeout_s=280)
