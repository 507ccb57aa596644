"""Where a backward pass first meets a NaN or an infinity."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fbackprop.record import record

X = jnp.linspace(0.1, 1.0, 6).reshape(2, 3)
W = jnp.linspace(-0.6, 0.5, 9).reshape(3, 3)


def test_root_of_zero():
    found = record(lambda x: jnp.sum(jnp.sqrt(x)))(jnp.array([1.0, 0.0])).first_nonfinite()
    assert (found.kind, found.backward, found.index) == ("infinity", True, 0)
    assert found.step.label == "sqrt" and found.forward is None and found.iterations == ()
    pattern = (
        r"infinity in the cotangent leaving 'sqrt' to operand 0, called at \S*test_nonfinite.*"
    )
    assert re.fullmatch(pattern, str(found))


def test_zero_times_the_logarithm_of_zero():
    found = record(lambda x: jnp.log(x) * 0.0)(0.0).first_nonfinite()
    assert (found.kind, found.step.label) == ("NaN", "log")
    assert (found.forward.kind, found.forward.step.label) == ("infinity", "log")
    assert not found.forward.backward
    assert "; before that, going forward, infinity in result 0 of 'log'" in str(found)
    assert "\n" not in str(found)


def test_a_value_that_is_not_finite_though_its_gradient_is():
    found = record(lambda x: x + jnp.log(0.0 * lax.stop_gradient(x)))(1.0).first_nonfinite()
    assert not found.backward and found.step.label == "log"


def test_the_masked_branch_is_found():
    """The gradient of `where` with a NaN in what it does not choose."""
    found = record(lambda x: jnp.where(x > 0, jnp.sqrt(x), 0.0))(0.0).first_nonfinite()
    assert (found.kind, found.step.label) == ("NaN", "sqrt")


def test_infinities_on_purpose_are_not_reported():
    def softmax_of_some(x):
        return jax.nn.softmax(jnp.where(jnp.arange(3) < 2, x, -jnp.inf))[0]

    assert record(softmax_of_some)(X[0]).first_nonfinite() is None
    assert record(lambda x: jnp.sum(jnp.sin(x)))(X).first_nonfinite() is None
    assert record(lambda x, n: x * n)(1.0, 2).first_nonfinite() is None


def test_a_nan_made_of_infinities():
    """A row of attention that sees nothing: the infinity is meant, the NaN is not."""

    def f(x):
        return jnp.sum(jnp.tanh(jax.nn.softmax(jnp.where(jnp.arange(3) > 5, x, -jnp.inf))))

    found = record(f)(X[0]).first_nonfinite()
    assert (found.kind, found.forward.kind, found.forward.step.label) == ("NaN", "NaN", "sub")
    assert not found.forward.outside and "result 0 of 'sub'" in str(found)


def test_what_was_not_finite_from_the_start():
    def f(w, x):
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    found = record(f)(W, X.at[1, 1].set(jnp.nan)).first_nonfinite()
    assert found.kind == "NaN" and found.backward and not found.outside
    given = found.forward
    assert given.outside and (given.index, given.step.label) == (0, "dot_general")
    assert "operand 0 of 'dot_general'" in str(given) and "an argument or a constant" in str(given)
    assert record(lambda x: jnp.sum(2 * x))(jnp.nan).first_nonfinite().outside
    returned = record(lambda x: x)(jnp.nan).first_nonfinite()
    assert returned.step is None and "leaf 0 of the value" in str(returned)
    sent = record(jnp.sin, cotangent=np.float32(np.inf))(1.0).first_nonfinite()
    assert sent.backward and sent.outside and "arriving at result 0 of 'sin'" in str(sent)


def test_cotangents_that_overflow_as_they_are_summed():
    def f(x, inner):
        return 3e38 * inner(x) + 3e38 * inner(x)

    found = record(lambda x: f(jnp.tanh(x), lambda x: x))(0.1).first_nonfinite()
    assert (found.kind, found.backward, found.outside) == ("infinity", True, True)
    assert "arriving at result 0 of 'tanh'" in str(found)
    found = record(lambda x: f(x, lambda x: x))(0.1).first_nonfinite()
    assert found.step is None and "leaf 0 of the gradients" in str(found)


@pytest.mark.parametrize(
    ("reverse", "values", "iteration"),
    [(False, [1, 0, 2, 0, 3], 3), (True, [1, 0, 2, 0, 3], 1), (False, [0, 1, 1, 1, 1], 0)],
)
def test_the_iteration_of_a_scan_is_told(reverse, values, iteration):
    def f(x):
        def step(h, x):
            return h + jax.jit(lambda x: jnp.sqrt(jnp.sin(x)))(x), h

        return lax.scan(step, 0.0, x, reverse=reverse)[0]

    found = jax.jit(record(f))(jnp.array(values, jnp.float32)).first_nonfinite()
    assert found.step.label == "sqrt"
    assert [i.number for i in found.iterations] == [iteration]
    assert f", iteration {iteration} of the scan at " in str(found)


def test_the_iterations_of_nested_scans_are_told():
    def f(x):
        def outer(h, row):
            return lax.scan(lambda h, x: (h + jnp.sqrt(x), None), h, row)[0], None

        return lax.scan(outer, 0.0, x)[0]

    x = jnp.ones((3, 4)).at[1, 2].set(0.0).at[1, 1].set(0.0)
    found = record(f)(x).first_nonfinite()
    assert [i.number for i in found.iterations] == [1, 2]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "complex64"])
def test_other_dtypes(dtype):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.array([0.0, 1.0], dtype)
        found = record(lambda x: jnp.sum(jnp.real(1 / x)))(x).first_nonfinite()
        assert found is not None and found.step.results[0].dtype == dtype


def test_values_are_needed_and_one_example():
    asked = lambda x: record(jnp.sin)(x).first_nonfinite()  # noqa: E731
    with pytest.raises(TypeError, match="looks at values") as caught:
        jax.jit(asked)(1.0)
    assert "\n" not in str(caught.value)
    mapped = jax.vmap(record(jnp.sqrt))(jnp.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="axis of examples"):
        mapped.first_nonfinite()
    assert jax.tree.map(lambda x: x[1], mapped).first_nonfinite().step.label == "sqrt"
