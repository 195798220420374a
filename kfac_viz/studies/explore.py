"""The playground on a network of the reader's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import Partition
from ..method.likelihood import output_vectors
from ..show.panel import Panel, refused_outside
from .coarse_space import CoarseSpacePlot, coarse_space, run_on
from .layer_map import LayerMapPlot, few_enough_scores, layer_map
from .playground import save_page
from .problems import Problem
from .setting import LARGEST, Setting


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

    Up to 2,500 parameters matrices are drawn entry by entry; of larger networks, up to millions of parameters, the norm
    of the block of each pair of layers. Spectra, captured decreases and the effective dimension are exact either way,
    as long as the batch has no more than 8,192 scores, examples times vectors: ``fisher="mc"`` has one for an example.

    Args:
        model: of any kind whose parameters :func:`kfac_viz.capture` sees, a transformer too; a copy in double precision
            is taken.
        inputs: a batch (N, …), or a tuple of arguments of the model.
        targets: true labels (see :func:`kfac_viz.nll`); without them one label per example is drawn from the
            model, so that the gradient is noise of the model's own kind. ``fisher="empirical"`` needs them.
        likelihood: ``"categorical"``, ``"bernoulli"`` or ``"gaussian"``.
        fisher: ``"exact"``, ``"mc"`` or ``"empirical"``.
        layers: names of layers or modules to look at, all by default; it leaves out what cannot be captured.
        checkpoints: state dictionaries of the model at moments of its training, over which a slider then moves.
        values: where the controls start, such as ``damping=0.1``.

    Raises:
        ValueError, TypeError: too many parameters and too many scores, checkpoints that do not fit the model, or what
            :func:`kfac_viz.capture` refuses.
    """
    names = Partition.from_model(model, layers).names  # refuses what has no layers, in words
    inputs = tuple(inputs) if isinstance(inputs, list) else inputs
    problem = Problem(model, inputs, targets, likelihood, type(model).__name__, names).to(dtype=torch.float64)
    problem.model.eval()
    if targets is None:
        problem.capture(fisher)  # refuses the rest, in words, before a label is drawn
        with torch.no_grad():
            outputs = problem.model(*problem.arguments)
        means = {"categorical": outputs.softmax(-1), "bernoulli": outputs.sigmoid()}.get(likelihood, outputs)
        drawn = means - output_vectors(outputs, likelihood, "mc")[0]
        problem = replace(problem, targets=drawn.argmax(-1) if likelihood == "categorical" else drawn)
    settings = [Setting(moment, fisher) for moment in _moments(problem, checkpoints)]
    small = problem.partition.size <= LARGEST
    if not small:
        few_enough_scores(settings[0])  # the others have as many
    run = run_on(settings, coarse_space if small else layer_map)
    plot = CoarseSpacePlot if small else LayerMapPlot

    def capture_line(flavour: str) -> str:
        labels = ", targets" * (flavour == "empirical")
        other = f", fisher={flavour!r}" * (flavour != "exact")
        some = "" if layers is None else f", layers={list(names)!r}"
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


def _moments(problem: Problem, checkpoints: Sequence[Mapping[str, Tensor]] | None) -> list[Problem]:
    """The problem as it is, or with the weights of each checkpoint."""
    if checkpoints is None:
        return [problem]
    if not checkpoints or not all(isinstance(state, Mapping) for state in checkpoints):
        raise ValueError(
            "checkpoints are state dictionaries of the model, at least one; take copy.deepcopy(model.state_dict()) "
            "at each moment of training."
        )
    moments = []
    for i, state in enumerate(checkpoints):
        moment = problem.twin()
        try:
            moment.model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"Checkpoint {i} does not fit the model: {error}") from None
        moments.append(moment)
    return moments


class Explorer(Panel):
    """A panel on the reader's own network."""

    def save_page(self, path: str | Path) -> Path:
        """Write one HTML file that needs no Python: sliders for λ and columns on this network, as it is chosen now.

        Raises:
            ValueError: of a network whose matrices are not drawn there is no page.
        """
        if self._plot_type is not CoarseSpacePlot:
            raise ValueError(f"A page shows matrices entry by entry, of up to {LARGEST} parameters.")
        path = Path(path)
        return save_page(self.run, path.stem, path.parent, **self._values)
