"""MkDocs hooks: pages whose source is elsewhere in the tree, where other tools want it.

Notebooks become pages with the outputs they were saved with; the cards of the zoo, the changelog and
CONTRIBUTING.md become pages as they are, and the help of the command line a page of the reference. Links to
them are written for the tree, so that they also work where the repository is browsed.
"""

import posixpath
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
ZOO = "engine/priors/zoo"
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    **{f"notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in ROOT.glob("notebooks/*.ipynb")},
    **{
        f"{ZOO}/{path.name}": f"zoo/{path.name}"
        for path in (ROOT / ZOO).iterdir()
        if path.suffix in (".md", ".png", ".yaml")
    },
}
"""Site path of a file of the tree that is not in docs/."""
LINK = re.compile(r"\]\((?!\w+:|#|/)([^)#\s]+)(#[^)\s]*)?\)")
EXAMPLE = re.compile(r"^Example:\n(.*?)(?=^#|\Z)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages to those of docs/."""
    for source, target in PAGES.items():
        path = ROOT / source
        if path.suffix == ".ipynb":
            text, images = _notebook(path)
            files.append(File.generated(config, target, content=text))
            for name, content in images.items():
                files.append(File.generated(config, f"notebooks/{name}", content=content))
        elif files.get_file_from_path(target) is None:  # docs/ has an index of its own
            files.append(File.generated(config, target, abs_src_path=str(path)))
    files.append(File.generated(config, "reference/command-line.md", content=_command_line()))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the tree into links between pages."""
    here = page.file.src_uri
    source = next((source for source, target in PAGES.items() if target == here), f"docs/{here}")

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        uri = PAGES.get(target, target.removeprefix("docs/"))
        return f"]({posixpath.relpath(uri, posixpath.dirname(here) or '.')}{link[2] or ''})"

    return LINK.sub(moved, markdown)


def _notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and the images that it shows by their names."""
    exporter = MarkdownExporter()
    resources = {"unique_key": path.stem}
    text, resources = exporter.from_notebook_node(nbformat.read(path, as_version=4), resources)
    return text, resources["outputs"]


def _command_line() -> str:
    """The help of every command, as Typer writes it, with the examples as code."""
    command = [sys.executable, "-m", "typer", "alpenglow.cli", "utils", "docs", "--name", "alpenglow"]
    title = ["--title", "Command line"]
    text = subprocess.run([*command, *title], check=True, capture_output=True, text=True).stdout
    return EXAMPLE.sub(lambda found: f"Example:\n\n```sh\n{found[1].strip()}\n```\n\n", text)
