"""Models of Flax, Equinox and Haiku as their users write them: quantities against definitions.

What the libraries' own layers are made of, in a few models each: convolutions with strides, groups
and dilation, normalisation, attention, embeddings tied to the output, layers in a scan, cells of
recurrent networks, reparametrised and low-rank weights, dropout.
"""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from naive import assert_close
from zoo import Case, N, classes

import fbackprop as fb

KEY = jax.random.key(0)
CLIP = 0.5


@pytest.fixture(autouse=True)
def _double():
    """Double precision, and the ranks that other people's code broadcasts."""
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        yield


# --- the quantities of a case ---------------------------------------------------------------------

QUANTITIES = dict(
    gradient=fb.Gradient(),
    each=fb.ExampleGradients(),
    norms=fb.ExampleNorms(),
    leaf_norms=fb.ExampleNorms(per_leaf=True),
    clipped=fb.ClippedGradient(CLIP),
    second_moment=fb.SecondMoment(),
    variance=fb.Variance(),
    diagonal=fb.GGNDiagonal(),
    kronecker=fb.Kronecker(),
    gram=fb.Gram(),
    weighted=fb.Gram(weighted=True),
)


def compute(function, *args):
    """Call it compiled as a whole and without much ado; arrays of numpy."""
    return jax.device_get(naive.compiled(function)(*args))


def check(case: Case) -> None:
    """All quantities, by one sweep, are what their definitions say."""

    def ours(params):
        found = fb.sweep(case.model, case.loss, **QUANTITIES)(params, case.batch)
        return {**found, "kronecker": dense(case, found["kronecker"])}

    found = compute(ours, case.params)
    _, each, jacobians, hessians = naive.definitions(case)
    check_gradients(found, each)
    rows = [x.reshape(*x.shape[:2], -1) for x in jax.tree.leaves(jacobians)]
    rows = np.concatenate(rows, axis=-1)  # (N, C, P)
    ggn = np.einsum("ncp,ncd,ndq->pq", rows, hessians, rows, optimize=True) / N
    assert_close(jax.tree.leaves(found["diagonal"]), split(np.diagonal(ggn), case.params))
    assert_close(found["gram"], np.einsum("ncp,mdp->ncmd", rows, rows))
    assert_close(*aligned(eigenvalues(found["weighted"]), eigenvalues(ggn)))
    for leaf, block in zip(jax.tree.leaves(case.params), found["kronecker"], strict=True):
        assert block.shape == (leaf.size, leaf.size)
        values = np.linalg.eigvalsh(block)
        assert np.all(values >= -1e-10 * np.max(values, initial=1))


def check_gradients(found: dict, each) -> None:
    """What is of the examples' gradients is what these say."""
    mean = jax.tree.map(lambda g: np.mean(g, axis=0).astype(g.dtype), each)
    second = jax.tree.map(lambda g: np.mean(g**2, axis=0).astype(g.dtype), each)
    norms = jax.tree.map(lambda g: np.sum(g.reshape(N, -1) ** 2, axis=1), each)
    total = sum(jax.tree.leaves(norms))
    share = np.minimum(1, CLIP / np.sqrt(total)) / N
    assert_close(found["gradient"], mean)
    assert_close(found["each"], each)
    assert_close(found["norms"], total)
    assert_close(found["leaf_norms"], norms)
    assert_close(found["clipped"], jax.tree.map(lambda g: np.tensordot(share, g, 1), each))
    assert_close(found["second_moment"], second)
    assert_close(found["variance"], jax.tree.map(lambda a, b: a - b**2, second, mean))


def dense(case: Case, factors) -> list:
    """The Kronecker product of every leaf as a matrix."""
    tuples = jax.tree.structure(case.params).flatten_up_to(factors)
    return [fb.KroneckerFactors(blocks).dense() for blocks in tuples]


def split(vector, params) -> list:
    """A vector in parts like the leaves."""
    leaves = jax.tree.leaves(params)
    parts = np.split(vector, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]


def eigenvalues(x):
    """Of a matrix that may have its axes in pairs; the greatest first."""
    size = int(x.size**0.5)
    return np.linalg.eigvalsh(x.reshape(size, size))[::-1]


def aligned(p, q):
    """Two spectra of one length, the shorter one filled up with zeros."""
    n = max(len(p), len(q))
    return np.pad(p, (0, n - len(p))), np.pad(q, (0, n - len(q)))


def check_unshared(case: Case) -> None:
    """Where each weight meets one activation, one example's block is a Kronecker product."""
    case = case._replace(batch=jax.tree.map(lambda x: x[:1], case.batch))

    def ours(params):
        sweep = fb.sweep(case.model, case.loss, kronecker=fb.Kronecker())
        return dense(case, sweep(params, case.batch)["kronecker"])

    def theirs(params):
        blocks = naive.ggn_of_examples(case._replace(params=params))
        return [block[0] for block in jax.tree.leaves(blocks)]

    assert_close(compute(ours, case.params), compute(theirs, case.params))


# --- data and parameters --------------------------------------------------------------------------


def normal(*shape):
    return np.random.default_rng(0).normal(size=(N, *shape))


def tokens(length=3, vocabulary=6):
    x = np.random.default_rng(0).integers(vocabulary, size=(N, length))
    return x, np.roll(x, -1, axis=1)


def images():
    return normal(6, 6, 2), classes(N, 3)


def series():
    return normal(3, 2), classes(N, 2)


def vectors():
    return normal(4), classes(N, 3)


def double(params):
    """Parameters in double precision, none of them at a special place such as 0."""

    def one(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        noise = np.random.default_rng(leaf.size).normal(size=leaf.shape)
        return jnp.asarray(leaf + 0.1 * noise, jnp.float64)

    return jax.tree.map(one, params)


def classifier(model, params, batch) -> Case:
    return Case(model, fb.losses.softmax_cross_entropy, params, batch)


# --- Flax linen -----------------------------------------------------------------------------------


def linen(module, batch) -> Case:
    """What is no parameter (statistics of a normalisation) stays as it was initialised."""
    params, rest = linen_variables(module, batch)
    return classifier(lambda p, x: module.apply({"params": p, **rest}, x), params, batch)


def linen_variables(module, batch):
    variables = compute(module.init, KEY, jax.tree.map(lambda x: x[0], batch[0]))
    rest = {name: value for name, value in variables.items() if name != "params"}
    return double(variables["params"]), rest


class LinenMLP(nn.Module):
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(5)(x))
        x = nn.Dropout(self.dropout, deterministic=not self.dropout)(x)
        return nn.Dense(3)(x)


class LinenConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), strides=2)(x)
        x = nn.relu(nn.GroupNorm(2)(x[None])[0])
        x = nn.Conv(4, (3, 3), feature_group_count=2, kernel_dilation=2)(x)
        x = nn.gelu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.WeightNorm(nn.Dense(3))(x.mean((0, 1)))
        return nn.LayerNorm()(x)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(4)(nn.gelu(nn.Dense(4)(x))), None


class LinenTransformer(nn.Module):
    """Two blocks in one scan, computed again on the way back; the output is the embedding."""

    @nn.compact
    def __call__(self, words):
        embed = nn.Embed(6, 4)
        blocks = nn.scan(
            nn.remat(LinenBlock, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=2,
        )
        x, _ = blocks()(embed(words), nn.make_causal_mask(words))
        return embed.attend(x)


class LinenRecurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.LSTMCell(2, param_dtype=jnp.float64))(x)[-1]


# --- Flax nnx -------------------------------------------------------------------------------------


def of_nnx(make, batch, kind=nnx.Param) -> Case:
    graph, params, rest = nnx.split(make(nnx.Rngs(0)), kind, ...)
    rest = jax.tree.map(lambda x: x, rest)

    # A copy: the module may write to its state, which is nobody else's then.
    def model(p, x):
        return nnx.merge(graph, p, rest, copy=True)(x)

    return classifier(model, double(params), batch)


class NnxMLP(nnx.Module):
    def __init__(self, rngs, dropout=0.0):
        self.first, self.last = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x, rngs=None):
        return self.last(self.dropout(nnx.relu(self.first(x)), rngs=rngs))


class NnxConvNet(nnx.Module):
    def __init__(self, rngs):
        self.strided = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
        self.group_norm = nnx.GroupNorm(4, 2, rngs=rngs)
        self.grouped = nnx.Conv(4, 4, (3, 3), feature_group_count=2, kernel_dilation=2, rngs=rngs)
        self.batch_norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.adapted = nnx.LoRALinear(4, 3, lora_rank=2, rngs=rngs)
        self.layer_norm = nnx.LayerNorm(3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.group_norm(self.strided(x)[None])[0])
        x = nnx.gelu(self.batch_norm(self.grouped(x)))
        return self.layer_norm(self.adapted(x.mean((0, 1))))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        # With a dropout, even if it is never used, the softmax is in the precision of its input.
        self.attention = nnx.MultiHeadAttention(
            2, 4, dropout_rate=0.1, deterministic=True, decode=False, rngs=rngs
        )
        self.dense = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm(x), mask=mask)
        return x + nnx.gelu(self.dense(x))


class NnxTransformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(6, 4, param_dtype=jnp.float64, rngs=rngs)
        self.blocks = nnx.split_rngs(splits=2)(nnx.vmap(NnxBlock))(rngs)

    def __call__(self, words):
        mask = nnx.make_causal_mask(words)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, block):
            return block(x, mask)

        return self.embed.attend(run(self.embed(words), self.blocks))


class NnxRecurrent(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.GRUCell(2, 2, param_dtype=jnp.float64, rngs=rngs))

    def __call__(self, x):
        return self.rnn(x)[-1]


# --- Equinox --------------------------------------------------------------------------------------


def equinox(module, batch, kind=eqx.is_inexact_array) -> Case:
    params, static = eqx.partition(module, kind)
    return classifier(lambda p, x: eqx.combine(p, static)(x), double(params), batch)


class EquinoxMLP(eqx.Module):
    """Buffers of integers and truth values among the arrays."""

    first: eqx.nn.Linear
    last: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    order: jax.Array
    mask: jax.Array

    def __init__(self, dropout=0.0):
        self.first = eqx.nn.Linear(4, 5, key=KEY)
        self.last = eqx.nn.Linear(5, 3, key=KEY)
        self.dropout = eqx.nn.Dropout(dropout)
        self.order, self.mask = jnp.array([2, 0, 3, 1]), jnp.arange(5) % 3 > 0

    def __call__(self, x, key=None):
        x = jnp.where(self.mask, self.first(x[self.order]), 1.0)
        return self.last(self.dropout(jax.nn.relu(x), key=key))


def equinox_conv_net():
    conv, keys = eqx.nn.Conv2d, jax.random.split(KEY, 3)
    return eqx.nn.Sequential(
        [
            conv(2, 4, 3, stride=2, padding=1, key=keys[0]),
            eqx.nn.GroupNorm(2, 4),
            eqx.nn.Lambda(jax.nn.relu),
            conv(4, 4, 3, padding=2, dilation=2, groups=2, key=keys[1]),
            eqx.nn.MaxPool2d(3, 3),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.WeightNorm(eqx.nn.Linear(4, 3, key=keys[2])),
            eqx.nn.LayerNorm(3),
        ]
    )


class EquinoxBlock(eqx.Module):
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    dense: eqx.nn.Linear

    def __init__(self, key):
        self.norm = eqx.nn.LayerNorm(4)
        self.attention = eqx.nn.MultiheadAttention(2, 4, use_query_bias=True, key=key)
        self.dense = eqx.nn.Linear(4, 4, key=key)

    def __call__(self, x):
        mask = jnp.tril(jnp.ones((len(x), len(x)), bool))
        h = jax.vmap(self.norm)(x)
        x = x + self.attention(h, h, h, mask=mask)
        return x + jax.nn.gelu(jax.vmap(self.dense)(x))


class EquinoxTransformer(eqx.Module):
    tied: eqx.nn.Shared
    blocks: EquinoxBlock

    def __init__(self):
        embed = eqx.nn.Embedding(6, 4, key=KEY)
        out = eqx.nn.Linear(4, 6, use_bias=False, key=KEY)
        self.tied = eqx.nn.Shared((embed, out), lambda x: x[1].weight, lambda x: x[0].weight)
        self.blocks = eqx.filter_vmap(EquinoxBlock)(jax.random.split(KEY, 2))

    def __call__(self, words):
        embed, out = self.tied()
        stacked, static = eqx.partition(self.blocks, eqx.is_array)

        @jax.checkpoint
        def run(x, block):
            return eqx.combine(block, static)(x), None

        x, _ = lax.scan(run, jax.vmap(embed)(words), stacked)
        return jax.vmap(out)(x)


class EquinoxRecurrent(eqx.Module):
    cell: eqx.nn.GRUCell

    def __init__(self):
        self.cell = eqx.nn.GRUCell(2, 2, key=KEY)

    def __call__(self, x):
        return lax.scan(lambda h, x: (self.cell(x, h), None), jnp.zeros(2), x)[0]


# --- Haiku ----------------------------------------------------------------------------------------


def haiku(function, batch) -> Case:
    """What is state (statistics of a normalisation) stays as it was initialised."""
    network = hk.without_apply_rng(hk.transform_with_state(function))
    params, state = compute(network.init, KEY, jax.tree.map(lambda x: x[0], batch[0]))
    state = jax.tree.map(lambda x: x.astype(jnp.float64), state)
    return classifier(lambda p, x: network.apply(p, state, x)[0], double(params), batch)


def haiku_mlp(x):
    return hk.nets.MLP([5, 3])(x)


def haiku_conv_net(x):
    x = hk.Conv2D(4, 3, stride=2)(x[None])
    x = jax.nn.relu(hk.GroupNorm(2)(x))
    x = hk.Conv2D(4, 3, rate=2, feature_group_count=2)(x)
    x = hk.BatchNorm(True, True, 0.9)(x, is_training=hk.running_init())
    x = hk.Conv2DTranspose(3, 2, stride=2)(jax.nn.gelu(x))
    return hk.LayerNorm(-1, True, True)(x.mean((0, 1, 2)))


def haiku_transformer(words):
    embed = hk.Embed(6, 4)
    mask = jnp.tril(jnp.ones((1, len(words), len(words))))

    def block(x):
        h = hk.LayerNorm(-1, True, True)(x)
        attend = hk.MultiHeadAttention(2, 2, w_init=hk.initializers.RandomNormal(), model_size=4)
        x = x + attend(h, h, h, mask=mask)
        return x + hk.nets.MLP([4, 4], activation=jax.nn.gelu)(x)

    x = hk.experimental.layer_stack(2)(block)(embed(words))
    return x @ embed.embeddings.T


def haiku_recurrent(x):
    core = hk.LSTM(2)
    return hk.dynamic_unroll(core, x, core.initial_state(None))[0][-1]


# --- the tests ------------------------------------------------------------------------------------

CASES = {
    "linen convolutions": lambda: linen(LinenConvNet(), images()),
    "linen transformer": lambda: linen(LinenTransformer(), tokens()),
    "linen recurrent": lambda: linen(LinenRecurrent(), series()),
    "nnx convolutions": lambda: of_nnx(NnxConvNet, images()),
    "nnx adapters only": lambda: of_nnx(NnxConvNet, images(), nnx.LoRAParam),
    "nnx transformer": lambda: of_nnx(NnxTransformer, tokens()),
    "nnx recurrent": lambda: of_nnx(NnxRecurrent, series()),
    "equinox convolutions": lambda: equinox(equinox_conv_net(), (normal(2, 6, 6), classes(N, 3))),
    "equinox transformer": lambda: equinox(EquinoxTransformer(), tokens()),
    "equinox recurrent": lambda: equinox(EquinoxRecurrent(), series()),
    "equinox buffers": lambda: equinox(EquinoxMLP(), vectors(), eqx.is_array),
    "haiku convolutions": lambda: haiku(haiku_conv_net, images()),
    "haiku transformer": lambda: haiku(haiku_transformer, tokens()),
    "haiku recurrent": lambda: haiku(haiku_recurrent, series()),
}


# Of each library one model runs everywhere, the others once.
BRIEF = ("linen transformer", "nnx recurrent", "equinox convolutions", "haiku recurrent")
EACH = [n if n in BRIEF else pytest.param(n, marks=pytest.mark.slow) for n in CASES]


@pytest.mark.parametrize("name", EACH)
def test_quantities(name):
    check(CASES[name]())


UNSHARED = {
    "linen": lambda: linen(LinenMLP(), vectors()),
    "nnx": lambda: of_nnx(NnxMLP, vectors()),
    "equinox": lambda: equinox(EquinoxMLP(), vectors(), eqx.is_array),
    "haiku": lambda: haiku(haiku_mlp, vectors()),
}


@pytest.mark.parametrize("library", UNSHARED)
def test_kronecker_factors_of_one_example(library):
    check_unshared(UNSHARED[library]())


def linen_dropout():
    module = LinenMLP(dropout=0.5)
    params, _ = linen_variables(LinenMLP(), vectors())
    return lambda p, x, key: module.apply({"params": p}, x, rngs={"dropout": key}), params


def nnx_dropout():
    graph, params = nnx.split(NnxMLP(nnx.Rngs(0), dropout=0.5), nnx.Param)
    return lambda p, x, key: nnx.merge(graph, p)(x, nnx.Rngs(key)), double(params)


def equinox_dropout():
    params, static = eqx.partition(EquinoxMLP(dropout=0.5), eqx.is_inexact_array)
    return lambda p, x, key: eqx.combine(p, static)(x, key), double(params)


def haiku_dropout():
    def function(x, rate):
        return hk.nets.MLP([5, 3])(x, dropout_rate=rate, rng=hk.next_rng_key())

    network = hk.transform(function)
    params = network.init(KEY, vectors()[0][0], 0.0)
    return lambda p, x, key: network.apply(p, key, x, 0.5), double(params)


def keys_given(key):
    """The keys of the examples in a sweep, read off the gradients of a model that returns them."""

    def model(p, x, key):
        return p @ jax.random.key_data(key).astype(p.dtype)

    sweep = fb.sweep(model, lambda z, y: z, each=fb.ExampleGradients())
    found = sweep(jnp.zeros(2, jnp.float64), (jnp.zeros(N), jnp.zeros(N)), key=key)["each"]
    return jax.random.wrap_key_data(found.astype(jnp.uint32))


@pytest.mark.parametrize("make", [linen_dropout, nnx_dropout, equinox_dropout, haiku_dropout])
def test_dropout_has_a_key_for_each_example(make):
    model, params = make()
    key = jax.random.key(3)
    case = classifier(model, params, vectors())
    loss, batch = case.loss, case.batch
    quantities = dict(QUANTITIES)
    for name in ("kronecker", "diagonal", "gram", "weighted"):
        del quantities[name]
    run = fb.sweep(model, loss, **quantities)
    found = compute(lambda params: run(params, batch, key=key), params)

    keys = keys_given(key)
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == N
    keyed = case._replace(
        model=lambda p, x: model(p, x[0], x[1]), batch=((batch[0], keys), batch[1])
    )
    each = compute(lambda p: naive.example_gradients(keyed._replace(params=p)), params)
    check_gradients(found, each)
