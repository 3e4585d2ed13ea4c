"""`expertmesh bench ...` on GPUs, and what their options must be: checked here and nowhere behind."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from deploy.options import JsonFile

Gpu = Annotated[str, typer.Option(help="cuda; there is no CPU side to this one.")]


def experts(
    device: Gpu = "cuda",
    layer: Annotated[
        bool, typer.Option(help="The whole MoE layer as one of 64 cards sees it, part by part.")
    ] = False,
    hidden: Annotated[int, typer.Option(help="Channels of a token.")] = 7168,
    intermediate: Annotated[int, typer.Option(help="Channels inside an expert.")] = 2048,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float8 or bfloat16; repeat for both. [both]")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Grouped products of experts on a GPU: ours, the library's, and the hardware's floor."""
    dtypes = all_of(dtype, ("float8", "bfloat16"), "--dtype")
    need_gpus(1, device)
    if layer:
        from deploy.bench.moe_layer_gpu import layer_command

        raise typer.Exit(layer_command(hidden, intermediate, dtypes, json_file))
    from deploy.bench.experts import experts_command

    raise typer.Exit(experts_command(hidden, intermediate, dtypes, json_file))


def decode(
    device: Gpu = "cuda",
    model: Annotated[str, typer.Option(help="A preset; weights are random.")] = "deepseek-v2-lite",
    quantization: Annotated[
        list[str] | None, typer.Option(help="bfloat16 or fp8; repeat for both. [both]")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Sequences decoding at once; repeat. [1 16 128 512]")
    ] = None,
    gpus: Annotated[
        int, typer.Option(min=1, max=2, help="1, or 2 with the experts divided over them.")
    ] = 1,
    tensor_parallel: Annotated[
        bool, typer.Option("--tensor-parallel", help="With 2 GPUs: heads divided over them, too.")
    ] = False,
    transformers: Annotated[
        bool, typer.Option("--transformers", help="Also measure transformers on this GPU.")
    ] = False,
    profile: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write what each kernel takes there.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Tokens per second of a whole model on a GPU, beside the memory's floor and transformers."""
    quantizations = all_of(quantization, ("bfloat16", "fp8"), "--quantization")
    if tensor_parallel and gpus < 2:
        raise typer.BadParameter("--tensor-parallel needs --gpus 2")
    need_gpus(gpus, device)
    from deploy.bench.decode import decode_command

    raise typer.Exit(
        decode_command(
            model,
            quantizations,
            batch or [1, 16, 128, 512],
            gpus,
            tensor_parallel,
            transformers,
            profile,
            json_file,
        )
    )


def all_of(chosen: list[str] | None, known: tuple[str, ...], option: str) -> list[str]:
    """What was chosen, all there is by default; a usage error for anything else."""
    for name in chosen or ():
        if name not in known:
            raise typer.BadParameter(f"{option} {name!r} is none of {', '.join(known)}")
    return chosen or list(known)


def need_gpus(number: int, device: str) -> None:
    """A usage error for another device than CUDA's; exit code 2 without so many GPUs."""
    if device != "cuda":
        raise typer.BadParameter(f"--device {device!r}: this one runs on cuda only")
    import torch

    found = torch.cuda.device_count()
    if found < number:
        print(f"this needs {number} CUDA GPU{'s'[: number > 1]}: {found} visible", file=sys.stderr)
        raise typer.Exit(2)
