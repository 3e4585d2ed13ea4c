"""The configurations that come with us: valid, and for what they say they are for."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from cluster.config import ServeConfig
from deploy.settings import DEPLOY
from simulations.deployment import Deployment
from simulations.presets import load_model
from tests.deploy.processes import ROOT

CONFIGS = sorted((DEPLOY / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_option_is_known_and_allowed(file: Path) -> None:
    config = ServeConfig.from_yaml(file)
    assert ServeConfig.from_dict({**config.model_dump()}) == config


@pytest.mark.parametrize("name", ["hosts", "deepseek_v3_8x8"])
def test_hosts_get_one_node_each_and_let_in_who_has_a_token(name: str) -> None:
    config = ServeConfig.from_yaml(DEPLOY / "configs" / f"{name}.yaml")
    assert config.ray.placement_strategy == "STRICT_SPREAD"
    server = config.server
    assert server.token_file
    assert server.admin_token_file
    assert server.tls_cert_file
    assert server.tls_key_file


def test_deepseek_v3_divides_over_its_ranks() -> None:
    config = ServeConfig.from_yaml(DEPLOY / "configs" / "deepseek_v3_8x8.yaml")
    deployment = Deployment(
        model=load_model("deepseek-v3"),
        topology=config.parallel.topology,
        num_redundant_experts=config.experts.num_redundant_experts,
    )
    assert (deployment.num_ranks, deployment.slots_per_rank) == (64, 5)


def test_ray_accepts_the_launcher_file_and_what_it_copies_is_there() -> None:
    launcher = yaml.safe_load((DEPLOY / "cluster_launcher" / "on_premises.yaml").read_text())
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(launcher, json.loads(schema.read_text()))
    copied = [source for source in launcher["file_mounts"].values() if not source.startswith("~")]
    assert all((ROOT / source).exists() for source in copied)


@pytest.mark.parametrize(
    "script", [["-m", "deploy.job"], ["deploy/job.py"]], ids=["module", "script"]
)
def test_the_job_runs_as_module_and_as_script(script: list[str]) -> None:
    """deploy/cluster.py must not be taken for the package `cluster`."""
    done = subprocess.run(
        [sys.executable, *script, "--config", "nonesuch.yaml"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("nonesuch.yaml: cannot be read")


def test_the_job_copied_away_says_what_is_missing(tmp_path: Path) -> None:
    """As `ray submit` copies it, to a host where nothing is installed (-S: no site-packages)."""
    script = tmp_path / "job.py"
    script.write_bytes((DEPLOY / "job.py").read_bytes())
    done = subprocess.run(
        [sys.executable, "-S", str(script), "--config", "demo.yaml"],
        cwd=tmp_path, env={}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "has no expertmesh" in done.stderr
