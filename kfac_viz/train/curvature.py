"""The curvature that an optimizer follows from batch to batch, and the two-level preconditioner made of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..method import coarse as spaces
from ..method.checks import warn
from ..method.columns import CoarseSpace
from ..method.fisher import Fisher
from ..method.kfac import EKFAC, KFAC
from ..method.kronecker_fisher import KroneckerFisher
from ..method.operator import Damped, uncached_copy
from ..method.partition import Partition
from ..method.preconditioner import BlockDiagonal, Diagonal, Exact, Identity, Nothing, Preconditioner
from ..method.products import check_factors
from ..method.two_level import TwoLevel
from ..scores.capture import capture_layers
from .options import Options
from .statistics import RunningFactors, Window, untouched

COUNTERS = (
    *("observations", "refreshes", "coarse refreshes", "overshoots", "rejected", "evaluations", "stuck"),
    "without plain steps",
    *("fallbacks to eigenvalues", "fallbacks to one level", "layers without statistics"),
    *("directions at the floor", "undetermined layers"),  # of the product nearest in KL, summed over refreshes
)


class RunningCurvature:
    """Averaged factors and recent vectors, with the clock that says when to observe, factorise and coarsen.

    Attributes:
        options: the choices of the optimizer, which owns the parameters and takes the steps.
        damping: λ as it is now.
        partition: the layers that have curvature.
        step: steps that the optimizer has taken.
        observed_at: the step of the last observation, or None.
        counters: of what has happened so far.
    """

    def __init__(self, options: Options, partition: Partition) -> None:
        self.options, self.damping = options, float(options.damping)
        self.factors = RunningFactors(options.decay, options.convention, options.factors)
        self.window = Window(options.coarse_window, options.coarse_examples, options.decay)
        self.step = 0
        self.counters: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self.set_partition(partition)

    def set_partition(self, partition: Partition) -> None:
        """Take up other layers; factors are kept by name, captured vectors are not, and an observation is due."""
        check_factors(self.options.factors, self.options.convention, partition.layers)
        self.partition = partition
        self.window.parts = []
        self._T: TwoLevel | None = None
        self.observed_at: int | None = None
        self._built_at = self._coarse_at = 0
        self._stale = self._coarse_stale = False

    # ---- from a batch to a preconditioner ---------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Whether this step is one to observe, or has been and its batch goes on."""
        last = self.observed_at
        return last is None or self.just_observed or self.step - last >= self.options.observe_every

    @property
    def just_observed(self) -> bool:
        """Whether this step has had its observation."""
        return self.observed_at == self.step

    def capture(
        self, model: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor | None, partition: Partition
    ) -> tuple[Fisher, tuple[str, ...]]:
        """The Fisher of a batch as the options ask for it, and the layers that took part; nothing is changed yet.

        ``partition`` may be another one than before, if layers were frozen or unfrozen. Labels are drawn on the device
        of the inputs, since drawing them on the CPU would wait for a GPU in every observation.
        """
        options, generator = self.options, torch.Generator(inputs[0].device)
        generator.manual_seed((1_000_003 * options.seed + self.counters["observations"]) % 2**63)
        with untouched(model, inputs[0].device):
            return capture_layers(
                model,
                inputs,
                partition,
                likelihood=options.likelihood,
                fisher=options.fisher,
                targets=targets,
                samples=options.samples,
                generator=generator,
                partial=True,
            )

    def add_batch(self, F: Fisher, seen: tuple[str, ...]) -> None:
        """Take a captured batch into the averages; a further part of it in the same step joins it."""
        if F.partition != self.partition:
            self.set_partition(F.partition)
        self.factors.add(F, seen, same_batch=self.just_observed)
        self.window.add(F, same_batch=self.just_observed)
        self.observed_at, self._stale, self._coarse_stale = self.step, True, True
        self.counters["observations"] += 1

    def preconditioner(self, gradient: Callable[[], Tensor]) -> TwoLevel:
        """Both levels as they are due at this step; ``gradient`` (P,) is asked for by Krylov spaces alone."""
        if self.observed_at is None:
            raise ValueError("No curvature yet: call observe(inputs) after loss.backward() and before step().")
        T, options = self._T, self.options
        if self._refresh_due:
            M = self._first_level()
            if T is None or options.coarse_every is None:
                self._coarsen(M, gradient)
            else:
                self._T = uncached_copy(T if T.damping == self.damping else T.with_damping(self.damping), M=M)
            self.counters["refreshes"] += 1
            self.counters["fallbacks to eigenvalues"] += getattr(M, "fallbacks", 0)
            self.counters["directions at the floor"] += self.factors.renew_inverses()
            self.counters["undetermined layers"] += len(M.factors.undetermined) if isinstance(M, EKFAC) else 0
            self._built_at, self._stale = self.step, False
        elif T.damping != self.damping:
            self._T = T.with_damping(self.damping)
        if self._coarsening_due:
            self._coarsen(self._T.M, gradient)
        return self._T

    @property
    def renewal_due(self) -> bool:
        """Whether the next call of :meth:`preconditioner` makes one of the levels anew."""
        return self._refresh_due or self._coarsening_due

    @property
    def _refresh_due(self) -> bool:
        return self._T is None or (self._stale and self._rebuild(self._built_at, self.options.refresh_every))

    @property
    def _coarsening_due(self) -> bool:
        every = self.options.coarse_every
        return bool(every) and self._coarse_stale and self._rebuild(self._coarse_at, every)

    def _rebuild(self, last: int, every: int) -> bool:
        """Whether so many steps have gone by, or something more was observed in the step of the last rebuild."""
        return self.step == last or self.step - last >= every

    def _first_level(self) -> Preconditioner:
        """M as it is now: K-FAC has the averaged factors, all others have the vectors that A has."""
        if self.options.first_level == "kfac":
            return KFAC(self.factors.factors(self.partition), self.damping, self.options.rule)
        return first_level_of(self.options, self.window.fisher(), self.damping)

    def _coarsen(self, M: Preconditioner, gradient: Callable[[], Tensor]) -> None:
        A = self.window.fisher().damped(self.damping)
        Z = self._space(A, M, gradient)
        self._T = self._two_level(A, M, Z, lambda: self.window.kronecker(self.options.convention))
        self._coarse_at, self._coarse_stale = self.step, False
        self.counters["coarse refreshes"] += 1

    def _two_level(
        self, A: Damped, M: Preconditioner, Z: CoarseSpace, kronecker: Callable[[], KroneckerFisher]
    ) -> TwoLevel:
        """The levels together; where E cannot be made or inverted M alone, told once and counted."""
        try:
            E = kronecker().damped(A.damping) if self.options.coarse_operator == "kronecker" and Z.size else None
            return TwoLevel(A, M, Z, self.options.correction, coarse_operator=E)
        except ValueError as error:
            if self.options.first_level == "none":  # without a coarse level nothing would move
                raise
            if not self.counters["fallbacks to one level"]:
                warn(f"The coarse level is left out until the next refresh: {error}")
            self.counters["fallbacks to one level"] += 1
            return TwoLevel(A, M, spaces.nicolaides(A, 0), self.options.correction)

    def _space(self, A: Damped, M: Preconditioner, gradient: Callable[[], Tensor]) -> CoarseSpace:
        coarse, per_layer, total = self.options.coarse, self.options.per_layer, self.options.total
        if not self.options.columns:
            return spaces.nicolaides(A, 0)
        if coarse == "krylov":
            return spaces.krylov(A, M, gradient(), per_layer)
        if coarse not in ("spectral", "smooth"):
            return getattr(spaces, coarse)(A, per_layer)
        factors = M.factors if isinstance(M, KFAC) else self.factors.factors(self.partition)
        if coarse == "smooth":
            return spaces.smooth(factors, per_layer)
        few = self.options.rule == "factored"  # whose K-FAC needs no eigenvectors
        of = factors.leading(self.options.columns) if few else factors
        return spaces.spectral(of, per_layer) if total is None else spaces.spectral(of, total=total)

    def __repr__(self) -> str:
        o = self.options
        columns = f"{o.columns}{' in all' * (o.total is not None)}"
        space = f"{o.coarse}-{columns} {o.correction}" if o.columns else "one level"
        first = f"rule {o.rule}{f', factors {o.factors}' * (o.factors != 'kfac')}"
        first = first if o.first_level == "kfac" else f"first level {o.first_level}"
        space += f", {o.iterations} CG iterations" * (o.iterations > 0)
        vectors = f"mc with {o.samples} labels per example" if o.fisher == "mc" else o.fisher
        examples, (kept, seen) = self.window.examples, self.window.newest
        window = "every example" if examples is None else f"at most {examples} examples"
        window += f" of the last {self.window.batches} observed batches"
        window += f" ({kept} of the {seen} of the newest)" * (kept < seen)
        every = (o.observe_every, o.refresh_every, o.coarse_every or o.refresh_every)
        return (
            f"{self.partition}, {first}, {space}, λ = {self.damping:.3g}\n"
            f"  curvature: {vectors}; A and E ({o.coarse_operator}) from {window}, decay "
            f"{o.decay:g}; observe, refresh, coarsen every {every} steps"
        )


def first_level_of(options: Options, F: Fisher, damping: float) -> Preconditioner:
    """M of the captured vectors F, for every first level but ``"kfac"``, which has averages."""
    if options.first_level == "ekfac":
        return EKFAC(F, damping, options.convention, options.factors)
    if options.first_level == "identity":
        return Identity(F, damping, power=1.0)
    levels = {"blocks": BlockDiagonal, "diagonal": Diagonal, "none": Nothing, "exact": Exact}
    return levels[options.first_level](F, damping)
