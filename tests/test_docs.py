"""Every block of code in README.md and docs/: Python is run, commands and YAML are checked or run.

Blocks of a page share one namespace and one folder. They are run as they stand, but with few samples and few
NFE (`cheap`, `CHEAPER`): whether a number in the text is right is for the tests of the samplers. A block that
cannot run says why in a comment before it, `<!-- not run here: REASON -->`; NOT_RUN lists them all.
"""

import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import tiny
import torch
import yaml
from markdown_it import MarkdownIt
from scans import head
from typer.testing import CliRunner

import alpenglow as ag
from alpenglow import api, cli
from alpenglow.demo import held_out_images
from alpenglow.distillation.config import Recipe
from alpenglow.export.bundle import export_bundle
from alpenglow.io import write_image, write_kspace
from alpenglow.jobs import Job
from alpenglow.mri_simulation import simulate_kspace
from alpenglow.networks.denoiser import EDMDenoiser
from alpenglow.operators import kspace_masks
from alpenglow.priors import NetworkPrior
from alpenglow.priors.batched import BatchedPrior
from alpenglow.samplers import calibrated
from alpenglow.scheduler import DevicePool

for needed in ("onnxscript", "onnxruntime", "sigpy"):
    pytest.importorskip(needed)
matplotlib.use("Agg")

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))]
MARKER = re.compile(r"<!-- not run here: (.+?) -->\s*\Z", re.DOTALL)
NOT_RUN = {
    "docs/cluster.md": ["starts Ray; tests/test_cluster.py does"],
    "docs/distillation.md": ["trains a network"],
    "docs/export.md": ["needs TensorRT; tests/test_benchmarks.py compiles it"],
    "docs/guides/own-data.md": ["trains a network for hours"],
    "docs/guides/own-operator.md": ["deepinv is not among the development packages"],
}
"""What is excused, by page: a new reason has to be entered here too."""

CHEAPER = {
    "demo": ["--images", "1", "--num-samples", "2", "--nfe", "2"],
    "evaluate": [],
    "info": [],
    "map": ["--max-iterations", "2"],
    "reconstruct": ["--num-samples", "2", "--nfe", "2"],
    "report": [],
}
"""Commands that are run, and what is added to them; the others are checked against the command line."""
SAMPLES, SAMPLES_TO_A_TARGET, NFE, ITERATIONS = 8, 64, 2, 2
"""At most, of priors that are networks."""
BUNDLE = "fashion-28-bundle"
GIVEN = {
    "docs/scheduler.md": """
import torch
import alpenglow as ag

torch.manual_seed(0)
operator = ag.operators.Denoising()
y = torch.zeros(1, 1, 28, 28)
problems = [(operator, y), (ag.operators.GaussianBlur(1.0), y)]
""",
    "docs/report.md": """
from pathlib import Path

import torch
import alpenglow as ag

prior = ag.priors.GaussianPrior(torch.zeros(1, 8, 8), torch.eye(64))
Path("out").mkdir()
ag.sample(prior, ag.operators.Denoising(), torch.zeros(1, 8, 8), noise_std=0.1).save("out/result.h5")
""",
}
"""What a page leaves to the reader."""


@dataclass(frozen=True)
class Block:
    """A block of code: where it stands, its language, and why it is not run, if so."""

    page: str
    line: int
    language: str
    text: str
    excuse: str | None


def blocks_of(page: str) -> list[Block]:
    """Fenced blocks, and indented ones: those are Python where they are that, and commands otherwise."""
    tokens = MarkdownIt().parse((ROOT / page).read_text())
    blocks = []
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type not in ("fence", "code_block"):
            continue
        marked = MARKER.search(before.content) if before and before.type == "html_block" else None
        language = token.info.split()[0] if token.info else "python" if is_python(token.content) else "sh"
        assert token.map is not None
        start = token.map[0] + (token.type == "fence")
        blocks.append(Block(page, start, language, token.content, marked[1] if marked else None))
    return blocks


def is_python(text: str) -> bool:
    try:
        compile(text, "block", "exec")
    except SyntaxError:
        return False
    return True


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that pages speak of: images and a scan."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("boot.png", "photo.png"):
        write_image(folder / name, held_out_images()[0])
    mask = kspace_masks.equispaced_1d((32, 32), 2, calibration=0.4)
    scan = simulate_kspace(head(1, 32, 32), coils=4, covariance=4e-4 * torch.eye(4), mask=mask)
    write_kspace(folder / "scan.h5", scan.kspace)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of fashion-28's image shape, of a small random network: the zoo's takes a minute."""
    denoiser = {"backbone": "SongUNet", "network": tiny.NETWORK | {"img_resolution": 14, "num_blocks": 0}}
    small = EDMDenoiser.from_config(denoiser | {"sigma_data": 0.5, "patch": 2})
    folder = tmp_path_factory.mktemp("bundle") / BUNDLE
    export_bundle(NetworkPrior(small, (1, 28, 28), name="small"), folder)
    return folder


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few samples and NFE; everything else is what it is for a reader."""

    def few(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            most = SAMPLES_TO_A_TARGET if "target_error" in options else SAMPLES
            samples = min(options.get("num_samples") or most, most)
            return function(*arguments, **(options | {"num_samples": samples, "nfe": NFE}))

        return call

    find_map = api.find_map
    monkeypatch.setattr(BatchedPrior, "batch_size", property(lambda prior: prior._batch_size or 1))
    monkeypatch.setattr(calibrated, "PILOT_CHAINS", 2)
    monkeypatch.setattr(calibrated, "PILOT_STEPS", 3)
    monkeypatch.setattr(api, "sample", few(api.sample))
    for scheduler in (ag.Scheduler, DevicePool):
        monkeypatch.setattr(scheduler, "submit", few(scheduler.submit))
    monkeypatch.setattr(
        api, "find_map", lambda *a, **options: find_map(*a, **options, max_iterations=ITERATIONS)
    )


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_blocks(
    page: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    blocks = blocks_of(page)
    text = "".join(block.text for block in blocks)
    if "load_prior" in text or "alpenglow reconstruct" in text:
        request.getfixturevalue("cheap")
    if BUNDLE in text:
        shutil.copytree(request.getfixturevalue("bundle"), BUNDLE)
    namespace: dict[str, Any] = {"__name__": page}
    exec(GIVEN.get(page, ""), namespace)
    for block in blocks:
        where = f"{block.page}:{block.line}"
        if block.language == "python":
            code = compile("\n" * block.line + block.text, str(ROOT / page), "exec")
            if block.excuse is None:
                exec(code, namespace)
        elif block.language in ("sh", "bash", "console"):
            for command in commands_of(block.text):
                check_command(command, where, run=block.excuse is None)
        elif block.language == "yaml":
            check_yaml(block.text)
        else:
            assert block.excuse, f"{where}: {block.language} cannot be run here; say why in a comment"


def test_excuses() -> None:
    found = {page: [b.excuse for b in blocks_of(page) if b.excuse] for page in PAGES}
    assert {page: reasons for page, reasons in found.items() if reasons} == NOT_RUN


def test_blocks_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "# Page\n\n<!-- not run here: no reason -->\n```cpp\nint x;\n```\n\n- item\n\n  ```sh\n  ls\n  ```\n"
    )
    (tmp_path / "page.md").write_text(text)
    monkeypatch.setattr("test_docs.ROOT", tmp_path)
    blocks = blocks_of("page.md")
    assert [(b.line, b.language, b.excuse) for b in blocks] == [(4, "cpp", "no reason"), (10, "sh", None)]


@pytest.mark.parametrize(
    "command",
    [
        "alpenglow reconstruct x.png --no-such-option",
        "alpenglow nothing",
        "make nothing",
        "rm x",
        "pip install x",
    ],
)
def test_wrong_commands_are_found(command: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_command(shlex.split(command), "here", run=False)


def commands_of(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words:
            yield words


def check_command(words: list[str], where: str, *, run: bool) -> None:
    """Run a command of alpenglow, if `run` and it is cheap; check that what others name exists."""
    match words:
        case ["alpenglow", *arguments]:
            run_command([*arguments, "--help"])  # reads all options, and refuses unknown ones
            if run and arguments[0] in CHEAPER:
                run_command([*arguments, *CHEAPER[arguments[0]]])
        case ["torchrun" | "accelerate", *_, "-m", "alpenglow", "distill", recipe, "-o", folder]:
            run_command(["distill", recipe, "-o", folder, "--help"])
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), where
        case ["pip", "install", *_, what] if what.startswith((".", "alpenglow")):
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(re.findall(r"[\w-]+(?=[,\]])", what)) <= set(extras), where
        case _:
            pytest.fail(f"{where}: {shlex.join(words)} is no command that this test knows; check it here")


def run_command(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli.app, arguments, prog_name="alpenglow")
    assert result.exit_code == 0, f"alpenglow {shlex.join(arguments)}: {result.output}"


def check_yaml(text: str) -> None:
    """Recipes and jobs are those of the package; jobs are kept, as job.yaml, for the commands that follow."""
    fields = yaml.safe_load(text)
    if "network" in fields:
        Recipe.model_validate(fields)
    if "input" in fields:
        Job.model_validate(fields)
        Path("job.yaml").write_text(text)
