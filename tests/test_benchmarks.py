"""The suites of benchmarks/: what they compare, what they report, and the comparison of two commits."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from scipy.stats import binom

import alpenglow as ag
from alpenglow.priors.network import NetworkPrior
from alpenglow.samplers import calibrated
from alpenglow.samplers.alps import AlpsOptions, schedule
from alpenglow.samplers.calibrated import CalibratedOptions
from alpenglow.samplers.chains import drive
from alpenglow.samplers.problem import Noise, Problem
from benchmarks import compare, fewer_nfe, published
from benchmarks.beds import BEDS
from benchmarks.operator_cases import Family, families
from benchmarks.pairs import Timing, median_limits
from tests.tiny import random_denoiser

ROOT = Path(__file__).parent.parent
FAMILIES = families(batch=4, size=16, tolerance=1e-8)  # means to 1e-6 then, draws to what float32 has


def by_name(family: Family) -> str:
    return family.name


# Both sides of a pair do the same work


@pytest.mark.parametrize("family", FAMILIES, ids=by_name)
def test_means_agree(family: Family) -> None:
    expected = family.their_mean()
    error = (family.our_mean() - expected).norm() / expected.norm()
    assert error < 3e-5


@pytest.mark.parametrize("family", FAMILIES, ids=by_name)
def test_draws_agree_on_the_same_normals(family: Family) -> None:
    expected = family.draw(Noise(0, torch.arange(len(family.images))).at(1))
    drawn = family.our_draw()
    if family.name == "super-resolution":
        # P^(1/2) n here, perturb-then-solve there: one distribution, of which the second moments are left.
        # Of 3 072 numbers; their relative standard error is 0.013.
        assert drawn.std().item() == pytest.approx(expected.std().item(), rel=0.1)
    else:
        assert (drawn - expected).norm() / expected.norm() < 3e-5


@pytest.mark.parametrize("family", FAMILIES, ids=by_name)
def test_steps_are_mean_plus_draw(family: Family) -> None:
    """Of both sides, at their own noise: the mean of many is the conditional mean of x - G."""
    torch.manual_seed(0)  # the composition draws by torch.randn
    ours, theirs = family.step_runs()
    centre = family.mean(family.images - 0.1 * family.images)
    for run in (ours, theirs):
        moved = run()
        assert isinstance(moved, torch.Tensor)
        noise = moved - centre
        assert noise.std().item() == pytest.approx(family.our_draw().std().item(), rel=0.15)


def test_the_published_gradient_is_the_priors() -> None:
    prior = NetworkPrior(random_denoiser(), (1, 8, 8))
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 1.0, 10.0])
    energy, grad = published.energy_gradient(prior)(x, sigma)
    expected = prior.energy_and_grad(x, sigma)
    torch.testing.assert_close(energy.detach(), expected[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(grad.detach(), expected[1], rtol=1e-4, atol=1e-4)
    assert grad.requires_grad  # a graph that nobody uses is what it costs


@pytest.mark.parametrize("seen", [False, True])
def test_the_published_loop_spreads_as_its_recursion(seen: bool) -> None:
    """For the prior N(0, s^2) the chain is linear: v <- (P / t^2 D')^2 v + P, D' = s^2 / (s^2 + t^2)."""
    s, noise_std, shape, options = 0.5, 0.2, (1, 8, 8), AlpsOptions(levels=12, steps=3)
    mask = torch.full((1, 1, 8, 8), float(seen))
    operator = published.PixelMask(mask, noise_std)

    def evaluate(x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        level = sigma[:, None, None, None] ** 2
        return x.new_zeros(len(x)), x * level / (s**2 + level)

    torch.manual_seed(0)
    samples = published.alps(operator, evaluate, torch.zeros(1, *shape), shape, 200, options)

    def conditional(t: float) -> float:
        return 1 / (seen / noise_std**2 + 1 / t**2)

    levels = schedule(options)
    variance = conditional(levels[0])
    for i, t in enumerate(levels):
        gain = conditional(t) / t**2 * s**2 / (s**2 + t**2)
        for inner in range(options.steps):
            variance = gain**2 * variance + conditional(t) * (inner < options.steps - 1)
        variance += conditional(levels[i + 1]) if i < len(levels) - 1 else 0
    # 12 800 independent numbers: the standard error of their standard deviation is 0.6 %.
    assert samples.std().item() == pytest.approx(variance**0.5, rel=0.03)


def test_conjugate_gradients_that_do_not_converge() -> None:
    with pytest.raises(RuntimeError, match="no convergence to 1e-06 in 1 iterations"):
        published.conjugate_gradient(
            lambda v: v * torch.linspace(1, 1e4, 16).view(1, 1, 4, 4), torch.ones(1, 1, 4, 4),
            tolerance=1e-6, max_iterations=1,
        )  # fmt: skip


# What is reported


@pytest.mark.parametrize("count", [8, 20, 101, 1000])
def test_limits_of_the_median_hold_in_95_percent(count: int) -> None:
    """Nearly: the number of values below the median is binomial, and ranks are whole numbers."""
    low, high = median_limits([float(i) for i in reversed(range(count))])
    covered = binom.cdf(high, count, 0.5) - binom.cdf(low, count, 0.5)
    assert 0.92 < covered < 0.97


def suites(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_suites_collect() -> None:
    paths = [str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks").glob("bench_*.py")]
    done = suites("--collect-only", *paths)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("kernels", "gradients", "operators", "samplers"):
        assert f"benchmarks/bench_{name}.py::" in done.stdout


@pytest.mark.slow
def test_a_benchmark_runs_and_reports_both_sides(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    done = suites(
        "--benchmark-only", f"--benchmark-json={file}", "benchmarks/bench_operators.py",
        "-k", "test_mean and inpainting",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ((name, timing),) = compare.read(file).items()
    assert name == "bench_operators.py::test_mean[inpainting]"
    (raw,) = json.loads(file.read_text())["benchmarks"]
    assert timing.ours == raw["stats"]["median"]
    assert timing.published is not None and timing.published > 0  # noqa: PT018
    assert timing.speedup is not None
    assert timing.low is not None
    assert timing.high is not None
    assert timing.low <= timing.speedup <= timing.high
    assert re.search(rf"{re.escape(name)} .* {timing.speedup:.2f} \(", done.stdout)
    (row,) = compare.table({name: timing}, {name: timing}, ("a", "b"))[2:]
    assert row == f"| {name} | {timing} | {timing} | 1.00x |"


def test_the_table() -> None:
    base = {"same": Timing(1.0, 2.0, 2.0, 1.9, 2.1), "better": Timing(1.0, 2.0, 2.0, 1.9, 2.1)}
    base |= {"alone": Timing(1.0), "gone": Timing(1.0, 3.0, 3.0, 2.0, 4.0)}
    here = {"same": Timing(5.0, 9.0, 2.1, 2.0, 2.2), "better": Timing(9.0, 27.0, 3.0, 2.9, 3.1)}
    here |= {"alone": Timing(1.0), "new": Timing(1.0, 1.0, 1.0, 0.9, 1.1)}
    assert compare.table(base, here, ("abc", "working tree")) == [
        "| published / ours | abc | working tree | ours became faster by |",
        "| --- | --- | --- | --- |",
        "| alone | alone | alone |  |",
        "| better | 2.00 (1.90 to 2.10) | 3.00 (2.90 to 3.10) | **1.50x** |",
        "| gone | 3.00 (2.00 to 4.00) | missing |  |",
        "| new | missing | 1.00 (0.90 to 1.10) |  |",
        "| same | 2.00 (1.90 to 2.10) | 2.10 (2.00 to 2.20) | 1.05x |",
    ]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"benchmarks": [{}]}'])
def test_files_that_are_no_results(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "out.json").write_text(content)
    with pytest.raises(ValueError, match="is no result of pytest-benchmark"):
        compare.read(tmp_path / "out.json")


# Two commits, of a repository of this one's layout

SUITE = """
import os, time
import alpenglow, pytest
from benchmarks.pairs import time_pair

@pytest.mark.parametrize("version", [alpenglow.VERSION])
def test_version(benchmark, version):
    time_pair(benchmark, lambda: time.sleep(0.001), lambda: time.sleep(0.002), seconds=0)

def test_both(benchmark):
    open(os.environ.get("MARK", os.devnull), "w").close()
    time.sleep(float(os.environ.get("PAUSE", "0")))
    time_pair(benchmark, lambda: time.sleep(0.001), lambda: time.sleep(0.002), seconds=0)
"""


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(
        ["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One commit; the working tree is at version 2."""
    folder = tmp_path / "repository"
    for part in ("engine", "kernels", "export", "benchmarks"):
        (folder / part).mkdir(parents=True)
        (folder / part / "__init__.py").write_text("VERSION = 1\n")
    for name in ("pairs.py", "compare.py"):
        shutil.copy(ROOT / "benchmarks" / name, folder / "benchmarks")
    (folder / "benchmarks/bench_small.py").write_text(SUITE)
    (folder / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "one")
    (folder / "engine/__init__.py").write_text("VERSION = 2\n")
    return folder


def compared(repository: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    scratch = repository.parent / "scratch"
    scratch.mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.compare", *arguments],
        cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"TMPDIR": str(scratch)} | environment,
    )  # fmt: skip


def assert_tidy(repository: Path) -> None:
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    assert list((repository.parent / "scratch").iterdir()) == []


@pytest.mark.slow
def test_two_commits_are_compared_each_on_its_own_package(repository: Path) -> None:
    out, errors = (process := compared(repository, "HEAD")).communicate(timeout=300)
    assert process.returncode == 0, errors
    rows = {
        cells[0]: cells[1:]
        for line in out.splitlines()
        if line.startswith("| bench_small")
        for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
    }
    assert set(rows) == {f"bench_small.py::test_{name}" for name in ("version[1]", "version[2]", "both")}
    assert rows["bench_small.py::test_version[1]"][1] == "missing"
    assert rows["bench_small.py::test_version[2]"][0] == "missing"
    before, after, change = rows["bench_small.py::test_both"]
    quotient = float(after.split()[0]) / float(before.split()[0])
    assert float(change.strip("*x")) == pytest.approx(quotient, rel=0.02)  # both are rounded
    assert_tidy(repository)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_comparison_leaves_no_worktree(repository: Path, number: signal.Signals) -> None:
    mark = repository.parent / "mark"
    process = compared(repository, "HEAD", MARK=str(mark), PAUSE="300")
    end = time.monotonic() + 200
    while not mark.exists() and time.monotonic() < end and process.poll() is None:
        time.sleep(0.1)
    assert mark.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 2
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert_tidy(repository)


def test_what_cannot_be_compared(repository: Path) -> None:
    out, errors = (process := compared(repository, "no-such-commit")).communicate(timeout=100)
    assert (process.returncode, out) == (1, "")
    assert "no tree of 'no-such-commit'" in errors
    assert_tidy(repository)
    shutil.rmtree(repository / "benchmarks")
    with pytest.raises(ValueError, match="has no suites"):
        compare.run_suites(repository, repository.parent / "scratch", [])


# docs/export.md


def cpp_example() -> str:
    found = re.search(r"```cpp\n(.*?)```", (ROOT / "docs/export.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return found[1]


def tensorrt_headers() -> Path | None:
    """NVIDIA's, where they are installed; TENSORRT_INCLUDE names another folder."""
    folders = [os.environ.get("TENSORRT_INCLUDE"), "/usr/include/x86_64-linux-gnu", "/usr/include"]
    folders.append("/usr/local/tensorrt/include")
    return next((Path(f) for f in folders if f and (Path(f) / "NvInfer.h").is_file()), None)


@pytest.mark.parametrize("headers", ["declared here", "NVIDIA's"])
def test_the_cpp_example_compiles(headers: str, tmp_path: Path) -> None:
    folder = ROOT / "tests/tensorrt_declarations" if headers == "declared here" else tensorrt_headers()
    if folder is None:
        pytest.skip("TensorRT's headers are in no package that can be installed here; set TENSORRT_INCLUDE")
    triton = find_spec("triton")
    cuda = Path(triton.origin).parent / "backends/nvidia/include" if triton and triton.origin else Path()
    if not shutil.which("g++") or not (cuda / "cuda_runtime_api.h").is_file():
        pytest.skip("needs g++, and the headers of CUDA that triton brings")
    source = tmp_path / "run.cpp"
    source.write_text(cpp_example())
    command = ["g++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    done = subprocess.run(
        [*command, "-isystem", folder, "-isystem", cuda, source], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["calibration", "cost_curves", "fewer_nfe", "mri_quality"])
def test_a_place_that_cannot_be_written_is_known_before_hours_of_measuring(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(sys, "argv", [name, "-o", str(tmp_path / "file" / "out")])
    with pytest.raises(NotADirectoryError):
        import_module(f"benchmarks.{name}").main()


def test_ways_to_fewer_nfe_run_the_samplers_chains() -> None:
    bed = BEDS["gaussian, half the pixels"](0)
    problem = Problem(bed.prior, bed.operator, bed.y, bed.noise_std)
    plan = drive(calibrated.prepare(problem, 0, CalibratedOptions()), problem)
    way = fewer_nfe.Way("independent", 20)
    samples, _, nfe = drive(fewer_nfe.moments(problem, plan, way, 0, 1), problem)
    posterior = ag.sample(bed.prior, bed.operator, bed.y, noise_std=bed.noise_std, nfe=20)
    assert posterior.samples is not None
    assert torch.equal(samples[0], posterior.samples)
    assert nfe.item() == posterior.nfe == 25
    forked = replace(way, trunk=8, fork=0.5)
    above = sum(sigma > 0.5 for sigma in forked.levels(plan))
    samples, _, nfe = drive(fewer_nfe.moments(problem, plan, forked, 0, 2), problem)
    assert nfe.item() == pytest.approx(25 - above * 7 / 8)
    assert len(samples.flatten(0, 1).flatten(1).unique(dim=0)) == 2 * fewer_nfe.SAMPLES
    exact = bed.posterior.sample(64 * 200, seed=3).unflatten(0, (200, 64))
    errors = fewer_nfe.errors(bed.posterior, exact)
    # Of 64 draws: 1 / 8 in the mean, 1 / 128^(1/2) in std; the RMS over 256 pixels varies by some percent.
    assert errors["mean"] == pytest.approx(1 / 8, rel=0.1)
    assert errors["std"] == pytest.approx(128**-0.5, rel=0.1)
