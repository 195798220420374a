"""Run the benchmarks named, or all of them: ``python tests/benchmarks [NAME …] [--device cuda]``.

Each measures on this machine, prints a table and writes it to ``figures/benchmarks/NAME_DEVICE.csv``.
"""

import importlib
import sys
from pathlib import Path

here = Path(__file__).parent
known = sorted(p.stem for p in here.glob("*.py") if p.stem not in ("__main__", "machine", "optimizers", "tuning"))
names = [a for a in sys.argv[1:] if a in known] or known
for name in names:
    print(f"== {name}", flush=True)
    importlib.import_module(name).main([a for a in sys.argv[1:] if a not in known])
