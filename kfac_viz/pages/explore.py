"""The playground on a network of the reader's own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..method.fisher import Fisher
from ..method.names import WRAPPERS, unwrapped
from ..problems import Problem
from ..scores.layers import partition_of
from ..show.panel import Panel, refused_outside
from ..studies import coarse_space
from ..studies.common.setting import MOST_PARAMETERS, Setting
from . import layer_map
from .playground import save_page


@refused_outside
def explore(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    targets: Tensor | None = None,
    *,
    likelihood: str,
    fisher: str = "exact",
    layers: Sequence[str] | None = None,
    checkpoints: Sequence[Mapping[str, Tensor]] | None = None,
    **values: Any,
) -> Explorer:
    """The playground on the reader's own network; the model is left as it is.

    It takes what :func:`kfac_viz.capture` takes. The model is evaluated once, in its own precision, and all that the
    panel shows is computed from that in double precision, so that it stays what it was when the model is trained on.

    Up to 2,500 parameters matrices are drawn entry by entry; of larger networks, up to millions of parameters, the norm
    of the block of each pair of layers. Spectra, captured decreases and the effective dimension are exact either way,
    as long as the batch has no more than 8,192 scores, examples times vectors: ``fisher="mc"`` has one for an example.

    Args:
        model: of any kind whose parameters :func:`kfac_viz.capture` sees, a transformer too; in float64 for more than
            the 7 digits of float32.
        inputs: a batch (N, …), or a tuple of arguments of the model; floating ones are brought to its dtype.
        targets: true labels (see :func:`kfac_viz.nll`); without them one label per example is drawn from the
            model, so that the gradient is noise of the model's own kind. ``fisher="empirical"`` needs them.
        likelihood: ``"categorical"``, ``"bernoulli"`` or ``"gaussian"``.
        fisher: ``"exact"``, ``"mc"`` or ``"empirical"``.
        layers: names of layers or modules to look at, all by default; it leaves out what cannot be captured.
        checkpoints: state dictionaries of the model, wrapped or not, at steps of its training, over which a slider
            then moves. Each is loaded and captured; then the model gets its own weights back.
        values: where the controls start, such as ``damping=0.1``.

    Raises:
        ValueError, TypeError: too many parameters and too many scores, checkpoints that do not fit the model, or what
            :func:`kfac_viz.capture` refuses.
    """
    model = unwrapped(model)
    partition = partition_of(model, layers)  # raises an error if there are no layers
    inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    dtype = partition.own_parameters(model)[0][0].dtype
    arguments = tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    problem = Problem(model, arguments, targets, likelihood, type(model).__name__, layers)
    settings = []
    for loaded in _contexts(model, checkpoints):
        with loaded:
            settings.append(_captured(problem, fisher))
    partition = settings[0].F.partition
    small = partition.size <= MOST_PARAMETERS
    if not small:
        layer_map.few_enough_scores(settings[0])  # the others have as many
    run = coarse_space.run_on(settings, coarse_space.compute if small else layer_map.compute)
    plot = coarse_space.Plot if small else layer_map.Plot

    def capture_line(flavour: str) -> str:
        labels = ", targets" * (flavour == "empirical")
        other = f", fisher={flavour!r}" * (flavour != "exact")
        some = "" if layers is None else f", layers={list(partition.names)!r}"
        return f"kv.capture(model, inputs{labels}, likelihood={likelihood!r}{other}{some})"

    def reproduce(values: dict[str, Any]) -> str:
        loaded = ""
        if len(settings) > 1:
            loaded = f"model.load_state_dict(states[{values['checkpoint']}]); "
        space, gradient = f"kv.coarse.{values['coarse']}(F, per_layer={values['per_layer']})", ""
        if values["coarse"] == "optimal":
            space = space.replace("(F, ", "(A, M, ")
        elif values["coarse"] == "krylov":  # the mean of the scores at the labels, given or drawn, is the gradient
            space = space.replace("(F, ", "(A, M, g, ")
            scores = capture_line("mc" if targets is None else "empirical")
            gradient = f"E = {scores}; g = E.pull(E.g[0].new_ones(1, E.N)) / E.N; "
        return (
            f"{loaded}F = {capture_line(fisher)}; A = F.damped({values['damping']}); "
            f"M = kv.KFAC(F, {values['damping']}, {values['rule']!r}); {gradient}"
            f"T = kv.TwoLevel(A, M, {space}, {values['correction']!r})"
        )

    return Explorer(run, plot, reproduce=reproduce, **values)


@dataclass(frozen=True, eq=False)
class _Captured(Setting):
    """A setting whose Fisher and gradient were captured beforehand."""

    seen: tuple[Fisher, Tensor] | None = None

    @cached_property
    def F(self) -> Fisher:
        return self.seen[0]

    @cached_property
    def g(self) -> Tensor:
        return self.seen[1]


def _captured(problem: Problem, fisher: str) -> _Captured:
    """The Fisher of the problem, and as its gradient the mean of the scores at the true or the drawn labels."""
    F = _double(problem.capture(fisher))
    labels = "mc" if problem.targets is None else "empirical"
    E = F if fisher == labels else _double(problem.capture(labels))
    return _Captured(problem, fisher, seen=(F, E.pull(E.g[0].new_ones(1, E.N)) / E.N))


def _double(F: Fisher) -> Fisher:
    """The same captured vectors in double precision."""
    return F.like(*([x.to(torch.float64) for x in vectors] for vectors in (F.a, F.g)))


def _contexts(model: nn.Module, checkpoints: Sequence[Mapping[str, Tensor]] | None) -> list[AbstractContextManager]:
    """A context for each checkpoint: inside, the model is what it was then."""
    if checkpoints is None:
        return [nullcontext()]
    if not checkpoints or not all(map(_is_state, checkpoints)):
        raise ValueError(
            "checkpoints are state dictionaries of the model, at least one; take copy.deepcopy(model.state_dict()) "
            "at each of the steps of training."
        )
    return [_weights(model, state, i) for i, state in enumerate(checkpoints)]


@contextmanager
def _weights(model: nn.Module, state: Mapping[str, Tensor], i: int) -> Iterator[None]:
    """The model with the weights of checkpoint i; afterwards with its own.

    The model itself, and no copy: not every model can be copied, and a function that was written inside of the model
    would go on using the first one's weights.

    Raises:
        ValueError: the checkpoint does not fit. What is raised inside gets a note with its number.
    """
    own = copy.deepcopy(model.state_dict())
    try:
        try:
            model.load_state_dict(_named_as(own, state))
        except RuntimeError as error:
            raise ValueError(f"Checkpoint {i} does not fit the model: {error}") from None
        try:
            yield
        except Exception as error:
            error.add_note(f"This was with the weights of checkpoint {i}.")
            raise
    finally:
        model.load_state_dict(own)


def _is_state(state: Any) -> bool:
    return isinstance(state, Mapping) and all(isinstance(name, str) for name in state)


def _named_as(own: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """A state under the names of another one: they may differ by what wrappers put into them."""

    def plain(name: str) -> str:
        return ".".join(part for part in name.split(".") if part not in WRAPPERS)

    known = {plain(name): name for name in own}
    if set(state) <= set(own) or len(known) < len(own):
        return dict(state)
    return {known.get(plain(name), name): value for name, value in state.items()}


class Explorer(Panel):
    """A panel on the reader's own network."""

    def save_page(self, path: str | Path) -> Path:
        """Write one HTML file that needs no Python: sliders for λ and columns on this network, as it is chosen now.

        Raises:
            ValueError: of a network whose matrices are not drawn there is no page.
        """
        if self._plot_type is not coarse_space.Plot:
            raise ValueError(f"A page shows matrices entry by entry, of up to {MOST_PARAMETERS} parameters.")
        path = Path(path)
        return save_page(self.run, path.stem, path.parent, **self._values)
