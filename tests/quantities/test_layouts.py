"""Products and convolutions of any layout, and what is read off their unformed gradients."""

import jax
import jax.numpy as jnp
import naive
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from naive import assert_close
from zoo import Case

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

    shape = jax.eval_shape(model, params, x[0]).shape
    y = jax.random.normal(jax.random.key(2), (N, *shape))
    case = Case(model, loss, params, (x, y))
    found = naive.compiled(fb.sweep(model, loss, **QUANTITIES))(params, (x, y))
    each = naive.example_gradients(case)
    rows = each.reshape(N, -1)
    assert_close(found["each"], each)
    assert_close(found["gradient"], jnp.mean(each, axis=0))
    assert_close(found["norms"], jnp.sum(rows**2, axis=1))
    assert_close(found["moment"], jnp.mean(each**2, axis=0))
    assert_close(found["dots"], rows @ rows.T)
    blocks = naive.ggn_of_examples(case)
    diagonal = jnp.mean(jnp.diagonal(blocks, axis1=1, axis2=2), axis=0)
    assert_close(found["diagonal"], diagonal.reshape(params.shape))
    matrix = fb.KroneckerFactors(found["kron"]).dense()
    assert_close(matrix, matrix.T)
    assert jnp.min(jnp.linalg.eigvalsh(matrix)) > -1e-9 * (1 + jnp.max(jnp.abs(matrix)))


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
    x = jax.random.normal(jax.random.key(0), (N, *(sizes[axis] for axis in data)))
    w = jax.random.normal(jax.random.key(1), tuple(sizes[axis] for axis in weight))

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
    x = jax.random.normal(jax.random.key(0), (N, *(length[axis] for axis in names[0])))
    w = jax.random.normal(jax.random.key(1), tuple(kernel[axis] for axis in names[1]))

    def model(w, x):
        return lax.conv_general_dilated(x, w, dimension_numbers=names, **settings)

    check(model, w, x)
