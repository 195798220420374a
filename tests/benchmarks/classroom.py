"""What a seat in a class costs: a process with the panel of ``make voila-class``, moved a step at a time.

Three seats one after the other: seconds until the panel is there, its memory (what it shares with others counted in
parts), and the processor time of a move to a new position. ``seats_per_core`` is how many people can move once a
second.

    python tests/benchmarks classroom
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from machine import arguments, describe, write

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "class" / "playground.ipynb"
MOVES, SEATS = 24, 3
SEAT = """
import json, sys, time
import psutil
cells = json.load(open(sys.argv[1]))["cells"]
*lines, panel = "".join(cells[1]["source"]).splitlines()
exec("\\n".join(lines))
panel = eval(panel)
me, ready = psutil.Process(), time.time()
moves = []
for name in ("damping", "per_layer"):
    control = panel.controls[name]
    for _ in range(int(sys.argv[2]) // 2):
        before = time.process_time()
        if name == "damping":
            control.index += 1  # on and on: a picture that was seen before costs nothing
        else:
            control.value += 1
        time.sleep(0.5)
        moves.append(time.process_time() - before)
assert panel.error == ""
print(json.dumps([ready, me.memory_full_info().pss / 1e6, sorted(moves)[len(moves) // 2]]))
"""


def seat() -> tuple[float, float, float]:
    """Seconds until the panel is there, megabytes, and seconds of processor time for a move."""
    start = time.time()
    command = [sys.executable, "-c", SEAT, str(NOTEBOOK), str(MOVES)]
    ready, memory, move = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return ready - start, memory, move


def main(argv: list[str] | None = None) -> None:
    options = arguments(__doc__, argv)
    torch.set_num_threads(1)
    found = list(zip(*(seat() for _ in range(SEATS)), strict=True))
    ready, memory, move = map(statistics.median, found)
    row = {"seats_measured": SEATS, "ready_s": f"{ready:.2g}", "memory_mb": f"{memory:.3g}", "move_s": f"{move:.2g}",
           "seats_per_core": int(1 / move)}  # fmt: skip
    write(options.out / "classroom.csv", [row], describe())


if __name__ == "__main__":
    main()
