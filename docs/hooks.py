"""Pages of the site that stand elsewhere in the repository, with links that fit; the examples with their text."""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import normpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "csrc/README.md": "kernels.md",
    "ltxkern/demo/MODEL_CARD.md": "model-card.md",
    "examples/README.md": "examples.md",
    "integrations/comfyui/README.md": "stacks/comfyui.md",
    "examples/adding_an_op/README.md": "adding-an-op.md",
}
LINK = re.compile(r"(\]\()(?!https?:|#)([^)#\s]+)((?:#[^)\s]*)?\))")


def moved(text: str, source: str) -> str:
    """The page with its relative links as they must be on the site."""

    def target(match: re.Match[str]) -> str:
        path = normpath(f"{Path(source).parent.as_posix()}/{match[2]}")
        if path.startswith("examples/") and path.endswith(".py"):
            page = f"#{heading_id(Path(path).name)}"
        else:
            page = PAGES.get(path, path.removeprefix("docs/"))
        return f"{match[1]}{page}{match[3]}"

    return LINK.sub(target, text)


def heading_id(name: str) -> str:
    """The anchor that the site gives to a heading that is a file name."""
    return name.replace(".", "")


def with_sources(text: str, folder: Path) -> str:
    """The page, then every Python file of its folder."""
    sources = (f"## {path.name}\n\n```python\n{path.read_text()}```\n" for path in sorted(folder.glob("*.py")))
    return "\n".join([text, *sources])


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    for source, page in PAGES.items():
        content = moved((ROOT / source).read_text(), source)
        if page == "examples.md":
            content = with_sources(content, ROOT / "examples")
        files.append(File.generated(config, page, content=content))
    return files
