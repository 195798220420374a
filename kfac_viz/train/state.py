"""An optimizer as tensors, numbers and text that can be saved, and back, all of it checked before any is used."""

from __future__ import annotations

import io
from collections.abc import Sequence
from math import inf
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from ..method.checks import check_count, check_damping, check_number, finite, warn
from ..method.columns import LocalSpace, RankOneSpace
from ..method.fisher import Fisher
from ..method.kfac import KFAC
from ..method.kronecker import KroneckerFactors
from ..method.kronecker_fisher import KroneckerFisher
from ..method.one_hot import OneHot, Rows
from ..method.partition import Layer, Partition
from ..method.two_level import TwoLevel
from .curvature import RunningCurvature
from .layout import Layout
from .options import SHAPING, Options, check_group
from .plain import MOMENTS, no_moments
from .statistics import Part


def saved(c: RunningCurvature) -> dict[str, Any]:
    """All of a running curvature as tensors, numbers, strings, lists and dictionaries."""
    return {
        "layers": {layer.name: list(layer.shape) for layer in c.partition.layers},
        "options": c.options.shaping,
        "damping": c.damping,
        "steps": c.step,
        "diagnostics": dict(c.counters),
        "marks": [c.observed_at, c._built_at, c._coarse_at, c._stale, c._coarse_stale],
        "factors": {name: [A, c.factors.G[name]] for name, A in c.factors.A.items()},
        "weights": dict(c.factors.weight),
        "newest": sorted(c.factors.newest),
        "window": [{"batch": part.batch, "N": part.N, **_vectors(part.F)} for part in c.window.parts],
        "level": None if c._T is None else _saved_levels(c._T),
    }


def packed(c: RunningCurvature, device: torch.device | str) -> tuple[Tensor]:
    """The same as the bytes that ``torch.save`` writes, a tensor (bytes,) of uint8 in a tuple.

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


def _saved_levels(T: TwoLevel) -> dict[str, Any]:
    """What :func:`_restored_levels` reads."""
    columns = list(T.Z.blocks) if isinstance(T.Z, LocalSpace) else [list(pair) for pair in T.Z.factors]
    levels = {"A": list(T.M.factors.A), "G": list(T.M.factors.G), **_vectors(T.A.operator)}
    levels |= {"damping": T.damping, "space": T.Z.name, "columns": columns}
    if not T.coarsens_A:  # its Kronecker model has weights in a as well; g is the same
        levels["kronecker a"] = _written(T.coarse_operator.operator.F.a)
    return levels


def _vectors(F: Fisher) -> dict[str, list]:
    """What :func:`_fisher` reads."""
    return {"a": _written(F.a), "g": list(F.g), "swapped": list(F.swapped)}


def _written(a: Sequence[Rows]) -> list:
    """Inputs as tensors, and one-hot ones as a dictionary of the two tensors that they are."""
    return [{"index": x.index, "value": x.value} if isinstance(x, OneHot) else x for x in a]


def restored(state: Any, options: Options, layers: Sequence[Layer], like: Tensor) -> RunningCurvature:
    """What :func:`saved` gave, with the options of now, in the dtype and on the device of ``like``.

    ``layers`` are all that the optimizer's parameters make up. The state may be of some of them: a layer that was
    frozen since is left out at the next observation.

    Raises:
        ValueError, TypeError: what the state lacks or has wrong.
    """
    for x in _tensors(_of_kind(state, dict, "curvature")):
        if not _plain(x, meta=like.is_meta, whole=True):
            raise ValueError(f"The state of the curvature holds a tensor of {x.dtype}, {x.layout}, on {x.device}.")
    state = _converted(state, like)
    wanted = {name: tuple(_of_kind(x, list, "layers", 2)) for name, x in _field(state, "layers", dict).items()}
    known = {layer.name: layer for layer in layers}
    fits = all(isinstance(n, int) for shape in wanted.values() for n in shape)
    if not (wanted and fits) or any(name not in known or known[name].shape != shape for name, shape in wanted.items()):
        mine = {layer.name: layer.shape for layer in layers}
        raise ValueError(f"The state belongs to layers {wanted}; this optimizer has {mine}.")
    partition = Partition(tuple(known[name] for name in wanted))
    numbers = _tensors(state)
    if not all(finite(numbers)):
        raise ValueError("The state of the curvature holds NaN or inf.")

    new = RunningCurvature(options, partition)
    new.damping = check_damping(_field(state, "damping"), like.dtype)
    new.step = check_count("The state's 'steps'", _field(state, "steps"), 0)
    counted = _field(state, "diagnostics", dict)
    for name in new.counters.keys() & counted.keys():
        new.counters[name] = check_count(f"diagnostics[{name!r}]", counted[name], 0)
    for name, pair in _field(state, "factors", dict).items():
        A, G = _of_kind(pair, list, "factors", 2)
        new.factors.A[name], new.factors.G[name] = _factors(A, G, name, known.get(name))
    weights = _field(state, "weights", dict)
    if weights.keys() != new.factors.A.keys():
        raise ValueError("The state's 'weights' and 'factors' are not of the same layers.")
    new.factors.weight = {name: check_number(f"weights[{name!r}]", w, 0.0, inf) for name, w in weights.items()}
    new.factors.newest = {name for name in weights if name in _field(state, "newest", list)}
    for entry in _field(state, "window", list):
        F = _fisher(partition, entry, options, "a")
        batch, N = (check_count(f"The window's {key!r}", _field(entry, key), 1) for key in ("batch", "N"))
        new.window.parts.append(Part(batch, N, F.with_vectors(F.stacked)))
    level = _field(state, "level")
    if level is not None:
        new._T = _restored_levels(new, _of_kind(level, dict, "level"))
    marks = _field(state, "marks", list, 5)
    if marks[0] is not None and not new.window.parts:
        raise ValueError("The state was observed at a step and has no window; it is incomplete.")
    steps = [None if mark is None else check_count("A mark of the state", mark, 0) for mark in marks[:3]]
    new.observed_at, new._built_at, new._coarse_at = steps[0], *(step or 0 for step in steps[1:])
    new._stale, new._coarse_stale = (_of_kind(mark, bool, "marks") for mark in marks[3:])
    was = _of_kind(state.get("options", {}), dict, "options")  # states of earlier versions have none
    if not all(value is None or isinstance(value, (str, int)) for value in was.values()):
        raise ValueError("The state's 'options' must be words, whole numbers or None.")
    _warn_of_other_options(was, options)
    return new


def _restored_levels(new: RunningCurvature, level: dict[str, Any]) -> TwoLevel:
    """The preconditioner of the last refresh."""
    options, partition = new.options, new.partition
    A, G = (tuple(_field(level, which, list, len(partition))) for which in "AG")
    damping = check_damping(_field(level, "damping"))
    M = KFAC(KroneckerFactors(partition, A, G), damping, options.rule)
    F = _fisher(partition, level, options, "a")
    name, columns = _field(level, "space", str), _field(level, "columns", list, len(partition))
    if name == "krylov":
        blocks = [_shaped(Z, (layer.size, None), "columns") for Z, layer in zip(columns, partition.layers, strict=True)]
        Z = LocalSpace(partition, blocks, name=name)
    else:
        pairs = [_of_kind(pair, list, "columns", 2) for pair in columns]
        for (W, U), layer in zip(pairs, partition.layers, strict=True):
            _shaped(W, (layer.out, None), "columns")
            _shaped(U, (layer.features, W.shape[1]), "columns")
        Z = RankOneSpace(partition, [tuple(pair) for pair in pairs], name=name)
    K = _fisher(partition, level, options, "kronecker a" if "kronecker a" in level else "a")
    return new._two_level(F.damped(damping), M, Z, lambda: KroneckerFisher(K, options.convention))


def _fisher(partition: Partition, entry: Any, options: Options, key: str) -> Fisher:
    """A Fisher from saved inputs and vectors, which it checks against each other and the layers."""
    entry = _of_kind(entry, dict, "window")
    a, g = (_field(entry, which, list) for which in (key, "g"))
    swapped = entry.get("swapped", [0] * len(partition))  # states of earlier versions have none
    swapped = _of_kind(swapped, list, "swapped", len(partition))
    swapped = [check_count("The state's 'swapped'", n, 0) for n in swapped]
    a = [_inputs(x, layer) for x, layer in zip(a, partition.layers, strict=False)]
    return Fisher(partition, a, g, likelihood=options.likelihood, flavour=options.fisher, swapped=swapped)


def _factors(A: Any, G: Any, name: str, layer: Layer | None) -> tuple[Tensor, Tensor]:
    """Factors of a layer, once they have its shapes; of a former one, which is None, they may have any."""
    if layer is None:
        axis = (None,) * (isinstance(G, Tensor) and G.ndim == 3)
        features = out = None
    else:
        axis, (out, features) = layer.axis, layer.unit
    is_diagonal = isinstance(A, Tensor) and A.ndim == len(axis) + 1
    A = _shaped(A, (*axis, *[features] * (1 if is_diagonal else 2)), f"factor A of layer {name!r}")
    return A, _shaped(G, (*axis, out, out), f"factor G of layer {name!r}")


def _inputs(x: Any, layer: Layer) -> Any:
    """What :func:`_written` wrote of one layer."""
    if not isinstance(x, dict):
        return x
    index, value = _field(x, "index", Tensor), _field(x, "value", Tensor)
    fits = index.dtype == torch.long and value.is_floating_point() and index.shape == value.shape
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
    """What :func:`saved` gave, out of a saved optimizer: of its groups or, in earlier versions, beside them.

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

    Tensors are copied, for PyTorch would go on with the caller's. Groups of earlier versions, which have the curvature
    beside them, know no ``plain_lr``: they take that of these groups.

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
    if not all(isinstance(i, (int, str)) for i in names):
        raise ValueError("The state numbers or names its parameters; in a group stands something else.")
    params = dict(zip(names, (p for group in groups for p in group["params"]), strict=True))
    copies = {}
    for i, own in kept.items():
        if i not in params or not isinstance(own, dict):
            raise ValueError(f"The state is of no parameter {i!r}.")
        copies[i] = {name: own[name].detach().clone() for name in _checked(own, i, params[i])}
    return {"state": copies, "param_groups": given}


def _checked(own: dict[str, Any], i: int | str, p: Tensor) -> list[str]:
    """What of the state of a parameter is taken, once it is found to be right."""
    names = [name for name in ("momentum_buffer", *MOMENTS) if name in own]
    if 0 < len(own.keys() & set(MOMENTS)) < len(MOMENTS):
        raise ValueError(f"The state of parameter {i!r} needs all of {', '.join(MOMENTS)}, or none of them.")
    for name in names:
        shape = () if name == "step" else tuple(p.shape)
        x = _shaped(own[name], shape, f"{name} of parameter {i!r}")
        if not _plain(x):
            raise ValueError(f"The {name} of parameter {i!r} is a tensor of {x.dtype}, {x.layout}, on {x.device}.")
    squares = ("step", "exp_avg_sq")  # which are not negative
    for name, fine in zip(names, finite([own[x].sqrt() if x in squares else own[x] for x in names]), strict=True):
        if not fine:
            raise ValueError(f"The {name} of parameter {i!r} holds NaN, inf or the root of a negative number.")
    return names


def _field(state: dict[str, Any], key: str, kind: type = object, length: int | None = None) -> Any:
    if key not in state:
        raise ValueError(f"The state of the curvature has no {key!r}; it is not whole, or of another version.")
    return _of_kind(state[key], kind, key, length)


def _of_kind(value: Any, kind: type, what: str, length: int | None = None) -> Any:
    if not isinstance(value, kind) or (length is not None and len(value) != length):
        size = "" if length is None else f" of {length}"
        raise ValueError(f"The state's {what!r} must be a {kind.__name__}{size}; got {type(value).__name__}.")
    return value


def _shaped(x: Any, shape: tuple[int | None, ...], what: str) -> Tensor:
    """A tensor of that shape, None standing for any size."""
    if not isinstance(x, Tensor) or x.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, x.shape)):  # noqa: B905
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        expected = "(" + ", ".join("…" if n is None else str(n) for n in shape) + ")"
        raise ValueError(f"In the state the {what} must have shape {expected}; got {got}.")
    return x


def _plain(x: Tensor, *, meta: bool = False, whole: bool = False) -> bool:
    """Whether a tensor has real numbers, or also ``whole`` ones, all of them written down; on the ``meta`` device none
    are."""
    kind = x.is_floating_point() or (whole and x.dtype == torch.long)
    return x.layout == torch.strided and kind and (meta or not x.is_meta)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [x for item in inner for x in _tensors(item)]


def _converted(value: Any, like: Tensor) -> Any:
    """The same nest of dictionaries and lists, its tensors in the dtype and on the device of ``like``."""
    if isinstance(value, dict):
        return {key: _converted(item, like) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_converted(item, like) for item in value]
    if not isinstance(value, Tensor):
        return value
    return value.to(like) if value.is_floating_point() else value.to(like.device)
