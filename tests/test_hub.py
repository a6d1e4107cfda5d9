"""Priors of the Hugging Face hub, against a server on this machine that speaks its protocol."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save

from alpenglow import jobs
from alpenglow.networks.denoiser import EDMDenoiser
from alpenglow.networks.storage import Kind, save_denoiser
from alpenglow.priors import hub
from alpenglow.priors.loading import load_prior
from tests.tiny import NETWORK

# Loads each reference as a user would; settings of huggingface_hub are read when it is imported.
LOADER = """
import json, sys
from alpenglow.priors.loading import load_denoiser, load_prior
for reference in sys.argv[1:]:
    try:
        prior = load_prior(reference) if "teacher" not in reference else load_denoiser(reference)
        print(json.dumps(getattr(prior, "name", "a denoiser")))
    except ValueError as error:
        print(json.dumps({"error": str(error)}))
"""


def weights(folder: Path, name: str, kind: Kind = "energy") -> bytes:
    """A weight file whose header bears `name`."""
    torch.manual_seed(0)
    denoiser = EDMDenoiser.from_config(
        {"backbone": "SongUNet", "network": NETWORK, "sigma_data": 0.7, "patch": 2}
    )
    path = folder / f"{name}.safetensors"
    save_denoiser(path, denoiser, name=name, image_shape=(1, 8, 8), kind=kind)
    return path.read_bytes()


def commit(files: dict[str, bytes]) -> str:
    digest = hashlib.sha1()
    for name, content in sorted(files.items()):
        digest.update(name.encode() + content)
    return digest.hexdigest()


@dataclass
class Repository:
    revisions: dict[str, dict[str, bytes]]
    """{revision: {file: content}}."""
    token: str | None = None
    gated: bool = False


@dataclass
class Hub:
    """What the server has, and what it was asked for."""

    repositories: dict[str, Repository]
    endpoint: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    """GET /api/models/R[/revision/V], HEAD and GET /R/resolve/V/F; files are elsewhere, as LFS files are."""

    hub: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.asked.append((self.command, self.path))
        # A revision may hold a slash, which comes quoted.
        parts = [unquote(part) for part in urlsplit(self.path).path.split("/")[1:]]
        if parts[0] == "lfs":
            return self._send(200, self._blobs()[parts[1]])
        api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if api else parts
        rest = rest[1:]  # after "revision" or "resolve"
        known = self.hub.repositories.get(f"{owner}/{name}")
        if known is None or (known.token and self.headers.get("authorization") != f"Bearer {known.token}"):
            # The hub does not tell strangers which repositories are private.
            return self._send(401, b"Invalid username or password.", {"X-Error-Code": "RepoNotFound"})
        revisions = known.revisions | {commit(files): files for files in known.revisions.values()}
        if (files := revisions.get(rest[0] if rest else "main")) is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if api:
            siblings = [{"rfilename": file} for file in files]
            information = {"id": f"{owner}/{name}", "sha": commit(files), "siblings": siblings}
            return self._send(200, json.dumps(information).encode(), {"Content-Type": "application/json"})
        if known.gated:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        headers = {"X-Repo-Commit": commit(files)}
        content = files.get("/".join(rest[1:]))
        if content is None:
            return self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
        digest = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        elsewhere = self.hub.endpoint.replace("127.0.0.1", "localhost")  # to the library, another host
        return self._send(302, b"", headers | {"Location": f"{elsewhere}/lfs/{digest}"})

    def _blobs(self) -> dict[str, bytes]:
        contents = (
            content
            for repository in self.hub.repositories.values()
            for files in repository.revisions.values()
            for content in files.values()
        )
        return {hashlib.sha256(content).hexdigest(): content for content in contents}

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


class Outcome(NamedTuple):
    """The prior's name, or the error."""

    name: str
    error: str


@dataclass
class Machine:
    """A user's machine: a cache of its own, and the server as its hub."""

    hub: Hub
    cache: Path

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        ours = {
            "HF_ENDPOINT": self.hub.endpoint, "HF_HOME": str(self.cache), "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        return subprocess.run(
            [sys.executable, *command], env=clean | ours | environment, capture_output=True, text=True,
            timeout=300, cwd=self.cache,
        )  # fmt: skip

    def load(self, *references: str, **environment: str) -> dict[str, Outcome]:
        done = self.run("-c", LOADER, *references, **environment)
        assert done.returncode == 0, done.stderr
        outcomes = {}
        for reference, line in zip(references, done.stdout.splitlines(), strict=True):
            value = json.loads(line)
            outcomes[reference] = Outcome(*(("", value["error"]) if isinstance(value, dict) else (value, "")))
        return outcomes

    def snapshot(self, repository: str) -> Path:
        return self.cache / "hub" / f"models--{repository.replace('/', '--')}"


FOUND = {
    "hub:lab/single": "only",
    "hub:lab/single@v1": "old",
    "hub:lab/single@feature/x": "branch",
    "hub:lab/single/odd-name.safetensors": "only",
    "hub:lab/brain": "brain",
    "hub:lab/brain/other.safetensors": "other",
    "hub:lab/brain/brain-teacher.safetensors": "a denoiser",
    "hub:lab/convention": "model",
    "hub:lab/pair": "prior",
    "hub:lab/several/deep/b.safetensors@main": "b",
}
REFUSED = {
    "hub:lab/several": r"holds 2 weight files \(a.safetensors, deep/b.safetensors\), none of them "
    r"several.safetensors or model.safetensors; say which, hub:lab/several/a.safetensors for one",
    "hub:lab/absent": r"no model repository lab/absent, or it is private: .*HF_TOKEN",
    "hub:lab/private": r"no model repository lab/private, or it is private: .*hf auth login",
    "hub:lab/gated": r"lab/gated is gated: ask for access at http://127.0.0.1:\d+/lab/gated",
    "hub:lab/single@v9": r"lab/single has no revision 'v9'; give a branch, tag or commit",
    "hub:lab/brain@v9": r"lab/brain has no revision 'v9'",
    "hub:lab/brain/absent.safetensors": r"lab/brain has no file absent.safetensors; .*/lab/brain/tree/main",
    "hub:lab/no-weights": r"holds no .safetensors file; expected one of alpenglow",
    "hub:lab/foreign": r"foreign.safetensors is a safetensors file without alpenglow's header",
    "hub:lab/pickled/x.pkl": r"is no reference to the hub; expected hub:owner/name",
    "hub:lab": r"is no reference to the hub",
    "hub:lab/": r"is no reference to the hub",
    "hub:lab/brain@": r"is no reference to the hub",
    "hub:lab/only-taught": r"holds a teacher, a plain denoiser without an energy",
}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    made = tmp_path_factory.mktemp("weights")

    def one(name: str, kind: Kind = "energy") -> bytes:
        return weights(made, name, kind)

    readme = {"README.md": b"# A prior", ".gitattributes": b"*.safetensors filter=lfs\n"}
    taught = one("taught", "teacher")
    main_only: dict[str, dict[str, bytes]] = {
        "lab/brain": {
            "other.safetensors": one("other"),
            "brain.safetensors": one("brain"),
            "brain-teacher.safetensors": taught,
        },
        "lab/convention": {"a.safetensors": one("a"), "model.safetensors": one("model")},
        "lab/pair": {"p.safetensors": one("prior"), "p-teacher.safetensors": taught},
        "lab/several": {"a.safetensors": one("a"), "deep/b.safetensors": one("b")},
        "lab/no-weights": {},
        "lab/foreign": {"foreign.safetensors": save({"w": torch.zeros(2)})},
        "lab/pickled": {"x.pkl": b"\x80\x04."},
        "lab/only-taught": {"t-teacher.safetensors": taught},
        "lab/moving": {"w.safetensors": one("before")},
        "lab/later": {"later.safetensors": one("later")},
    }
    repositories = {name: Repository({"main": readme | files}) for name, files in main_only.items()}
    repositories["lab/single"] = Repository(
        {
            "main": readme | {"odd-name.safetensors": one("only")},
            "v1": readme | {"odd-name.safetensors": one("old")},
            "feature/x": readme | {"odd-name.safetensors": one("branch")},
        }
    )
    repositories["lab/private"] = Repository(
        {"main": {"private.safetensors": one("private")}}, token="hf_secret"
    )
    repositories["lab/gated"] = Repository({"main": {"gated.safetensors": one("gated")}}, gated=True)

    store = Hub(repositories)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": store}))
    store.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Machine(store, tmp_path_factory.mktemp("cache"))
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def online(machine: Machine) -> dict[str, Outcome]:
    return machine.load(*FOUND, *REFUSED, "hub:lab/moving")


@pytest.mark.parametrize(("reference", "name"), FOUND.items())
def test_it_loads(online: dict[str, Outcome], reference: str, name: str) -> None:
    assert online[reference] == (name, "")


@pytest.mark.parametrize(("reference", "message"), REFUSED.items())
def test_it_refuses(online: dict[str, Outcome], reference: str, message: str) -> None:
    assert re.search(message, online[reference].error), online[reference]
    assert "\n" not in online[reference].error


def test_only_what_is_wanted_is_downloaded_and_once(machine: Machine, online: dict[str, Outcome]) -> None:
    files = machine.hub.repositories["lab/pair"].revisions["main"]
    digest = hashlib.sha256(files["p.safetensors"]).hexdigest()
    assert [path.name for path in (machine.snapshot("lab/pair") / "blobs").iterdir()] == [digest]
    # Two references of FOUND name the same file.
    single = machine.hub.repositories["lab/single"].revisions["main"]["odd-name.safetensors"]
    request = ("GET", f"/lfs/{hashlib.sha256(single).hexdigest()}")
    assert machine.hub.asked.count(request) == 1


def test_a_new_commit_is_fetched(machine: Machine, online: dict[str, Outcome], tmp_path: Path) -> None:
    """A branch is followed as long as there is a network; a commit is what it was, from the cache alone."""
    repository = machine.hub.repositories["lab/moving"]
    before = commit(repository.revisions["main"])
    repository.revisions["main"] = {"w.safetensors": weights(tmp_path, "after")}
    branch, pinned = "hub:lab/moving", f"hub:lab/moving@{before}"
    assert online[branch].name == "before"
    assert machine.load(branch)[branch].name == "after"
    outcomes = machine.load(branch, pinned, HF_HUB_OFFLINE="1")
    assert [outcome.name for outcome in outcomes.values()] == ["after", "before"]


def test_the_cache_does_without_network(machine: Machine, online: dict[str, Outcome]) -> None:
    """By HF_HUB_OFFLINE, or with a hub that cannot be reached: what was loaded loads, and no more."""
    asked = len(machine.hub.asked)
    nowhere = "http://127.0.0.1:9"  # the discard port: nobody listens
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": nowhere}):
        outcomes = machine.load(*FOUND, "hub:lab/later", "hub:lab/single@v9", **environment)
        assert {reference: outcomes[reference].name for reference in FOUND} == FOUND
        error = outcomes["hub:lab/later"].error
        if "HF_HUB_OFFLINE" in environment:
            assert "hub:lab/later is not in the cache" in error
            assert "HF_HUB_OFFLINE is set; load it once without" in error
        else:
            assert f"could not be fetched from {nowhere} (Connect" in error
            assert "check the network" in error
        assert outcomes["hub:lab/single@v9"].error
    assert len(machine.hub.asked) == asked


def test_a_cache_that_others_filled(machine: Machine, tmp_path: Path) -> None:
    """The layout of huggingface_hub's cache, as a download on another machine leaves it, copied here."""
    here = Machine(Hub({}, "http://127.0.0.1:9"), tmp_path / "home")
    sha = "0123456789" * 4
    folder = here.snapshot("lab/copied")
    for part in ("blobs", "refs", f"snapshots/{sha}"):
        (folder / part).mkdir(parents=True)
    content = weights(tmp_path, "copied")
    digest = hashlib.sha256(content).hexdigest()
    (folder / "blobs" / digest).write_bytes(content)
    (folder / "refs/main").write_text(sha)
    (folder / f"snapshots/{sha}/x.safetensors").symlink_to(f"../../blobs/{digest}")
    references = [
        "hub:lab/copied", f"hub:lab/copied@{sha}", "hub:lab/copied/x.safetensors",
        "hub:lab/copied/y.safetensors", "hub:lab/copied@v1",
    ]  # fmt: skip
    *found, file, revision = here.load(*references, HF_HUB_OFFLINE="1").values()
    assert found == [("copied", "")] * 3
    assert "hub:lab/copied/y.safetensors is not in the cache" in file.error
    assert "hub:lab/copied@v1 is not in the cache" in revision.error


def test_info_and_a_login(machine: Machine, online: dict[str, Outcome]) -> None:
    """A login opens the private repository that `online` was refused."""
    done = machine.run("-m", "alpenglow", "info", "hub:lab/private", HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    assert "private" in done.stdout
    assert "1x8x8" in done.stdout


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'alpenglow\[hub\]'"):
        load_prior("hub:lab/brain")
    with pytest.raises(ValueError, match="is no reference to the hub"):
        hub.fetch("hub:lab")


def test_a_job_file_keeps_the_reference(tmp_path: Path) -> None:
    """Paths in a job file are relative to it; a prior of the hub is none."""
    path, prior = tmp_path / "job.yaml", "hub:lab/brain/brain.safetensors@v1"
    job = f"{{prior: '{prior}', input: y.npy, output: out, operator: {{kind: denoising}}, noise_std: 0.1}}"
    path.write_text(job)
    loaded = jobs.load_job({}, path)
    assert loaded.prior == prior
    assert loaded.input == tmp_path / "y.npy"
