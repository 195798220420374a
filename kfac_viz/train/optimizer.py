"""Train with the objects that the figures draw: two-level K-FAC as a ``torch.optim.Optimizer``."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..method.checks import check_damping, own_precision, warn
from ..method.krylov import pcg
from ..method.names import parameters_of, unwrapped
from ..method.partition import Layer, Partition
from ..method.two_level import TwoLevel
from ..scores.capture import check_inputs
from ..scores.layers import computed, inside, layers_of, partition_of
from . import state as states
from .curvature import RunningCurvature
from .distributed import Outcome, check_replicas, ranks_of, share
from .layout import Layout
from .options import Options, check_group, shows_options
from .plain import MOMENTS
from .search import LENGTHS_TRIED, line_search
from .step import Step
from .trial import Trial, loss_alone
from .update import QuadraticModel, judged_damping, update


def _full_precision(method: Callable) -> Callable:
    """Keep statistics out of an autocast, and out of an inference mode, that surrounds the call."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        with torch.inference_mode(False), own_precision(self._layout.like.device):
            return method(self, *args, **kwargs)

    return wrapped


class TwoLevelKFAC(Optimizer):
    """K-FAC with a coarse correction between layers, built from :class:`TwoLevel` and nothing else.

    >>> import kfac_viz as kv
    >>> problem = kv.problems.digits(widths=(8,), side=4, n=64)
    >>> opt = TwoLevelKFAC(problem.model, likelihood="categorical", per_layer=4)
    >>> for _ in range(3):
    ...     opt.zero_grad()
    ...     loss = kv.nll(problem.model(problem.inputs), problem.targets, "categorical")
    ...     loss.backward()
    ...     opt.observe(problem.inputs)
    ...     opt.step()
    >>> opt.preconditioner.correction
    'balanced'

    The loss has to be the mean over examples of the *summed* negative log-likelihood, :func:`kfac_viz.nll`: the
    curvature and the damping are on that scale.

    By default it is one-level K-FAC, ``per_layer=0``, since no default with a coarse level is nowhere worse than that.
    In 600 mini-batch steps, every method tuned by one rule, four eigenvectors per layer end lower on a deep narrow
    classifier, a transformer and a convolutional network, as low on a classifier, higher on an autoencoder, and take up
    to twice the time; SOAP ends lower still on most (notebook 12, figures/benchmarks/training.csv). Turn the coarse
    level on, with ``per_layer`` or ``total``, where K-FAC alone stalls, and tune λ anew. Where badly conditioned least
    squares are to be solved to the end with a full batch (notebook 15), :meth:`TwoLevelKFAC.for_equations` takes the
    exact step. The other defaults are a compromise of three tasks (defaults.csv, each option varied alone beside 4
    columns): with λ = 0.03, momentum 0.95 or ``kl_clip=3e-3`` one or another blows up. For large networks observe and
    refresh less often.

    What is averaged or stale: M holds exponential averages of the factors, as they were at the last refresh; A is
    the weighted Fisher of the last observed batches, as it was at the last coarse refresh; both share λ. After a
    single observation of a batch that fits in ``coarse_examples`` they are that batch's own.

    With several ranks the step is the one that a single process takes on the joined batch, rank after rank: the same
    bits on all, and labels drawn by each. Factors are summed over ranks, and the vectors of A are gathered, so that all
    that follows is the same computation everywhere. ``DistributedDataParallel`` takes the plain mean of the ranks'
    gradients, and so is the loss that a closure's step is judged by: where batches differ in size, each rank multiplies
    its loss by :func:`kfac_viz.share`. The ranks compare what has to agree when the optimizer is built, at every
    observation and at the step after it; an error on one is raised on all. A rank that ends, or is silent for the time
    limit of its process group, ends the others with its name some ten seconds later; where they wait for it in
    ``backward``, in PyTorch's words. R ranks send, and ``diagnostics`` counts for this one,

    - 64 bytes, gathered, at each of these meetings and at every loss that judges a step;
    - for every observed batch what ``kfac_viz/train/shards.py`` says.

    Args:
        model: its trainable layers get curvature, norms, embeddings and attention included; parameters that are used
            otherwise than in sums of products follow Adam's rule, and a warning names them once. Compiled models
            and wrappers such as ``nn.DataParallel`` are seen through, and layers have the names of the plain model.
            Of a model in ``DistributedDataParallel`` every rank observes its own batch; see below.
        params: parameters or groups with their own ``lr``, ``plain_lr``, ``momentum``, ``weight_decay``, ``maximize``;
            all trainable ones by default. A layer is preconditioned if all of its parameters are given.
        likelihood: ``"categorical"``, ``"bernoulli"`` or ``"gaussian"``.
        lr: factor on every step. None is 0.3 where ``kl_clip`` bounds the step, 0.1 where it is fixed, and 1 with
            ``"quadratic"``, the rule's own length, and ``"line_search"``, its first try.
        plain_lr: length of the steps of parameters without curvature, which follow Adam's update (Kingma and Ba 2015,
            arXiv 1412.6980, algorithm 1) with β₁ = ``momentum``, β₂ = 0.999 and ε = 1e-8. They are loose parameters in
            functions that are not sums of products, weights that are computed from others, and layers that are not in
            ``layers`` or not given in full. PyTorch's schedulers move ``lr`` alone; edit ``plain_lr`` in the groups.
            Adam's step is no part of the direction whose length the step rules choose, it is added to it:
            ``"line_search"`` scales both together, and with ``momentum=0``, its default, both go downhill;
            ``"quadratic"`` with a closure predicts its change by its slope, and looks at a step that went up once
            more without it. A step that is undone or refused undoes the moments too. The moments are kept at least
            in float32. A parameter that gains or loses curvature starts without momentum and moments.
        momentum: in [0, 1); None is 0.9, and 0 with ``"line_search"``, whose gains a heavy ball destroys. The quadratic
            rule finds its own coefficient, and 0 turns that off.
        decay: weight of a batch against the next newer one in every average, of K-FAC's factors and of the batches in
            A; None is 0.95, and 0, the batch alone, with ``"line_search"``.
        damping: λ. Adapted by Levenberg–Marquardt when the step rule is quadratic and ``step`` gets a closure. Pass one
            where training starts at random weights: without it nothing undoes a step that went up, however far.
        first_level: ``"kfac"``, of averaged factors; or made of the vectors that A holds, at each refresh, ``"ekfac"``,
            exact ``"blocks"``, the ``"diagonal"`` or the ``"identity"`` over λ; ``"none"``, the coarse level alone; or
            ``"exact"``, the exact step, by a matrix of all scores or of all parameters, whichever is smaller.
        factors: which Kronecker product K-FAC and EKFAC take for a block: ``"kfac"``, ``"shampoo"``, ``"nearest"`` or
            ``"kl"`` (:func:`kfac_viz.method.products.product`). Each observation makes one turn of the alternation that
            leads to the last two, against the running average of the other factor. Where too few scores determine the
            product nearest in KL, a floor does, and ``diagnostics`` counts directions (layers with EKFAC).
        rule: of K-FAC's damping, ``"factored"`` (two products per layer) or ``"eigen"`` (four).
        coarse, per_layer: coarse space and its columns per layer, at most so many (a small layer gives what it
            has); ``per_layer=0`` is one-level K-FAC.
        total: columns of ``coarse="spectral"`` in all, in place of ``per_layer``: they go where the eigenvalues are.
        correction: ``"additive"``, ``"a-def1"``, ``"a-def2"`` or ``"balanced"``.
        iterations: of conjugate gradients for ``A v = g`` that both levels precondition, a product with F each; with 0
            they are applied once.
        coarse_operator: ``"captured"`` coarsens A itself; ``"kronecker"`` the Kronecker model, as the 2020 paper.
        fisher, samples: ``"mc"`` with so many labels drawn per example, ``"exact"`` or ``"empirical"``.
        observe_every, refresh_every, coarse_every: steps between observations, factorisations of M, and rebuilds
            of the coarse level (None: with M).
        coarse_examples, coarse_window: A holds at most so many examples of the last so many observed batches. None is
            512 examples, and the whole batch with ``"line_search"``, whose steps are of another function than the loss
            where A has not seen all of it: a warning says so once, also with ``"quadratic"``.
        weight_decay: of the loss, also in the quadratic model; or shrinks weights directly if ``decoupled``, by
            ``lr * weight_decay`` of themselves in each step, and by ``plain_lr * weight_decay`` without curvature.
        step_rule: ``"fixed"``; ``"kl_clip"`` shortens directions with ``lr² vᵀ(F + λI)v > kl_clip``, F itself and
            not its Kronecker model, which to second order is no less than twice the KL divergence; where F
            vanishes because the model is sure of itself, λ still bounds the step. The bound holds before momentum,
            which lengthens the step up to ``1/(1 − momentum)`` times and the form up to the square of that.
            ``"quadratic"`` takes step length and momentum from the captured model (Martens and Grosse 2015,
            section 7). ``"line_search"`` takes the length that ``search`` finds. It is for full batches, and large ones
            whose losses are nearly one function (a differential equation at many points), and not for mini-batches,
            where the next one undoes what this one gained. Every step needs a closure then.
        search: of the line search: ``"parabola"`` brackets a minimum and takes the lowest points of two parabolas,
            about five evaluations; ``"first"`` halves the step until the loss is lower than before; ``"least"`` takes
            the best of 31 halvings (:func:`kfac_viz.train.search.line_search`).
        convention: ``"expand"`` or ``"reduce"`` for layers with positions (Eschenhagen et al. 2023).
        layers: names of the layers to precondition; all of them by default.
        seed: of the sampled labels, which have their own generator.
        capturable: read nothing from the device in a plain step, so that it can be part of a CUDA graph: a bad gradient
            then leaves parameters and momentum alone by masking, and the next observation warns of it. Closures that
            judge a step are refused.

    Raises:
        ValueError, TypeError: a hyperparameter out of range.
    """

    @shows_options
    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | None = None,
        *,
        lr: float | None = None,
        plain_lr: float = 1e-3,
        momentum: float | None = None,
        weight_decay: float = 0.0,
        maximize: bool = False,
        layers: Iterable[str] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"The model comes first, not its parameters; got {type(model).__name__}. Write "
                "TwoLevelKFAC(model, likelihood=…), or TwoLevelKFAC(model, params, likelihood=…) to train a part of it."
            )
        try:
            if isinstance(params, Tensor):  # whose rows a list would hold
                raise TypeError
            given = None if params is None else list(params)
        except TypeError:
            raise TypeError(
                f"The second argument holds parameters or their groups; got {params!r}. Every other option is given "
                "by name, as in lr=0.1."
            ) from None
        self.options, self.ranks = Options.read(options), ranks_of(model)
        if self.options.capturable and self.ranks.size > 1:
            raise ValueError("capturable=True decides nothing on the host, where several ranks agree: leave it out.")
        self.model = unwrapped(model)
        self._only = layers if layers is None else _layer_names(layers, self.model)
        defaults = {
            "lr": self.options.usual("lr") if lr is None else lr,
            "plain_lr": plain_lr,
            "momentum": self.options.usual("momentum") if momentum is None else momentum,
            "weight_decay": weight_decay,
            "maximize": bool(maximize),
            "curvature": None,  # the place where a saved state has it, known to checkpoints that are flattened
        }
        if given is None:
            given = [p for p in self.model.parameters() if p.requires_grad]
        if not given:
            raise ValueError("There is no trainable parameter to optimize.")
        self._told: set[str] = set()
        self._left_out: set[str] = set()  # parameters of no known module that were seen in no sum of products
        self._facts: dict[str, float | Tensor] = {}  # the last values of the step rule
        self._skipped: Tensor | None = None  # steps with NaN or inf that a capturable optimizer left out
        super().__init__(given, defaults)
        self.curvature = RunningCurvature(self.options, self._layers(), self.ranks)
        self._rebuild_layout()
        layers = {f"layer {layer.name!r}": layer.shape for layer in self.partition.layers}
        self.ranks.agree("TwoLevelKFAC()", lambda: Outcome(None, vars(self.options) | self._choices | layers))

    @classmethod
    def as_published_2020(
        cls,
        model: nn.Module,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | None = None,
        **options: Any,
    ) -> TwoLevelKFAC:
        """The choice of Tselepidis, Kohler and Orvieto, mended: one constant per layer, its coarse operator from
        the Kronecker model, added to K-FAC. The coarse matrix is rebuilt at each refresh and damped by ``λ ZᵀZ``."""
        published = {"coarse": "nicolaides", "per_layer": 1, "correction": "additive", "coarse_operator": "kronecker"}
        return cls(model, params, **{**published, **options})

    @classmethod
    def for_equations(
        cls,
        model: nn.Module,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | None = None,
        **options: Any,
    ) -> TwoLevelKFAC:
        """The choice for differential equations and other least squares, with full or large batches: the exact step at
        λ = 1e-6, of the vectors of the batch alone, observed and refreshed at every step, and the line search.

        It is the exact step, since two levels, ``first_level="kfac", per_layer=64, damping=0.01``, had the lower error
        after 5 seconds of processor time but the higher one after 10 (one seed of Poisson's equation in 5 dimensions,
        1,000 fresh points at each step). A run that went over from two levels to the exact step stayed behind: the line
        search cut its exact steps to less than a fiftieth.

        >>> import kfac_viz as kv
        >>> problem = kv.problems.poisson(widths=(8, 8), points=40)
        >>> opt = TwoLevelKFAC.for_equations(problem.model)
        >>> for seed in range(3):
        ...     problem = problem.resampled(seed)
        ...     opt.observe(problem.inputs)
        ...     loss = opt.step(problem.closure(opt))
        """
        chosen = {"likelihood": "gaussian", "fisher": "exact", "first_level": "exact", "rule": "eigen", "damping": 1e-6}
        chosen |= {"step_rule": "line_search", "observe_every": 1, "refresh_every": 1}
        return cls(model, params, **{**chosen, **options})

    # ---- curvature ------------------------------------------------------------------------------------

    @_full_precision
    def observe(self, *inputs: Tensor, targets: Tensor | None = None) -> None:
        """Capture curvature from a batch when it is due; at other steps it costs nothing.

        Call it with the arguments of the model, after ``backward`` and before ``step``; the parts of an
        accumulated batch may come one by one. The model keeps its mode, buffers and ``.grad``, and the global
        random state stays. ``targets`` belong to ``fisher="empirical"``.

        Raises:
            ValueError, TypeError: what cannot be captured; nothing has been changed then.
        """
        if not self.curvature.due:
            return
        self._tell_of_skipped()
        before = self.partition.names
        (F, seen, partition), sizes = self.ranks.agree("observe()", lambda: self._captured(inputs, targets))
        sizes = [int(n) for (n,) in sizes]
        if len(set(sizes)) > 1 and not share.asked:
            self._tell(
                "share",
                f"Ranks have {sizes} examples, and DistributedDataParallel takes the plain mean of their gradients: "
                "multiply the loss of each by kv.share(n).",
            )
        self._follow()  # while the layers that the curvature has now all count as eligible
        self._left_out |= set(partition.names) - set(F.partition.names)
        self.curvature.add_batch(F, seen, sizes)
        self._tell_of_cut()
        if self.partition.names != before:  # a layer was frozen or unfrozen since, or is used in no known way
            self._rebuild_layout()

    def _captured(self, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Outcome:
        """The Fisher of a batch with the layers that took part, and the partition that was asked for."""
        if (self.options.fisher == "empirical") != (targets is not None):
            raise ValueError("fisher='empirical' needs the true labels as targets=…, and no other kind takes them.")
        now = parameters_of(self.model)
        if not all(now.get(piece.parameter) is p for piece, p in self._layout.pieces):
            raise ValueError("The model's layers have changed since the optimizer was built; build a new optimizer.")
        check_inputs(self.model, self.partition, inputs)
        partition = self.partition if tuple(self._eligible()) == self.partition.layers else self._layers()
        F, seen = self.curvature.capture(self.model, inputs, targets, partition)
        same = {"the layers with curvature": F.partition.names, "the vectors of an example": F.S, "dtype": F.dtype}
        return Outcome((F, seen, partition), same, (F.N,))

    def _tell_of_cut(self) -> None:
        """Tell of a batch of which A has a part, where the loss of all of it judges the step."""
        rule, most, (kept, seen) = self.options.step_rule, self.options.coarse_examples, self.curvature.window.newest
        if rule in ("quadratic", "line_search") and most is not None and seen > most:
            self._tell(
                "cut",
                f"A holds {kept} of the {seen} examples of the batch, since coarse_examples={most}; the gradient and "
                f"K-FAC have all of them. Steps of step_rule={rule!r} then solve another system than that of the loss "
                f"that judges them. Pass coarse_examples={seen} or smaller batches.",
            )

    @property
    @_full_precision
    @torch.no_grad()
    def preconditioner(self) -> TwoLevel:
        """The two-level preconditioner that the next step applies; it can be drawn."""
        return self.curvature.preconditioner(lambda: self._gradient().g)

    @property
    def partition(self) -> Partition:
        """The layers that are preconditioned."""
        return self.curvature.partition

    @property
    def diagnostics(self) -> dict[str, float]:
        """A copy of the counters and of the last values of the step rule, as plain numbers, read when asked for."""
        facts = {name: float(x) for name, x in self._facts.items()}
        return self.curvature.counters | facts | self.ranks.traffic

    @property
    def damping(self) -> float:
        """λ, which may be set at any time."""
        return self.curvature.damping

    @damping.setter
    def damping(self, damping: float) -> None:
        self.curvature.damping = check_damping(damping)

    # ---- the step -------------------------------------------------------------------------------------

    @_full_precision
    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step along ``preconditioner @ gradient``; returns the closure's loss.

        Args:
            closure: recomputes the loss and its gradient, as for every PyTorch optimizer. With the quadratic rule
                it is called again after the step: λ follows the reduction ratio, and a step that went up is
                undone, its momentum forgotten and λ raised fourfold. The line search calls it at each length and needs
                the loss alone: a closure with an argument ``backward`` gets ``backward=False``. ``.grad``
                stays that of the start of the step. If the loss goes up at every length, the parameters stay, the step
                is counted in ``diagnostics["stuck"]``, and the first gives a warning.

        Raises:
            ValueError, TypeError: no observation yet, no gradient, one with NaN or inf (naming the layer), a step that
                overflows the parameters, or a group whose options were edited out of range; parameters and momentum
                have not been changed then.
        """
        if closure is None and self._asked_for_state:
            self._make_state()
            return None
        searching = self.options.step_rule == "line_search"
        judged = searching or (closure is not None and self.options.step_rule == "quadratic")
        if self.options.capturable and judged:
            raise ValueError(
                f"capturable=True decides nothing on the host; step_rule={self.options.step_rule!r} "
                f"{'needs to' if searching else 'takes no closure then'}."
            )
        if searching and closure is None:
            raise ValueError("step_rule='line_search' looks at the loss: call step(closure), which returns it.")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        kept, facts = copy.copy(self.curvature), dict(self._facts)
        kept.counters = dict(kept.counters)
        try:
            self._follow()
            self._judged_step(closure if judged else None, loss)
        except BaseException:
            self.curvature, self._facts = kept, facts  # a refresh that was due still is
            raise
        unseen = [name for name in self.partition.names if name not in self.curvature.factors.weight]
        self.curvature.counters["layers without statistics"] += len(unseen)
        self.curvature.step += 1
        return loss

    def _judged_step(self, closure: Callable[[], Tensor] | None, loss: Tensor | None) -> None:
        """The step itself; if there is a closure, which has just returned ``loss``, it judges the step."""
        step = self._agreed_gradient() if self.ranks.size > 1 and self.curvature.due else self._gradient()
        if self.curvature.renewal_due:  # which a bad gradient must not set off
            step.check_gradient()
        searching = self.options.step_rule == "line_search"
        T, layout = self.preconditioner, self._layout
        ridge = T.damping if self.options.decoupled else T.damping + layout.option("weight_decay")
        proposed = update(
            step.moving(self._direction(T, step), known=self.curvature.factors.weight),
            step.momentum(),
            QuadraticModel(T.A.operator, step.g, ridge),
            self.options,
            lr=layout.option("lr"),
            momentum=layout.option("momentum"),
            damping=T.damping,
            predicting=not searching and (closure is not None or self.curvature.just_observed),
        )
        moves = step.moves(proposed)  # here, since a closure may write into the gradients at every length that is tried
        measured = proposed.facts
        if "predicted" in measured and (slope := step.plain_slope(moves)) is not None:
            measured = measured | {"predicted": measured["predicted"] + slope, "plain slope": slope}

        def take(length: float = 1.0) -> None:
            """Take the step, or so much of it, and note what was measured."""
            facts, skipped = step.write(moves, measured, T, length)
            self._facts.update(facts)
            if skipped is not None:
                self._skipped = skipped + (0 if self._skipped is None else self._skipped)
            elif "overshoot" in facts:
                self._count_overshoot(facts["overshoot"])

        if closure is None:
            take()
        elif searching:
            self._search(Trial(step, loss_alone(closure), loss, self.ranks), take)
        else:
            trial = Trial(step, closure, loss, self.ranks)
            take()
            self._judge(trial)

    def _direction(self, T: TwoLevel, step: Step) -> Tensor:
        """What takes the place of ``A⁻¹ g``, (P,)."""
        if not self.options.iterations:
            return T._apply(step.g)
        step.check_gradient()
        return pcg(T.A, step.g, T, rtol=1e-10, max_iterations=self.options.iterations).solution

    def _gradient(self) -> Step:
        """The gradients as they are now, from which a step is made."""
        return Step(self._layout, self.param_groups, self.state, self.options)

    def _agreed_gradient(self) -> Step:
        """The gradients, once it is clear that all ranks have the same, and take the same step from the same place."""

        def found() -> Outcome:
            step = self._gradient()
            norms = (torch.stack(torch._foreach_norm(list(x), dtype=torch.float64)).norm()
                     for x in (step.grads.values(), step.grads))  # fmt: skip
            same = {"steps so far": self.curvature.step, "the last observation": self.curvature.observed_at}
            same |= {"damping": self.damping, "parameters with a gradient": len(step.grads)} | self._choices
            return Outcome(step, same, [float(x) for x in norms])

        step, norms = self.ranks.agree("step()", found)
        check_replicas(norms, torch.finfo(self._layout.like.dtype).eps ** 0.5)
        return step

    @property
    def _choices(self) -> dict[str, Any]:
        """The options of the groups, which may be edited at any time."""
        choices = {}
        for i, group in enumerate(self.param_groups):
            choices |= {f"{key} of group {i}": x for key, x in group.items() if key not in ("params", "curvature")}
        return choices

    def _tell_of_skipped(self) -> None:
        """Tell of steps that were skipped on the device since the last observation."""
        if self._skipped is not None and int(self._skipped):
            skipped, self._skipped = int(self._skipped), None
            warn(f"{skipped} steps since the last observation were skipped: their gradients or steps held NaN or inf.")

    def _count_overshoot(self, change: float) -> None:
        """Count, and warn once of, a step just after an observation along which the captured model itself goes up."""
        if change > 0 and self.curvature.just_observed:
            self.curvature.counters["overshoots"] += 1
            self._tell(
                "overshoot",
                "By the captured quadratic model this step goes up: it is too long. Lower lr, raise damping, or take "
                "step_rule='quadratic'. Counted from now on in diagnostics['overshoots'].",
            )

    def _judge(self, trial: Trial) -> None:
        """Compare with the loss after the step: undo what went up, and adapt λ."""
        change, predicted = trial.change(), self._facts["predicted"]
        if not change <= 0 and trial.plain:  # λ cannot mend the steps of these
            trial.restore(trial.plain)
            change, predicted = trial.change(), predicted - self._facts["plain slope"]
            self.curvature.counters["without plain steps"] += 1
        ratio = self._facts["reduction ratio"] = change / predicted if predicted else 0.0
        if not change <= 0:  # which NaN is not, either
            trial.reject()
            self.curvature.counters["rejected"] += 1
        self.damping = judged_damping(self.damping, change, ratio, self.curvature.step)

    def _search(self, trial: Trial, take: Callable[[float], None]) -> None:
        """Take the length that the option ``search`` finds; leave everything as it is where there is none."""
        if not math.isfinite(trial.loss):
            raise ValueError(f"The closure returned {trial.loss}: there is no lower loss to look for.")

        def change(length: float) -> float:
            """The loss's along so much of the step, which is taken back; inf where more than all of it overflows."""
            try:
                take(length)
            except ValueError:
                if length <= 1:
                    raise
                return math.inf
            change = trial.change()
            trial.restore()
            return change

        gradients = {p: (p.grad, p.grad.clone()) for p in trial.before}  # the closure may write into them
        try:
            length, evaluations = line_search(change, 0.0, self.options.search)
        finally:
            for p, (grad, value) in gradients.items():
                p.grad = grad.copy_(value)
        self.curvature.counters["evaluations"] += evaluations
        if length:
            take(length)
        self._facts["step length"] = length
        if not length:
            self.curvature.counters["stuck"] += 1
            self._tell(
                "stuck",
                f"The loss goes up at every length of the step, down to {LENGTHS_TRIED[-1]:.0e}: it was not taken. The "
                "minimum may be reached to working precision; else raise damping, or see that the closure returns the "
                "loss of the batch that was observed. Counted from now on in diagnostics['stuck'].",
            )

    # ---- what it acts on ------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; layers that they complete join the curvature at the next :meth:`observe`.

        Raises:
            ValueError, TypeError: an option out of range; the groups are as before then.
        """
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"A group is a dictionary with its 'params'; got {type(param_group).__name__}.")
        given = param_group["params"]
        if not isinstance(given, Iterable):
            raise TypeError(f"The 'params' of a group are parameters; got {type(given).__name__}.")
        param_group = param_group | {"params": [given] if isinstance(given, Tensor) else list(given)}
        check_group(self.defaults | param_group)
        complex_ones = [x for x in param_group["params"] if isinstance(x, Tensor) and x.is_complex()]
        if complex_ones:
            names = {p: name for name, p in self.model.named_parameters()}
            raise ValueError(
                f"Parameter {names.get(complex_ones[0], '?')!r} is complex, and no step is defined for it. Give the "
                "others alone, or keep real and imaginary part in one real parameter (torch.view_as_real)."
            )
        again = len(param_group["params"]) - len(set(map(id, param_group["params"])))
        if again:
            raise ValueError(f"A group holds {again} of its parameters twice; each is trained once.")
        try:
            super().add_param_group(param_group)
        except (TypeError, ValueError) as error:
            raise type(error)(f"These parameters cannot be trained: {error}") from None
        if hasattr(self, "curvature"):  # PyTorch's constructor comes here too
            try:
                partition = self._layers()
            except ValueError:
                self.param_groups.pop()
                raise
            self.curvature.set_partition(partition)
            self._rebuild_layout()

    def _eligible(self, *, frozen: bool = False) -> list[Layer]:
        """The layers all of whose parameters are in a group, and trainable or also ``frozen``."""
        given = {p for group in self.param_groups for p in group["params"]}
        parameters = parameters_of(self.model)
        return [
            layer
            for name, layer in layers_of(self.model).items()
            if name not in self._left_out
            and (self._only is None or any(inside(name, chosen) for chosen in self._only))
            and all(p in given and (frozen or p.requires_grad) for p in (parameters[x.parameter] for x in layer.pieces))
        ]

    def _layers(self) -> Partition:
        """The layers that can have curvature as groups and parameters are now."""
        names = [layer.name for layer in self._eligible()]
        missing = [chosen for chosen in self._only or () if not any(inside(name, chosen) for name in names)]
        if missing or not names:
            raise ValueError(
                f"Layers {missing} are not trainable layers of the model with all their parameters in the optimizer."
                if missing
                else "The model has no trainable layer with all its parameters given."
            )
        return partition_of(self.model, names)

    def _rebuild_layout(self) -> None:
        """Rebuild the layout for the current partition; warn once about parameters without curvature."""
        names = self.partition.names
        self._find_parameters()
        layout = self._layout
        firm = [name for name, layer in layers_of(self.model).items() if not layer.loose]
        left = [name for name in (*firm, *computed(self.model)) if name not in names]
        if left:
            self._tell("left", f"Left out of the curvature, being frozen or not given in full: {', '.join(left)}.")
        plain = [layout.names.get(p, "?") for p in layout.group if p not in layout.covered and p.requires_grad]
        if plain:
            self._tell("plain", f"Adam's steps, with the plain_lr of their group, for: {', '.join(plain)}.")

    def _find_parameters(self) -> None:
        """Look up the parameters of the layers: groups and partition are new, or the model is a copy."""
        self._layout = Layout(self.partition, self.model, self.param_groups)
        for p, own in self.state.items():  # who gains or loses curvature starts anew
            for name in MOMENTS if p in self._layout.covered else ("momentum_buffer",):
                own.pop(name, None)

    def _tell(self, key: str, message: str) -> None:
        if key not in self._told:
            self._told.add(key)
            warn(message)

    # ---- state ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As PyTorch's: tensors, numbers, strings, lists, dictionaries and one tuple.

        ``state`` has the momentum or the moments of every trainable parameter, those that are zero included; the first
        of the ``param_groups`` has in ``"curvature"`` all that belongs to no parameter, as a copy. So
        ``get_optimizer_state_dict``, ``set_optimizer_state_dict``, ``save`` and ``load`` of
        ``torch.distributed.checkpoint`` lose nothing. With ``flatten_optimizer_state_dict=True`` they write that copy
        once for every parameter of the first group. The momentum of a parameter that was taken out of its group is left
        out: PyTorch has no number for it.
        """
        given = {p for group in self.param_groups for p in group["params"]}
        taken_out = {p: self.state.pop(p) for p in list(self.state) if p not in given}
        try:
            state = super().state_dict()
        finally:
            self.state.update(taken_out)
        for i, p in enumerate(p for group in self.param_groups for p in group["params"]):
            if p.requires_grad:
                state["state"][i] = states.whole(state["state"].get(i, {}), p, self._layout)
        like = self._layout.like
        state["param_groups"][0]["curvature"] = states.packed(self.curvature, "cpu" if like.is_meta else like.device)
        return state

    @property
    def _asked_for_state(self) -> bool:
        """Whether a step is to make the state alone, as ``torch.distributed.checkpoint`` has it done before it saves or
        loads: the first one, at ``lr=0`` and with gradients of zeros, without any observation."""
        if self.state or self.curvature.observed_at is not None or any(group["lr"] for group in self.param_groups):
            return False
        grads = [p.grad for p in self._layout.group if p.grad is not None]
        return bool(grads) and not any(bool(grad.any()) for grad in grads)

    def _make_state(self) -> None:
        """Zeros for the momentum or the moments of every trainable parameter."""
        for p in self._layout.group:
            if p.requires_grad:
                self.state[p] = states.whole({}, p, self._layout)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume bit for bit, with the saved λ and options of the groups in place of the constructor's.

        States of the version before, with ``"curvature"`` beside ``"param_groups"``, are loaded too; they have no
        ``plain_lr`` and no moments.

        The constructor's other arguments are the caller's to repeat. Those that shape the curvature are in the
        state: where they differ, a warning names both values, and this optimizer's hold from now on.

        Raises:
            ValueError, TypeError: a state of another optimizer, of other layers, or with something missing or out of
                range; nothing has been changed then.
        """
        curvature = self._restored(states.curvature_in(state_dict))
        matching = states.matching(state_dict, self.param_groups)
        super().load_state_dict(matching)
        own = [matching["state"].get(i, {}) for group in matching["param_groups"] for i in group["params"]]
        for p, kept in zip(self._layout.group, own, strict=True):  # PyTorch has cast moments to the parameter's dtype
            self.state[p].update({name: kept[name] for name in MOMENTS if name in kept})
        self.curvature = curvature
        self._find_parameters()

    def _restored(self, saved: Any) -> RunningCurvature:
        """Saved curvature where the model is now; it may be of layers that were frozen since."""
        curvature = states.restored(saved, self.options, self._eligible(frozen=True), self._layout.like)
        curvature.ranks = self.ranks
        return curvature

    def _follow(self) -> None:
        """Move the curvature after the model to another device or dtype."""
        like = self._layout.like
        kept = next(iter(self.curvature.factors.A.values()), like)
        if (kept.dtype, kept.device) != (like.dtype, like.device):
            self.curvature = self._restored(states.saved(self.curvature))

    def __getstate__(self) -> dict[str, Any]:
        own = ("model", "options", "ranks", "curvature", "_told", "_only", "_left_out", "_facts", "_skipped")
        return super().__getstate__() | {name: self.__dict__[name] for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._find_parameters()

    def __repr__(self) -> str:
        groups = "; ".join(
            ", ".join(f"{key}={_shown(value)}" for key, value in group.items() if key not in ("params", "curvature"))
            for group in self.param_groups
        )
        ranks = f"  {self.ranks.size} ranks, replicated\n" if self.ranks.size > 1 else ""
        return (
            f"TwoLevelKFAC({self.curvature}\n{ranks}"
            f"  step: {self.options.step_rule}; {groups}\n"
            f"  so far: {', '.join(f'{key} {value:.4g}' for key, value in self.diagnostics.items() if value)})"
        )


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else repr(value)


def _layer_names(layers: Iterable[str], model: nn.Module) -> tuple[str, ...]:
    """The names, once each element can be one: a string would fall into its characters."""
    names = () if isinstance(layers, str) or not isinstance(layers, Iterable) else tuple(layers)
    if not names:
        raise ValueError(f"layers must be a list of names out of {list(layers_of(model))}; got {layers!r}.")
    return names
