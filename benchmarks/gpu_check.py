"""`make gpu-check`: the kernels' tests on this GPU, each kernel's time against what it replaces, and every
backend's time for the energy gradient of the EDM 64x64 network.

python -m benchmarks.gpu_check [--device cpu] [--skip-tests] [-o docs/kernels-gpu.md]

Runs with the torch and triton that are installed; needs no network, and nothing else: without pytest and
hypothesis it compares kernels and twins on the benchmark's own inputs, and without onnx, onnxruntime-gpu
and tensorrt it times the gradient in torch alone. On a CPU it times the twins.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from alpenglow.kernels import cg_update, group_norm_silu, pixel_step, sense, spectral_step
from alpenglow.kernels.triton_support import AVAILABLE
from alpenglow.priors.network import NetworkPrior
from benchmarks.gradients import EDM_64, backends, gradient_table, random_prior
from benchmarks.kernel_cases import COMPILABLE, FAMILIES, Case, pixel_cases

TESTS = [
    f"tests/test_{name}.py"
    for name in (
        "philox",
        "pixel_step",
        "spectral_step",
        "sense",
        "cg_update",
        "group_norm_silu",
        "kernel_runs",
    )
]


def seconds(run: Callable[[], object], device: str, *, repeats: int = 30) -> float:
    """Median time of a call, caches cold on a GPU (triton's do_bench clears its L2)."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(run, warmup=50, rep=200, return_mode="median") / 1e3
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def check(device: str) -> None:
    """The tests; where they cannot run, the kernels against their twins. Exits when one fails."""
    if all(importlib.util.find_spec(name) for name in ("pytest", "hypothesis", "scipy")):
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS], check=False)
        if done.returncode:
            sys.exit("the kernels' tests failed: nothing was timed")
        return
    print("pytest, hypothesis or scipy is missing: kernels are compared with their twins alone")
    modules = (pixel_step, spectral_step, sense, cg_update, group_norm_silu)
    for family in FAMILIES.values():
        for case in family(device, 3, 20):
            fused = case.kernel()
            if fused is None:  # works in place: the tests compare it
                continue
            decisions = [(module, module.runs_on) for module in modules]
            for module in modules:
                module.runs_on = lambda x: False  # type: ignore[assignment]
            plain = case.kernel()
            for module, decision in decisions:
                module.runs_on = decision
            for a, b in zip(_tensors(fused), _tensors(plain), strict=True):
                tolerance = 1e-2 if a.dtype.itemsize == 2 else 1e-4 * float(b.abs().max())
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
            print(f"{case.name}: kernel and twin agree")


def _tensors(result: object) -> list[torch.Tensor]:
    parts = result if isinstance(result, tuple) else (result,)
    return [part for part in parts if isinstance(part, torch.Tensor)]


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of a device-to-device copy of 1 GiB (64 MiB on a CPU)."""
    source = torch.empty(2**30 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device)


def row(case: Case, device: str, bandwidth: float, *, compile_too: bool) -> str:
    """One line of the table."""
    ours, eager = seconds(case.kernel, device), seconds(case.eager, device)
    share = f"{case.bytes / ours / bandwidth:.0%}" if case.bytes else ""
    compiled = ""
    if compile_too and case.name in COMPILABLE:
        function, arguments = COMPILABLE[case.name]
        fast = torch.compile(function)
        compiled = f"{seconds(lambda: fast(*arguments), device) / ours:.2f}"
    moved = f"{case.bytes / 2**20:.1f}" if case.bytes else ""
    return f"| {case.name} | {1e6 * ours:.0f} | {moved} | {share} | {eager / ours:.2f} | {compiled} |"


def iteration_share(prior: NetworkPrior) -> str:
    """How much of an iteration, with the gradient in eager torch, the pixel step takes."""
    batch, size = prior.batch_size, prior.image_shape[1]
    x = torch.randn(batch, *prior.image_shape, device="cuda")
    sigma = torch.full((batch,), 0.5, device="cuda")
    gradient = seconds(lambda: prior.run(x, sigma), "cuda")
    step = seconds(next(c for c in pixel_cases("cuda", batch, size) if "kinetic" in c.name).kernel, "cuda")
    return (
        f"EDM {size}x{size} network, float16, batch {batch}: {1e3 * gradient:.1f} ms for energy and "
        f"gradient, {1e3 * step:.3f} ms for the data-consistency step, {step / (gradient + step):.2%} of an "
        "iteration."
    )


def report(device: str, batch: int, size: int) -> str:
    """The page: machine, table, share of an iteration."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU (plain-torch twins)"
    bandwidth = copy_bandwidth(device)
    lines = [
        f"{name}, torch {torch.__version__}, images {size}x{size}, batch {batch}. Copy: "
        f"{bandwidth / 1e9:.0f} GB/s, read and written, in this run.",
        "",
        "| kernel | µs | MiB moved | share of copy bandwidth | eager / ours | torch.compile / ours |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for family in FAMILIES.values():
        for case in family(device, batch, size):
            lines.append(row(case, device, bandwidth, compile_too=device == "cuda"))
            print(lines[-1], flush=True)
    if device == "cuda":
        prior = random_prior(EDM_64, "cuda", "float16", batch, 64)
        lines += ["", iteration_share(prior), "", *gradient_table(prior, backends(prior))]
        if all(importlib.util.find_spec(name) for name in ("scipy", "h5py", "pydantic")):
            from benchmarks.scheduler_load import throughput

            lines += ["", *throughput(prior)]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Test, time, print, and write the page on request. Exits where there is nothing to run on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--batch", type=int, help="default: 256 on a GPU, 16 on a CPU")
    parser.add_argument("--size", type=int, help="width and height; default: 64 on a GPU, 32 on a CPU")
    parser.add_argument("-o", "--output", type=Path, help="also write the page to this file")
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    if gpu and not (torch.cuda.is_available() and AVAILABLE):
        missing = "triton" if torch.cuda.is_available() else "a CUDA GPU that this torch can use"
        sys.exit(f"gpu-check needs {missing}; --device cpu times the plain-torch twins")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    if not options.skip_tests:
        check(options.device)
    page = report(options.device, options.batch or (256 if gpu else 16), options.size or (64 if gpu else 32))
    print("\n" + page)
    if options.output:
        options.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
