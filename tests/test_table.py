"""Rows of the table: registration, user rules, errors at trace time."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive

import fbackprop as fb
from fbackprop.program import trace
from fbackprop.rules.derived import _no_recurrence
from fbackprop.table import TABLE

X = jnp.arange(1.0, 4.0)


@pytest.fixture
def cubed():
    """A primitive of its own, with forward-mode rule but without a backward rule."""
    from jax.interpreters import ad, mlir

    p = Primitive("cubed")
    p.def_impl(lambda x: x * x * x)
    p.def_abstract_eval(lambda x: x)
    mlir.register_lowering(p, mlir.lower_fun(lambda x: x * x * x, multiple_results=False))
    ad.primitive_jvps[p] = lambda primals, tangents: (
        p.bind(*primals),
        3 * primals[0] ** 2 * tangents[0],
    )
    yield p
    TABLE.pop(p, None)


def f_of(p):
    return lambda x: jnp.sum(p.bind(x))


def test_missing_rule_is_derived_from_forward_mode(cubed):
    assert fb.grad(f_of(cubed))(X).tolist() == [3.0, 12.0, 27.0]


def test_strict_names_primitive_line_and_remedy(cubed):
    with pytest.raises(fb.MissingRule) as info:
        fb.grad(f_of(cubed), strict=True)(X)
    message = str(info.value)
    assert "'cubed'" in message and "test_table.py" in message and "@fb.defrule" in message
    with pytest.raises(fb.MissingRule):  # inside a nested call, too
        fb.grad(jax.jit(f_of(cubed)), strict=True)(X)


def test_the_line_is_the_users_though_a_library_called():
    with pytest.raises(fb.MissingRule, match="test_table.py"):
        fb.grad(lambda x: jnp.sum(jax.scipy.linalg.schur(x)[0]), strict=True)(jnp.eye(2))


def test_what_leads_back_to_itself_is_refused():
    """The tangents of a `custom_vmap` function are one with more operands, and so on."""

    @jax.custom_batching.custom_vmap
    def f(x):
        return jnp.sin(x)

    @f.def_vmap
    def rule(size, batched, x):
        return jnp.sin(x), batched[0]

    with pytest.raises(fb.MissingRule, match="custom_vjp around") as info:
        fb.grad(lambda x: f(x))(1.0)
    assert str(pickle.loads(pickle.dumps(info.value))) == str(info.value)
    run = fb.sweep(lambda p, x: f(p) * x, fb.losses.squared_error, g=fb.Gradient())
    with pytest.raises(fb.MissingRule, match="custom_vjp around"):
        run(1.0, (jnp.ones(2), jnp.ones(2)))


def test_defrule_adds_a_row(cubed):
    @fb.defrule(cubed)
    def rule(ct, x):
        return ct * 3 * x * x

    assert fb.grad(f_of(cubed), strict=True)(X).tolist() == [3.0, 12.0, 27.0]
    with pytest.raises(ValueError, match="already has a rule"):
        fb.defrule(cubed)(rule)
    with pytest.raises(TypeError, match="takes a primitive or the name of one"):
        fb.defrule(3)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda ct, x: ct[:1], "a cotangent has the shape and dtype of its operand"),
        (lambda ct, x: ct.astype(jnp.bfloat16), "a cotangent has the shape and dtype"),
        (lambda ct, x: (ct, ct), "returned 2 cotangents for 1 operands"),
    ],
)
def test_wrong_rules_are_named(cubed, rule, message):
    fb.defrule(cubed)(rule)
    with pytest.raises(TypeError, match=message) as info:
        fb.grad(f_of(cubed))(X)
    assert "'cubed'" in str(info.value) and "test_table.py" in str(info.value)


def test_parameters_are_chosen_by_name(cubed):
    with pytest.raises(TypeError, match=r"\['g'\].*choose from arriving, ct, cts, eqn, out"):
        fb.defrule(cubed)(lambda g, x: g)


def test_unknown_primitive():
    with pytest.raises(ValueError, match="no primitive called 'sine'"):
        fb.defrule("sine")


def test_underivable_primitive_says_so():
    p = Primitive("opaque")
    p.def_impl(lambda x: x)
    p.def_abstract_eval(lambda x: x)
    with pytest.raises(NotImplementedError, match="opaque"):
        fb.grad(lambda x: jnp.sum(p.bind(x)))(X)


def test_a_jaxpr_that_a_primitive_keeps_is_no_body_that_it_calls():
    """Before JAX 0.12 one without its constants, which libraries pass as operands."""
    from jax.interpreters import ad, mlir

    closed = jax.make_jaxpr(lambda y: y * X)(X)
    kept = getattr(closed, "jaxpr", closed)
    p = Primitive("keeps_a_jaxpr")
    p.def_impl(lambda x, *, kept: 2 * x)
    p.def_abstract_eval(lambda x, *, kept: x)
    mlir.register_lowering(p, mlir.lower_fun(lambda x, *, kept: 2 * x, multiple_results=False))
    ad.deflinear(p, lambda ct, *, kept: [p.bind(ct, kept=kept)])

    def f(x):
        return jnp.sum(p.bind(jnp.sin(x), kept=kept))

    expected = 2 * jnp.cos(X)
    assert jnp.allclose(fb.grad(f)(X), expected)
    assert jnp.allclose(fb.record(f)(X).gradients[0], expected)
    assert fb.check_grads(f, X).ok


def test_threads_may_derive_a_rule_at_once():
    """That one is under way in another thread is no recurrence."""
    (eqn,) = trace(lambda x: [jnp.sin(x)], [jax.typeof(1.0)]).equations

    def derive():
        with _no_recurrence(eqn, (True,)):
            return True

    with _no_recurrence(eqn, (True,)), ThreadPoolExecutor() as pool:
        assert pool.submit(derive).result()
        with pytest.raises(fb.MissingRule):
            derive()
