"""The processor and the linear algebra on which numbers were computed: what their last digits depend on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path


@cache
def made_on() -> dict[str, str]:
    """``processor``, with the widest instructions that PyTorch uses, and ``BLAS``, of PyTorch, NumPy and SciPy."""
    import scipy.linalg  # noqa: F401  loads the BLAS that SciPy brings, beside NumPy's
    import torch
    from threadpoolctl import threadpool_info

    found = re.search(r"Math Kernel Library Version (\S+)", torch.__config__.show())
    name = f"MKL {found[1].partition('-')[0]}" if found else re.search(r"BLAS_INFO=(\w+)|$", torch.__config__.show())[1]
    own = " ".join(filter(None, [name or "unknown", os.environ.get("MKL_CBWR" if found else "")]))
    others = {f"{library['internal_api']} {library['version']} {library.get('architecture') or ''}".strip()
              for library in threadpool_info() if library["user_api"] == "blas"}  # fmt: skip
    widest = torch.backends.cpu.get_cpu_capability()
    return {"processor": f"{_processor()}, {widest}", "BLAS": ", ".join([own, *sorted(others - {own})])}


def _processor() -> str:
    """The name that the maker gives it; its architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"^model name\s*: *(.+)$", info.read_text(), re.MULTILINE)):
        return found[1].strip()
    if sys.platform == "darwin":
        told = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        if told.stdout.strip():
            return told.stdout.strip()
    return platform.processor() or platform.machine()
