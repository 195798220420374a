"""Two-level K-FAC as the public codes of 2020 and 2023 have it, with their faults, any of which can be mended."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...method import coarse as spaces
from ...method.checks import check_choice
from ...method.fisher import Fisher
from ...method.kfac import KFAC
from ...method.kronecker import KroneckerFactors
from ...method.two_level import TwoLevel
from ...scores.layers import partition_of
from ...scores.likelihood import output_vectors
from ...train.statistics import untouched

FAULTS = ("triangle", "damping", "operator", "correction", "space")


class Published(torch.optim.Optimizer):
    """The optimizer ``GKFAC`` of github.com/ntselepidis/KFAC-Pytorch, the code of Tselepidis, Kohler and Orvieto
    (2020), written anew: a study's exhibit. To train a network take :class:`kfac_viz.TwoLevelKFAC`.

    With Z a column of ones for each layer, a step goes along ``M g + Z E⁻¹ Zᵀ g``, and E holds for each pair of layers
    ``(Σ A_lm)(Σ G_lm)``, sums of all entries of the averaged cross-layer factors. What ``mended`` can name:

    - ``"triangle"``: averages are kept in one triangle alone. A refresh adds the transpose, whose triangle still holds
      what the last refresh wrote; so the off-diagonals grow from refresh to refresh and E stops being definite.
    - ``"damping"``: E gets λI, where the columns of ones ask for ``λ ZᵀZ``, λ times the parameters of a layer.
    - ``"operator"``: E is made of Kronecker products, where ``Zᵀ(F + λI)Z`` of the last batch can be had exactly.
    - ``"correction"``: the two steps are added, so that what both take is taken twice; mended, it is ``balanced``.
    - ``"space"``: one constant in each layer; mended, four leading Kronecker eigenvectors.

    Each needs those before it. The code also ignores the decay that it is asked for (always ``1 − 1/k``, at most 0.95),
    which is kept here, and its clip takes ``lr² gᵀv`` for the squared length of a step, as do many K-FAC codes.

    Args:
        model: its Linear layers are preconditioned; all else gets plain steps with momentum.
        coarse: None for the one-level K-FAC of that code. The other spaces are those of Koroko et al. (2023), whose
            public code adds ``Z E⁻¹ Zᵀ g`` for each of them: ``"smooth"``, its eigenvectors with the smallest
            eigenvalues, called spectral there, or ``"krylov"``, each layer's piece of ``M g``, called residual there.
        mended: of :data:`FAULTS`.

    Raises:
        ValueError: where the code stops, because its direction goes uphill.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        *,
        lr: float = 1e-2,
        damping: float = 1e-3,
        momentum: float = 0.9,
        kl_clip: float = 1e-2,
        weight_decay: float = 0.0,
        rule: str = "eigen",
        observe_every: int = 1,
        refresh_every: int = 5,
        coarse: str | None = "nicolaides",
        mended: Collection[str] = (),
    ) -> None:
        for fault in mended:
            check_choice("Every entry of mended", fault, FAULTS)
        missing = set(FAULTS[: max((FAULTS.index(fault) for fault in mended), default=0)]) - set(mended)
        if missing:
            raise ValueError(f"Each fault needs those before it mended; missing: {', '.join(sorted(missing))}.")
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        self.model, self.likelihood, self.rule, self.coarse = model, likelihood, rule, coarse
        self.partition, self.mended = partition_of(model, linear), frozenset(mended)
        self.lr, self.damping, self.momentum, self.kl_clip = lr, damping, momentum, kl_clip
        self.weight_decay, self.observe_every, self.refresh_every = weight_decay, observe_every, refresh_every
        self.steps = self.observations = 0
        self.A, self.G = ([0.0] * len(linear) for _ in range(2))  # averaged factors of each layer
        self.sums_A = self.sums_G = torch.zeros(len(linear), len(linear), device="cpu")  # of the cross-layer factors
        self.velocity: Tensor | float = 0.0
        self.coarse_share = 0.0  # of the last direction's slope, gᵀ(coarse part) / gᵀ(fine part)
        inside = {id(p) for own in self.partition.parameters(model) for p in own}
        others = [p for p in model.parameters() if id(p) not in inside]
        self.others = torch.optim.SGD(others, lr, momentum, weight_decay=weight_decay) if others else None
        super().__init__(model.parameters(), {"lr": lr})

    def observe(self, inputs: Tensor) -> None:
        """Average the factors of a batch, one sampled label for each example, when it is due."""
        if self.steps % self.observe_every:
            return
        generator = torch.Generator().manual_seed(self.observations)
        with untouched(self.model, inputs.device):
            self.F = self._captured(inputs, generator)
        kept = min(1 - 1 / (self.observations + 1), 0.95)
        new = self.F.kronecker()
        self.A = [kept * old + (1 - kept) * fresh for old, fresh in zip(self.A, new.A, strict=True)]
        self.G = [kept * old + (1 - kept) * fresh for old, fresh in zip(self.G, new.G, strict=True)]
        a, g = (torch.stack([x.sum(-1).flatten() for x in side]) for side in (self.F.a, self.F.g))
        sums_A, sums_G = self.sums_A.to(a), self.sums_G.to(g)
        lower, upper = torch.ones_like(sums_A).tril().bool(), torch.ones_like(sums_A).triu().bool()
        self.sums_A = torch.where(lower, kept * sums_A + (1 - kept) * (a @ a.T / self.F.N), sums_A)
        self.sums_G = torch.where(upper, kept * sums_G + (1 - kept) * (g @ g.T / self.F.N), sums_G)
        self.observations += 1

    def _captured(self, inputs: Tensor, generator: torch.Generator) -> Fisher:
        """Inputs of the layers and gradients of the loss at their results, as hooks on the modules see them: these go
        through the statistics of the batch, where batch norm takes them."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        layers = {name: self.model.get_submodule(name) for name in self.partition.names}
        handles = [
            layer.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0].detach(), out)}))
            for name, layer in layers.items()
        ]
        try:
            with torch.enable_grad():
                outputs = self.model(inputs)
        finally:
            for handle in handles:
                handle.remove()
        vectors = output_vectors(outputs, self.likelihood, "mc", generator=generator)
        g = torch.autograd.grad(outputs, [seen[name][1] for name in layers], vectors[0])
        biases = [(0, int(layer.bias is not None)) for layer in layers.values()]
        a = [functional.pad(seen[name][0], pad, value=1.0)[:, None] for name, pad in zip(layers, biases, strict=True)]
        return Fisher(self.partition, a, [x[None, :, None] for x in g], flavour="mc")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """One step from the gradients that the last backward pass has left."""
        g = self.partition.pack_grad(self.model)
        if self.steps % self.refresh_every == 0:
            self._refresh(g)
        v = self._direction(g)
        form = float(self.lr**2 * (v @ g))
        if not form > 0:
            raise ValueError(f"The published code stops here, after {self.steps} steps: its direction goes uphill.")
        scale = min(1.0, (self.kl_clip / form) ** 0.5)
        self.velocity = self.momentum * self.velocity + scale * v + self.weight_decay * self.partition.pack(self.model)
        self.partition.add_(self.model, self.velocity, alpha=-self.lr)
        if self.others is not None:
            self.others.step()
        self.steps += 1

    def _refresh(self, g: Tensor) -> None:
        M = KFAC(KroneckerFactors(self.partition, tuple(self.A), tuple(self.G)), self.damping, self.rule)
        if self.coarse is None:
            self._direction = M._apply
        elif "operator" in self.mended:
            A = self.F.damped(self.damping)
            self._direction = TwoLevel(A, M, self._space(M, g), self._correction)._apply
        else:
            Z = spaces.nicolaides(self.F, 1)
            inverse = torch.linalg.inv(self._coarse_matrix(Z.gram()))
            self._direction = lambda r: M._apply(r) + Z.prolong(inverse @ Z.restrict(r))
        fine = g @ M._apply(g)
        self.coarse_share = float((g @ self._direction(g) - fine) / fine)

    @property
    def _correction(self) -> str:
        return "balanced" if "correction" in self.mended else "additive"

    def _space(self, M: KFAC, g: Tensor) -> spaces.CoarseSpace:
        if "space" in self.mended:
            return spaces.spectral(M, 4)
        if self.coarse == "krylov":
            return spaces.krylov(self.F.damped(self.damping), M, g, 1)
        return getattr(spaces, self.coarse)(M if self.coarse == "smooth" else self.F, 1)

    def _coarse_matrix(self, gram: Tensor) -> Tensor:
        def whole(S: Tensor, one: Tensor) -> Tensor:
            kept = one if "triangle" in self.mended else S
            return kept + kept.T - kept.diag().diag()

        sums_A, sums_G = whole(self.sums_A, self.sums_A.tril()), whole(self.sums_G, self.sums_G.triu())
        if "triangle" not in self.mended:
            self.sums_A, self.sums_G = sums_A, sums_G
        eye = gram if "damping" in self.mended else torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return sums_A * sums_G + self.damping * eye
