"""The code blocks of README and its kin and of every page under docs."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCED = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:\A|\n)\n((?:(?:    |\t)[^\n]*\n|\n)+)")


@dataclass(frozen=True)
class Block:
    """One code block: its document, the line before it, its language ("" where none is named), its text, whether it is a file."""

    path: Path
    line: int
    language: str
    text: str
    is_file: bool = False

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def documents() -> list[Path]:
    """Everything in Markdown that a reader opens."""
    names = (
        "README.md",
        "CONTRIBUTING.md",
        "csrc/README.md",
        "ltxkern/demo/MODEL_CARD.md",
        "integrations/comfyui/README.md",
    )
    own = [ROOT / name for name in names]
    return [*own, *sorted((ROOT / "examples").rglob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a document, then its indented ones, which are shell."""
    text = path.read_text()
    found = [
        Block(path, text.count("\n", 0, m.start()) + 1, m[1], m[3], "title=" in m[2]) for m in FENCED.finditer(text)
    ]
    bare = FENCED.sub(lambda match: "x\n" * match[0].count("\n"), text)
    for match in INDENTED.finditer(bare):
        # What is indented beneath an item of a list is text.
        before = bare[: match.start(1)].rstrip().rpartition("\n")[2]
        if match[1].strip() and not re.match(r"\s*([-*]|\d+\.) ", before):
            lines = "".join(line[4:] or "\n" for line in match[1].splitlines(keepends=True))
            found.append(Block(path, bare.count("\n", 0, match.start(1)), "indented", lines))
    return found


ALL = [block for path in documents() for block in blocks(path)]
