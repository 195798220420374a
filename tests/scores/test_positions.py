"""Tables that every example uses whole, such as learned positions, against per-example derivatives."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings

import pytest
import torch
from helpers import Model, assert_close
from torch import Tensor, nn

import kfac_viz as kv
from kfac_viz.scores.likelihood import output_vectors

WORDS, E = 7, 4
SLOW = "each example is pulled back by itself"


def fisher_by_example(model: nn.Module, partition: kv.Partition, x: Tensor, samples: int | None = None) -> Tensor:
    """``JᵀJ / N``, (P, P), with a row of J for each example and vector, from a batch of that example alone."""
    outputs, kind = model(x), "exact" if samples is None else "mc"
    vectors = output_vectors(outputs, "categorical", kind, samples=samples or 1)
    parameters, rows = list(model.parameters()), []
    for n in range(len(x)):
        alone = model(x[n : n + 1])
        for v in vectors[:, n]:
            grads = torch.autograd.grad(alone, parameters, v[None], allow_unused=True, retain_graph=True)
            for p, grad in zip(parameters, grads, strict=True):
                p.grad = torch.zeros_like(p) if grad is None else grad
            rows.append(partition.pack_grad(model))
    model.zero_grad()
    J = torch.stack(rows)
    return J.T @ J / len(x)


def positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])


def pooled(s: Model, h: Tensor) -> Tensor:
    return s.head(torch.tanh(h).mean(1))


def embeddings(**more) -> dict[str, nn.Module | Tensor]:
    return {"word": nn.Embedding(WORDS, E), "position": nn.Embedding(8, E), "head": nn.Linear(E, 3), **more}


def table(*shape: int, **more) -> dict[str, nn.Module | Tensor]:
    return {"word": nn.Embedding(WORDS, E), "table": torch.randn(shape), "head": nn.Linear(E, 3), **more}


# name: forward pass, parts
DIRECT = {
    "added": (lambda s, x: pooled(s, s.word(x) + s.position(positions(x))), embeddings),
    "added, with an axis": (lambda s, x: pooled(s, s.position(positions(x)[None]) + s.word(x)), embeddings),
    "added in place": (lambda s, x: pooled(s, s.word(x).clone().add_(s.position(positions(x)))), embeddings),
    "multiplied": (lambda s, x: pooled(s, s.word(x) * s.position(positions(x))), embeddings),
    "copied": (
        lambda s, x: pooled(s, torch.cat([s.word(x), s.position(positions(x)).expand(len(x), -1, -1)], 1)),
        embeddings,
    ),
    "used twice": (
        lambda s, x: pooled(s, (s.word(x) + s.position(positions(x))) * s.position(positions(x))),
        embeddings,
    ),
    "its weight": (lambda s, x: pooled(s, s.word(x) + s.position.weight[: x.shape[1]]), embeddings),
    "a parameter": (lambda s, x: pooled(s, s.word(x) + s.table[:, : x.shape[1]]), lambda: table(1, 8, E)),
    "a parameter, multiplied": (
        lambda s, x: pooled(s, s.word(x) * s.table.repeat(len(x), 1, 1)),
        lambda: table(1, 5, E),
    ),
    "a row of its own": (
        lambda s, x: pooled(s, torch.cat([s.word(x[:, :1]) + s.table[:, :1], s.word(x[:, 1:]) + s.table[:, 1:5]], 1)),
        lambda: table(1, 8, E),
    ),
    "behind a class token": (
        lambda s, x: pooled(s, torch.cat([s.token.expand(len(x), -1, -1), s.word(x)], 1) + s.table),
        lambda: table(1, 6, E, token=torch.randn(1, 1, E)),
    ),
    "a map of channels": (
        lambda s, x: s.head((s.word(x).mT[..., None] * s.table).sum((2, 3))),
        lambda: table(1, E, 5, 2),
    ),
}
LATER = {
    "through a norm": (
        lambda s, x: pooled(s, s.word(x) + s.norm(s.position(positions(x)))),
        lambda: embeddings(norm=nn.LayerNorm(E)),
    ),
    "through a linear layer": (
        lambda s, x: pooled(s, s.word(x) + s.lin(s.position(positions(x)))),
        lambda: embeddings(lin=nn.Linear(E, E)),
    ),
    "a parameter through layers": (
        lambda s, x: pooled(s, s.word(x) + s.lin(s.norm(s.table))),
        lambda: table(1, 5, E, lin=nn.Linear(E, E), norm=nn.LayerNorm(E)),
    ),
    "met in another way": (
        lambda s, x: pooled(s, torch.cat([s.word(x), torch.stack([s.position(positions(x))] * len(x))], 1)),
        embeddings,
    ),
}


def built(cases: dict, name: str) -> Model:
    torch.manual_seed(0)
    run, parts = cases[name]
    return Model(run, **parts()).double().eval()


@pytest.mark.parametrize("N", [1, 3, 5, 20])  # 5 examples of 5 positions: both axes have that length
@pytest.mark.parametrize("name", [*DIRECT, *LATER])
def test_a_table_is_in_the_fisher(name, N):
    model = built(DIRECT | LATER, name)
    x = torch.randint(0, WORDS, (N, 5), generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        F = kv.capture(model, x, likelihood="categorical")
        again = kv.capture(model, x, likelihood="categorical")  # by what was found before
    assert sum(SLOW in str(w.message) for w in told) == (name in LATER and N > 1), "said once, where it is slow"
    assert len(F.partition.names) == len({name.split(".")[0] for name, _ in model.named_parameters()})
    assert_close(F.dense(), fisher_by_example(model, F.partition, x))
    assert_close(again.dense(), F.dense())


def test_the_mean_of_the_scores_is_the_gradient_where_batches_change_in_length():
    model = built(DIRECT, "added")
    for N, T in ((3, 5), (6, 6), (4, 8), (5, 5)):
        x = torch.randint(0, WORDS, (N, T), generator=torch.Generator().manual_seed(N))
        y = torch.arange(N) % 3
        F = kv.capture(model, x, y, likelihood="categorical", fisher="empirical")
        model.zero_grad()
        kv.nll(model(x), y, "categorical").backward()
        assert_close(F.pull(F.g[0].new_ones(1, N)) / N, F.partition.pack_grad(model))


def test_positions_are_a_kronecker_product_that_shares_one_factor_between_them():
    """One example, one position of a table used alone: there the product is the block itself."""
    model = built(DIRECT, "added")
    with pytest.warns(UserWarning, match="One example alone"):
        F = kv.capture(model, torch.tensor([[2]]), likelihood="categorical")
    l = F.partition.index("position")
    A, G = F.factors(l, l)
    assert_close(torch.kron(G, A), F.block(l, l))


def test_a_model_that_mixes_examples_is_refused_where_they_are_as_many_as_positions():
    torch.manual_seed(0)
    mixing = Model(lambda s, x: s.head(s.word(x).mean(1).cumsum(0)), word=nn.Embedding(WORDS, E), head=nn.Linear(E, 3))
    x = torch.randint(0, WORDS, (5, 5))
    with pytest.raises(ValueError, match="mixes the examples"):
        kv.capture(mixing.double(), x, likelihood="categorical")


@pytest.mark.parametrize("name", ["added", "through a norm", "a parameter"])
def test_the_optimizer_trains_a_table(name):
    model = built(DIRECT | LATER, name).train()
    x = torch.randint(0, WORDS, (12, 5), generator=torch.Generator().manual_seed(1))
    y = (x.float().mean(1) > 3).long()
    losses = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{SLOW}")
        opt = kv.TwoLevelKFAC(model, likelihood="categorical", fisher="exact", per_layer=2, observe_every=1)
        for _ in range(25):
            opt.zero_grad()
            loss = kv.nll(model(x), y, "categorical")
            loss.backward()
            opt.observe(x)
            opt.step()
            losses.append(loss.item())
    named = {n.split(".")[0] for n, _ in model.named_parameters()}
    assert set(opt.partition.names) == named
    assert losses[-1] < losses[0] / 2, losses


# ---- the classes that people bring -------------------------------------------------------------------------


class Logits(nn.Module):
    """The logits out of what a model of that library returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


TEXT = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 6,
}
TINY = {
    "BertForSequenceClassification": ("BertConfig", TEXT | {"num_labels": 3}),
    "DistilBertForSequenceClassification": (
        "DistilBertConfig",
        {"vocab_size": 11, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 12, "max_position_embeddings": 6},
    ),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"vocab_size": 11, "n_positions": 6, "n_embd": 8, "n_layer": 1, "n_head": 2}
        | {"bos_token_id": 0, "eos_token_id": 0},
    ),
    "LlamaForCausalLM": ("LlamaConfig", TEXT | {"num_key_value_heads": 1}),
    "ViTForImageClassification": (
        "ViTConfig",
        {k: v for k, v in TEXT.items() if k not in ("vocab_size", "max_position_embeddings")}
        | {"image_size": 4, "patch_size": 2, "num_channels": 1, "num_labels": 3},
    ),
}


@pytest.fixture(scope="module")
def transformers():
    library = pytest.importorskip("transformers")
    if importlib.util.find_spec("torchvision"):
        with contextlib.suppress(Exception):
            importlib.import_module("torchvision")
            return library
        # A torchvision for another build of PyTorch than the one installed; nothing here needs it.
        utils = importlib.import_module("transformers.utils")
        utils.is_torchvision_available = utils.import_utils.is_torchvision_available = lambda: False
    return library


@pytest.mark.filterwarnings("ignore:The model seems to end")
@pytest.mark.parametrize("name", TINY)
def test_models_of_transformers_are_in_the_fisher(name, transformers):
    torch.manual_seed(0)
    config, options = TINY[name]
    model = Logits(getattr(transformers, name)(getattr(transformers, config)(**options))).double().eval()
    x = torch.randn(3, 1, 4, 4).double() if name.startswith("ViT") else torch.randint(0, 11, (3, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left out, and nothing is slow
        F = kv.capture(model, x, likelihood="categorical", fisher="mc", samples=2)
    assert F.partition.size == F.partition.total
    assert_close(F.dense(), fisher_by_example(model, F.partition, x, samples=2))
    step = kv.KFAC(F, 0.1) @ F.pull(F.g[0].new_ones(2, 3))
    assert step.isfinite().all()
