"""Draws the pictures of `docs/batch.md`: a job on a terminal, and its report on a wide screen and on a phone.

    python docs/batch_pictures.py

The job is a real one, with SmolLM2-135M. It runs on a pseudo-terminal, of which the picture shows the progress bar when
half of the rows were answered, and what stood there in the end. The report is drawn by Chromium, without a network.
"""

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

DOCS = Path(__file__).parent
COLUMNS, ROWS = 120, 96
COMMAND = ["batch", "--model", "smollm2-135m", "-i", "prompts.jsonl", "-o", "answers.jsonl", "--report", "report.html"]
COMMAND += ["--kv-memory", "64MiB"]
ERASE_LINE, ERASE_BAR = "\r\x1b[2K", "\x1b[1A\x1b[2K"
"""With which rich begins each drawing of its bar, and takes the last one away."""
TOPICS = ("rain", "bread", "glass", "salt", "wind", "silk", "iron", "tea", "clocks", "maps", "bridges", "wool")


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("Chromium is not installed; Debian has it as chromium")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_prompts(folder / "prompts.jsonl")
        draw_terminal(recorded(folder), DOCS / "batch_terminal.svg")
        draw_report(chromium, folder, DOCS / "batch_report.png")


def write_prompts(path: Path) -> None:
    """Questions with a common beginning, in all precisions, of different lengths; and two rows that are wrong."""
    rows = []
    for number in range(ROWS):
        content = f"{('Explain', 'Describe', 'Praise')[number % 3]} {TOPICS[number % len(TOPICS)]} in a few sentences."
        row = {"id": number, "messages": [{"role": "user", "content": content}], "temperature": 0.7}
        rows.append(row | {"max_tokens": 24 + 8 * (number % 11), "kv_precision": ("bf16", "int8", "int4")[number % 3]})
    rows[40]["temperature"] = -1
    rows[70]["kv_precision"] = "int5"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def recorded(folder: Path) -> str:
    """What the command writes to a terminal, with its control sequences."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
    command = [sys.executable, "-m", "fineserve_jax.entrypoints.cli", *COMMAND]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=child, stdout=child, stderr=child)
    os.close(child)
    output = b""
    while process.poll() is None or output:
        try:
            piece = os.read(parent, 1 << 16)
        except OSError:  # the other end is closed
            break
        output += piece
    if process.wait():
        sys.exit(f"the job has ended with status {process.returncode}: {output.decode(errors='replace')}")
    return output.decode()


def draw_terminal(output: str, path: Path) -> None:
    *bars, last = output.split(ERASE_LINE)
    half = next(bar for bar in bars if (done := re.search(rf"(\d+)/{ROWS}", bar)) and 2 * int(done[1]) >= ROWS)
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(f"$ fineserve-jax {' '.join(COMMAND)}", highlight=False, soft_wrap=True)
    for part in (half, "", last.split(ERASE_BAR)[-1].replace("\r", "")):
        console.print(Text.from_ansi(part), soft_wrap=True)
    console.save_svg(str(path), title="fineserve-jax batch")


def draw_report(chromium: str, folder: Path, path: Path) -> None:
    """The page in two frames: 1,000 pixels wide, and 390."""
    style = "flex:none;border:1px solid #999;height:1000px;margin:8px"
    frames = "".join(f'<iframe src="report.html" style="{style};width:{width}px"></iframe>' for width in (1000, 390))
    (folder / "frames.html").write_text(f'<!doctype html><body style="margin:0;display:flex">{frames}')
    picture = folder / "picture.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--hide-scrollbars"]
    flags += [f"--user-data-dir={folder / 'profile'}", "--window-size=1428,1018", f"--screenshot={picture}"]
    subprocess.run([chromium, *flags, (folder / "frames.html").as_uri()], check=True, capture_output=True, timeout=120)
    with Image.open(picture) as image:
        image.convert("RGB").quantize(64).save(path, optimize=True)


if __name__ == "__main__":
    main()
