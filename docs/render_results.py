"""Writes the tables of results into the Markdown files, from the JSON files in `docs/results`.

    python docs/render_results.py          # or: make results

A table stands between two comments, and the prose around them is left alone:

    <!-- results: decode decode.json decode-no-cache.json -->
    ...
    <!-- /results -->

The first word is a renderer of `result_tables.py`, the others are files. Under each table (but
not in the README) stands how each of its files was made: command, machine, versions, commit.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from result_tables import RENDERERS

from lookup_experts import console
from lookup_experts.errors import UserError, unknown_name

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS / "results"
PAGES = (DOCS.parent / "README.md", DOCS / "results.md", DOCS / "serving.md")
BLOCK = re.compile(
    r"(?P<begin><!-- results: (?P<name>[\w-]+)(?P<files>( [\w.-]+\.json)+) -->\n)"
    r".*?(?P<end><!-- /results -->)",
    re.DOTALL,
)


def provenance(file: str, report: Mapping[str, Any]) -> str:
    """How a file was made, in one line."""
    machine = report["machine"]
    versions = ", ".join(
        f"{program} {version}"
        for program, version in machine["versions"].items()
        if program != "lookup-experts"
    )
    place = [machine["cpu"], f"{machine['cores']} cores"]
    if "vector_instructions" in machine:
        place.append(machine["vector_instructions"])
    if "memory_bytes" in machine:
        place.append(f"{machine['memory_bytes'] / 1e9:.0f} GB")
    if machine.get("gpu"):
        place.append(machine["gpu"])
    commit = machine.get("commit")
    made_by = f"commit {commit}" if commit else f"version {machine['versions']['lookup-experts']}"
    parts = [f"`{report['command']}`", ", ".join(place), versions, made_by]
    if "date" in machine:
        parts.append(machine["date"][:10])
    return f"[{file}](results/{file}): {'; '.join(parts)}."


def render(page: str, *, with_provenance: bool, results: Path = RESULTS) -> str:
    """A page with all its tables written anew.

    Args:
        page: Markdown.
        with_provenance: say under each table how its files were made.
        results: the folder of the files.

    Raises:
        UserError: a comment is malformed, or names no renderer or no file.
    """

    def block(match: re.Match[str]) -> str:
        name, files = match["name"], match["files"].split()
        if name not in RENDERERS:
            raise unknown_name("renderer", name, RENDERERS)
        for file in files:
            if not (results / file).is_file():
                raise UserError(f"There is no {file} in {results}; a table asks for it.")
        reports = [json.loads((results / file).read_text()) for file in files]
        parts = [RENDERERS[name](reports)]
        if with_provenance:
            lines = map(provenance, files, reports)
            parts.append("\n".join(f"- {line}" for line in lines))
        return match["begin"] + "\n\n".join(parts) + "\n" + match["end"]

    rendered, num_blocks = BLOCK.subn(block, page)
    if num_blocks != page.count("<!-- results:") or num_blocks != page.count("<!-- /results -->"):
        raise UserError(
            "A comment of results is malformed: write <!-- results: RENDERER FILE.json ... -->, a "
            "line for each of the two comments."
        )
    return rendered


def main() -> None:
    """Write all pages anew."""
    for path in PAGES:
        before = path.read_text()
        after = render(before, with_provenance=path.name != "README.md")
        if after != before:
            path.write_text(after)
            console.say(f"{path.relative_to(DOCS.parent)}: tables written anew.")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"render_results: {error}")
