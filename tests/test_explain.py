"""What is said of how each parameter is handled."""

import jax
import jax.numpy as jnp
import pytest
from agreement import assert_close

import fbackprop as fb


def model(p, x):
    h = jnp.tanh(x @ p["dense"] + p["bias"][None])
    direction = p["v"] / jnp.linalg.norm(p["v"])
    h = h @ direction
    table = p["table"][jnp.argmax(x)]
    return h.sum(0) + table + p["frozen"].sum()


PARAMS = {
    "bias": jnp.zeros(3),
    "dense": jnp.ones((4, 3)),
    "frozen": jnp.arange(2),
    "table": jnp.ones((5, 2)),
    "unused": jnp.ones(7),
    "v": jnp.ones((3, 2)),
}


def test_every_leaf_has_its_rows(capsys):
    report = fb.explain_sites(model, PARAMS, jnp.ones((6, 4)))
    printed = capsys.readouterr().out
    assert printed.strip() == str(report)
    by_name = {leaf.name: leaf for leaf in report.leaves}
    assert list(by_name) == [f"['{name}']" for name in sorted(PARAMS)]
    dense = by_name["['dense']"]
    assert "product at 6 places" in dense.uses[0] and "test_explain.py" in dense.uses[0]
    assert dense.held == 6 * 4 + 6 * 3 and not dense.formed and dense.norm <= dense.gradient
    assert "lookup at 1 place" in by_name["['table']"].uses[0]
    assert "add at" in by_name["['bias']"].uses[0]
    assert "unused" in by_name["['unused']"].uses[0]
    assert "no gradient" in by_name["['frozen']"].uses[0]
    assert by_name["['v']"].formed and "gradients formed" in printed
    assert repr(report) == "<SitesReport of 6 leaves, gradients of 1 formed>"


def test_lines_of_library_functions_and_repeated_uses():
    def model(p, tokens):
        layer = lambda h: jnp.tanh(h @ p["w"])  # noqa: E731
        h = jnp.take(p["table"], tokens, axis=0)
        return layer(layer(h)) + jnp.cumsum(p["m"] * h[:, :1])[-1]

    params = {"table": jnp.ones((9, 3)), "w": jnp.ones((3, 3)), "m": jnp.ones((4, 3))}
    report = fb.explain_sites(model, params, jnp.arange(4))
    by_name = {leaf.name: leaf for leaf in report.leaves}
    assert "test_explain.py" in by_name["['table']"].uses[0]
    assert [use.count("product at 4 places") for use in by_name["['w']"].uses] == [1]
    assert by_name["['w']"].uses[0].endswith(", 2 times")
    # No structure, and no vector: every example's gradient is as large as the weight.
    assert by_name["['m']"].formed and not by_name["['w']"].formed


def _turned_in_calls(wrap):
    cell = wrap(lambda w, b, h, c: jnp.tanh(h @ w.T + b[::-1] * c))
    return lambda p, h: jax.lax.scan(lambda h, b: (cell(p["w"], b, h, p["c"]), None), h, p["b"])[0]


def _chosen_in_branches(wrap):
    cell = wrap(lambda w, c, i, h: jax.lax.cond(i > 1, lambda: h @ w.T, lambda: h @ w * c))
    return lambda p, h: jax.lax.fori_loop(0, 4, lambda i, h: cell(p["w"], p["c"], i, h), h)


def _nested(wrap):
    cell = wrap(lambda w, h: jnp.tanh(h @ w.T))

    def layers(w, h):
        return jax.lax.scan(lambda h, _: (cell(w, h), None), h, length=2)[0]

    return lambda p, h: jax.lax.scan(lambda h, b: (layers(p["w"], h) + b, None), h, p["b"])[0]


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
@pytest.mark.parametrize("make", [_turned_in_calls, _chosen_in_branches, _nested])
def test_a_weight_that_a_call_in_a_loop_turns_is_one(make, wrap):
    """Whatever of the call's other operands changes from step to step."""
    model, (h, y) = make(wrap), jnp.cos(jnp.arange(12.0)).reshape(2, 2, 3)
    params = {
        "w": jnp.sin(jnp.arange(9.0)).reshape(3, 3),
        "b": jnp.sin(jnp.arange(12.0)).reshape(4, 3),
        "c": jnp.ones(3),
    }
    by_name = {leaf.name: leaf for leaf in fb.explain_sites(model, params, h[0]).leaves}
    assert not by_name["['w']"].formed
    assert sum(int(use.split()[2]) for use in by_name["['w']"].uses) == 8 or make is not _nested
    run = fb.sweep(model, fb.losses.squared_error, each=fb.ExampleGradients())
    expected = jax.vmap(
        jax.grad(lambda p, h, y: fb.losses.squared_error(model(p, h), y)), (None, 0, 0)
    )
    assert_close(run(params, (h, y))["each"], expected(params, h, y))


@pytest.mark.parametrize("look", [lambda table, i: table[i], lambda table, i: table.at[i].get()])
def test_a_lookup_under_vmap_is_one(look):
    table, tokens = (
        jnp.sin(jnp.arange(24.0)).reshape(8, 3),
        jnp.array([[7, 0, 7, -1], [1, 1, 2, 9]]),
    )

    def model(table, tokens):
        return jnp.tanh(jax.vmap(lambda i: look(table, i))(tokens))

    assert "lookup at 4 places" in fb.explain_sites(model, table, tokens[0]).leaves[0].uses[0]
    run = fb.sweep(model, lambda z, y: jnp.sum(z * y), each=fb.ExampleGradients())
    y = jnp.cos(jnp.arange(24.0)).reshape(2, 4, 3)
    expected = jax.vmap(jax.grad(lambda p, x, y: jnp.sum(model(p, x) * y)), (None, 0, 0))
    assert_close(run(table, (tokens, y))["each"], expected(table, tokens, y))


def test_shapes_and_keys_suffice(capsys):
    def dropout(p, x, *, key):
        return (x * jax.random.bernoulli(key, 0.5, x.shape)) @ p

    shape = jax.ShapeDtypeStruct((100_000, 10_000), jnp.float32)
    report = fb.explain_sites(dropout, shape, jax.ShapeDtypeStruct((100_000,), jnp.float32))
    (leaf,) = report.leaves
    assert leaf.held == 110_000
