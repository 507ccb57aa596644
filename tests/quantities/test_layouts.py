"""Products and convolutions of any layout, and what is read off their unformed gradients."""

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from naive import assert_close
from zoo import Case, normal

import fbackprop as fb

QUANTITIES = {
    "each": fb.ExampleGradients(),
    "norms": fb.ExampleNorms(),
    "moment": fb.SecondMoment(),
    "gradient": fb.Gradient(),
    "dots": fb.ExampleDots(),
    "diagonal": fb.GGNDiagonal(),
    "kron": fb.Kronecker(),
}
N = 3


@pytest.fixture(autouse=True, scope="module")
def _double():
    with jax.enable_x64(True):
        yield


def check(model, params, x) -> None:
    """All quantities of a linear model with a curved loss."""

    def loss(z, y):
        return jnp.sum(jnp.cosh(z - y))

    def ours(params, batch):
        found = fb.sweep(model, loss, **QUANTITIES)(params, batch)
        return {**found, "kron": fb.KroneckerFactors(found["kron"]).dense()}

    shape = jax.eval_shape(model, params, x[0]).shape
    y = normal(jax.random.key(2), N, *shape, scale=1)
    found = jax.device_get(naive.compiled(ours)(params, (x, y)))
    definitions = naive.definitions(Case(model, loss, params, (x, y)))
    each = definitions.gradients
    rows = each.reshape(N, -1)
    assert_close(found["each"], each)
    assert_close(found["gradient"], np.mean(each, axis=0))
    assert_close(found["norms"], np.sum(rows**2, axis=1))
    assert_close(found["moment"], np.mean(each**2, axis=0))
    assert_close(found["dots"], rows @ rows.T)
    jacobians = definitions.jacobians.reshape(N, -1, params.size)
    diagonal = np.einsum("ncp,ncd,ndp->p", jacobians, definitions.hessians, jacobians) / N
    assert_close(found["diagonal"], diagonal.reshape(params.shape))
    assert_close(found["kron"], found["kron"].T)
    assert np.min(np.linalg.eigvalsh(found["kron"])) > -1e-9 * (1 + np.max(np.abs(found["kron"])))


@st.composite
def einsums(draw):
    """A specification of data (n examples), weight and result; some axes of length one."""
    shared, contracted, kept, places = (draw(st.integers(0, 2)) for _ in range(4))
    letters = iter("abcdefgh")
    g, i, o, t = (
        "".join(next(letters) for _ in range(k)) for k in (shared, contracted, kept, places)
    )
    axes = ("".join(draw(st.permutations(term))) for term in (g + i + t, g + i + o, g + o + t))
    data, weight, result = axes
    sizes = {axis: draw(st.integers(1, 3)) for axis in g + i + o + t}
    return data, weight, result, sizes, draw(st.booleans())


@pytest.mark.slow
@settings(max_examples=5, deadline=None, derandomize=True)
@given(einsums())
def test_products(spec):
    data, weight, result, sizes, weight_first = spec
    x = normal(jax.random.key(0), N, *(sizes[axis] for axis in data), scale=1)
    w = normal(jax.random.key(1), *(sizes[axis] for axis in weight))

    def model(w, x):
        if weight_first:
            return jnp.einsum(f"{weight},{data}->{result}", w, x)
        return jnp.einsum(f"{data},{weight}->{result}", x, w)

    check(model, w, x)


@st.composite
def convolutions(draw):
    groups, rank = draw(st.sampled_from([1, 1, 2])), draw(st.integers(1, 2))
    size = st.integers(1, 3)
    window = [draw(size) for _ in range(rank)]
    settings = dict(
        window_strides=[draw(st.integers(1, 2)) for _ in range(rank)],
        padding=[(draw(st.integers(-1, 2)), draw(st.integers(0, 2))) for _ in range(rank)],
        lhs_dilation=[draw(st.integers(1, 2)) for _ in range(rank)],
        rhs_dilation=[draw(st.integers(1, 2)) for _ in range(rank)],
        feature_group_count=groups,
    )
    features = groups * draw(size), groups * draw(size)
    names = (
        ("NHC", "HIO", "NHC")
        if rank == 1
        else draw(
            st.sampled_from(
                [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NWCH"), ("CHWN", "IWHO", "CNHW")]
            )
        )
    )
    return window, features, settings, names


@pytest.mark.slow
@settings(max_examples=5, deadline=None, derandomize=True)
@given(convolutions())
def test_convolutions(spec):
    window, (into, out), settings, names = spec
    groups = settings["feature_group_count"]
    length = {"H": 6, "W": 5, "N": 2, "C": into}
    kernel = {"H": window[0], "W": window[-1], "I": into // groups, "O": out}
    x = normal(jax.random.key(0), N, *(length[axis] for axis in names[0]), scale=1)
    w = normal(jax.random.key(1), *(kernel[axis] for axis in names[1]))

    def model(w, x):
        return lax.conv_general_dilated(x, w, dimension_numbers=names, **settings)

    check(model, w, x)


# --- what leaves a weight where it lies -----------------------------------------------------------

ONE_DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
REARRANGED = {
    "transposed by reshape": lambda w, x: x @ w[:, 0] + x @ lax.reshape(w[:, 0], (3, 3), (1, 0)),
    "reshaped in another order": lambda w, x: x @ lax.reshape(w[:, 0], (3, 3), (1, 0)),
    "unstacked": lambda w, x: sum(jnp.tanh(x @ row) for row in jnp.unstack(w, axis=1)),
    "named": lambda w, x: x @ checkpoint_name(w, "w")[:, 0],
    "behind a barrier": lambda w, x: x @ lax.optimization_barrier((w[0], w[1]))[1].T,
    "put on a device": lambda w, x: x @ jax.device_put(w, jax.devices()[0])[:, 1],
    "sharded": lambda w, x: x @ lax.with_sharding_constraint(w, ONE_DEVICE)[:, 0],
    "by a loop's number": lambda w, x: lax.fori_loop(
        0, 2, lambda i, h: jnp.tanh(h @ w.swapaxes(0, 1)[i]), x
    ),
    "from the last on": lambda w, x: lax.scan(
        lambda h, i: (jnp.tanh(h @ w.swapaxes(0, 1)[1 - i]), None), x, jnp.arange(2)
    )[0],
    "by a number of the data": lambda w, x: jax.lax.cond(
        x[0] > 0, lambda: x @ w[:, 0], lambda: jnp.tanh(x @ w[:, 1])
    ),
}


@pytest.mark.parametrize("name", REARRANGED)
def test_a_weight_that_was_rearranged_has_its_structure(name):
    model = REARRANGED[name]
    w, x = normal(jax.random.key(1), 3, 2, 3), normal(jax.random.key(0), N, 3, scale=1)
    check(model, w, x)
    (leaf,) = fb.explain_sites(model, w, x[0]).leaves
    assert not leaf.formed and "product" in leaf.uses[0]


@pytest.mark.parametrize("rows", [[0, 0, 2], [0, 2, 1], [3, 0, 1]])
def test_rows_that_repeat_or_are_in_no_order_are_right(rows):
    def model(w, x):
        return lax.scan(lambda h, i: (jnp.tanh(h @ w[i]), None), x, jnp.array(rows))[0]

    check(model, normal(jax.random.key(1), 3, 2, 2), normal(jax.random.key(0), N, 2, scale=1))


def test_no_copy_of_a_weight_for_each_example():
    """Neither where the example chooses it, nor where a loop does by its number."""
    size, n = 64, 32
    layers = {
        "cond": lambda w, x: lax.cond(x[0] > 0, lambda: x @ w[0], lambda: x @ w[1]),
        "loop": lambda w, x: lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ w[i]), x),
    }
    w, batch = jnp.ones((2, size, size)), (jnp.ones((n, size)),) * 2
    for model in layers.values():
        run = fb.sweep(model, fb.losses.squared_error, norms=fb.ExampleNorms(), g=fb.Gradient())
        memory = jax.jit(run).lower(w, batch).compile().memory_analysis()
        assert memory.temp_size_in_bytes < n * w.nbytes / 4


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_of_a_weight_that_no_place_meets_are_zero(sharing):
    factors = fb.sweep(
        lambda w, x: (x @ w).sum(0), fb.losses.squared_error, k=fb.Kronecker(sharing=sharing)
    )(jnp.ones((3, 2)), (jnp.ones((4, 0, 3)), jnp.zeros((4, 2))))["k"]
    assert_close(fb.KroneckerFactors(factors).dense(), jnp.zeros((6, 6)))
