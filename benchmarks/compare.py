"""`make bench-compare BASE=<commit>`: the suites of two commits, and the quotient published / ours of each.

python -m benchmarks.compare BASE [COMMIT] [-k EXPRESSION]

COMMIT is the working tree, uncommitted changes included, unless one is given. Every commit runs its own
suites on its own package, in this Python. Times of the two runs cannot be compared on a machine that does
other work too, quotients can: each is measured turn by turn (pairs.py).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from benchmarks.pairs import Timing, timing

PACKAGE, FOLDERS = "alpenglow", ("kernels", "export")
"""setup.py's mapping: engine/ is the package, these are within it."""


def read(path: Path) -> dict[str, Timing]:
    """The benchmarks of a file that --benchmark-json wrote, by name.

    Raises ValueError for a file that is none.
    """
    try:
        benchmarks = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
        return {
            one["fullname"].removeprefix("benchmarks/"): timing(one["stats"]["median"], one["extra_info"])
            for one in benchmarks
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no result of pytest-benchmark ({type(error).__name__}: {error}); expected a file "
            "that `make bench JSON=FILE` wrote"
        ) from error


def table(base: dict[str, Timing], here: dict[str, Timing], names: tuple[str, str]) -> list[str]:
    """Markdown: published / ours with 95 % limits in both runs, and how many times faster ours became by it.

    A change whose limits do not overlap is bold. Benchmarks that only one run has are listed with it alone.
    """
    lines = [
        f"| published / ours | {names[0]} | {names[1]} | ours became faster by |",
        "| --- | --- | --- | --- |",
    ]
    for name in sorted(base.keys() | here.keys()):
        before, after = base.get(name), here.get(name)
        cells = [("missing" if side is None else str(side) or "alone") for side in (before, after)]
        lines.append(f"| {name} | {' | '.join(cells)} | {_change(before, after)} |")
    return lines


def _change(before: Timing | None, after: Timing | None) -> str:
    if before is None or after is None or before.speedup is None or after.speedup is None:
        return ""
    assert before.low is not None
    assert before.high is not None
    assert after.low is not None
    assert after.high is not None
    change = f"{after.speedup / before.speedup:.2f}x"
    apart = after.low > before.high or after.high < before.low
    return f"**{change}**" if apart else change


@contextmanager
def worktree(repository: Path, commit: str, scratch: Path) -> Iterator[Path]:
    """The tree of a commit in a folder of `scratch`, removed at the end, also of an interrupted run.

    Raises ValueError for what is no commit of the repository.
    """
    tree = scratch / "tree"
    git = ["git", "-C", str(repository)]
    added = subprocess.run(
        [*git, "worktree", "add", "--detach", tree, commit], capture_output=True, text=True, check=False
    )
    try:
        if added.returncode:
            raise ValueError(
                f"no tree of {commit!r}: {added.stderr.strip()}; expected a commit of this repository"
            )
        yield tree
    finally:
        subprocess.run([*git, "worktree", "remove", "--force", tree], capture_output=True, check=False)
        subprocess.run([*git, "worktree", "prune"], capture_output=True, check=False)


def run_suites(tree: Path, scratch: Path, arguments: list[str]) -> dict[str, Timing]:
    """Run a tree's suites on its own package.

    Raises ValueError where there are none, RuntimeError where they fail.
    """
    suites = sorted(path.relative_to(tree).as_posix() for path in (tree / "benchmarks").glob("bench_*.py"))
    if not suites:
        raise ValueError(f"{tree} has no suites: expected benchmarks/bench_*.py")
    packages = scratch / "packages"
    package = packages / PACKAGE
    package.mkdir(parents=True)
    for source in [*(tree / "engine").iterdir(), *(tree / folder for folder in FOLDERS)]:
        (package / source.name).symlink_to(source)
    paths = [str(packages), str(tree), os.environ.get("PYTHONPATH", "")]
    result = scratch / "result.json"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tree)]
    done = subprocess.run(
        [*command, "--benchmark-only", f"--benchmark-json={result}", *suites, *arguments],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the suites of {tree} failed (pytest exit code {done.returncode})")
    return read(result)


def compare(repository: Path, base: str, commit: str | None, arguments: list[str]) -> list[str]:
    """The table of two commits; None: the working tree."""

    def run(name: str | None) -> dict[str, Timing]:
        with tempfile.TemporaryDirectory(prefix="alpenglow-bench-") as folder:
            scratch = Path(folder)
            if name is None:
                return run_suites(repository, scratch, arguments)
            with worktree(repository, name, scratch) as tree:
                return run_suites(tree, scratch, arguments)

    return table(run(base), run(commit), (base, commit or "working tree"))


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("base", help="a commit")
    parser.add_argument("commit", nargs="?", help="another; default: the working tree as it is")
    parser.add_argument("-k", metavar="EXPRESSION", help="as of pytest: which benchmarks")
    options = parser.parse_args(arguments)
    # SIGTERM ends a process at once; as an exception it removes the worktree, as Ctrl-C does.
    signal.signal(signal.SIGTERM, _stop)
    chosen = ["-k", options.k] if options.k else []
    try:
        lines = compare(Path.cwd(), options.base, options.commit, chosen)
    except (ValueError, RuntimeError) as error:
        sys.exit(str(error))
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
