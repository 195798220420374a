"""How far the notebooks are: a bar with the time left in a terminal, and a line for each start and end elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence


class Progress:
    """Counts the cells of all notebooks, as a context.

    Args:
        names: of the notebooks.
        cells: how many each has.
    """

    def __init__(self, names: Sequence[str], cells: Sequence[int]) -> None:
        from tqdm import tqdm

        self.names, self.cells, self.done = names, cells, [0] * len(names)
        self.running: dict[int, None] = {}
        quiet = not (names and sys.stdout.isatty() and sys.stderr.isatty())
        self.bar = tqdm(total=sum(cells), unit="cell", disable=quiet, smoothing=0, dynamic_ncols=True, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def start(self, index: int, cell: int) -> None:
        """A notebook has come to this cell, counted from 1."""
        if index not in self.running:
            self.running[index] = None
            if self.bar.disable:
                print(f"{self.names[index]}: started", flush=True)
        self._reach(index, cell - 1)

    def end(self, index: int, word: str) -> None:
        """A notebook has ended; the word says how."""
        self.running.pop(index, None)
        self._reach(index, self.cells[index])
        self.bar.write(f"{self.names[index]}: {word}", file=sys.stdout)
        sys.stdout.flush()

    def _reach(self, index: int, cell: int) -> None:
        self.bar.set_postfix_str(", ".join(self.names[i] for i in self.running), refresh=False)
        self.bar.update(cell - self.done[index])
        self.done[index] = cell
