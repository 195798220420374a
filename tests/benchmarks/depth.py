"""What `10_depth` shows, measured: steps and conjugate gradients of every preconditioner on networks of 2 to 33 layers.

Four networks at two moments, five seeds, and a map over λ. Each case is a few rows that are appended to the table when
they are there: a run that was stopped goes on where it was, and a table that is whole is left alone. Numbers depend on
no clock; delete the table to measure again.

    python tests/benchmarks depth [--seconds 240]     # stop after so many seconds; once more goes on
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import torch
from machine import arguments, clock, describe

from kfac_viz import parameters
from kfac_viz.show.threads import one_thread
from kfac_viz.studies import depth
from kfac_viz.studies.common.options import entry, remember

COLUMNS = (*depth.COLUMNS, "options")


def extend(table: Path, wanted: dict[depth.Case, bool], seconds: float = float("inf")) -> float:
    """Append what the table lacks, for so many seconds; returns those that it took.

    A case of which only the iterations are there is measured again where all of it is wanted: its rows come last, and
    the last ones count.
    """
    if not table.exists():
        table.write_text(",".join(COLUMNS) + "\n")
    there = depth.read(table)
    todo = [case for case, whole in wanted.items() if not there.get(case) or whole and not depth.whole(there[case])]
    todo.sort(key=lambda case: (case.seed, case.data, case.steps, case.layers))  # a network stays in the cache
    start = clock()
    with one_thread(), table.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        options = remember(entry("step", {}), table.parent)
        for i, case in enumerate(todo, 1):
            if clock() - start >= seconds:
                print(f"{len(todo) - i + 1} cases are left; run again to go on.")
                break
            found = depth.rows(case, depth.measure(case, wanted[case]))
            writer.writerows(row | {"options": options} for row in found)
            file.flush()
            print(f"{i}/{len(todo)} {case.data}, {case.layers} layers, after {case.steps} steps, seed {case.seed}, "
                  f"λ = {case.damping_share:g} λ_max: {clock() - start:.0f} s", flush=True)  # fmt: skip
    return clock() - start


def main(argv: list[str] | None = None) -> None:
    options = arguments(__doc__, argv)
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=float("inf"))
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    table, record = options.out / "depth.csv", options.out / "depth.json"
    published = {name: p.default for name, p in parameters.read(depth.depth.run).items()}
    wanted = depth.cases(published) | depth.cases(published | {"data": "planted_bn"})  # one more map over λ
    seconds = extend(table, wanted, parser.parse_known_args(argv)[0].seconds)
    before = json.loads(record.read_text())["seconds"] if record.exists() else 0
    facts = {"command": "python tests/benchmarks depth", **describe(), "seconds": round(before + seconds)}
    record.write_text(json.dumps(facts, indent=2) + "\n")
    print(f"{table}: {facts}")


if __name__ == "__main__":
    main()
