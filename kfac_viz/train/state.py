"""An optimizer as tensors, numbers and text that can be saved, and back, all of it checked before any is used."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from ..method.checks import check_damping, warn
from ..method.columns import LocalSpace, RankOneSpace
from ..method.fisher import Fisher
from ..method.kfac import KFAC
from ..method.kronecker import KroneckerFactors
from ..method.kronecker_fisher import KroneckerFisher
from ..method.one_hot import OneHot, Rows
from ..method.partition import Layer, Partition
from ..method.two_level import TwoLevel
from .curvature import RunningCurvature, first_level_of
from .layout import Layout
from .options import SHAPING, Options, check_group
from .plain import MOMENTS, no_moments
from .statistics import Part
from .template import Array, Each, Maybe, read

VERSION = 2  # of what is saved; 1 had the curvature beside the groups, and no plain_lr, options or swapped uses


def saved(c: RunningCurvature) -> dict[str, Any]:
    """All of a running curvature as tensors, numbers, strings, lists and dictionaries."""
    return {
        "version": VERSION,
        "layers": {layer.name: list(layer.shape) for layer in c.partition.layers},
        "options": c.options.shaping,
        "damping": c.damping,
        "steps": c.step,
        "diagnostics": dict(c.counters),
        "marks": [c.observed_at, c._built_at, c._coarse_at, c._stale, c._coarse_stale],
        "factors": {name: [A, c.factors.G[name]] for name, A in c.factors.A.items()},
        "inverses": {name: list(pair) for name, pair in c.factors.inverses.items()},
        "weights": dict(c.factors.weight),
        "newest": sorted(c.factors.newest),
        "window": [{"batch": part.batch, "N": part.N, **_vectors(part.F)} for part in c.window.parts],
        "level": None if c._T is None else _saved_levels(c._T),
    }


def _saved_levels(T: TwoLevel) -> dict[str, Any]:
    """The preconditioner of the last refresh, as :func:`_level` describes it."""
    columns = list(T.Z.blocks) if isinstance(T.Z, LocalSpace) else [list(pair) for pair in T.Z.factors]
    levels = {"damping": T.damping, "space": T.Z.name, "columns": columns, **_vectors(T.A.operator)}
    if type(T.M) is KFAC:  # every other first level is made of the vectors
        levels |= {"A": list(T.M.factors.A), "G": list(T.M.factors.G)}
    if not T.coarsens_A:  # its Kronecker model has weights in a as well; g is the same
        levels["kronecker a"] = _written(T.coarse_operator.operator.F.a)
    return levels


def _vectors(F: Fisher) -> dict[str, list]:
    """The captured vectors of a Fisher, as :data:`VECTORS` describes them."""
    return {"a": _written(F.a), "g": list(F.g), "swapped": list(F.swapped)}


def _written(a: Sequence[Rows]) -> list:
    """Inputs as tensors, and one-hot ones as a dictionary of the two tensors that they are."""
    return [{"index": x.index, "value": x.value} if isinstance(x, OneHot) else x for x in a]


# ---- the templates of what was saved; a Fisher checks its vectors against each other and the layers ----------------


def _rows(x: Any) -> Any:
    """Of the inputs of one layer."""
    return {"index": Array(whole=True), "value": Array()} if isinstance(x, dict) else Array()


VECTORS = {"a": [_rows], "g": [Array()], "swapped": [int]}


def _curvature(partition: Partition, known: dict[str, Layer], state: dict[str, Any]) -> dict[str, Any]:
    """Of a running curvature of these layers; its factors may be of former layers too, which have any shape."""
    names, inverses = (list(x) if isinstance(x := state.get(key), dict) else [] for key in ("factors", "inverses"))
    return {
        "options": Each(lambda x: Maybe(str if isinstance(x, str) else int)),
        "damping": float,
        "steps": int,
        "diagnostics": Each(int),
        "marks": (Maybe(int), Maybe(int), Maybe(int), bool, bool),
        "factors": {name: _pair(known.get(name)) for name in names},
        "inverses": {name: _pair(known.get(name)) for name in inverses},
        "weights": dict.fromkeys(names, float),
        "newest": [str],
        "window": [{"batch": int, "N": int} | VECTORS],
        "level": Maybe(lambda level: _level(partition, level, _first_level(state))),
    }


def _pair(layer: Layer | None) -> tuple[Any, Any]:
    """Of the factors A and G of a layer; A may be a diagonal."""
    if layer is None:
        return Array(), Array()
    out, features = layer.unit

    def A(x: Any) -> Array:
        diagonal = isinstance(x, Tensor) and x.ndim == len(layer.axis) + 1
        return Array((*layer.axis, *[features] * (1 if diagonal else 2)))

    return A, Array((*layer.axis, out, out))


def _first_level(state: dict[str, Any]) -> Any:
    """That of the optimizer which was saved; once all had K-FAC."""
    options = state.get("options")
    return options.get("first_level", "kfac") if isinstance(options, dict) else "kfac"


def _level(partition: Partition, level: Any, first_level: Any) -> dict[str, Any]:
    """Of both levels as they were at the last refresh."""
    found = level if isinstance(level, dict) else {}
    if found.get("space") == "krylov":
        columns = tuple(Array((layer.size, None)) for layer in partition.layers)
    else:
        columns = tuple((Array((layer.out, None)), Array((layer.features, None))) for layer in partition.layers)
    template = {"damping": float, "space": str, "columns": columns} | VECTORS
    if first_level == "kfac":
        template |= dict(zip("AG", zip(*map(_pair, partition.layers), strict=True), strict=True))
    return template | ({"kronecker a": [_rows]} if "kronecker a" in found else {})


# ---- from what was saved to a running curvature --------------------------------------------------------------------


def restored(state: Any, options: Options, layers: Sequence[Layer], like: Tensor) -> RunningCurvature:
    """What :func:`saved` gave, with the options of now, in the dtype and on the device of ``like``.

    ``layers`` are all that the optimizer's parameters make up. The state may be of some of them: a layer that was
    frozen since is left out at the next observation.

    Raises:
        ValueError: another version, other layers, or what the state lacks or has wrong.
    """
    state = _of_this_version(state)
    wanted = read(state, {"layers": Each((int, int))}, "curvature", like)["layers"]
    known = {layer.name: layer for layer in layers}
    if not wanted or any(name not in known or [*known[name].shape] != shape for name, shape in wanted.items()):
        mine = {layer.name: list(layer.shape) for layer in layers}
        raise ValueError(f"The state belongs to layers {wanted}; this optimizer has {mine}.")
    partition = Partition(tuple(known[name] for name in wanted))
    state = read(state, _curvature(partition, known, state), "curvature", like)

    was = state["options"].get("factors", "kfac")
    if was != options.factors and state["factors"]:
        raise ValueError(f"The state has averages for factors={was!r}; this optimizer has factors={options.factors!r}.")

    new = RunningCurvature(options, partition)
    new.damping, new.step = check_damping(state["damping"], like.dtype), state["steps"]
    new.counters |= {name: n for name, n in state["diagnostics"].items() if name in new.counters}
    new.factors.A, new.factors.G = ({name: pair[i] for name, pair in state["factors"].items()} for i in (0, 1))
    new.factors.weight, new.factors.newest = state["weights"], set(state["newest"])
    new.factors.inverses = {name: tuple(pair) for name, pair in state["inverses"].items()}
    for entry in state["window"]:
        F = _fisher(partition, entry, options, "a")
        new.window.parts.append(Part(entry["batch"], entry["N"], F.with_vectors(F.stacked)))
    if state["level"] is not None and _first_level(state) == options.first_level:  # else a refresh is due
        new._T = _restored_levels(new, state["level"])
    new.observed_at, built, coarsened, new._stale, new._coarse_stale = state["marks"]
    new._built_at, new._coarse_at = built or 0, coarsened or 0
    _warn_of_other_options(state["options"], options)
    return new


def _of_this_version(state: Any) -> Any:
    """A saved curvature with all that this version reads.

    Raises:
        ValueError: it was saved by a later version.
    """
    if not isinstance(state, dict):
        return state
    version = state.get("version", 1)
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise ValueError(f"The state has the format {version!r}, and this kfac_viz reads up to {VERSION}: update it.")
    if version == VERSION:
        return state
    uses = {"swapped": [0] * len(state.get("layers") or ())}
    window = [uses | part if isinstance(part, dict) else part for part in state.get("window") or ()]
    level = state.get("level")
    level = uses | level if isinstance(level, dict) else level
    return {"options": {}, "inverses": {}} | state | {"window": window, "level": level}


def _restored_levels(new: RunningCurvature, level: dict[str, Any]) -> TwoLevel:
    """The preconditioner of the last refresh."""
    options, partition = new.options, new.partition
    F, damping = _fisher(partition, level, options, "a"), level["damping"]
    if options.first_level == "kfac":
        M = KFAC(KroneckerFactors(partition, tuple(level["A"]), tuple(level["G"])), damping, options.rule)
    else:
        M = first_level_of(options, F, damping)
    if level["space"] == "krylov":
        Z = LocalSpace(partition, level["columns"], name="krylov")
    else:
        Z = RankOneSpace(partition, [tuple(pair) for pair in level["columns"]], name=level["space"])
    K = _fisher(partition, level, options, "kronecker a" if "kronecker a" in level else "a")
    return new._two_level(F.damped(damping), M, Z, lambda: KroneckerFisher(K, options.convention))


def _fisher(partition: Partition, entry: dict[str, Any], options: Options, inputs: str) -> Fisher:
    """A Fisher from saved inputs and vectors, which it checks against each other and the layers."""
    a = [_inputs(x, layer) for x, layer in zip(entry[inputs], partition.layers, strict=False)]
    vectors = {"likelihood": options.likelihood, "flavour": options.fisher, "swapped": entry["swapped"]}
    return Fisher(partition, a, entry["g"], **vectors)


def _inputs(x: Any, layer: Layer) -> Rows:
    """What :func:`_written` wrote of one layer; refuses columns that it does not have."""
    if not isinstance(x, dict):
        return x
    index, value = x["index"], x["value"]
    fits = index.shape == value.shape
    if fits and index.numel() and not index.is_meta:
        fits = 0 <= int(index.min()) and int(index.max()) < layer.features
    if not fits:
        raise ValueError(f"The state's one-hot inputs of layer {layer.name!r} are not of {layer.features} columns.")
    return OneHot(index, value, layer.features)


def _warn_of_other_options(was: dict[str, Any], options: Options) -> None:
    now = options.shaping
    other = [name for name in SHAPING if name in was and was[name] != now[name]]
    if other:
        differences = ", ".join(f"{name}={was[name]!r} (here {now[name]!r})" for name in other)
        warn(
            f"The state was saved with {differences}. It is loaded, and this optimizer keeps its own options: "
            "the run goes on differently from the saved one."
        )


# ---- the state of a whole optimizer --------------------------------------------------------------------------------


def packed(c: RunningCurvature, device: torch.device | str) -> tuple[Tensor]:
    """:func:`saved` as the bytes that ``torch.save`` writes, a tensor (bytes,) of uint8 in a tuple.

    ``torch.distributed.checkpoint`` keeps what it finds in ``state`` and ``param_groups``, takes lists and dictionaries
    apart, and loads a tensor only into one of the same shape. A tuple it stores and loads whole.
    """
    file = io.BytesIO()
    torch.save(saved(c), file)
    return (torch.frombuffer(file.getbuffer(), dtype=torch.uint8).to(device),)


def _unpacked(value: Any) -> Any:
    """What :func:`packed` was made of; checkpoints may have made a list of the tuple."""
    whole = isinstance(value, (tuple, list)) and len(value) == 1 and isinstance(value[0], Tensor)
    if not whole or value[0].dtype != torch.uint8 or value[0].is_meta:
        raise ValueError("The state's 'curvature' must be one tensor of uint8 in a tuple.")
    try:
        return torch.load(io.BytesIO(value[0].cpu().numpy().tobytes()), map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        raise ValueError(f"The state's 'curvature' cannot be read, it is not whole: {error}") from None


def whole(own: dict[str, Tensor], p: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The state of a parameter, with zeros for momentum or moments that it does not have yet.

    It has both if another batch may give or deny it curvature, so that what is saved has the same names in every run.
    """
    covered, loose = p in layout.covered, p in layout.loose
    if (covered or loose) and "momentum_buffer" not in own:
        own = own | {"momentum_buffer": torch.zeros_like(p)}
    if (loose or not covered) and "step" not in own:
        own = own | dict(zip(MOMENTS, no_moments(p), strict=True))
    return own


def curvature_in(state: Any) -> Any:
    """What :func:`saved` gave, out of a saved optimizer: of its groups or, in version 1, beside them.

    Raises:
        ValueError: it is not there, or not whole, or this is no state of an optimizer.
    """
    state = state if isinstance(state, dict) else {}
    groups = state.get("param_groups")
    whole = isinstance(groups, list) and isinstance(state.get("state"), dict)
    if not whole or not all(isinstance(x, dict) and isinstance(x.get("params"), list) for x in groups):
        raise ValueError("The state has no 'param_groups' and 'state' as PyTorch's optimizers write them.")
    found = [group["curvature"] for group in groups if group.get("curvature") is not None]
    if not found and "curvature" not in state:
        raise ValueError("This is not a state of TwoLevelKFAC: it has no 'curvature'.")
    return _unpacked(found[0]) if found else state["curvature"]


def matching(state: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A saved state as PyTorch takes it, once its groups, momentum and moments fit these groups.

    Tensors are copied, for PyTorch would go on with the caller's. Groups of version 1, which have the curvature beside
    them, know no ``plain_lr``: they take that of these groups.

    Raises:
        ValueError, TypeError: groups or momentum of other parameters, or an option that is missing or out of range.
    """
    given, kept = state["param_groups"], state["state"]
    sizes, mine = ([len(group["params"]) for group in each] for each in (given, groups))
    if sizes != mine:
        raise ValueError(f"The state has groups of {sizes} parameters; this optimizer has groups of {mine}.")
    earlier = [{"plain_lr": group["plain_lr"]} if "curvature" in state else {} for group in groups]
    given = [more | group | {"curvature": None} for more, group in zip(earlier, given, strict=True)]
    for group in given:
        check_group(group)
    names = [i for group in given for i in group["params"]]
    params = dict(zip(names, (p for group in groups for p in group["params"]), strict=True))
    if strange := [i for i in kept if i not in params]:
        raise ValueError(f"The state is of no parameter {strange[0]!r}.")
    copies = {}
    for i, own in kept.items():
        found = read(own, _moments(own, params[i]), f"state[{i!r}]")
        copies[i] = {name: x.detach().clone() for name, x in found.items()}
    return {"state": copies, "param_groups": given}


def _moments(own: Any, p: Tensor) -> dict[str, Array]:
    """The template of the state of a parameter: its momentum, its moments, both or neither."""
    own = own if isinstance(own, dict) else {}
    names = [*["momentum_buffer"] * ("momentum_buffer" in own), *(MOMENTS if own.keys() & set(MOMENTS) else ())]
    return {name: Array(() if name == "step" else tuple(p.shape)) for name in names}
