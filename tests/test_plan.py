"""The plan of what to keep: sufficient always, smallest where it can be enumerated."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fbackprop.plan import _Network, cheap, choose, nbytes, steps_between
from fbackprop.program import Var, evaluate, program_of


def program(f, *args):
    return program_of(jax.make_jaxpr(f)(*args))


def test_recomputes_the_cheap_and_keeps_the_dear():
    def f(x):
        dear = jnp.exp(x)
        return (dear + 1) * 2, dear > 1

    p = program(f, jnp.ones(8))
    kept = choose(p, [v for v in p.outputs], free=())
    assert len(kept) == 1
    assert next(e for e in p.equations if kept[0] in e.outputs).primitive.name == "exp"


def test_prefers_small_results_to_large_sources():
    p = program(lambda x: (x > 0) & (x < 1), jnp.ones(8))
    (kept,) = choose(p, p.outputs, free=())
    assert kept.aval.dtype == jnp.bool_


def test_free_values_are_used():
    p = program(lambda x: (jnp.exp(x) * 2,), jnp.ones(8))
    source = p.equations[0].outputs[0]
    assert choose(p, p.outputs, free={source}) == [source]
    assert len(choose(p, p.outputs, free=(), recompute=lambda e: True)) == 1


def test_no_plan_from_too_little():
    p = program(lambda x: jnp.exp(x), jnp.ones(8))
    with pytest.raises(AssertionError, match="keeps too little"):
        steps_between(p, [], p.outputs)


OPERATIONS = {
    "exp": jnp.exp,
    "sin": jnp.sin,
    "add": jnp.add,
    "mul": jnp.multiply,
    "less": lambda a, b: (a < b).astype(jnp.float32),
    "head": lambda a: a[:1] * jnp.ones(a.shape[0]),
    "neg": jnp.negative,
}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 9), st.integers(0, 9)),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 2**6),
)
@pytest.mark.slow
def test_minimal_among_all_sufficient_sets(steps, chosen):
    def f(x):
        values = [x]
        for name, i, j in steps:
            operation = OPERATIONS[name]
            operands = (values[i % len(values)], values[j % len(values)])
            values.append(
                operation(
                    *operands[: operation.__code__.co_argcount]
                    if hasattr(operation, "__code__")
                    else operands[: 1 if name in ("exp", "sin", "neg") else 2]
                )
            )
        return values

    p = program(f, jnp.linspace(0.1, 1.0, 4))
    candidates = list(dict.fromkeys([*p.inputs, *(v for e in p.equations for v in e.outputs)]))
    wanted = [v for i, v in enumerate(p.outputs) if chosen >> i & 1 and isinstance(v, Var)]
    kept = choose(p, wanted, free=())

    again = steps_between(p, kept, wanted)
    assert all(cheap(e) for e in again)
    env = dict(zip(candidates, evaluate_all(p, candidates), strict=True))
    for e in again:
        np.testing.assert_array_equal(
            e.bind(*(env[v] if isinstance(v, Var) else v.val for v in e.inputs))[0],
            env[e.outputs[0]],
        )
    if len(candidates) <= 12:
        best = min(
            cost(s)
            for r in range(len(candidates) + 1)
            for s in itertools.combinations(candidates, r)
            if sufficient(p, s, wanted)
        )
        assert cost(kept) == best


def cost(kept):
    return sum(nbytes(v) + 1 for v in kept)


def evaluate_all(p, variables):
    from fbackprop.program import Program

    return evaluate(Program(p.inputs, p.constants, p.equations, variables), [X])


X = jnp.linspace(0.1, 1.0, 4)


def sufficient(p, kept, wanted):
    known = set(kept)
    for e in p.equations:
        if cheap(e) and all(v in known for v in e.inputs if isinstance(v, Var)):
            known.update(e.outputs)
    return all(v in known for v in wanted)


def test_a_cut_takes_time_in_proportion_to_its_edges():
    """Of many calls in a row, each of which has much to choose from."""

    def looked_at(n):
        network = _Network()
        for i in range(n):
            network.connect("source", ("a", i), 1)
            network.connect(("a", i), ("b", i), 2)
            network.connect(("b", i), "sink", 1)
        seen = 0

        class Counted(dict):
            def __getitem__(self, key):
                nonlocal seen
                seen += 1
                return super().__getitem__(key)

        network.capacity = {a: Counted(out) for a, out in network.capacity.items()}
        network.minimum_cut("source", "sink")
        return seen

    assert looked_at(400) < 5 * looked_at(100)
