"""Layers as slices of one flat vector."""

import numpy as np
import pytest
import torch
from helpers import ZOO, mlp, normal
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import kfac_viz as kv
from kfac_viz.method.partition import Layer


@pytest.mark.parametrize("name", ZOO)
def test_pack_split_join_add_are_inverse_to_each_other(name):
    model, _ = ZOO[name].make()
    P = kv.partition_of(model)
    v = P.pack(model)
    assert v.shape == (P.size,) and P.size == sum(layer.size for layer in P.layers) == P.slices[-1].stop
    assert torch.equal(P.join(P.split(v)), v)
    wide = normal(P.size, 3)
    assert torch.equal(P.join(P.split(wide)), wide)
    step = normal(P.size, seed=8)
    P.add_(model, step, alpha=-0.5)
    assert torch.equal(P.pack(model), v - 0.5 * step)


def test_layout_is_weight_and_bias_row_major():
    model = mlp((2, 3, 1), bias=(True, False))
    P = kv.partition_of(model)
    first = torch.cat([model[0].weight, model[0].bias[:, None]], dim=1).flatten()
    assert torch.equal(P.pack(model), torch.cat([first, model[2].weight.flatten()]))
    assert P.layers == (Layer("0", 3, 3, True), Layer("2", 1, 3, False))


def test_convolution_kernels_are_read_as_channels_height_width():
    model = nn.Sequential(nn.Conv2d(2, 3, (3, 2)))
    P = kv.partition_of(model)
    v = P.pack(model).view(3, 13)
    assert torch.equal(v[:, :12].view(3, 2, 3, 2), model[0].weight) and torch.equal(v[:, 12], model[0].bias)


def test_pack_grad():
    model = mlp()
    P = kv.partition_of(model)
    with pytest.raises(ValueError, match="'0' has no gradient"):
        P.pack_grad(model)
    model(normal(5, 4)).square().sum().backward()
    g = P.pack_grad(model)
    before = P.pack(model)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    torch.testing.assert_close(P.pack(model), before - 0.1 * g, rtol=0, atol=1e-15)


def test_from_model_takes_named_layers_in_registration_order():
    model = mlp((4, 3, 3, 2))
    assert kv.partition_of(model, ["4", "0"]).names == ("0", "4")


def test_equal_partitions_are_equal_and_hashable():
    assert kv.partition_of(mlp()) == kv.partition_of(mlp(seed=9))
    assert hash(kv.partition_of(mlp())) == hash(kv.partition_of(mlp(seed=9)))
    assert kv.partition_of(mlp()) != kv.partition_of(mlp(bias=False))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 3))
def test_from_sizes_covers_the_vector_once(sizes, k):
    P = kv.Partition.from_sizes(sizes)
    assert [s.stop - s.start for s in P.slices] == sizes
    v = torch.arange(P.size * k, dtype=torch.float64).view(P.size, k)
    assert torch.equal(torch.cat([v[s] for s in P.slices]), v)
    assert torch.equal(P.join(P.split(v)), v)


def test_index_by_number_name_or_numpy_integer():
    P = kv.Partition.from_sizes([1, 2], ["low", "high"])
    assert P.index("high") == P.index(1) == P.index(-1) == P.index(np.int64(1)) == 1


def test_repr_shows_every_layer_and_str_the_sizes():
    P = kv.partition_of(mlp((4, 5, 3), bias=(True, False)))
    assert "0: 4+1→5" in repr(P) and "2: 5→3" in repr(P)
    assert str(P) == "40 parameters in 2 layers (25 + 15)"
    assert "…" in str(kv.Partition.from_sizes([1] * 40))


@pytest.mark.parametrize(
    ("break_it", "error", "words"),
    [
        (lambda P: P.split(torch.zeros(3)), ValueError, r"\(40,\) or \(40, k\).*got \(3,\)"),
        (lambda P: P.split(torch.zeros(40, 1, 1)), ValueError, r"got \(40, 1, 1\)"),
        (lambda P: P.split([0.0] * 40), TypeError, "got list"),
        (lambda P: P.join([torch.zeros(5, 5)]), ValueError, "2 pieces.*got 1"),
        (lambda P: P.join([torch.zeros(5, 5), torch.zeros(5, 3)]), ValueError, r"'2' has shape \(3, 5\); got \(5, 3\)"),
        (lambda P: P.index("nope"), ValueError, "'nope'.*'0', '2'"),
        (lambda P: P.index(2), ValueError, "Layer 2 does not exist: there are 2"),
        (lambda P: P.index(1.0), TypeError, "1.0"),
        (lambda P: P.index(True), TypeError, "True"),
        (lambda P: P.pack(nn.Linear(4, 5)), ValueError, "no parameter '0.weight' of layer '0'"),
        (lambda P: P.pack(mlp((4, 6, 3), bias=False)), ValueError, "'0' no longer is 0: 4"),
        (lambda P: kv.Partition(()), ValueError, "at least one layer"),
        (lambda P: kv.Partition((Layer("a", 1, 1), Layer("a", 1, 1))), ValueError, "differ.*'a', 'a'"),
        (lambda P: kv.Partition((Layer("a", 0, 3),)), ValueError, r"\['a'\] have no parameters"),
        (lambda P: kv.Partition.from_sizes([2, 0]), ValueError, r"positive whole numbers; got \[2, 0\]"),
        (lambda P: kv.Partition.from_sizes([2.5]), ValueError, "2.5"),
        (lambda P: kv.Partition.from_sizes([1, 2], ["one"]), ValueError, "2 sizes, 1 names"),
        (lambda P: kv.partition_of("model"), TypeError, "got str"),
        (lambda P: kv.partition_of(nn.Tanh()), ValueError, "Tanh has no nn.Linear"),
        (lambda P: kv.partition_of(nn.LazyLinear(3)), ValueError, "lazy"),
        (lambda P: kv.partition_of(nn.Sequential(nn.Linear(0, 3, bias=False))), ValueError, r"\['0'\]"),
        (lambda P: kv.partition_of(mlp(), ["0", "7"]), ValueError, r"\['7'\].*\['0', '2'\]"),
        (lambda P: kv.partition_of(mlp(), "0"), ValueError, "list of names"),
        (lambda P: kv.partition_of(mlp(), []), ValueError, "list of names"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors", "ignore:Lazy modules")
def test_bad_input_is_named(break_it, error, words):
    with pytest.raises(error, match=words):
        break_it(kv.partition_of(mlp((4, 5, 3), bias=(True, False))))


@pytest.mark.parametrize(
    ("v", "alpha", "words"),
    [
        (torch.full((43,), torch.nan, dtype=torch.float64), 1.0, "NaN or inf in layer '0', '2'"),
        (torch.cat([torch.zeros(25), torch.full((18,), torch.inf)]).double(), 1.0, "in layer '2'"),
        (torch.zeros(42, dtype=torch.float64), 1.0, r"\(43,\).*got \(42,\)"),
        (torch.zeros(43, 1, dtype=torch.float64), 1.0, r"got \(43, 1\)"),
        (torch.zeros(43), 1.0, "'0' is torch.float64.*the update is torch.float32"),
        (torch.ones(43, dtype=torch.float64), float("nan"), "alpha must be finite; got nan"),
    ],
)
def test_a_refused_update_changes_nothing(v, alpha, words):
    model = mlp()
    P = kv.partition_of(model)
    before = P.pack(model)
    with pytest.raises(ValueError, match=words):
        P.add_(model, v, alpha)
    assert torch.equal(P.pack(model), before)


def tied_bias() -> nn.Module:
    model = mlp((4, 4, 4))
    model[2].bias = model[0].bias
    return model


def tied_weight() -> nn.Module:
    model = mlp((4, 4, 4))
    model[2].weight = model[0].weight
    return model


def tied_embedding() -> nn.Module:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    model[1].weight = model[0].weight
    return model


def one_parameter_under_two_names() -> nn.Module:
    model = nn.Sequential(nn.LayerNorm(3))
    model[0].again = model[0].weight
    return model


@pytest.mark.parametrize(
    ("build", "layers"),
    [
        (one_parameter_under_two_names, ["0: 6"]),
        (tied_bias, ["0: 4+1→4", "2: 4→4"]),
        (tied_weight, ["0: 4+1→4", "2.bias: 4"]),
        (tied_embedding, ["0: 5→3", "1.bias: 5"]),
    ],
)
def test_a_shared_parameter_belongs_to_its_first_module(build, layers):
    model = build()
    P = kv.partition_of(model)
    assert [str(layer) for layer in P.layers] == layers and P.size == sum(p.numel() for p in model.parameters())
    before, step = P.pack(model), normal(P.size).to(P.pack(model))
    P.add_(model, step)
    assert torch.equal(P.pack(model), before + step)


def test_a_module_registered_twice_is_one_layer():
    layer = nn.Linear(3, 3)
    assert kv.partition_of(nn.Sequential(layer, nn.Tanh(), layer)).names == ("0",)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "bias", 1),
    ],
)
def test_computed_weights_are_refused(wrap):
    with pytest.raises(ValueError, match="parameter of layer '0' is computed"):
        kv.partition_of(nn.Sequential(wrap(nn.Linear(3, 2))))


def test_frozen_layers_are_refused_unless_the_others_are_named():
    model = mlp((4, 3, 3, 2))
    model[2].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"\['2'\] are frozen"):
        kv.partition_of(model)
    assert kv.partition_of(model, ["0", "4"]).names == ("0", "4")


def test_modules_stand_for_the_layers_inside():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(4, 2, 8)
    P = kv.partition_of(nn.ModuleDict({"block": block, "head": nn.Linear(4, 3)}))
    assert P.names == (
        *(f"block.self_attn.{name}" for name in ("q", "k", "v", "out_proj")),
        *(f"block.{name}" for name in ("linear1", "linear2", "norm1", "norm2")), "head",
    )  # fmt: skip
    assert P.size == P.total and "of" not in str(P)
    some = kv.partition_of(nn.ModuleDict({"block": block}), ["block.self_attn", "block.norm2"])
    assert some.names == (*P.names[:4], "block.norm2") and str(some).startswith(f"{some.size} of {P.total - 15} ")


def test_rows_of_a_packed_weight_and_a_transposed_table_are_written_where_they_belong():
    torch.manual_seed(0)
    model = nn.ModuleDict({"mix": nn.MultiheadAttention(4, 2), "table": nn.Embedding(5, 3), "norm": nn.LayerNorm(3)})
    P = kv.partition_of(model)
    v = P.pack(model)
    pieces = dict(zip(P.names, P.split(v), strict=True))
    mix = model["mix"]
    assert torch.equal(pieces["mix.k"], torch.cat([mix.in_proj_weight[4:8], mix.in_proj_bias[4:8, None]], 1))
    assert torch.equal(pieces["table"], model["table"].weight.T)
    assert torch.equal(pieces["norm"][:, 0], torch.cat([model["norm"].weight, model["norm"].bias]))
    P.add_(model, torch.ones_like(v))
    assert torch.equal(P.pack(model), v + 1)
