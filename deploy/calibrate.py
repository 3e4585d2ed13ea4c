"""`expertmesh calibrate`: measure this machine, for `expertmesh simulate --calibration FILE`."""

import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.model.config import ModelConfig
from cluster.model.errors import CheckpointError, UnsupportedModelError
from comms.launch import RankError
from simulations.hardware import calibrate
from simulations.presets import load_model


def calibrate_command(
    device: str, model_names: str | None, *, quick: bool, out: Path, kernels: str = "ours"
) -> int:
    """Writes `out`; 2 for what cannot be measured or written, 1 where a rank failed."""
    try:
        _check_writable(out)
        on_gpu = _choose_gpu(device)
        names = model_names or ("deepseek-v3" if on_gpu else "mosaic")
        models = _models(names, kernels, on_gpu=on_gpu)
        command = f"expertmesh calibrate --device {'cuda' if on_gpu else 'cpu'} --model {names}"
        command += f" --kernels {kernels}" if on_gpu else ""
        command += " --quick" if quick else ""
        console = Console(stderr=True)
        with console.status("starting") as status:

            def say(part: str) -> None:
                status.update(f"measuring: {part}")

            values = (
                calibrate.gpu_calibration(
                    models, kernels, name=out.stem, command=command, quick=quick, say=say
                )
                if on_gpu
                else calibrate.cpu_calibration(
                    models[0], name=out.stem, command=command, quick=quick, say=say
                )
            )
        calibration = calibrate.write(out, values)
    except (
        ValueError, OSError, CheckpointError, UnsupportedModelError, calibrate.NoGpuError,
    ) as error:  # fmt: skip
        print(error, file=sys.stderr)
        return 2
    except RankError as error:
        print(f"measuring failed: {error}", file=sys.stderr)
        return 1
    _show(values)
    print(f"wrote {out}: calibration {calibration.name}, {calibration.hash}")
    return 0


def _choose_gpu(device: str) -> bool:
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda, got {device!r}")
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def _models(names: str, kernels: str, *, on_gpu: bool) -> list[ModelConfig]:
    if kernels not in ("ours", "library"):
        raise ValueError(f"--kernels must be ours or library, got {kernels!r}")
    models = [load_model(name) for name in names.split(",")]
    if len(models) > 1 and not (on_gpu and kernels == "ours"):
        raise ValueError(f"--model: several only on a GPU with our kernels, got {names}")
    return models


def _check_writable(out: Path) -> None:
    """Before minutes of measuring, not after."""
    if out.suffix != ".json" and not out.is_dir():
        raise ValueError(f"--out {out}: name it *.json, so that --calibration takes it for a file")
    if out.is_dir():
        raise ValueError(f"--out {out} is a directory: name a file in it")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no directory {out.parent}")
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out {out}: {out.parent} is not writable")


def _show(values: dict[str, Any]) -> None:
    """The constants, and how well the tables predict what was held out."""
    console = Console()
    constants = Table("constant", "value")
    constants.add_row("memory bandwidth", f"{values['memory_bandwidth'] / 1e9:,.1f} GB/s")
    for dtype, flops in values["peak_flops"].items():
        launch = values["gemm"][dtype]
        text = f"{flops / 1e12:,.3g} TFLOP/s, {1e6 * launch['overhead_s']:.1f} us a launch"
        constants.add_row(f"{dtype} products", f"{text}, tiles of {launch['tile']}")
    for where, link in values["links"].items():
        text = f"{1e6 * link['alpha_s']:.1f} us, {link['beta'] / 1e9:.2f} GB/s"
        constants.add_row(f"link: {where}", text)
    console.print(constants)
    held_out = Table("held out", "points", "median error", "worst")
    for what, row in values["fidelity"].items():
        held_out.add_row(what, str(row["points"]), f"{row['median']:.1%}", f"{row['worst']:.1%}")
    console.print(held_out)
    for row in values["measured"].get("layer", ()):
        print(
            f"layer of {row['experts']} experts, {row['dtype']}, {row['sequences']} sequences: "
            f"predicted {row['predicted_us']:.1f} us, ran in {row['measured_us']:.1f} us"
        )
    for row in values["measured"].get("step", ()):
        print(
            f"decode step, 2 x 2 ranks, {row['sequences']} sequences each: predicted "
            f"{row['predicted_ms']:.1f} ms, ran in {row['measured_ms']:.1f} ms"
        )
