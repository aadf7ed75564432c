"""Runs `prepare` on a file system that is too small, and again after it has been enlarged.

    unshare --user --map-root-user --mount python fill_disk.py TEXT TOKENIZER DISK

Prints what happened as JSON. The file system is gone when the process ends.
"""

import json
import subprocess
import sys
from pathlib import Path

from lookup_experts.errors import DiskFullError
from lookup_experts.training import sections
from lookup_experts.training.prepare import prepare


def mount(disk: str, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], check=True)


def main(text: str, tokenizer: str, disk: str) -> None:
    sections.PIECE_CHARACTERS, sections.SECTION_CHARACTERS = 3000, 1000
    # The tokenizer takes 16 kB and a piece of 3,000 characters 8 kB.
    mount(disk, "size=60k")
    report: dict[str, object] = {}
    out = Path(disk) / "out"
    try:
        prepare([text], tokenizer=tokenizer, out=out, num_workers=2)
    except DiskFullError as error:
        report["while_writing"] = str(error)
    report["pieces_kept"] = len(list((out / "pieces").glob("*.safetensors")))
    mount(disk, "remount,size=10m")
    prepare([text], tokenizer=tokenizer, out=out, num_workers=1)
    report["manifest"] = (out / "manifest.json").read_text()
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
