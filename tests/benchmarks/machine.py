"""What the benchmarks share: the machine's name, its matrix-product rate, and a tidy table on screen and on disk."""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from pathlib import Path

import torch


def arguments(doc: str, argv: list[str] | None) -> argparse.Namespace:
    """``--device`` and ``--out``, which every benchmark takes."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "figures" / "benchmarks")
    return parser.parse_known_args(argv)[0]


def clock(device: str = "cpu") -> float:
    """Seconds: of this process's own work on a single core, which neighbours on the machine do not disturb, or
    else by the wall."""
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def describe(device: str = "cpu") -> dict[str, str]:
    """Columns that say where and with what a row was measured."""
    if device != "cpu":
        name = torch.cuda.get_device_name(device)
    else:
        cpu = platform.processor() or platform.machine()
        info = Path("/proc/cpuinfo")
        if info.exists():
            names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
            cpu = names[0] if names else cpu
        n = torch.get_num_threads()
        name = f"{n} cores of {cpu}" if n > 1 else f"1 core of {cpu}, processor time"
    return {"machine": name, "torch": torch.__version__}


def rate(device: str = "cpu", n: int = 1000, repeats: int = 15) -> float:
    """Floating point operations per second of a float32 product of two n×n matrices, median."""
    a = torch.rand(n, n, device=device)
    times = []
    for _ in range(repeats):
        start = clock(device)
        a @ a
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(clock(device) - start)
    return 2 * n**3 / statistics.median(times)


def show(rows: list[dict]) -> None:
    """Print rows as a table."""
    columns = list(rows[0])
    widths = [max(len(c), *(len(str(row[c])) for row in rows)) for c in columns]
    for row in (dict(zip(columns, columns, strict=True)), *rows):
        print("  ".join(str(row[c]).ljust(w) for c, w in zip(columns, widths, strict=True)))


def write(path: Path, rows: list[dict], machine: dict, *, quiet: bool = False) -> None:
    """Print the rows as a table unless ``quiet``, and write them, with the machine's columns, as CSV."""
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    if not quiet:
        show(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *machine], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **machine} for row in rows)
    print(f"written to {path}\n", flush=True)


class Table:
    """A CSV that grows run by run; a run that is in it is not made again.

    Args:
        key: the columns that tell one run from another.
        machine: columns that every row has.
        deadline: of ``time.monotonic``, after which no run is begun.
    """

    def __init__(self, path: Path, key: tuple[str, ...], machine: dict, deadline: float) -> None:
        self.path, self.key, self.machine, self.deadline = path, key, machine, deadline
        self.rows: dict[tuple[str, ...], list[dict[str, str]]] = {}
        if path.exists():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    self.rows.setdefault(self._key(row), []).append(row)

    def _key(self, setting: dict) -> tuple[str, ...]:
        return tuple(str(setting[name]) for name in self.key)

    def missing(self, **setting: object) -> bool:
        """Whether the run with this setting is to be made; ends the program where its time is over."""
        if self._key(setting) in self.rows:
            return False
        if time.monotonic() > self.deadline:
            raise SystemExit("The time is over; run it again to go on.")
        return True

    def found(self, **setting: object) -> list[dict[str, str]]:
        """The rows of a run."""
        return self.rows[self._key(setting)]

    def add(self, rows: list[dict], **setting: object) -> None:
        """Append the rows of a run, and print the last."""
        rows = [{**setting, **row, **self.machine} for row in rows]
        columns = list(rows[0])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            with self.path.open(newline="") as file:
                columns = next(csv.reader(file))  # whose order is kept
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)
        self.rows[self._key(setting)] = [{name: str(value) for name, value in row.items()} for row in rows]
        print(*(value for name, value in rows[-1].items() if name not in self.machine), flush=True)
