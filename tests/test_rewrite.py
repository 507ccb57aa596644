"""Other backward rules for one sweep: what they are for, where they reach, what they may hold."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.tree_util import Partial

import fbackprop as fb


def doubled(ct, default):
    return jax.tree.map(lambda g: 2 * g, default(ct))


def by_default(ct, default):
    return default(ct)


X = jnp.array([0.3, -0.7, 1.1])


# --- keys -----------------------------------------------------------------------------------------


def python_function(x):
    return jnp.sin(x) * x


@jax.jit
def jitted(x):
    return jnp.sin(x) * x


@jax.custom_jvp
def custom(x):
    return jnp.sin(x) * x


custom.defjvp(lambda primals, tangents: (custom(*primals), tangents[0]))


@jax.custom_vjp
def custom_back(x):
    return jnp.sin(x) * x


custom_back.defvjp(lambda x: (custom_back(x), None), lambda _, ct: (ct,))

FUNCTIONS = [python_function, jitted, custom, custom_back, jax.nn.gelu, jax.nn.softmax]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("under", [lambda f: f, jax.jit, jax.checkpoint])
def test_a_function_is_found_by_its_name(function, under):
    def f(x):
        return jnp.sum(under(lambda x: function(2 * x) ** 2)(x))

    name = function.__name__
    got = fb.grad(f, rules={name: lambda ct: 5 * ct})(X)
    ct = 2 * function(2 * X)
    np.testing.assert_allclose(got, 2 * 5 * ct, rtol=1e-6)


def test_a_primitive_is_found_by_its_name_and_itself():
    from jax.extend.core.primitives import sin_p

    for key in ("sin", sin_p):
        assert fb.grad(jnp.sin, rules={key: lambda ct: 7 * ct})(0.3) == 7.0


def test_a_named_value_is_found_by_its_name():
    def f(x):
        return jnp.sum(checkpoint_name(x * 2, "twice") ** 2)

    np.testing.assert_array_equal(
        fb.grad(f, rules={"twice": lambda ct: jnp.sign(ct)})(X), 2 * jnp.sign(X)
    )


def test_a_predicate_sees_path_line_scope_and_weights():
    seen = {}

    def note(eqn):
        if eqn.primitive.name == "dot_general":
            seen[eqn.path] = (eqn.scope, eqn.weights, "test_rewrite.py" in eqn.source)
        return False

    @jax.jit
    def dense(w, x):
        with jax.named_scope("inner"):
            return x @ w

    def f(w, x):
        with jax.named_scope("outer"):
            return jnp.sum(dense(w, x))

    fb.grad(f, rules={note: None})(jnp.ones((3, 2)), X)
    assert seen == {("jit:dense", "dot_general"): ("outer/inner", (False, True), True)}


def test_a_predicate_tells_two_calls_of_one_function_apart():
    @jax.jit
    def layer(x):
        return jnp.tanh(x)

    def f(x):
        with jax.named_scope("first"):
            x = layer(x)
        with jax.named_scope("second"):
            return layer(x)

    def second(eqn):
        return "second" in eqn.scope and eqn.primitive.name == "tanh"

    got = fb.grad(f, rules={second: lambda ct: ct})(0.4)
    np.testing.assert_allclose(got, 1 - jnp.tanh(0.4) ** 2, rtol=1e-6)


def test_the_first_key_that_matches_gives_the_rule():
    rules = {"sin": lambda ct: 2 * ct, (lambda eqn: True): lambda ct: 3 * ct}
    assert fb.grad(jnp.sin, rules=rules)(0.3) == 2.0


def test_anywhere_need_not_be_there():
    rules = {fb.Anywhere(("relu", "sin")): lambda ct: 4 * ct}
    assert fb.grad(jnp.sin, rules=rules)(0.3) == 4.0
    assert fb.grad(lambda x: x * 3, rules=rules)(0.3) == 3.0


# --- rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["sin", (), ("sin", ""), ["sin"]])
def test_anywhere_takes_names(names):
    with pytest.raises(TypeError, match="give a tuple of names"):
        fb.Anywhere(names)


def test_none_stops_the_cotangent():
    assert fb.grad(lambda x: jnp.sin(x) + x, rules={"sin": None})(0.3) == 1.0


def test_an_ellipsis_leaves_an_operand_to_the_default():
    got = fb.grad(jnp.multiply, (0, 1), rules={"mul": lambda ct: (..., 10 * ct)})(2.0, 3.0)
    assert got == (3.0, 10.0)


def test_the_default_at_other_operands():
    def rule(ct, xs, default):
        return default(ct, (xs[0], 5.0))

    got = fb.grad(jnp.multiply, (0, 1), rules={"mul": rule})(2.0, 3.0)
    assert got == (5.0, 2.0)


def test_a_rule_sees_what_it_names():
    def rule(ct, cts, arriving, x, y, xs, out, outs, eqn, active):
        assert cts == (ct,) and arriving == (ct,) and outs == (out,)
        assert eqn.primitive.name == "mul" and active == (True, False)
        return ct * (x + y + xs[0] + out), None

    got = fb.grad(lambda x, y: x * y, rules={"mul": rule})(2.0, 3.0)
    assert got == 2 + 3 + 2 + 6


def test_a_rule_may_hold_arrays_that_are_traced():
    traces = []

    @jax.jit
    def gradient(factor, x):
        traces.append(None)
        rules = {"sin": Partial(lambda factor, ct: factor * ct, factor)}
        return fb.grad(lambda x: jnp.sum(jitted(x)), rules=rules)(x)

    for factor in (2.0, 3.0):
        np.testing.assert_allclose(gradient(factor, X), factor * X + jnp.sin(X), rtol=1e-6)
    assert len(traces) == 1
    rules = jax.vmap(lambda factor: gradient(factor, X))(jnp.array([2.0, 3.0]))
    np.testing.assert_allclose(rules[1], 3 * X + jnp.sin(X), rtol=1e-6)


def test_rules_reach_into_loops_branches_and_calls():
    def f(w, x):
        @jax.checkpoint
        def layer(h, w):
            h = jitted(h * w)
            return lax.cond(h[0] > 100, lambda h: h, lambda h: jnp.tanh(h), h), None

        h, _ = lax.scan(layer, x, w)
        return jnp.sum(h)

    w = jnp.array([[0.5], [2.0], [1.5]]) * jnp.ones((1, 3))

    def by_hand(w, x):
        @jax.custom_vjp
        def tanh(x):
            return jnp.tanh(x)

        tanh.defvjp(lambda x: (tanh(x), x), lambda x, ct: (3 * ct * (1 - jnp.tanh(x) ** 2),))

        @jax.custom_vjp
        def sin(x):
            return jnp.sin(x)

        sin.defvjp(lambda x: (sin(x), None), lambda _, ct: (2 * ct,))
        for row in w:
            x = x * row
            x = tanh(sin(x) * x)
        return jnp.sum(x)

    rules = {
        "sin": Partial(lambda a, ct: a * ct, jnp.float32(2)),
        "tanh": Partial(lambda a, ct, default: a * default(ct), jnp.float32(3)),
    }
    got = jax.jit(fb.grad(f, (0, 1), rules=rules))(w, X)
    chex.assert_trees_all_close(got, jax.grad(by_hand, (0, 1))(w, X), rtol=1e-5)
    chex.assert_trees_all_close(fb.record(f, rules=rules)(w, X).gradients, got, rtol=1e-5)


def test_rules_apply_where_a_function_looks_at_values():
    def f(x):
        return jnp.sin(x) * (2 if x > 0 else 3) + jax.nn.relu(x)

    assert fb.grad(f, rules={"sin": lambda ct: ct})(0.5) == 3.0
    assert fb.grad(f, rules={"relu": lambda ct: 10 * ct, "sin": lambda ct: ct})(0.5) == 12.0


def test_the_default_rule_changes_nothing_to_the_bit():
    key = jax.random.key(0)

    def f(w, x):
        def layer(h, w):
            return jax.nn.relu(jax.nn.gelu(h @ w)) + jax.nn.softmax(h), None

        h, _ = lax.scan(jax.checkpoint(layer), x, w)
        return jnp.sum(h**3)

    w, x = jax.random.normal(key, (3, 4, 4)), jax.random.normal(key, (2, 4))
    rules = {(lambda eqn: eqn.primitive.name not in ("scan", "checkpoint", "remat2")): by_default}
    for run in (lambda f: f, jax.jit):
        got = run(fb.value_and_grad(f, rules=rules))(w, x)
        chex.assert_trees_all_equal(got, run(fb.value_and_grad(f))(w, x))
    for name in ("relu", "gelu", "dot_general", "softmax"):
        chex.assert_trees_all_equal(fb.grad(f, rules={name: by_default})(w, x), fb.grad(f)(w, x))


def test_gradients_of_changed_gradients():
    def g(x):
        return fb.grad(lambda x: jnp.sin(x) ** 2, rules={"sin": lambda ct, x: ct * x})(x)

    # ct = 2 sin x, so g = 2 x sin x.
    for grad in (jax.grad, fb.grad):
        np.testing.assert_allclose(grad(g)(0.7), 2 * np.sin(0.7) + 1.4 * np.cos(0.7), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(g)(X), 2 * X * jnp.sin(X), rtol=1e-6)


def test_vjp_and_its_pullback_take_rules_through_jit():
    value, pullback = jax.jit(lambda x: fb.vjp(jitted, x, rules={"sin": lambda ct: 0 * ct}))(X)
    np.testing.assert_allclose(pullback(jnp.ones(3))[0], jnp.sin(X), rtol=1e-6)
    np.testing.assert_allclose(value, jitted(X), rtol=1e-6)


def test_error_signals_by_other_rules():
    def f(x):
        return jnp.sum(jnp.sin(checkpoint_name(x, "x")))

    np.testing.assert_array_equal(
        fb.error_signals(f, X, rules={"sin": lambda ct: 3 * ct})["x"], jnp.full(3, 3.0)
    )


# --- a sweep --------------------------------------------------------------------------------------


def model(w, x):
    return jnp.tanh(jnp.tanh(x @ w["a"]) @ w["b"] + w["c"])


def weights(key=0):
    a, b, c = jax.random.split(jax.random.key(key), 3)
    return {
        "a": jax.random.normal(a, (4, 3)),
        "b": jax.random.normal(b, (3, 2)),
        "c": jax.random.normal(c, (2,)),
    }


@pytest.mark.parametrize(
    "rules",
    [
        {"tanh": lambda ct: ct},
        {"dot_general": lambda ct, default: tuple(g if g is None else 2 * g for g in default(ct))},
        {"dot_general": lambda ct, default, active: (..., 3 * default(ct)[1])},
        {"add": lambda ct: (ct, 5 * ct)},
        fb.credit.feedback_alignment(weights(1)),
        fb.credit.sign_symmetric(weights(1)),
    ],
    ids=["activation", "both", "weight", "bias", "feedback", "sign"],
)
@pytest.mark.slow
def test_a_sweep_has_the_gradients_of_its_rules(rules, optimized):
    batch = jax.random.normal(jax.random.key(2), (5, 4)), jnp.ones((5, 2))
    sweep = fb.sweep(
        model,
        fb.losses.squared_error,
        each=fb.ExampleGradients(),
        norms=fb.ExampleNorms(),
        rules=rules,
    )
    out = jax.jit(sweep)(weights(), batch)

    def loss(w, x, y):
        return fb.losses.squared_error(model(w, x), y)

    each = jax.vmap(fb.grad(loss, rules=rules), (None, 0, 0))(weights(), *batch)
    chex.assert_trees_all_close(out["each"], each, rtol=1e-5, atol=1e-6)
    norms = sum(jnp.sum(g**2, tuple(range(1, g.ndim))) for g in each.values())
    np.testing.assert_allclose(out["norms"], norms, rtol=1e-5)


# --- models of other libraries --------------------------------------------------------------------


def equinox_model():
    import equinox as eqx

    return eqx.nn.MLP(3, 2, 5, 2, activation=jax.nn.relu, key=jax.random.key(0))


def nnx_model():
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
            self.last = nnx.Linear(5, 2, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.last(nnx.relu(self.first(x)))

    return Model()


@pytest.mark.parametrize("make", [equinox_model, nnx_model])
def test_a_function_of_a_model_of_another_library_is_found_by_its_name(make):
    model = make()
    got = fb.grad(lambda x: jnp.sum(model(x)), rules={"relu": lambda ct: ct})(X)
    back = jnp.ones(2)  # without its rectifiers' derivative a network goes back like a linear one
    for w in kernels(model)[::-1]:
        back = back @ w
    np.testing.assert_allclose(got, back, rtol=1e-5)


def kernels(model):
    """Of shapes (outputs, inputs)."""
    if hasattr(model, "layers"):
        return [layer.weight for layer in model.layers]
    return [model.first.kernel[...].T, model.last.kernel[...].T]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ({"sine": by_default}, ValueError, "nothing in the function is called 'sine'"),
        ({"sin": lambda ct, q: ct}, TypeError, r"parameters \['q'\], which name nothing"),
        ({"sin": lambda *args: args[0]}, TypeError, "name nothing"),
        ({"sin": 3.0}, TypeError, "the rule for 'sin' is 3.0"),
        ({3: by_default}, TypeError, "3 names no equation"),
        ({"": by_default}, TypeError, "'' names no equation"),
        ({"sin": lambda ct, default: default(ct[:1])}, TypeError, r"`default` cotangents of sh"),
        (by_default, TypeError, "is not a mapping"),
        ({"sin": lambda ct: ct[:2]}, TypeError, "returned a cotangent of type float32"),
        ({"sin": lambda ct: ct.astype(jnp.bfloat16)}, TypeError, "of type bfloat16"),
        ({"sin": lambda ct: (ct, ct)}, TypeError, "2 cotangents for 1 operands"),
        ({"sin": fb.Twinned(by_default, jnp.ones(4))}, ValueError, "twin of the parameters"),
        ({"sin": fb.Twinned(by_default, [X])}, ValueError, "the twins have the structure"),
        ({"sin": fb.Severed(jnp.ones((3, 2)))}, ValueError, "comes from no output"),
    ],
)
def test_bad_rules_are_refused_when_traced(rules, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(fb.grad(lambda x: jnp.sum(jnp.sin(x)), rules=rules), X)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (lambda ct, y: ct, "reads the operand 'y', but the equation has 1"),
        (lambda ct, default, x: default(ct, x), "gave `default` no tuple of operands"),
        (lambda ct, default, xs: default(ct, ()), "gave `default` 0 operands"),
        (max, "whose parameters have no names"),
    ],
)
def test_operands_that_are_not_there_are_refused(rule, words):
    with pytest.raises(TypeError, match=words) as raised:
        jax.eval_shape(fb.grad(lambda x: jnp.sum(jnp.sin(x)), rules={"sin": rule}), X)
    assert "\n" not in str(raised.value)


def test_what_is_refused_says_where():
    with pytest.raises(TypeError) as caught:
        fb.grad(lambda x: jnp.sum(jnp.sin(x)), rules={"sin": lambda ct: ct[:2]})(X)
    assert "test_rewrite.py" in str(caught.value)
    with pytest.raises(fb.MissingRule, match=r"called at .*test_rewrite.py"):
        fb.grad(jax.custom_batching.sequential_vmap(jnp.sin))(1.0)


def test_rules_with_arrays_do_not_stay_behind():
    """A mapping made inside of jit leaks no tracer into what is cached between calls."""

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(n, factor):
        rules = {"sin": Partial(lambda factor, ct: factor * ct, factor)}
        return fb.grad(lambda x: jnp.sum(jitted(x)) * n, rules=rules)(X)

    with jax.checking_leaks():
        gradient(1, 2.0)
        gradient(2, 2.0)
