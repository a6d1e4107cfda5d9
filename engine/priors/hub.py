"""Weight files of the Hugging Face hub, `hub:owner/name`: downloaded once, into huggingface_hub's cache."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

PREFIX = "hub:"
FORM = "hub:owner/name, hub:owner/name/file.safetensors, or either with @revision"
PATTERN = re.compile(
    r"hub:(?P<repository>[\w.-]+/(?P<name>[\w.-]+))(/(?P<file>[^@]+\.safetensors))?(@(?P<revision>.+))?"
)
SUFFIX = ".safetensors"
# `alpenglow distill` writes the teacher beside the prior under this name.
TEACHER = "-teacher.safetensors"
TIMEOUT = 10.0  # seconds, as huggingface_hub itself waits for the facts of a file


class _Reference(NamedTuple):
    text: str
    repository: str
    name: str
    file: str | None
    revision: str | None


def fetch(reference: str) -> Path:
    """The local file of `hub:owner/name`, `hub:owner/name/file.safetensors`, or either with `@revision`.

    Where no file is named it is the repository's only .safetensors file, else <name>.safetensors, else
    model.safetensors; files that end in -teacher.safetensors count only where there are no others. revision:
    a branch, tag or commit; default the main branch. Login, cache and offline mode are huggingface_hub's own
    (HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE=1). Without a network the files that the cache has of the
    revision stand for the repository.

    Raises ValueError for a malformed reference, a repository, revision or file that is not there or not open
    to this user, a choice of several files, and a network that fails with nothing in the cache.
    """
    match = PATTERN.fullmatch(reference)
    if match is None:
        raise ValueError(f"{reference!r} is no reference to the hub; expected {FORM}")
    wanted, hub = _Reference(reference, **match.groupdict()), _library()
    file = wanted.file
    if file is None:
        with _clear_errors(hub, wanted):
            files = _list(hub, wanted)
        file = _choose(wanted, files)
    with _clear_errors(hub, wanted):
        return Path(hub.hf_hub_download(wanted.repository, file, revision=wanted.revision))


def _library() -> ModuleType:
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise ValueError("priors of the hub need huggingface_hub: pip install 'alpenglow[hub]'") from None
    return huggingface_hub


def _list(hub: ModuleType, wanted: _Reference) -> list[str]:
    """The .safetensors files of the repository, or, where it is out of reach, those in the cache."""
    try:
        # Not list_repo_files, which without a network tries for half a minute.
        known = hub.HfApi().model_info(wanted.repository, revision=wanted.revision, timeout=TIMEOUT)
    # A failing network raises what the HTTP library raises, and huggingface_hub has changed it twice.
    except Exception:
        if cached := _list_cache(hub, wanted):
            return cached
        raise
    return sorted(file.rfilename for file in known.siblings or [] if file.rfilename.endswith(SUFFIX))


def _list_cache(hub: ModuleType, wanted: _Reference) -> list[str]:
    try:
        # No patterns: any part of a snapshot will do, not only a whole one.
        snapshot = hub.snapshot_download(
            wanted.repository, revision=wanted.revision, allow_patterns=[], local_files_only=True
        )
    except hub.errors.LocalEntryNotFoundError:
        return []
    found = Path(snapshot).rglob(f"*{SUFFIX}")
    return sorted(path.relative_to(snapshot).as_posix() for path in found if path.is_file())


def _choose(wanted: _Reference, files: list[str]) -> str:
    candidates = [file for file in files if not file.endswith(TEACHER)] or files
    if len(candidates) == 1:
        return candidates[0]
    for file in (f"{wanted.name}{SUFFIX}", f"model{SUFFIX}"):
        if file in candidates:
            return file
    if not candidates:
        raise ValueError(
            f"{wanted.text} holds no .safetensors file; expected one of alpenglow (`alpenglow distill`, "
            "`alpenglow convert`)"
        )
    revision = f"@{wanted.revision}" if wanted.revision else ""
    raise ValueError(
        f"{wanted.text} holds {len(candidates)} weight files ({', '.join(candidates)}), none of them "
        f"{wanted.name}{SUFFIX} or model{SUFFIX}; say which, "
        f"hub:{wanted.repository}/{candidates[0]}{revision} for one"
    )


@contextmanager
def _clear_errors(hub: ModuleType, wanted: _Reference) -> Iterator[None]:
    """What huggingface_hub raises, as one ValueError that says what to do."""
    repository, endpoint, cache = wanted.repository, hub.constants.ENDPOINT, hub.constants.HF_HUB_CACHE
    try:
        yield
    except hub.errors.GatedRepoError:
        raise ValueError(
            f"{repository} is gated: ask for access at {endpoint}/{repository}, and log in with "
            "`hf auth login`, or set HF_TOKEN"
        ) from None
    except hub.errors.RepositoryNotFoundError:
        raise ValueError(
            f"{endpoint} has no model repository {repository}, or it is private: check the name, and for a "
            "private one log in with `hf auth login`, or set HF_TOKEN"
        ) from None
    except hub.errors.RevisionNotFoundError:
        raise ValueError(
            f"{repository} has no revision {wanted.revision!r}; give a branch, tag or commit of it"
        ) from None
    except Exception as error:
        local = isinstance(error, hub.errors.LocalEntryNotFoundError)
        if wanted.file and isinstance(error, hub.errors.EntryNotFoundError) and not local:
            raise ValueError(
                f"{repository} has no file {wanted.file}; {endpoint}/{repository}/tree/"
                f"{wanted.revision or 'main'} lists what there is"
            ) from None
        if hub.constants.HF_HUB_OFFLINE:
            raise ValueError(
                f"{wanted.text} is not in the cache {cache}, and HF_HUB_OFFLINE is set; load it once without"
            ) from None
        # huggingface_hub's own message speaks of the cache; what failed is behind it.
        reason = error.__cause__ or error
        raise ValueError(
            f"{wanted.text} could not be fetched from {endpoint} ({type(reason).__name__}: {reason}), and "
            f"the cache {cache} does not have it; check the network and try again"
        ) from error
