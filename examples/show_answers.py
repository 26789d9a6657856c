"""Prints a file of answers beside the prompts they belong to.

python examples/show_answers.py examples/prompts.jsonl answers.jsonl
"""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.text import Text


def question(row: dict) -> str:
    """The last thing that was said to the model."""
    return row["messages"][-1]["content"] if "messages" in row else str(row["prompt"])


def show(console: Console, row: dict, answer: dict) -> None:
    if "error" in answer:
        console.print(Text(f"{answer['id']}  error: {answer['error']}", style="bold red"))
        return
    label = f"{answer['id']}  [{answer['kv_precision']} KV, {answer['output_tokens']} tokens]"
    console.print(Text(label, style="bold"))
    console.print(Padding(Text(question(row).strip(), style="dim"), (0, 2)))
    for sample in answer.get("samples", [answer]):
        console.print(Padding(Text(f"> {sample['text'].strip()}"), (0, 2)))
    console.print()


def main(prompts: str, answers: str) -> None:
    rows = {}
    for number, line in enumerate(Path(prompts).read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        rows[row.get("id", number)] = row
    console = Console()
    answered = {}
    for line in Path(answers).read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        answered[answer["id"]] = answer
    for row_id, row in rows.items():
        show(console, row, answered[row_id])


if __name__ == "__main__":
    main(*sys.argv[1:])
