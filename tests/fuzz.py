"""Random tries of the public API: whatever it is given, it answers rightly or refuses in a sentence of its own.

One seed is one small random case of one kind, held against oracles in float64 that share no code with the package.

    python tests/fuzz.py --tries 100000 --jobs 2
    python tests/fuzz.py --only capture --seed 17 --tries 1     # one try again, with its traceback

A failure is a *raw error*, an exception that is no ValueError or TypeError raised by a ``raise`` of this package; or a
*silent difference*, something accepted whose result is wrong, NaN or inf, or something refused that left a trace.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import torch  # noqa: E402
from fuzzing.arguments import arguments  # noqa: E402
from fuzzing.captures import capture  # noqa: E402
from fuzzing.judge import Hanging, Outcome, Raw, Refused, Try, gist  # noqa: E402
from fuzzing.levels import twolevel, worth  # noqa: E402
from fuzzing.operators import operators  # noqa: E402
from fuzzing.parts import losses, partitions  # noqa: E402
from fuzzing.training import states, training  # noqa: E402

PATIENCE = 30  # seconds that one try may take before it counts as hanging
KINDS: dict[str, Callable[[Try], None]] = {
    function.__name__: function
    for function in (arguments, capture, operators, twolevel, worth, partitions, losses, training, states)
}


def attempt(kind: str, seed: int) -> Outcome:
    """One try of one kind."""
    t = Try(kind, seed)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            KINDS[kind](t)
            t.outcome.accepted = not t.refusals
        except Refused as error:
            if t.benign:
                t.wrong(f"an ordinary case is refused: {gist(str(error.__cause__))}", error.__cause__)
        except Raw as error:
            t.record(error.__cause__)
        except Hanging as error:
            t.record(error)
        except Exception as error:  # a mistake in this file
            t.outcome.failures.append(("fuzz", f"{type(error).__name__} {gist(str(error))}"))
            t.outcome.details.append("".join(traceback.format_exception(error)))
    t.outcome.refused = t.refusals > 0
    return t.outcome


def drawn_kind(seed: int) -> str:
    return random.Random(f"kind {seed}").choice(list(KINDS))


@contextlib.contextmanager
def _patience() -> Iterator[Callable[[int], object]]:
    """Inside, a function that sets the seconds until what runs is interrupted, where the system can do that."""

    def ring(*_: object) -> None:
        raise Hanging(f"no answer within {PATIENCE} seconds")

    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield lambda seconds: None
        return
    previous = signal.signal(signal.SIGALRM, ring)
    try:
        yield signal.alarm
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def run(seeds: range, only: str | None = None) -> list[Outcome]:
    """Tries of these seeds, one after another in this process."""
    with _patience() as wait:
        outcomes = []
        for seed in seeds:
            wait(PATIENCE)
            outcomes.append(attempt(only or drawn_kind(seed), seed))
    return outcomes


def _chunk(work: tuple[range, str | None]) -> list[Outcome]:
    torch.set_num_threads(1)
    outcomes = run(*work)
    for outcome in outcomes:
        outcome.details = [text[-2000:] for text in outcome.details]
    return outcomes


@dataclass
class Report:
    """Counts per kind, and every distinct failure with the first try that shows it."""

    counts: dict[str, Counter] = field(default_factory=dict)
    failures: dict[tuple[str, str], list[Outcome]] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        count = self.counts.setdefault(outcome.kind, Counter())
        sorts = {sort for sort, _ in outcome.failures}
        count.update(tries=1, accepted=outcome.accepted, refused=outcome.refused)
        count.update(raw="raw" in sorts, silent="silent" in sorts)
        for sort, what in outcome.failures:
            self.failures.setdefault((sort, what), []).append(outcome)

    def __str__(self) -> str:
        heads = ("tries", "accepted", "refused", "raw", "silent")
        names = ("tries", "accepted", "refused by a sentence", "raw errors", "silent differences")
        lines = [f"{'kind of try':14}" + "".join(f"{name:>{len(name) + 3}}" for name in names)]
        rows = sorted(self.counts.items()) + [("all", sum(self.counts.values(), Counter()))]
        for kind, count in rows:
            lines.append(f"{kind:14}" + "".join(f"{count[h]:>{len(n) + 3}}" for h, n in zip(heads, names, strict=True)))
        for (sort, what), outcomes in sorted(self.failures.items(), key=lambda item: -len(item[1])):
            again = f"--only {outcomes[0].kind} --seed {outcomes[0].seed} --tries 1"
            lines.append(f"\n{sort}, {len(outcomes)} times: {what}\n    python tests/fuzz.py {again}")
            if sort != "silent":
                detail = outcomes[0].details[outcomes[0].failures.index((sort, what))]
                said = [line for line in detail.splitlines() if re.match(r"[\w.]*(Error|Hanging|Mishap)\b", line)]
                lines.append(f"    {said[-1][:150] if said else ''}")
        return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Random tries of the public API.")
    parser.add_argument("--tries", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first try; the others count up from it")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--only", choices=sorted(KINDS), help="one kind of try")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many")
    args = parser.parse_args(argv)
    report, started, seeds = Report(), time.monotonic(), range(args.seed, args.seed + args.tries)
    chunks = [(seeds[i : i + 100], args.only) for i in range(0, len(seeds), 100)]
    with contextlib.ExitStack() as stack:
        if args.jobs > 1 and len(chunks) > 1:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(min(args.jobs, len(chunks))))
            results = pool.imap_unordered(_chunk, chunks)
        else:
            results = map(_chunk, chunks)
        for outcomes in results:
            for outcome in sorted(outcomes, key=lambda o: o.seed):
                report.add(outcome)
                if args.tries == 1:
                    print(*outcome.details, sep="\n")
            if time.monotonic() - started > 60 * args.minutes:
                break
    print(report)
    print(f"\n{len(report.failures)} distinct failures in {time.monotonic() - started:.0f} seconds.")
    return bool(report.failures)


if __name__ == "__main__":
    sys.exit(main())
