"""Folders of results that are written whole or not at all."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder whose files move to the folder `path` on success, and vanish on failure.

    It is made at once, so that a place that cannot be written to fails before the work, not after it. Files
    of the same names in `path` are replaced, others stay. Raises ValueError when `path` is a file, OSError
    where the disk refuses.
    """
    path = Path(path)
    # The temporary folder lies as near as it can without making folders that a failure would leave behind.
    place = path
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"cannot write to the folder {path}: {place} is a file; give another folder")
    temporary = place / f".alpenglow-{secrets.token_hex(8)}"
    temporary.mkdir()
    try:
        yield temporary
        path.mkdir(parents=True, exist_ok=True)
        for file in sorted(temporary.rglob("*")):  # a folder comes before what is in it
            target = path / file.relative_to(temporary)
            if file.is_dir():
                target.mkdir(exist_ok=True)
            else:
                file.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
