"""The notebooks run from the first cell to the last, with fewer samples, views and steps than they show."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).parents[1] / "notebooks"
FEWER_STEPS = """\
from alpenglow.priors.batched import BatchedPrior
from alpenglow.samplers import calibrated

BatchedPrior.batch_size = property(lambda prior: prior._batch_size or 1)
calibrated.PILOT_CHAINS, calibrated.PILOT_STEPS = 4, 6
"""
PARAMETERS = {
    "inpainting": "NUM_SAMPLES, NFE, IMAGES, LEVELS = 8, 8, 2, 4",
    "mri": "SIZE, ACCELERATION = 40, 1.5\nNUM_SAMPLES, NFE = 4, 4",
    "own-operator-and-prior": "TRUTHS, NUM_SAMPLES, NFE = 2, 8, [8, 16]",
}
"""In place of each notebook's cell with the tag `parameters`."""


def test_every_notebook_is_tested() -> None:
    assert sorted(PARAMETERS) == sorted(path.stem for path in FOLDER.glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_it_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the kernel: a process of its own
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = FEWER_STEPS + PARAMETERS[name]
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": FOLDER}}).execute()
    pictures = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]  # fmt: skip
    assert len(pictures) >= 3


@pytest.mark.parametrize("name", PARAMETERS)
def test_it_is_saved_as_it_ran(name: str) -> None:
    """The site shows saved outputs: of all cells, run in order, without an error or a warning among them."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [
        output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"
    ]
