"""The curvature that an optimizer follows from batch to batch, and the two-level preconditioner made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..method import coarse as spaces
from ..method.capture import observed
from ..method.checks import check_choice, check_count, check_damping, check_number, warn
from ..method.columns import CoarseSpace, LocalSpace, RankOneSpace
from ..method.fisher import Fisher
from ..method.kfac import KFAC, RULES
from ..method.kronecker import CONVENTIONS, KroneckerFactors, LeadingEigenvectors
from ..method.kronecker_fisher import KroneckerFisher
from ..method.likelihood import FLAVOURS, LIKELIHOODS
from ..method.operator import Damped, replace
from ..method.partition import Partition
from ..method.two_level import CORRECTIONS, TwoLevel
from .statistics import RunningFactors, Window, untouched

SPACES = ("nicolaides", "spectral", "smooth", "krylov", "random")
COARSE_OPERATORS = ("captured", "kronecker")
# What shapes the curvature goes into the state, to be compared when it is loaded.
SHAPING = (
    *("likelihood", "rule", "coarse", "per_layer", "correction"),
    *("coarse_operator", "fisher", "samples", "convention"),
)


class RunningCurvature:
    """Averaged factors and recent vectors, with the clock that says when to observe, factorise and coarsen.

    The arguments are those of :class:`kfac_viz.TwoLevelKFAC`, which owns the parameters and takes the steps.

    Attributes:
        partition: the layers that have curvature.
        step: steps that the optimizer has taken.
        observed_at: the step of the last observation, or None.
        diagnostics: counters, plain numbers; the optimizer adds its own.
    """

    partition: Partition

    def __init__(
        self,
        *,
        likelihood: str,
        damping: float,
        rule: str,
        coarse: str,
        per_layer: int,
        correction: str,
        coarse_operator: str,
        fisher: str,
        samples: int,
        decay: float,
        observe_every: int,
        refresh_every: int,
        coarse_every: int | None,
        coarse_examples: int,
        coarse_window: int,
        convention: str,
        seed: int,
    ) -> None:
        self.likelihood = check_choice("likelihood", likelihood, LIKELIHOODS)
        self.damping = check_damping(damping)
        self.rule = check_choice("rule", rule, RULES)
        self.coarse = check_choice("coarse", coarse, SPACES)
        self.per_layer = check_count("per_layer", per_layer, 0)
        self.correction = check_choice("correction", correction, CORRECTIONS)
        self.coarse_operator = check_choice("coarse_operator", coarse_operator, COARSE_OPERATORS)
        self.fisher = check_choice("fisher", fisher, FLAVOURS)
        self.samples = check_count("samples", samples, 1)
        self.observe_every = check_count("observe_every", observe_every, 1)
        self.refresh_every = check_count("refresh_every", refresh_every, 1)
        self.coarse_every = None if coarse_every is None else check_count("coarse_every", coarse_every, 1)
        self.convention = check_choice("convention", convention, CONVENTIONS)
        self.seed = check_count("seed", seed, 0)
        self.factors = RunningFactors(check_number("decay", decay, 0.0, 1.0), self.convention)
        self.window = Window(
            check_count("coarse_window", coarse_window, 1),
            check_count("coarse_examples", coarse_examples, 1),
            self.factors.decay,
        )
        self.step = 0
        self.diagnostics: dict[str, float] = dict.fromkeys(
            ("observations", "refreshes", "coarse refreshes", "overshoots", "shortened", "rejected")
            + ("fallbacks to eigenvalues", "fallbacks to one level", "layers without statistics"),
            0,
        )
        self._forget()

    def _forget(self) -> None:
        """No preconditioner, and the next observation is due."""
        self._T: TwoLevel | None = None
        self.observed_at: int | None = None
        self._built_at = self._coarse_at = 0
        self._stale = self._coarse_stale = False

    def lay_out(self, partition: Partition) -> None:
        """Take up other layers; factors are kept by name, captured vectors are not."""
        self.partition = partition
        self.window.entries = []
        self._forget()

    # ---- from a batch to a preconditioner ---------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Whether this step is one to observe, or has been and its batch goes on."""
        last = self.observed_at
        return last is None or self.just_observed or self.step - last >= self.observe_every

    @property
    def just_observed(self) -> bool:
        """Whether this step has had its observation."""
        return self.observed_at == self.step

    def observe(
        self, model: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor | None, partition: Partition
    ) -> None:
        """Capture the batch and take it into the averages; a further part of it in the same step joins it.

        ``partition`` may be another one than before: it is taken up once the capture has gone well.
        """
        generator = torch.Generator(inputs[0].device)
        generator.manual_seed((1_000_003 * self.seed + self.diagnostics["observations"]) % 2**63)
        with untouched(model, inputs[0].device):
            F, seen = observed(
                model,
                inputs,
                partition,
                likelihood=self.likelihood,
                fisher=self.fisher,
                targets=targets,
                samples=self.samples,
                generator=generator,
                partial=True,
            )
        if partition is not self.partition:
            self.lay_out(partition)
        self.factors.add(F, seen, same_batch=self.just_observed)
        self.window.add(F, same_batch=self.just_observed)
        self.observed_at, self._stale, self._coarse_stale = self.step, True, True
        self.diagnostics["observations"] += 1

    def preconditioner(self, gradient: Callable[[], Tensor]) -> TwoLevel:
        """Both levels as they are due at this step; ``gradient`` (P,) is asked for by Krylov spaces alone."""
        if self.observed_at is None:
            raise ValueError("No curvature yet: call observe(inputs) after loss.backward() and before step().")
        T = self._T
        if T is None or (self._stale and self._rebuild(self._built_at, self.refresh_every)):
            M = KFAC(self.factors.factors(self.partition), self.damping, self.rule)
            if T is None or self.coarse_every is None:
                self._coarsen(M, gradient)
            else:
                self._T = replace(T if T.damping == self.damping else T.with_damping(self.damping), M=M)
            self.diagnostics["refreshes"] += 1
            self.diagnostics["fallbacks to eigenvalues"] += M.fallbacks
            self._built_at, self._stale = self.step, False
        elif T.damping != self.damping:
            self._T = T.with_damping(self.damping)
        if self.coarse_every and self._coarse_stale and self._rebuild(self._coarse_at, self.coarse_every):
            self._coarsen(self._T.M, gradient)
        return self._T

    def _rebuild(self, last: int, every: int) -> bool:
        """Whether so many steps have gone by, or something more was observed in the step of the last rebuild."""
        return self.step == last or self.step - last >= every

    def _coarsen(self, M: KFAC, gradient: Callable[[], Tensor]) -> None:
        A = self.window.fisher(self.partition, self.likelihood, self.fisher).damped(self.damping)
        Z = self._space(A, M, gradient)
        self._T = self._two_level(A, M, Z, lambda: self.window.kronecker(self.partition, self.convention))
        self._coarse_at, self._coarse_stale = self.step, False
        self.diagnostics["coarse refreshes"] += 1

    def _two_level(self, A: Damped, M: KFAC, Z: CoarseSpace, kronecker: Callable[[], KroneckerFisher]) -> TwoLevel:
        """The levels together; where E cannot be made or inverted M alone, told once and counted."""
        try:
            E = None
            if self.coarse_operator == "kronecker" and Z.size:
                E = kronecker().damped(A.damping)
            return TwoLevel(A, M, Z, self.correction, coarse_operator=E)
        except ValueError as error:
            if not self.diagnostics["fallbacks to one level"]:
                warn(f"The coarse level is left out until the next refresh: {error}")
            self.diagnostics["fallbacks to one level"] += 1
            return TwoLevel(A, M, spaces.nicolaides(A, 0), self.correction)

    def _space(self, A: Damped, M: KFAC, gradient: Callable[[], Tensor]) -> CoarseSpace:
        if self.coarse == "krylov" and self.per_layer:
            return spaces.krylov(A, M, gradient(), self.per_layer)
        if self.coarse == "spectral" and self.per_layer and self.rule == "factored":
            return spaces.spectral(LeadingEigenvectors(M.factors, self.per_layer), self.per_layer)
        source = M if self.coarse in ("spectral", "smooth") and self.per_layer else A
        builder = getattr(spaces, self.coarse if self.per_layer else "nicolaides")
        return builder(source, self.per_layer)

    # ---- state ------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All of it as tensors, numbers, strings, lists and dictionaries."""
        T, level = self._T, None
        if T is not None:
            F = T.A.operator
            level = {"A": list(T.M.factors.A), "G": list(T.M.factors.G), "a": list(F.a), "g": list(F.g)}
            columns = list(T.Z.blocks) if isinstance(T.Z, LocalSpace) else [list(pair) for pair in T.Z.factors]
            level |= {"damping": T.damping, "space": T.Z.name, "columns": columns}
            if not T.galerkin:  # g is the same
                level["kronecker a"] = list(T.coarse_operator.operator.F.a)
        return {
            "layers": self._shapes(),
            "options": {name: getattr(self, name) for name in SHAPING},
            "damping": self.damping,
            "steps": self.step,
            "diagnostics": dict(self.diagnostics),
            "marks": [self.observed_at, self._built_at, self._coarse_at, self._stale, self._coarse_stale],
            "factors": {name: [A, self.factors.G[name]] for name, A in self.factors.A.items()},
            "weights": dict(self.factors.weight),
            "newest": sorted(self.factors.newest),
            "window": [dict(entry) for entry in self.window.entries],
            "level": level,
        }

    def _shapes(self) -> dict[str, list[int]]:
        return {layer.name: list(layer.shape) for layer in self.partition.layers}

    def check_state(self, saved: dict[str, Any]) -> None:
        """Refuse a state of other layers, and warn where it was made with other options."""
        if list(saved["layers"].items()) != list(self._shapes().items()):
            raise ValueError(f"The state belongs to layers {saved['layers']}; this optimizer has {self._shapes()}.")
        was = saved.get("options", {})  # states of earlier versions have none
        other = [name for name in SHAPING if name in was and was[name] != getattr(self, name)]
        if other:
            differences = ", ".join(f"{name}={was[name]!r} (here {getattr(self, name)!r})" for name in other)
            warn(
                f"The state was saved with {differences}. It is loaded, and this optimizer keeps its own options: "
                "the run goes on differently from the saved one."
            )

    def restore(self, saved: dict[str, Any], like: Tensor) -> None:
        """Take over what :meth:`state` gave, on the device and in the dtype of ``like``."""
        saved = converted(saved, like)
        self.damping, self.step, self.diagnostics = saved["damping"], saved["steps"], saved["diagnostics"]
        self.factors.A = {name: A for name, (A, _) in saved["factors"].items()}
        self.factors.G = {name: G for name, (_, G) in saved["factors"].items()}
        self.factors.weight, self.window.entries = saved["weights"], saved["window"]
        self.factors.newest = set(saved["newest"])
        self._forget()
        level = saved["level"]
        if level is not None:
            factors = KroneckerFactors(self.partition, tuple(level["A"]), tuple(level["G"]))
            M = KFAC(factors, level["damping"], self.rule)
            F = Fisher(self.partition, level["a"], level["g"], likelihood=self.likelihood, flavour=self.fisher)
            space, columns = level["space"], level["columns"]
            if space == "krylov":
                Z = LocalSpace(self.partition, columns, name=space)
            else:
                Z = RankOneSpace(self.partition, [(W, U) for W, U in columns], name=space)
            K = Fisher(self.partition, level.get("kronecker a", level["a"]), level["g"])
            self._T = self._two_level(F.damped(level["damping"]), M, Z, lambda: KroneckerFisher(K, self.convention))
        self.observed_at, self._built_at, self._coarse_at, self._stale, self._coarse_stale = saved["marks"]

    def follow(self, like: Tensor) -> bool:
        """Move to the device and dtype of ``like``; whether there was anything to move."""
        kept = next(iter(self.factors.A.values()), like)
        moves = (kept.dtype, kept.device) != (like.dtype, like.device)
        if moves:
            self.restore(self.state(), like)
        return moves

    def __repr__(self) -> str:
        space = f"{self.coarse}-{self.per_layer} {self.correction}" if self.per_layer else "one level"
        vectors = f"mc with {self.samples} labels per example" if self.fisher == "mc" else self.fisher
        window = f"{self.window.examples} examples of the last {self.window.batches} observed batches"
        every = (self.observe_every, self.refresh_every, self.coarse_every or self.refresh_every)
        return (
            f"{self.partition}, {space}, rule {self.rule}, λ = {self.damping:.3g}\n"
            f"  curvature: {vectors}; A and E ({self.coarse_operator}) from at most {window}, decay "
            f"{self.factors.decay:g}; observe, refresh, coarsen every {every} steps"
        )


def converted(value: Any, like: Tensor) -> Any:
    """The same nest of dictionaries and lists, its tensors in the dtype and on the device of ``like``."""
    if isinstance(value, dict):
        return {key: converted(item, like) for key, item in value.items()}
    if isinstance(value, list):
        return [converted(item, like) for item in value]
    return value.to(like) if isinstance(value, Tensor) else value
