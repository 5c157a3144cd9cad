"""What the site needs beside mkdocs: pages as GitHub reads them, and the roles of docstrings as links."""

import re
from pathlib import Path

import griffe

HERE = Path(__file__).parent
OUTWARD = re.compile(r"\[([^\]]+)\]\((\.\./[^)]+)\)")
MARKED = re.compile(r"^```python \w+$", re.MULTILINE)
ROLE = re.compile(r":(?:func|class):`([^`]+)`")
SECTION = re.compile(r"(Args|Returns|Raises):$")


def on_page_markdown(markdown: str, *, page, **_) -> str:
    """Links to files of the repository, which the site does not hold, as their text; fences without tests' marks."""

    def text(link: re.Match) -> str:
        if not (HERE / link[2].partition("#")[0]).exists():
            raise ValueError(f"{page.file.src_uri}: wanted a file of the repository, got a link to {link[2]}")
        return link[1]

    return OUTWARD.sub(text, MARKED.sub("```python", markdown))


class Roles(griffe.Extension):
    """A role, as of a function, becomes a link where docs/api.md has the name, and the bare name in a formula."""

    def __init__(self) -> None:
        super().__init__()
        names = re.findall(r"^::: (\S+)$", (HERE / "api.md").read_text(), re.MULTILINE)
        self.places = {name.rpartition(".")[2]: name for name in reversed(names)} | {name: name for name in names}

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is None:
            return
        lines, formulas = [], True
        for line in obj.docstring.value.splitlines():
            if line.strip() and not line.startswith(" "):
                formulas = not SECTION.match(line)
            bare = formulas and line.startswith("    ")
            lines.append(ROLE.sub(r"\1" if bare else self._link, line))
        obj.docstring.value = "\n".join(lines)

    def _link(self, role: re.Match) -> str:
        place = self.places.get(role[1])
        return f"`{role[1]}`" if place is None else f"[`{role[1]}`][{place}]"
