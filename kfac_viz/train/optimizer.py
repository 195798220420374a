"""Train with the objects that the figures draw: two-level K-FAC as a ``torch.optim.Optimizer``."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..method.capture import check_inputs
from ..method.checks import check_choice, check_damping, check_number, finite, warn
from ..method.partition import Partition, is_kronecker_layer
from ..method.two_level import TwoLevel
from .curvature import RunningCurvature, converted
from .step import STEP_RULES, QuadraticModel, adapted_damping, best_coefficients, kl_scale

GUARDS = ("off", "count", "shorten")
LENGTHS = {"fixed": 0.1, "kl_clip": 0.3, "quadratic": 1.0}  # the lr that goes with each step rule
ADAPT_EVERY = 5  # steps between two looks at the reduction ratio (Martens and Grosse 2015, section 6.5)
REJECTION = 4.0  # factor on λ after a step that went up


def _full_precision(method: Callable) -> Callable:
    """Keep statistics out of an autocast that surrounds the call."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        with torch.autocast(self._params[0].device.type, enabled=False):
            return method(self, *args, **kwargs)

    return wrapped


class TwoLevelKFAC(Optimizer):
    """K-FAC with a coarse correction between layers, built from :class:`TwoLevel` and nothing else.

    >>> import kfac_viz as kv
    >>> problem = kv.problems.digits(widths=(8,), side=4, n=64)
    >>> opt = TwoLevelKFAC(problem.model, likelihood="categorical")
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

    The defaults are a compromise of three tasks in mini-batches of digits (figures/benchmarks/defaults.csv, each
    option varied alone, three seeds): with λ = 0.03, momentum 0.95 or ``kl_clip=3e-3`` one or another blows up;
    ``coarse="krylov"`` ends lower on both classifiers and takes longer at each refresh.
    training_mini_batch.csv has the losses of five more seeds beside K-FAC, Adam and SGD at equal steps, and the
    processor time, mostly higher than theirs; on a deep narrow classifier one-level K-FAC ends lower. For a full
    batch take ``step_rule="quadratic"`` with a closure, ``coarse_window=1``, ``coarse_examples`` that hold the batch,
    and exact vectors or several samples: with one label per example ``balanced`` is worse than K-FAC on a classifier
    (training_full_batch.csv). For large networks observe and refresh less often.

    What is averaged or stale: M holds exponential averages of the factors, as they were at the last refresh; A is
    the weighted Fisher of the last observed batches, as it was at the last coarse refresh; both share λ. After a
    single observation of a batch that fits in ``coarse_examples`` they are that batch's own.

    Args:
        model: its trainable Linear and ungrouped Conv2d layers get curvature; other parameters get plain gradient
            steps, and a warning names them once. Compiled models are seen through; a model distributed over several
            processes is refused.
        params: parameters or groups with their own ``lr``, ``momentum``, ``weight_decay``, ``maximize``; all
            trainable ones by default. A layer is preconditioned if all of its parameters are given.
        likelihood: ``"categorical"``, ``"bernoulli"`` or ``"gaussian"``.
        lr: factor on every step. None is 0.3 where ``kl_clip`` bounds the step, 0.1 where it is fixed, and with
            ``step_rule="quadratic"`` 1, the rule's own length.
        damping: λ. Adapted by Levenberg–Marquardt when the step rule is quadratic and ``step`` gets a closure.
        rule: ``"factored"`` (two products per layer) or ``"eigen"`` (four).
        coarse, per_layer: coarse space and its columns per layer, at most so many (a small layer gives what it
            has); ``per_layer=0`` is one-level K-FAC.
        correction: ``"additive"``, ``"a-def1"``, ``"a-def2"`` or ``"balanced"``.
        coarse_operator: ``"captured"`` coarsens A itself; ``"kronecker"`` the Kronecker model, as the 2020 paper.
        fisher, samples: ``"mc"`` with so many labels drawn per example, ``"exact"`` or ``"empirical"``.
        decay: weight of a batch against the next newer one in every average.
        observe_every, refresh_every, coarse_every: steps between observations, factorisations of M, and rebuilds
            of the coarse level (None: with M).
        coarse_examples, coarse_window: A holds at most so many examples of the last so many observed batches.
        momentum: in [0, 1); the quadratic rule finds its own coefficient, and 0 turns that off.
        weight_decay: of the loss, also in the quadratic model; or shrinks weights directly if ``decoupled``.
        step_rule: ``"fixed"``; ``"kl_clip"`` shortens directions with ``lr² vᵀ(F + λI)v > kl_clip``, F itself and
            not its Kronecker model, which to second order is no less than twice the KL divergence; where F
            vanishes because the model is sure of itself, λ still bounds the step. The bound holds before momentum,
            which lengthens the step up to ``1/(1 − momentum)`` times and the form up to the square of that.
            ``"quadratic"`` takes step length and momentum from the captured model (Martens and Grosse 2015,
            section 7).
        overshoot: what to do with steps along which the captured model itself goes up: ``"count"`` looks at the
            step after each observation and warns once, ``"shorten"`` cuts every such step to the model's minimum.
        convention: ``"expand"`` or ``"reduce"`` for layers with positions (Eschenhagen et al. 2023).
        layers: names of the layers to precondition; all of them by default.
        seed: of the sampled labels, which have their own generator.

    Raises:
        ValueError, TypeError: a hyperparameter out of range, in words.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | None = None,
        *,
        likelihood: str,
        lr: float | None = None,
        damping: float = 0.1,
        rule: str = "factored",
        coarse: str = "spectral",
        per_layer: int = 4,
        correction: str = "balanced",
        coarse_operator: str = "captured",
        fisher: str = "mc",
        samples: int = 1,
        decay: float = 0.95,
        observe_every: int = 5,
        refresh_every: int = 10,
        coarse_every: int | None = None,
        coarse_examples: int = 512,
        coarse_window: int = 4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        maximize: bool = False,
        step_rule: str = "kl_clip",
        kl_clip: float = 5e-4,
        overshoot: str = "count",
        convention: str = "expand",
        layers: Iterable[str] | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"The model comes first, not its parameters; got {type(model).__name__}. Write "
                "TwoLevelKFAC(model, likelihood=…), or TwoLevelKFAC(model, params, likelihood=…) to train a part of it."
            )
        if params is not None and not isinstance(params, Iterable):
            raise TypeError(
                f"The second argument holds parameters or their groups; got {params!r}. Every other option is given "
                "by name, as in lr=0.1."
            )
        shared = [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
        if any(dist.get_world_size(m.process_group) > 1 for m in shared):
            raise ValueError(
                "Curvature is not averaged between processes, so that the replicas would drift apart; train in one."
            )
        self.curvature = RunningCurvature(
            likelihood=likelihood,
            damping=damping,
            rule=rule,
            coarse=coarse,
            per_layer=per_layer,
            correction=correction,
            coarse_operator=coarse_operator,
            fisher=fisher,
            samples=samples,
            decay=decay,
            observe_every=observe_every,
            refresh_every=refresh_every,
            coarse_every=coarse_every,
            coarse_examples=coarse_examples,
            coarse_window=coarse_window,
            convention=convention,
            seed=seed,
        )
        self.step_rule = check_choice("step_rule", step_rule, STEP_RULES)
        self.overshoot = check_choice("overshoot", overshoot, GUARDS)
        self.kl_clip = check_number("kl_clip", kl_clip, 0.0, math.inf, open_low=True)
        self.decoupled = bool(decoupled)
        self.model = getattr(model, "_orig_mod", model)
        self._only = layers if layers is None else _layer_names(layers, self.model)
        lr = LENGTHS[step_rule] if lr is None else lr
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "maximize": bool(maximize)}
        if params is None:
            params = [p for p in self.model.parameters() if p.requires_grad]
        self._told: set[str] = set()
        super().__init__(params, defaults)
        self.curvature.lay_out(self._layers())
        self._take_up()

    @classmethod
    def as_published_2020(cls, model: nn.Module, **options: Any) -> TwoLevelKFAC:
        """The choice of Tselepidis, Kohler and Orvieto, mended: one constant per layer, its coarse operator from
        the Kronecker model, added to K-FAC. The coarse matrix is rebuilt at each refresh and damped by ``λ ZᵀZ``."""
        published = {"coarse": "nicolaides", "per_layer": 1, "correction": "additive", "coarse_operator": "kronecker"}
        return cls(model, **{**published, **options})

    # ---- curvature ------------------------------------------------------------------------------------

    @_full_precision
    def observe(self, *inputs: Tensor, targets: Tensor | None = None) -> None:
        """Capture curvature from a batch when it is due; at other steps it costs nothing.

        Call it with the arguments of the model, after ``backward`` and before ``step``; the parts of an
        accumulated batch may come one by one. The model keeps its mode, buffers and ``.grad``, and the global
        random state stays. ``targets`` belong to ``fisher="empirical"``.

        Raises:
            ValueError, TypeError: what cannot be captured, in words; nothing has been changed then.
        """
        if not self.curvature.due:
            return
        if (self.curvature.fisher == "empirical") != (targets is not None):
            raise ValueError("fisher='empirical' needs the true labels as targets=…, and no other kind takes them.")
        present = set(self.model.parameters())
        if not all(p in present for p in self._params):
            raise ValueError("The model's layers have changed since the optimizer was built; build a new optimizer.")
        check_inputs(self.model, self.partition, inputs)
        before = self.partition.names
        partition = self.partition if self._eligible() == self.partition.names else self._layers()
        self._follow()
        self.curvature.observe(self.model, inputs, targets, partition)
        if partition.names != before:  # a layer was frozen or unfrozen since
            self._take_up()

    @property
    @torch.no_grad()
    @_full_precision
    def preconditioner(self) -> TwoLevel:
        """The two-level preconditioner that the next step applies; it can be drawn."""
        return self.curvature.preconditioner(lambda: self._gradient()[0].clone())

    @property
    def partition(self) -> Partition:
        """The layers that are preconditioned."""
        return self.curvature.partition

    @property
    def diagnostics(self) -> dict[str, float]:
        """Counters and the last values of the step rule; plain numbers."""
        return self.curvature.diagnostics

    @property
    def damping(self) -> float:
        """λ, which may be set at any time."""
        return self.curvature.damping

    @damping.setter
    def damping(self, damping: float) -> None:
        self.curvature.damping = check_damping(damping)

    # ---- the step -------------------------------------------------------------------------------------

    @torch.no_grad()
    @_full_precision
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step along ``preconditioner @ gradient``; returns the closure's loss.

        Args:
            closure: recomputes the loss and its gradient, as for every PyTorch optimizer. With the quadratic rule
                it is called again after the step: λ follows the reduction ratio, and a step that went up is
                undone, its momentum forgotten and λ raised fourfold.

        Raises:
            ValueError: no observation yet, no gradient, or one with NaN or inf (naming the layer); parameters and
                momentum have not been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow()
        g, grads = self._gradient()
        T = self.preconditioner
        v = T._apply(g)
        for name, s in zip(self.partition.names, self.partition.slices, strict=True):
            if name not in self.curvature.factors.weight:  # λ alone would set the length of its step
                v[s] = 0
                self.diagnostics["layers without statistics"] += 1
        for p, piece in zip(self._params, self._split(v), strict=True):
            if p not in grads:  # it takes no step, so that the others' length must not depend on it
                piece.zero_()
        self.partition.check_finite(v, "The preconditioned gradient")
        model = QuadraticModel(T.A.operator, g, self._ridge())
        judged = closure is not None and self.step_rule == "quadratic"
        before = {p: p.clone() for p in grads} if judged else {}
        along = self._quadratic_steps if self.step_rule == "quadratic" else self._steps_along
        steps = along(v, grads, model)
        predicted = self._guarded(steps, model) if judged or self._on_guard else None
        for group in self.param_groups:
            params = [p for p in group["params"] if p in steps]
            if params and self.decoupled and group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            if params:
                torch._foreach_add_(params, [steps[p] for p in params])
        if judged:
            self._judge(closure, loss, before, predicted)
        self.curvature.step += 1
        return loss

    def _gradient(self) -> tuple[Tensor, dict[Tensor, Tensor]]:
        """The gradient over the partition (P,), and of each parameter that has one: checked, with weight decay."""
        grads: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            found = [p.grad for p in params]
            if any(grad.layout != torch.strided for grad in found):
                raise ValueError("Sparse gradients are not supported; build the embedding with sparse=False.")
            if params and group["maximize"]:
                found = torch._foreach_neg(found)
            if params and group["weight_decay"] and not self.decoupled:
                found = torch._foreach_add(found, params, alpha=group["weight_decay"])
            grads.update(zip(params, found, strict=True))
        if not grads:
            raise ValueError("No parameter of the optimizer has a gradient; call loss.backward() first.")
        g = self._joined(grads)
        self.partition.check_finite(g, "The gradient")
        for p, grad in grads.items():
            if p not in self._index and not finite([grad])[0]:
                raise ValueError(f"The gradient holds NaN or inf in parameter {self._names.get(p, '?')!r}.")
        return g, grads

    def _steps_along(self, v: Tensor, grads: dict[Tensor, Tensor], model: QuadraticModel) -> dict[Tensor, Tensor]:
        """Steps of a given length along v, clipped or not, and along the gradient of other parameters."""
        if self.step_rule == "kl_clip":
            moved = self._scaled(v, {p: self._group[p]["lr"] for p in self._params})
            form = dataclasses.replace(model, ridge=self.damping).along(moved[None])[1]
            self.diagnostics["clip"] = scale = kl_scale(float(form), self.kl_clip)
            v = v * scale
        directions = {p: grad for p, grad in grads.items() if p not in self._index}
        directions |= {p: x.to(p.dtype) for p, x in zip(self._params, self._split(v), strict=True) if p in grads}
        return self._plain_steps(directions)

    def _plain_steps(self, directions: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """``-lr · buffer`` with ``buffer ← momentum · buffer + direction``, parameter by parameter."""
        steps = {}
        for group in self.param_groups:
            params = [p for p in group["params"] if p in directions]
            along = [directions[p] for p in params]
            if not params:
                continue
            if group["momentum"]:
                buffers = [self._buffer(p) for p in params]
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_add_(buffers, along)
                along = buffers
            steps |= zip(params, torch._foreach_mul(along, -group["lr"]), strict=True)
        return steps

    def _quadratic_steps(self, v: Tensor, grads: dict[Tensor, Tensor], model: QuadraticModel) -> dict[Tensor, Tensor]:
        """The best combination of −v and of the last step; ``lr`` scales it, and layers against each other."""
        top = max(group["lr"] for group in self.param_groups)
        v = self._scaled(v, {p: self._group[p]["lr"] / top if top else 0.0 for p in self._params})
        directions = [-v]
        going_on = [p for p in self._params if p in grads and self._group[p]["momentum"] and self._group[p]["lr"]]
        if going_on:
            directions.append(self._joined({p: self._buffer(p) for p in going_on}))
        D = torch.stack(directions)
        c = best_coefficients(*model.along(D))
        self.diagnostics["step length"], self.diagnostics["momentum coefficient"] = [*c.tolist(), 0.0][:2]
        best = (top * c) @ D
        rest = {p: grad for p, grad in grads.items() if p not in self._index}
        steps = {p: x.to(p.dtype) for p, x in zip(self._params, self._split(best), strict=True) if p in grads}
        for p, step in steps.items():
            self._buffer(p).copy_(step)
        return steps | self._plain_steps(rest) if rest else steps

    @property
    def _on_guard(self) -> bool:
        """Whether this step is looked at for overshoot."""
        return self.overshoot == "shorten" or (self.overshoot == "count" and self.curvature.just_observed)

    def _guarded(self, steps: dict[Tensor, Tensor], model: QuadraticModel) -> float:
        """The change that the captured model predicts, after its own overshoot has been counted or cut."""
        slope, curvature = (float(x) for x in model.along(self._joined(steps)[None]))
        change = slope + 0.5 * curvature
        if change <= 0 or not self._on_guard:
            return change
        self.diagnostics["overshoots"] += 1
        if self.overshoot == "count":
            self._tell(
                "overshoot",
                "By the captured quadratic model this step goes up: it is too long. Lower lr, raise damping, or take "
                "step_rule='quadratic' or overshoot='shorten'. Counted from now on in diagnostics['overshoots'].",
            )
            return change
        scale = max(0.0, -slope / curvature)
        self.diagnostics["shortened"] += 1
        mine = [p for p in self._params if p in steps]
        torch._foreach_mul_([steps[p] for p in mine], scale)
        torch._foreach_mul_([self._buffer(p) for p in mine], scale)
        return 0.5 * scale * slope

    def _judge(
        self, closure: Callable[[], Tensor], loss: Tensor, before: dict[Tensor, Tensor], predicted: float
    ) -> None:
        """Compare with the loss after the step: undo what went up, and adapt λ."""
        with torch.enable_grad():
            after = float(closure().detach())
        sign = -1.0 if self.param_groups[0]["maximize"] else 1.0
        change = sign * (after - float(loss.detach()))
        if not self.decoupled:
            for p, value in before.items():
                decay = self._group[p]["weight_decay"]
                change += 0.5 * decay * float(p.square().sum() - value.square().sum()) if decay else 0.0
        ratio = self.diagnostics["reduction ratio"] = change / predicted if predicted else 0.0
        if not change <= 0:
            for p, value in before.items():
                p.copy_(value)
                self._buffer(p).zero_()
            self.diagnostics["rejected"] += 1
            self.damping = max(REJECTION * self.damping, 1e-8)
        elif self.curvature.step % ADAPT_EVERY == 0:
            self.damping = adapted_damping(self.damping, ratio, ADAPT_EVERY)

    def _ridge(self) -> float | Tensor:
        """λ, plus each parameter's weight decay where that is part of the loss."""
        if self.decoupled or not any(group["weight_decay"] for group in self.param_groups):
            return self.damping
        return self.damping + self._scaled(
            self._like().new_ones(self.partition.size), {p: self._group[p]["weight_decay"] for p in self._params}
        )

    # ---- flat vectors and parameters ------------------------------------------------------------------

    def _like(self) -> Tensor:
        """An empty tensor of the dtype (at least float32) and device of the statistics."""
        p = self._params[0]
        return torch.empty(0, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)

    def _split(self, v: Tensor) -> list[Tensor]:
        """Views of v (P,) in the shapes of the layers' parameters, in the order of ``self._params``."""
        pieces = []
        for layer, V in zip(self.partition.layers, self.partition.split(v), strict=True):
            weight = self._params[len(pieces)]
            pieces.append(V[:, : layer.features - layer.bias].view(weight.shape))
            if layer.bias:
                pieces.append(V[:, -1])
        return pieces

    def _joined(self, tensors: dict[Tensor, Tensor]) -> Tensor:
        """The inverse of :meth:`_split`; parameters that are missing have zeros."""
        v = self._like().new_zeros(self.partition.size)
        views = [(view, tensors[p]) for p, view in zip(self._params, self._split(v), strict=True) if p in tensors]
        if views:
            torch._foreach_copy_(*map(list, zip(*views, strict=True)))
        return v

    def _scaled(self, v: Tensor, factors: dict[Tensor, float]) -> Tensor:
        """v with one factor per parameter."""
        if len(set(factors.values())) == 1:
            return v * next(iter(factors.values()))
        v = v.clone()
        for p, view in zip(self._params, self._split(v), strict=True):
            view.mul_(factors[p])
        return v

    def _buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]

    # ---- what it acts on ------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; layers that they complete join the curvature at the next :meth:`observe`.

        Raises:
            ValueError, TypeError: an option out of range; the groups are as before then.
        """
        group = self.defaults | param_group
        check_number("lr", group["lr"], 0.0, math.inf)
        check_number("momentum", group["momentum"], 0.0, 1.0, open_high=True)
        check_number("weight_decay", group["weight_decay"], 0.0, math.inf)
        super().add_param_group(param_group)
        if hasattr(self.curvature, "partition"):
            try:
                partition = self._layers()
            except ValueError:
                self.param_groups.pop()
                raise
            self.curvature.lay_out(partition)
            self._take_up()

    def _eligible(self) -> tuple[str, ...]:
        """Names of the layers all of whose parameters are trainable and in a group."""
        given = {p for group in self.param_groups for p in group["params"]}
        return tuple(
            name
            for name, module in self.model.named_modules()
            if is_kronecker_layer(module)
            and (self._only is None or name in self._only)
            and all(p is None or (p.requires_grad and p in given) for p in (module.weight, module.bias))
        )

    def _layers(self) -> Partition:
        """The layers that can have curvature as groups and parameters are now."""
        names = self._eligible()
        missing = [name for name in self._only or () if name not in names]
        if missing or not names:
            raise ValueError(
                f"Layers {missing} are not trainable Linear or ungrouped Conv2d layers of the model with all their "
                "parameters in the optimizer."
                if missing
                else "The model has no trainable Linear or ungrouped Conv2d layer with all its parameters given."
            )
        return Partition.from_model(self.model, names)

    def _take_up(self) -> None:
        """Find the parameters of the layers that the curvature has now, and tell once what is not among them."""
        names = self.partition.names
        self._lookup()
        left = [n for n, m in self.model.named_modules() if is_kronecker_layer(m) and n not in names]
        if left:
            self._tell("left", f"Left out of the curvature, being frozen or not given in full: {', '.join(left)}.")
        plain = [self._names.get(p, "?") for p in self._group if p not in self._index and p.requires_grad]
        if plain:
            self._tell("plain", f"Plain gradient steps, with the lr of their group, for: {', '.join(plain)}.")

    def _lookup(self) -> None:
        """Dictionaries from parameters to what belongs to them."""
        self._group = {p: group for group in self.param_groups for p in group["params"]}
        self._names = {p: name for name, p in self.model.named_parameters()}
        modules = (self.model.get_submodule(name) for name in self.partition.names)
        self._params = [p for m in modules for p in (m.weight, m.bias) if p is not None]
        self._index = set(self._params)

    def _tell(self, key: str, message: str) -> None:
        if key not in self._told:
            self._told.add(key)
            warn(message)

    # ---- state ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As PyTorch's, with ``"curvature"`` beside it: tensors, numbers, strings, lists and dictionaries only."""
        return super().state_dict() | {"curvature": self.curvature.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume bit for bit, with the saved λ, lr, momentum and weight decay in place of the constructor's.

        The constructor's other arguments are the caller's to repeat. Those that shape the curvature are in the
        state: where they differ, a warning names both values, and this optimizer's hold from now on.

        Raises:
            ValueError: a state of another optimizer, or of other layers; nothing has been changed then.
        """
        saved = state_dict.get("curvature")
        if saved is None:
            raise ValueError("This is not a state of TwoLevelKFAC: it has no 'curvature'.")
        self.curvature.check_state(saved)
        super().load_state_dict(copy.deepcopy({k: v for k, v in state_dict.items() if k != "curvature"}))
        self.curvature.restore(saved, self._like())

    def _follow(self) -> None:
        """Move the state after the model to another device or dtype."""
        if self.curvature.follow(self._like()):
            for p, state in self.state.items():
                self.state[p] = converted(state, p)

    def __getstate__(self) -> dict[str, Any]:
        own = ("model", "curvature", "decoupled", "step_rule", "kl_clip", "overshoot", "_told", "_only")
        return super().__getstate__() | {name: self.__dict__[name] for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lookup()

    def __repr__(self) -> str:
        groups = "; ".join(
            ", ".join(f"{key}={value:.3g}" for key, value in group.items() if key != "params")
            for group in self.param_groups
        )
        return (
            f"TwoLevelKFAC({self.curvature}\n"
            f"  step: {self.step_rule}, overshoot {self.overshoot}; {groups}\n"
            f"  so far: {', '.join(f'{key} {value:.4g}' for key, value in self.diagnostics.items() if value)})"
        )


def _layer_names(layers: Iterable[str], model: nn.Module) -> tuple[str, ...]:
    """The names, once each element can be one: a string would fall into its characters."""
    names = () if isinstance(layers, str) or not isinstance(layers, Iterable) else tuple(layers)
    if not names:
        known = [name for name, module in model.named_modules() if is_kronecker_layer(module)]
        raise ValueError(f"layers must be a list of names out of {known}; got {layers!r}.")
    return names
