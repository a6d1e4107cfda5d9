"""What the suites share: the prior and its bundle, and the table of quotients by pytest-benchmark's own."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.pairs import timing


@pytest.fixture(scope="session")
def prior() -> Any:
    """The prior that comes with the package."""
    from alpenglow.priors.loading import load_prior

    return load_prior("fashion-28")


@pytest.fixture(scope="session")
def bundle(prior: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle; a minute."""
    for needed in ("onnxscript", "onnxruntime"):
        pytest.importorskip(needed)
    from alpenglow.export.bundle import export_bundle

    folder = tmp_path_factory.mktemp("bundle")
    export_bundle(prior, folder)
    return folder


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Published and our time of every benchmark, and their quotient with its 95 % limits."""
    session = getattr(config, "_benchmarksession", None)
    done = {
        one.fullname.removeprefix("benchmarks/"): timing(one.stats.median, one.extra_info)
        for one in (session.benchmarks if session else [])
        if one
    }
    rows = [
        (name, f"{1e3 * row.published:10.3f} ms {1e3 * row.ours:10.3f} ms  {row}")
        for name, row in done.items()
        if row.published is not None
    ]
    if not rows:
        return
    terminalreporter.section("published / ours, in turns")
    width = max(len(name) for name, _ in rows)
    for name, figures in rows:
        terminalreporter.write_line(f"{name:{width}} {figures}")
