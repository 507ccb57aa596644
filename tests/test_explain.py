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
