"""`device: cuda` in the configuration: what goes with it, and what is said where there is no GPU."""

import pytest
import torch

from cluster.config import ConfigError, ServeConfig
from cluster.engine.runner import Runner
from cluster.model.errors import UnsupportedModelError
from deploy.settings import BUNDLED_MODELS
from tests.model.solo import solo_groups

MODEL = str(BUNDLED_MODELS["mosaic"])
TWO = {"ranks_per_node": 2, "tensor_parallel_size": 1}


def test_the_cpu_is_the_default():
    config = ServeConfig.from_dict({"model": MODEL})
    assert (config.device, config.quantization) == ("cpu", None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantization": "fp8"}, "quantization = 'fp8' needs device = 'cuda'"),
        ({"device": "cuda", "dtype": "float32"}, "needs dtype = 'bfloat16', not 'float32'"),
        ({"device": "cuda", "parallel": TWO, "comms": {"combine": "exact"}}, "not 'exact'"),
        ({"device": "cuda", "experts": {"split": "balanced"}}, "or 'static', not 'balanced'"),
        ({"device": "tpu"}, "device = 'tpu': allowed are 'cpu' or 'cuda'"),
    ],
)
def test_what_does_not_go_together_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        ServeConfig.from_dict({"model": MODEL, **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_said_so():
    config = ServeConfig.from_dict({"model": MODEL, "device": "cuda"})
    with pytest.raises(UnsupportedModelError, match="sees no NVIDIA GPU"):
        Runner.load(config, solo_groups())
