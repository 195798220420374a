"""With which options a table was measured, and whether the same call would mean the same today.

Every row of a table in figures/benchmarks names in its column ``options`` an entry of options.json: the ``optimizer``,
the options that its script ``given``, those that the row's own ``columns`` hold, what stands ``beside`` the curvature,
and all options as they were ``resolved`` when the row was measured.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from ... import KFAC, TwoLevel, TwoLevelKFAC
from ...problems import Problem
from ...train.options import NAMES, Options
from ...train.search import LENGTHS_TRIED
from .measured import MEASURED, measured_rows

Entry = dict[str, Any]
FILE = "options.json"
OF_A_GROUP = ("lr", "plain_lr", "momentum", "weight_decay", "maximize")
OF_THE_COARSE_LEVEL = ("coarse", "total", "per_layer", "correction", "coarse_operator", "coarse_every")
# Options that rows do not know yet, with the value that says what was done before.
BEFORE: dict[str, Any] = {"factors": "kfac", "first_level": "kfac", "search": "first", "iterations": 0}
GONE: dict[str, Any] = {"overshoot": "count"}  # options that are no more, with the value that says what is done now
BESIDE = {  # how the optimizer treats these parts of a model; no option says it
    "batch norm": "statistics of the batch held constant",
    "plain steps": "Adam's rule",  # of parameters without curvature
}


def resolved(optimizer: str, given: Mapping[str, Any], beside: Collection[str] = ()) -> dict[str, Any]:
    """Every option that has an effect in such a run, with today's defaults.

    Args:
        optimizer: ``"TwoLevelKFAC"``, ``"Published"``, ``"Method"`` and ``"Rival"`` (of the differential equations),
            ``"ladder"``, ``"step"`` (linear algebra alone), or one of PyTorch's, of which all that is known are the
            options given.
        given: by name.
        beside: of :data:`BESIDE`.

    >>> resolved("TwoLevelKFAC", {"likelihood": "gaussian", "step_rule": "line_search"})["lr"]
    1.0
    """
    from ..pde.descent import Method  # here, since these studies ask whether their tables are outdated
    from ..pde.rivals import Rival
    from ..published.optimizer import Published

    if optimizer == "TwoLevelKFAC":
        return _of_two_levels(given, beside)
    if optimizer == "Published":
        return _defaults(Published) | dict(given)
    levels = {"rule": _defaults(KFAC)["rule"]}
    if optimizer == "Method":
        return Method(**given)._asdict() | levels | {"lengths tried": len(LENGTHS_TRIED)}
    if optimizer == "Rival":
        return Rival(**given)._asdict() | {"lengths tried": len(LENGTHS_TRIED)}
    if optimizer == "ladder":
        step = Options(likelihood="categorical", step_rule=given["step_rule"])
        return dict(given) | {"momentum": step.usual("momentum"), "correction": _defaults(TwoLevel)["correction"]}
    if optimizer == "step":
        return levels | {"correction": _defaults(TwoLevel)["correction"], "lr": _defaults(Problem.trained)["lr"]}
    return dict(given)


def _of_two_levels(given: Mapping[str, Any], beside: Collection[str]) -> dict[str, Any]:
    options = Options.read({name: value for name, value in given.items() if name not in OF_A_GROUP})
    group = {name: _defaults(TwoLevelKFAC)[name] for name in OF_A_GROUP}
    group |= {name: options.usual(name) for name in ("lr", "momentum")}
    group |= {name: given[name] for name in OF_A_GROUP if name in given}
    plain_lr = group.pop("plain_lr")
    found = group | {name: getattr(options, name) for name in NAMES} | {name: BESIDE[name] for name in beside}
    if "plain steps" in beside:
        found["plain steps"] += f" with plain_lr = {plain_lr}"
    unused = {
        *(OF_THE_COARSE_LEVEL[:2] + OF_THE_COARSE_LEVEL[3:] if not options.columns else ()),
        *(("kl_clip",) if options.step_rule != "kl_clip" else ()),
        *(("search",) if options.step_rule != "line_search" else ()),
        *(("samples",) if options.fisher != "mc" else ()),
    }
    return {name: value for name, value in found.items() if name not in unused}


def _defaults(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def entry(optimizer: Any, given: Mapping[str, Any], columns: Collection[str] = ()) -> Entry:
    """What a run with this optimizer, an object or a name, is to remember; ``columns`` are those of its row."""
    name = optimizer if isinstance(optimizer, str) else type(optimizer).__name__
    beside = _beside(optimizer) if isinstance(optimizer, TwoLevelKFAC) else []
    given = {key: value for key, value in given.items() if key not in columns}
    now = {key: value for key, value in resolved(name, given, beside).items() if key not in columns}
    return json.loads(json.dumps(
        {"optimizer": name, "given": given, "columns": list(columns), "beside": beside, "resolved": now}, default=list
    ))  # fmt: skip


def _beside(optimizer: TwoLevelKFAC) -> list[str]:
    covered = {id(p) for own in optimizer.partition.parameters(optimizer.model) for p in own}
    every = [p for group in optimizer.param_groups for p in group["params"]]
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in optimizer.model.modules())
    there = (norms, any(id(p) not in covered for p in every))
    return [name for name, is_there in zip(BESIDE, there, strict=True) if is_there]


def remember(found: Entry, folder: Path = MEASURED) -> str:
    """The name of this entry in the folder's options.json, where it is written if it is new."""
    name = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:8]
    file = folder / FILE
    entries = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if name not in entries:
        entries[name] = found
        lines = (f"{json.dumps(key)}: {json.dumps(entries[key], ensure_ascii=False)}" for key in sorted(entries))
        file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8", newline="\n")
    return name


@cache
def entries(folder: Path = MEASURED) -> dict[str, Entry]:
    """The entries of options.json, by name."""
    return json.loads((folder / FILE).read_text(encoding="utf-8"))


def changed(found: Entry) -> dict[str, tuple[Any, Any]]:
    """The options that such a call would resolve otherwise today: what they were and what they are, None for absent.

    >>> then = entry("TwoLevelKFAC", {"likelihood": "gaussian"})
    >>> changed(then), changed(then | {"resolved": then["resolved"] | {"damping": 0.2}})
    ({}, {'damping': (0.2, 0.1)})
    """
    try:
        now = resolved(found["optimizer"], found["given"], found["beside"])
    except (TypeError, ValueError):  # an option or a value that is no more
        now = {}
    now = json.loads(json.dumps(now, default=list))
    then = {name: value for name, value in BEFORE.items() if name in now} | found["resolved"]
    then = {name: value for name, value in then.items() if name in now or GONE.get(name) != value}
    names = [name for name in {**then, **now} if name not in found["columns"]]
    return {name: (then.get(name), now.get(name)) for name in names if then.get(name) != now.get(name)}


@cache
def outdated(table: str) -> dict[str, dict[str, tuple[Any, Any]]]:
    """The optimizers of a measured table whose options have changed since, each with its changes."""
    found: dict[str, dict[str, tuple[Any, Any]]] = {}
    for name in dict.fromkeys(row["options"] for row in measured_rows(table)):
        if changes := changed(entries()[name]):
            found.setdefault(entries()[name]["optimizer"], {}).update(changes)
    return found


def told(*tables: str) -> str:
    """What the second line of a figure adds where a table is older than today's options; empty where none is."""
    found: dict[str, dict[str, None]] = {}
    for table in tables:
        for optimizer, changes in outdated(table).items():
            found.setdefault(optimizer, {}).update(dict.fromkeys(changes))
    return "".join(f"; {optimizer} before changes in {', '.join(names)}" for optimizer, names in found.items())
