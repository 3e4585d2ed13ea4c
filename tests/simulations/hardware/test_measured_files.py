"""The measured calibrations that come with us hold numbers that their hardware can have.

Limits are the vendor's datasheets (H100 SXM and H200 SXM: dense FLOP/s, memory, NVLink).
"""

import numpy as np
import pytest

from simulations.hardware.calibration import NAMES, Calibration
from simulations.hardware.fit import products

MEASURED = [name for name in NAMES if name.endswith(("-measured", "-ours"))]
LIMITS = {
    "h100": {"memory": 80 * 2**30, "bandwidth": 3.35e12},
    "h200": {"memory": 141 * 2**30, "bandwidth": 4.8e12},
}
GPUS = {
    name: LIMITS[name.partition("-")[0]] for name in MEASURED if name.partition("-")[0] in LIMITS
}
LEAST_SHARE = {"bfloat16": 0.4, "float8": 0.2}  # of the datasheet; scales by blocks take their time
DENSE_FLOPS = {"bfloat16": 989e12, "float8": 1979e12}
NVLINK = 450e9  # bytes/s each way


@pytest.mark.parametrize("name", GPUS)
def test_nothing_beats_the_datasheet(name):
    known, limits = Calibration.named(name), GPUS[name]
    assert 0.9 * limits["memory"] < known.memory_bytes <= limits["memory"]
    assert 0.5 * limits["bandwidth"] < known.memory_bandwidth < limits["bandwidth"]
    for dtype, most in DENSE_FLOPS.items():
        assert LEAST_SHARE[dtype] * most < known.peak_flops[dtype] < most
        for gemm, table in products(known.tables, dtype).items():
            rows = np.array(table.axes["tokens"])
            assert (rows * gemm.flop_per_row / table.values < most).all()
            weight_bytes = gemm.params * {"bfloat16": 2, "float8": 1}[dtype]
            assert (weight_bytes / table.values < limits["bandwidth"]).all()


@pytest.mark.parametrize("name", GPUS)
def test_attention_reads_its_cache(name):
    known = Calibration.named(name)
    table = known.tables["mla_decode/bfloat16/128x576"]
    pairs = np.multiply.outer(*(np.array(x) for x in table.axes.values()))
    assert (pairs * 576 * 2 / table.values < GPUS[name]["bandwidth"]).all()
    assert (pairs * 278_528 / table.values < DENSE_FLOPS["bfloat16"]).all()


@pytest.mark.parametrize("name", [name for name in GPUS if name.startswith("h200")])
def test_the_links_of_two_gpus(name):
    known = Calibration.named(name)
    for links in (known.links, known.dispatch, known.combine):
        assert 0.25 * NVLINK < links["node"].beta < NVLINK
        assert 1e-6 < links["node"].alpha_s < 1e-4


@pytest.mark.parametrize("name", MEASURED)
def test_times_grow_with_the_work(name):
    """Within a tenth: some kernels are slower at fewer rows."""
    for table_name, table in Calibration.named(name).tables.items():
        if table_name.startswith(("gemm/", "mla_decode/", "attention_prefill/")):
            assert (table.values[..., -1] > 0.9 * table.values[..., 0]).all(), table_name


@pytest.mark.parametrize("name", MEASURED)
def test_provenance_says_who_and_when(name):
    provenance = Calibration.named(name).provenance
    assert provenance["source"] == "measured by expertmesh calibrate"
    assert provenance["command"].startswith("expertmesh calibrate --device")
    assert provenance["date"] >= "2026-11-22"
    assert "torch" in provenance["software"]
