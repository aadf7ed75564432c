"""What a run has measured: its clock, its rates, its history on disk."""

import json
import math
from pathlib import Path
from time import perf_counter
from typing import Any

from lookup_experts.training.files import atomic_write


class Stopwatch:
    """Seconds spent on training steps; validation and checkpoints are left out."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self._mark = perf_counter()

    def lap(self) -> None:
        """Count the time since the last mark."""
        now = perf_counter()
        self.seconds += now - self._mark
        self._mark = now

    def skip(self) -> None:
        """Don't count the time since the last mark."""
        self._mark = perf_counter()


def tokens_per_second(num_tokens: int, seconds: float) -> float:
    """A rate; 0 where no time has passed."""
    return num_tokens / seconds if seconds > 0 else 0.0


def perplexity(loss: float) -> float:
    """e to the mean loss per token, in nats."""
    return math.exp(loss) if loss < 700 else math.inf  # above, exp overflows


class History:
    """The lines of history.jsonl, on disk as soon as they are known.

    A line holds `step`, `tokens`, `seconds` (of training, since the beginning) and either `loss`
    (of the language model, the mean since the line before) and `lr`, or `validation_loss` and
    `validation_perplexity`; `load_balance_loss` and `z_loss`, without their coefficients, stand
    beside the `loss` of a model that trains with them.

    Args:
        path: the file; what it says about steps after `step` is not read.
        step: where the run is taken up.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        # Begun anew, a run has measured nothing yet, not even before its first step.
        self.lines = [line for line in _read_lines(path) if line["step"] <= step > 0]

    def drop_later_lines(self) -> None:
        """Make the file agree with `lines`."""
        with atomic_write(self._path) as file:
            file.writelines(f"{json.dumps(line)}\n".encode() for line in self.lines)

    @property
    def seconds(self) -> float:
        """Of training, up to the last line."""
        return float(self.lines[-1]["seconds"]) if self.lines else 0.0

    def append(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def last(self, key: str) -> Any:
        """The latest value of a key, or None."""
        return next((line[key] for line in reversed(self.lines) if key in line), None)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines but one that a kill cut off."""
    text = path.read_text() if path.exists() else ""
    complete = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in complete.splitlines()]
