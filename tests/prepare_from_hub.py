"""Prepares data sets of the hub that the environment names, one after the other.

    python prepare_from_hub.py TOKENIZER OUT NAME...

Prints a JSON object: for each name the folder, or the error.
"""

import json
import sys
from pathlib import Path

from lookup_experts.errors import UserError
from lookup_experts.training.prepare import prepare


def main(tokenizer: str, out: Path, names: list[str]) -> None:
    report = {}
    for number, name in enumerate(names):
        folder = out / str(number)
        try:
            prepare([name], tokenizer=tokenizer, out=folder, validation=0, num_workers=1)
            report[name] = str(folder)
        except UserError as error:
            report[name] = str(error)
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
