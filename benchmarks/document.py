"""Sections of docs/benchmarks.md that a script owns: they are replaced, what stands around them is kept."""

import shlex
import sys
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"


def write_section(document: Path, name: str, body: str) -> None:
    """Put `body` between the markers of section `name`, which are added at the end where they are missing."""
    begin, end = f"<!-- {name}: written by benchmarks/{name}.py -->", f"<!-- end of {name} -->"
    section = f"{begin}\n{body.strip()}\n{end}"
    text = document.read_text(encoding="utf-8") if document.exists() else "# Benchmarks\n"
    if begin in text and end in text:
        before, _, rest = text.partition(begin)
        text = before + section + rest.partition(end)[2]
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(text, encoding="utf-8")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def command() -> str:
    """The command line that was run, without where its files went."""
    words = [f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    for option in ("--document", "--measurements", "--folder", "--picture"):
        if option in words:
            at = words.index(option)
            del words[at : at + 2]
    return shlex.join(["python", *words])
