"""What lookup experts add to a trained model, beside further steps of its own FFNs.

The backbone is a folder of `mole train`. Every variant takes the same steps on the same text in
the same order, for each learning rate given; the report is what `make results` reads.

Run: python examples/compare_upcycling.py runs/dense --data runs/novels4k --work runs/upcycling \
    --steps 600 --expert-lr 1e-3,3e-3 --ffn-lr 3e-4,1e-3 --json upcycling.json
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lookup_experts.benchmarks.machine import describe_machine
from lookup_experts.benchmarks.results import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backbone", type=Path, help="a folder that mole train wrote")
    parser.add_argument("--data", type=Path, required=True, help="a folder of mole prepare")
    parser.add_argument(
        "--work", type=Path, required=True, help="the runs' folders; taken up again"
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--experts", type=int, default=4, help="per layer")
    parser.add_argument("--expert-lr", default="1e-3,3e-3", help="learning rates of the experts")
    parser.add_argument("--ffn-lr", default="3e-4,1e-3", help="learning rates of the FFNs alone")
    parser.add_argument("--seed", type=int, default=1, help="another than the backbone's")
    parser.add_argument("--json", type=Path, required=True, help="the report to write")
    arguments = parser.parse_args()

    before = read_summary(arguments.backbone)
    results = [row("dense, before", None, before, before)]
    frozen = f"{arguments.experts} experts per layer, backbone frozen"
    for rate in arguments.expert_lr.split(","):
        options = ["--experts", arguments.experts, "--set", f"training.learning_rate={rate}"]
        after = upcycle(arguments, f"experts-{rate}", options)
        results.append(row(frozen, rate, after, before))
    for rate in arguments.ffn_lr.split(","):
        options = ["--experts", 0, "--train-backbone", "ffn", "--backbone-lr", rate]
        after = upcycle(arguments, f"ffn-{rate}", options)
        results.append(row("its own FFNs alone", rate, after, before))

    report = {
        "what": "upcycling",
        "command": f"python {' '.join(sys.argv)}",
        "machine": describe_machine().to_dict(),
        "results": results,
    }
    write_report(report, arguments.json)


def upcycle(arguments: argparse.Namespace, name: str, options: list[Any]) -> dict[str, Any]:
    """Train one variant, or go on with it; what `summary.json` says at its end."""
    out = arguments.work / name
    if not (out / "summary.json").exists():
        command = [Path(sys.executable).with_name("mole"), "upcycle", arguments.backbone]
        command += ["--data", arguments.data, "--out", out, "--recipe", "upcycle-tiny"]
        command += ["--set", f"training.steps={arguments.steps}"]
        command += ["--set", f"training.seed={arguments.seed}", *options]
        subprocess.run([str(word) for word in command], check=True)
    return read_summary(out)


def read_summary(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def row(
    system: str, learning_rate: str | None, after: dict[str, Any], before: dict[str, Any]
) -> dict[str, Any]:
    return {
        "system": system,
        "learning_rate": None if learning_rate is None else float(learning_rate),
        "steps": after["steps"],
        "tokens": after["tokens"],
        "parameters_trained": after["parameters"]["trained"],
        "validation_loss": after["validation_loss"],
        "gain": before["validation_loss"] - after["validation_loss"],
    }


if __name__ == "__main__":
    main()
