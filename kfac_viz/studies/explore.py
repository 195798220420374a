"""The playground on a network of the reader's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import Partition
from ..method.likelihood import output_vectors
from .coarse_space import CoarseSpacePlot, coarse_space, run_on
from .layer_map import LayerMapPlot, few_enough_scores, layer_map
from .problems import Problem
from .setting import LARGEST, Setting

if TYPE_CHECKING:
    from ..show.panel import Panel


def explore(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    targets: Tensor | None = None,
    *,
    likelihood: str,
    fisher: str = "exact",
    layers: Sequence[str] | None = None,
    **values: Any,
) -> Panel:
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
        values: where the controls start, such as ``damping=0.1``.

    Raises:
        ValueError, TypeError: too many parameters and too many scores, or what :func:`kfac_viz.capture` refuses.
    """
    from ..show.panel import Panel

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
    setting = Setting(problem, fisher)
    small = problem.partition.size <= LARGEST
    run = run_on(setting, coarse_space) if small else run_on(few_enough_scores(setting), layer_map)
    plot = CoarseSpacePlot if small else LayerMapPlot

    def capture_line(flavour: str) -> str:
        labels = ", targets" * (flavour == "empirical")
        other = f", fisher={flavour!r}" * (flavour != "exact")
        some = "" if layers is None else f", layers={list(names)!r}"
        return f"kv.capture(model, inputs{labels}, likelihood={likelihood!r}{other}{some})"

    def reproduce(values: dict[str, Any]) -> str:
        space, gradient = f"kv.coarse.{values['coarse']}(F, per_layer={values['per_layer']})", ""
        if values["coarse"] == "optimal":
            space = space.replace("(F, ", "(A, M, ")
        elif values["coarse"] == "krylov":  # the mean of the scores at the labels, given or drawn, is the gradient
            space = space.replace("(F, ", "(A, M, g, ")
            scores = capture_line("mc" if targets is None else "empirical")
            gradient = f"E = {scores}; g = E.pull(E.a[0].new_ones(1, E.N)) / E.N; "
        return (
            f"F = {capture_line(fisher)}; A = F.damped({values['damping']}); "
            f"M = kv.KFAC(F, {values['damping']}, {values['rule']!r}); {gradient}"
            f"T = kv.TwoLevel(A, M, {space}, {values['correction']!r})"
        )

    return Panel(run, plot, reproduce=reproduce, **values)
