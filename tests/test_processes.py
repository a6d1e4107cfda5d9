"""Training on several processes, as torchrun and `accelerate launch` start them, is training on one."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from alpenglow.distillation import pipeline, training
from alpenglow.distillation.config import load_recipe
from alpenglow.distillation.processes import Processes
from tests.tiny import discs, logged, recipe_fields

pytestmark = pytest.mark.usefixtures("one_thread")

# Without a GPU Accelerate starts several processes by --multi_gpu: --cpu starts one, or leaves it to MPI.
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "accelerate": [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
        "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0",
    ],
}  # fmt: skip

# The pipeline with a checkpoint at every step. The first process kills itself in the step of the energy stage
# that the last argument says; the others may write nothing at all.
SCRIPT = """
import os, signal, sys
from functools import partial
from pathlib import Path
import torch
from alpenglow.distillation import pipeline, training
from alpenglow.distillation.config import load_recipe
from alpenglow.distillation.processes import Processes

folder, out, stop = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
training.LOG_STEPS = 3
pipeline.train = partial(training.train, checkpoint_seconds=-1.0)
processes = Processes.launched()
assert processes.count == 2

def only_read(event, arguments):
    if event == "open":
        path, _, flags = arguments
        if str(path).startswith(str(folder)) and flags & (os.O_WRONLY | os.O_RDWR):
            os._exit(77)

if not processes.first:
    sys.addaudithook(only_read)
original, seen = pipeline.energy_loss, []

def energy_loss(*arguments, **options):
    if processes.first and len(seen) == stop:
        os.kill(os.getpid(), signal.SIGKILL)
    seen.append(1)
    return original(*arguments, **options)

pipeline.energy_loss = energy_loss
_, energy = pipeline.distill(load_recipe(folder / "recipe.yaml"), out)
if not processes.first:
    total = sum(parameter.double().sum().item() for parameter in energy.parameters())
    print(f"the second process ends with {total!r}", flush=True)
"""


def launch(launcher: str, folder: Path, out: Path, *, stop: int = -1) -> tuple[int, str]:
    """Exit status and output."""
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(folder / "script.py")]
    process = subprocess.Popen(
        [*command, str(folder), str(out), str(stop)], env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        # At a time-out; a launcher that is terminated takes its processes with it.
        process.terminate()
    return process.returncode, output


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipe.yaml, and in alone/ what one process makes of it."""
    folder = tmp_path_factory.mktemp("processes")
    np.save(folder / "images.npy", discs())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_fields(folder)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LOG_STEPS", 3)
        pipeline.distill(load_recipe(folder / "recipe.yaml"), folder / "alone")
    torch.set_num_threads(threads)
    return folder


def same_to_rounding(folder: Path, other: Path) -> None:
    """Both stages' logs, weights and averages."""
    for name in ("teacher", "energy"):
        found, expected = (logged(where / f"{name}.jsonl") for where in (folder, other))
        assert [(step, rate) for step, _, rate in found] == [(step, rate) for step, _, rate in expected]
        assert [loss for _, loss, _ in found] == pytest.approx([loss for _, loss, _ in expected], rel=1e-5)
        states = [torch.load(where / f"{name}.ckpt", weights_only=True) for where in (folder, other)]
        for kind in ("model", "ema"):
            a, b = (torch.cat([value.flatten() for value in state[kind].values()]) for state in states)
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), (a - b).abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_end_as_one(alone: Path, launcher: str) -> None:
    pytest.importorskip("accelerate")
    out = alone / launcher
    status, output = launch(launcher, alone, out)
    assert status == 0, output
    same_to_rounding(out, alone / "alone")
    assert sorted(path.name for path in out.iterdir()) == [
        "energy.ckpt", "energy.jsonl", "teacher.ckpt", "teacher.jsonl",
    ]  # fmt: skip
    # Both have the result, not the first alone.
    ema = torch.load(out / "energy.ckpt", weights_only=True)["ema"]
    total = sum(value.double().sum().item() for value in ema.values())
    assert f"the second process ends with {total!r}" in output


@pytest.mark.slow
def test_killed_processes_resume_on_any_number(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes are killed and one goes on, to the weights and losses of one from the start."""
    pytest.importorskip("accelerate")
    out = alone / "killed"
    status, output = launch("torchrun", alone, out, stop=4)
    assert status != 0
    assert torch.load(out / "energy.ckpt", weights_only=True)["step"] == 4, output
    monkeypatch.setattr(training, "LOG_STEPS", 3)
    pipeline.distill(load_recipe(alone / "recipe.yaml"), out)
    same_to_rounding(out, alone / "alone")


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes = Processes.launched()
    assert (processes.rank, processes.count, processes.first) == (0, 1, True)
    assert processes.mean(0.1) == 0.1
    assert processes.agree(7)
    processes.wait()


def test_several_processes_need_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match=r"needs accelerate: pip install 'alpenglow\[train\]'"):
        Processes.launched()


def test_processes_that_accelerate_does_not_join_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would train by itself, and all would write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "accelerate", SimpleNamespace(PartialState=lambda cpu: alone))
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, and Accelerate sees 1 processes"):
        Processes.launched()
