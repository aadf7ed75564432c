"""A few made-up rows of each of the paper's tasks, as local copies of their data sets."""

import gzip
import json
from pathlib import Path
from typing import Any

from lookup_experts.evaluation.tasks import TASKS

NOUNS = ("fox", "dog", "table", "record", "number", "time")


def _row(task: str, number: int) -> dict[str, Any]:
    noun, other = NOUNS[number % len(NOUNS)], NOUNS[(number + 1) % len(NOUNS)]
    question = f"what did the {noun} see"
    story = f"Once upon a time a {noun} saw the {other}."
    if task.startswith("arc_"):
        choices = {"text": [noun, other, "the lazy one", "a small one"], "label": list("ABCD")}
        return {"question": question, "choices": choices, "answerKey": "ABCD"[number % 4]}
    if task == "boolq":
        return {"passage": story, "question": question, "label": number % 2, "idx": number}
    if task == "hellaswag":
        endings = [f"jumps over the {noun}.", f"was read by the {other}.", "ends.", "was small."]
        return {
            "activity_label": "Stories",
            "ctx_a": story,
            "ctx_b": f"the {noun}",
            "endings": endings,
            "label": str(number % 4),
        }
    if task == "piqa":
        return {"goal": question, "sol1": noun, "sol2": f"the {other}", "label": number % 2}
    if task == "race":
        problem = {"question": "It saw the  _  .", "options": list(NOUNS[:4]), "answer": "B"}
        return {"article": story, "problems": str([problem, problem])}
    if task == "social_iqa":
        answers = {"answerA": noun, "answerB": other, "answerC": "no one"}
        return {"context": story, "question": question, **answers, "label": str(1 + number % 3)}
    return {"text": f"{story} And then the {other} saw the {noun}"}


def write_tasks(folder: Path, num_rows: int = 3) -> Path:
    """Local copies of all tasks, some packed and some not."""
    folder.mkdir(parents=True, exist_ok=True)
    for position, task in enumerate(TASKS.values()):
        lines = (json.dumps(_row(task.name, number)) + "\n" for number in range(num_rows))
        text = "".join(lines).encode()
        if position % 2:
            (folder / f"{task.file}.jsonl").write_bytes(text)
        else:
            (folder / f"{task.file}.jsonl.gz").write_bytes(gzip.compress(text))
    return folder
