"""The record of a backward pass: against `vjp`, by hand, and place by place with `jax.vjp`."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_close, cotangent_like, two_devices
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

import fbackprop as fb
from fbackprop.record import Record, error_signals, record
from fbackprop.table import TABLE

X = jnp.linspace(0.1, 1.0, 6).reshape(2, 3)
W = jnp.linspace(-0.6, 0.5, 9).reshape(3, 3)


@jax.custom_jvp
def steep(x):
    return jnp.sin(x)


steep.defjvp(lambda primals, tangents: (steep(*primals), 3 * tangents[0]))


@jax.custom_vjp
def halved(x):
    return x * 2


halved.defvjp(lambda x: (x * 2, None), lambda _, ct: (ct / 2,))


# --- every named value's cotangent, read in two ways ---------------------------------------------
#
# Each function names a value "v" after `at` was applied to it. Read as JAX would do it, `at` adds
# a zero, and the gradient with respect to that is the value's cotangent.


def in_jit(x, at):
    @jax.jit
    def inner(x):
        return at(jnp.sin(x) @ W) ** 2

    return inner(x) * x


def in_checkpoint(x, at, **options):
    return jax.checkpoint(lambda x: jnp.sin(at(jnp.sin(x) @ W)), **options)(x)


def in_scan(x, at, length=3, **options):
    def step(h, k):
        h = jnp.tanh(at(h @ W + x, k))
        return h, jnp.sin(h) * k

    return lax.scan(step, x, jnp.arange(length), **options)


def in_nested_scans(x, at):
    def outer(h, k):
        def inner(h, j):
            return at(jnp.sin(h) * (1 + x), (k, j)), None

        return lax.scan(inner, h, jnp.arange(2))[0], jnp.sum(h)

    return lax.scan(outer, x, jnp.arange(3))


def in_checkpointed_scan_of_jit(x, at):
    @jax.checkpoint
    def step(h, k):
        return jax.jit(lambda h: jnp.tanh(at(h @ W, k)))(h), None

    return lax.scan(step, x, jnp.arange(3))[0]


def in_branch(x, at, taken=True):
    def named(x):
        return at(jnp.sin(x)) * x

    return lax.cond((x[0, 0] > 0) == taken, named, lambda x: x * 2, jnp.cos(x))


def in_scanned_branch(x, at):
    def step(h, k):
        return lax.switch(k, [lambda h: h * 2, lambda h: jnp.sin(at(h * 0.3, k))], h), None

    return lax.scan(step, x, jnp.arange(2))[0]


def in_branched_scan(x, at):
    return lax.cond(x[0, 0] > 0, lambda x: in_scan(x, at)[0], lambda x: x, x)


PLACES = {
    "plain": (lambda x, at: jnp.sin(at(x * 2)) @ W, ()),
    "around custom rules": (lambda x, at: steep(at(halved(steep(x)))), ()),
    "integer output": (lambda x, at: (at(x * 2), jnp.argmax(x)), ()),
    "jit": (in_jit, ()),
    "jit of jit": (lambda x, at: jax.jit(lambda x: in_jit(x, at))(x), ()),
    "checkpoint": (in_checkpoint, ()),
    "checkpoint, dots saved": (
        functools.partial(in_checkpoint, policy=jax.checkpoint_policies.dots_saveable),
        (),
    ),
    "scan": (in_scan, (3,)),
    "scan, reversed": (functools.partial(in_scan, reverse=True), (3,)),
    "scan, unrolled": (functools.partial(in_scan, unroll=2), (3,)),
    "nested scans": (in_nested_scans, (3, 2)),
    "checkpointed scan of jit": (in_checkpointed_scan_of_jit, (3,)),
    "branch taken": (in_branch, ()),
    "branch not taken": (functools.partial(in_branch, taken=False), ()),
    "branch in a scan": (in_scanned_branch, (2,)),
    "scan in a branch": (in_branched_scan, (3,)),
    "vmap inside": (lambda x, at: jax.vmap(lambda x: jnp.sin(x @ W))(at(jnp.exp(x))), ()),
}
# Each kind of nesting once, for what compiles long.
NESTED = ["jit", "checkpointed scan of jit", "branch in a scan", "nested scans"]


def test_a_scan_of_nothing():
    found = record(lambda x: in_scan(x, name, length=0)[0])(X)
    assert found.signals["v"].shape == (0, *X.shape)
    assert_close(found.gradients[0], jnp.ones_like(X))
    assert found.first_nonfinite() is None


def name(v, *_):
    return checkpoint_name(v, "v")


def expected_signal(f, x, loops, ct):
    """The gradient with respect to zeros added to the named value."""

    def nudged(nudge):
        return f(x, lambda v, k=(): v + nudge[k])

    zero = jnp.zeros((*loops, *jnp.shape(x)))
    return jax.vjp(nudged, zero)[1](ct)[0]


@pytest.mark.parametrize("place", PLACES)
def test_cotangents_are_those_of_a_zero_added_there(place):
    f, loops = PLACES[place]
    plain = lambda x: f(x, name)  # noqa: E731
    value, pullback = fb.vjp(plain, X)
    ct = cotangent_like(value)
    recorded = record(plain, cotangent=ct, strict=True)
    found = recorded(X)
    assert_close((found.value, found.gradients), (value, pullback(ct)))
    assert_close(found.signals["v"], expected_signal(f, X, loops, ct), 4)
    if place in NESTED:
        jitted = jax.jit(lambda x, ct: record(plain, cotangent=ct)(x))(X, ct)
        assert_close(jitted, found, 10)


@pytest.mark.parametrize("place", NESTED)
def test_the_same_mapped_over_examples(place):
    f, _ = PLACES[place]
    xs = jnp.stack([X, -X])
    one = record(lambda x: f(x, name))
    singly = jax.tree.map(lambda *xs: jnp.stack(xs), *map(one, xs))
    assert_close(jax.vmap(one)(xs), singly, 10)


def test_value_and_gradients_are_those_of_vjp_to_the_bit(optimized):
    f = lambda x: in_scan(jnp.sin(x) * x + x * jnp.cos(x), name)[0]  # noqa: E731
    found = record(f)(X)
    value, pullback = fb.vjp(f, X)
    np.testing.assert_array_equal(found.value, value)
    np.testing.assert_array_equal(found.gradients[0], pullback(jnp.ones_like(value))[0])


# --- what a step holds ---------------------------------------------------------------------------


def test_a_product_by_hand():
    found = record(lambda x, y: jnp.sin(x) * y)(0.5, 3.0)
    sin, mul = found.steps
    assert (sin.primitive, mul.primitive, mul.label) == ("sin", "mul", "mul")
    assert_close(mul.operands, (jnp.sin(0.5), jnp.float32(3.0)))
    assert_close(mul.results, (3 * jnp.sin(0.5),))
    assert_close(mul.arriving, (jnp.float32(1.0),))
    assert_close(mul.leaving, (jnp.float32(3.0), jnp.sin(0.5)))
    assert_close(sin.arriving, (jnp.float32(3.0),))
    assert_close(sin.leaving, (3 * jnp.cos(0.5),))
    assert_close(found.gradients, (3 * jnp.cos(0.5), jnp.sin(0.5)))
    assert re.fullmatch(r".*test_record\.py:\d+(:\d+)? \(.*<lambda>\)", mul.source)


def test_a_value_used_twice_gets_the_sum_and_each_use_its_own():
    found = record(lambda x: (y := 2.0 * x) * y + y)(3.0)
    double, square, add = found.steps
    assert [float(ct) for ct in square.leaving] == [6.0, 6.0]
    assert [float(ct) for ct in add.leaving] == [1.0, 1.0]
    assert float(double.arriving[0]) == 13.0
    assert double.leaving[0] is None and float(double.leaving[1]) == 26.0


def test_what_takes_no_part_has_values_only():
    def f(x, n):
        dead = jnp.cos(x)
        stopped = lax.stop_gradient(x * 2)
        return x * n + stopped, dead > 0

    found = record(f)(1.0, 2)
    steps = {step.label: step for step in found.steps}
    assert steps["cos"].arriving == steps["cos"].leaving == (None,)
    assert steps["gt"].leaving == (None, None)
    assert float(steps["cos"].results[0]) == float(jnp.cos(1.0))
    assert found.gradients[1].dtype == jax.dtypes.float0
    assert int(found.steps[-1].operands[0] is not None)


def test_calls_hold_steps_and_bear_names():
    @jax.jit
    def layer(x):
        return jnp.sin(jax.nn.relu(x))

    found = record(lambda x: halved(steep(layer(x))))(X)
    labels = [step.label for step in found.steps]
    assert labels == ["jit:layer", "custom_jvp_call:steep", "custom_vjp_call:halved"]
    call = found.steps[0]
    assert [step.label for step in call.steps] == ["custom_jvp_call:relu", "sin"]
    assert found.steps[1].steps == found.steps[2].steps == ()
    assert_close(call.arriving, call.steps[-1].arriving)
    assert_close(call.leaving, call.steps[0].leaving)
    assert_close(found.gradients[0], call.leaving[0])
    assert all("test_record.py" in step.source for step in call.steps)


def test_a_scan_stacks_and_a_branch_is_zero_unless_taken():
    found = record(lambda x: in_scanned_branch(x, name))(X)
    (scan,) = (step for step in found.steps if step.primitive == "scan")
    assert scan.loop == (2, False) and scan.results[0].shape == X.shape
    (cond,) = (step for step in scan.steps if step.primitive == "cond")
    assert cond.operands[0].tolist() == [0, 1]
    first, second = cond.steps
    assert (first.label, second.label) == ("branch:0", "branch:1")
    (double,) = first.steps
    assert double.results[0].shape == (2, *X.shape)
    assert_close(double.results[0], jnp.stack([2 * X, jnp.zeros_like(X)]))
    assert not np.any(double.arriving[0][1]) and np.all(double.arriving[0][0])
    mul, named, sin = second.steps
    assert not np.any(sin.results[0][0]) and np.all(sin.results[0][1])
    assert_close(named.arriving, mul.arriving)


def test_keys_in_a_branch():
    def f(x, key):
        noisy = lambda x: x * jax.random.uniform(jax.random.split(key)[0])  # noqa: E731
        return lax.cond(x > 0, noisy, lambda x: x, x)

    key = jax.random.key(0)
    found = record(f)(-1.0, key)
    assert_close(found.gradients[0], jnp.float32(1.0))
    assert "key<fry>" in str(found) and found.first_nonfinite() is None


def test_each_call_of_a_function_is_its_own_step():
    @jax.jit
    def inner(x):
        return jnp.sin(x)

    first, second = record(lambda x: inner(inner(x)))(0.5).steps
    assert_close(first.arriving[0], jnp.cos(jnp.sin(0.5)))
    assert_close(first.steps[0].results, second.steps[0].operands)


def test_shard_map_is_one_step():
    mesh = two_devices()
    shard = jax.shard_map(jnp.sin, mesh=mesh, in_specs=P("i"), out_specs=P("i"))
    found = record(lambda x: shard(x) * 2.0)(X)
    assert found.steps[0].primitive == "shard_map" and not found.steps[0].steps
    assert_close(found.gradients[0], 2 * jnp.cos(X), 2)


def test_within_shard_map():
    mesh = two_devices()
    signals = lambda x: error_signals(lambda x: in_scan(x, name)[0], x)["v"]  # noqa: E731
    shard = jax.shard_map(signals, mesh=mesh, in_specs=P("i"), out_specs=P(None, "i"))
    assert_close(shard(X), signals(X), 2)


def test_a_while_loop_on_what_is_not_differentiated():
    found = record(lambda x, n: x * lax.while_loop(lambda n: n < 5, lambda n: n + 1, n))(2.0, 1)
    assert [step.primitive for step in found.steps][0] == "while"
    assert float(found.gradients[0]) == 5.0
    with pytest.raises(ValueError, match="while_loop"):
        record(lambda x: lax.while_loop(lambda x: x < 5, lambda x: x * 2, x))(1.0)


def test_functions_that_look_at_values():
    def f(x):
        y = steep(x) if x[0, 0] > 0 else x
        return jnp.sum(name(halved(y)) ** 2)

    found = record(f)(X)
    assert_close(found.gradients[0], jax.grad(f)(X))
    assert [s.name for s in found.steps if s.name] == ["steep", "halved", "v"]
    assert_close(found.signals["v"], 2 * (2 * jnp.sin(X)), 2)


def test_nothing_to_record():
    assert record(lambda: 1.0)().steps == ()
    found = record(lambda x, unused: (x, {}))(X, {"a": X})
    assert found.steps == ()
    assert_close(found.gradients, (jnp.ones_like(X), {"a": jnp.zeros_like(X)}))


def test_a_record_is_a_pytree_and_can_be_differentiated():
    f = lambda x: jnp.sum(jnp.sin(x) ** 2)  # noqa: E731
    found = jax.jit(record(f))(X)
    assert isinstance(found, Record) and found.steps[0].primitive == "sin"
    assert jax.tree.structure(found) == jax.tree.structure(record(f)(X))

    def arriving(x):
        return jnp.sum(record(f)(x).steps[0].arriving[0])

    assert_close(jax.grad(arriving)(X), 2 * jnp.cos(X))
    assert_close(fb.grad(arriving)(X), 2 * jnp.cos(X))
    assert_close(jax.jvp(arriving, (X,), (X,))[1], jnp.sum(2 * jnp.cos(X) * X))


def test_one_compilation_serves_two_calls():
    traces = []
    jitted = jax.jit(record(lambda x: traces.append(0) or in_scan(x, name)[0]))
    jitted(X), jitted(2 * X)
    assert len(traces) == 1


# --- what is kept --------------------------------------------------------------------------------


def test_where_limits_what_is_kept():
    sines = record(lambda x: in_nested_scans(x, name), where=lambda e: e.primitive.name == "sin")
    (outer,) = sines(X).steps
    (inner,) = outer.steps
    (sin,) = inner.steps
    assert (outer.primitive, inner.primitive, sin.primitive) == ("scan", "scan", "sin")
    assert sin.results[0].shape == (3, 2, *X.shape)
    assert set(outer.operands) == set(outer.arriving) == set(inner.leaving) == {None}
    whole = record(lambda x: in_nested_scans(x, name))(X)
    (wanted,) = (s for s in whole.steps if s.primitive == "scan")
    wanted = next(s for s in wanted.steps if s.primitive == "scan")
    wanted = next(s for s in wanted.steps if s.primitive == "sin")
    assert_close(sin, wanted, 10)


def test_where_sees_lines_parameters_and_types():
    large = record(lambda x: jnp.sum(x @ W, axis=0), where=lambda e: e.in_avals[0].ndim == 2)
    assert [s.primitive for s in large(X).steps] == ["dot_general", "reduce_sum"]
    here = record(lambda x: in_jit(x, name), where=lambda e: "(in_jit)" in e.source)
    assert {s.primitive for s in here(X).steps} >= {"jit", "mul"}
    first = record(lambda x: jnp.sum(x, 0).sum(), where=lambda e: e.params.get("axes") == (1,))
    assert first(X).steps == ()


def test_no_array_is_kept_that_was_not_asked_for():
    found = record(lambda x: in_scan(x, name), where=lambda e: e.primitive.name == "name")(X)
    arrays = jax.tree.leaves(found.steps)
    assert {x.shape for x in arrays} == {(3, *X.shape)} and len(arrays) == 4


def test_error_signals_cost_no_more_memory_than_a_gradient_with_them():
    """Checkpointed layers are computed again, loop constants are not stacked."""
    many = jnp.ones((64, 256))

    def f(w, x):
        @jax.checkpoint
        def layer(h, _):
            for _ in range(4):
                h = jnp.tanh(h @ w)
            return h, jnp.sum(checkpoint_name(h @ w, "v"), axis=0)

        h, sums = lax.scan(layer, x, None, length=32)
        return jnp.sum(h) + jnp.sum(sums)

    def memory(g):
        return jax.jit(g).lower(jnp.ones((256, 256)), many).compile().memory_analysis()

    gradient = memory(lambda w, x: fb.grad(f)(w, x)).temp_size_in_bytes
    signals = 32 * many.nbytes
    ours = memory(lambda w, x: error_signals(f, w, x)["v"].sum(-1)).temp_size_in_bytes
    assert ours < gradient + 1.5 * signals


# --- error signals -------------------------------------------------------------------------------


def test_each_example_has_its_own_signal():
    def losses(w, xs):
        return jnp.sum(jnp.tanh(checkpoint_name(xs @ w, "net")) ** 2, axis=1)

    xs = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
    signals = error_signals(losses, W, xs)["net"]
    net = xs @ W
    assert_close(signals, 2 * jnp.tanh(net) * (1 - jnp.tanh(net) ** 2), 2)
    one = lambda x: error_signals(lambda w, x: losses(w, x[None])[0], W, x)["net"][0]  # noqa: E731
    assert_close(jax.vmap(one)(xs), signals, 4)
    assert_close(jax.jit(jax.vmap(one))(xs), signals, 4)
    third = error_signals(losses, W, xs, cotangent=jnp.eye(4)[2])["net"]
    assert_close(third, signals * jnp.eye(4)[2][:, None])


def unrolled(w, x):
    for _ in range(3):
        x = jnp.tanh(checkpoint_name(x @ w, "net"))
    return x


def rolled(w, x):
    def step(h, _):
        return jnp.tanh(checkpoint_name(h @ w, "net")), None

    return lax.scan(step, x, None, length=3)[0]


def test_repeated_names_are_stacked_like_iterations():
    ours = error_signals(unrolled, W, X)["net"]
    assert ours.shape == (3, 2, 3)
    assert_close(ours, error_signals(rolled, W, X)["net"], 2)
    xs = jnp.stack([X, -X])
    for f in (unrolled, rolled):
        mapped = jax.vmap(lambda x: error_signals(f, W, x)["net"])(xs)  # noqa: B023
        assert_close(mapped[0], ours, 2)
        assert_close(jax.vmap(lambda x: record(f)(W, x))(xs).signals["net"], mapped)  # noqa: B023


def test_names_of_different_shapes_must_differ():
    f = lambda x: jnp.sum(name(x)) + jnp.sum(name(x[0]))  # noqa: E731
    with pytest.raises(ValueError, match=r"\(2, 3\), \(3,\) share the name 'v'") as caught:
        error_signals(f, X)
    assert "\n" not in str(caught.value)
    assert len(record(f)(X).steps) > 2  # as a record it is fine


def test_names_from_which_nothing_flows():
    def f(x):
        checkpoint_name(jnp.sin(x), "dropped")
        stopped = lax.stop_gradient(checkpoint_name(jnp.cos(x), "stopped"))
        return checkpoint_name(x * 2, "used") + checkpoint_name(jnp.arange(3), "n") + stopped

    signals = error_signals(f, X[0])
    assert list(signals) == ["dropped", "stopped", "used", "n"]
    for key in ("dropped", "stopped", "n"):
        assert not signals[key].any() and signals[key].shape == (3,)
    assert_close(signals["used"], jnp.ones(3))
    assert error_signals(jnp.sin, X) == {}


def test_a_name_on_what_depends_on_no_argument_has_a_signal():
    """As of frozen layers: the signal is the derivative by the value, whoever computed it."""

    def step(h, w):
        return h * w, None

    def f(w):
        features = checkpoint_name(jnp.sin(X[0]), "features")
        carried = lax.scan(lambda h, _: (name(jnp.sin(h)), None), features, None, length=2)[0]
        return lax.scan(step, carried, w[None])[0]

    signals = error_signals(f, X[1])
    assert_close(signals["v"][1], X[1])
    assert_close(signals["v"][0], X[1] * jnp.cos(jnp.sin(jnp.sin(X[0]))))
    inner = jnp.cos(jnp.sin(X[0])) * signals["v"][0]
    assert_close(signals["features"], inner, 2)


# --- statistics ----------------------------------------------------------------------------------


def test_statistics_by_hand():
    f = lambda x: jnp.sum(jax.nn.relu(name(x)) ** 2)  # noqa: E731
    found = record(f)(jnp.array([3.0, 0.0, -1.0, 4.0])).statistics()["v"]
    assert [round(float(s), 5) for s in found] == [
        *(round(26**0.5, 5), round(6.5**0.5, 5), 0.25),
        *(10.0, 5.0, 8.0, 0.5),
    ]


def test_statistics_tell_iterations_and_examples_apart():
    found = jax.jit(lambda x: record(rolled)(W, x).statistics())(X)["net"]
    signals = error_signals(unrolled, W, X)["net"]
    assert_close(found.signal_norm, jnp.linalg.norm(signals.reshape(3, -1), axis=1), 4)
    assert_close(found.signal_max, jnp.abs(signals).max((1, 2)), 4)
    mapped = jax.vmap(lambda x: record(rolled)(W, x))(jnp.stack([X, X])).statistics()["net"]
    assert_close(mapped.signal_rms, jnp.stack([found.signal_rms] * 2), 4)


def test_statistics_in_low_precision_and_of_nothing():
    x = jnp.full((5,), 300.0, jnp.float16)
    found = record(lambda x: jnp.sum(name(x)))(x).statistics()["v"]
    assert found.value_norm.dtype == jnp.float32
    assert float(found.value_rms) == pytest.approx(300.0)  # whose square float16 cannot hold
    empty = record(lambda x: jnp.sum(name(x)))(jnp.ones((0,))).statistics()["v"]
    assert not np.isnan(jax.tree.leaves(empty)).any()


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_norms_of_numbers_whose_squares_leave_the_range(size):
    f = lambda x: jnp.sum(name(x) * size)  # noqa: E731
    found = record(f)(jnp.full(4, size)).statistics()["v"]
    assert float(found.value_norm) == pytest.approx(2 * size)
    assert float(found.value_rms) == float(found.signal_rms) == pytest.approx(size)
    printed = str(record(f)(jnp.ones((30, 30))))
    assert f"norm {30 * size:.4g}" in printed


def test_a_name_in_and_out_of_a_loop_is_refused():
    """Though the shapes agree: an axis of iterations is no axis of the value."""

    def f(x):
        step = lambda h, _: (checkpoint_name(h * 2, "v"), None)  # noqa: E731
        return jnp.sum(checkpoint_name(jnp.stack([lax.scan(step, x, length=3)[0]] * 3), "v"))

    with pytest.raises(ValueError, match="values in and out of loops share the name 'v'"):
        error_signals(f, jnp.ones(2))


def test_a_name_in_loops_of_different_lengths_is_refused():
    def f(x):
        for length in (2, 3):
            x, _ = lax.scan(lambda h, _: (checkpoint_name(h * 2, "v"), None), x, length=length)
        return jnp.sum(x)

    with pytest.raises(ValueError, match="in loops of different lengths share the name 'v'"):
        error_signals(f, jnp.ones(2))


def test_statistics_of_narrow_numbers_and_beside_keys():
    def f(x, key):
        key = checkpoint_name(key, "key")
        y = checkpoint_name(x.astype(jnp.float8_e4m3fn), "v")
        return jnp.sum(y.astype(jnp.float32)) + jax.random.normal(key)

    found = record(f)(jnp.array([3.0, 4.0]), jax.random.key(0)).statistics()
    assert list(found) == ["v"] and float(found["v"].value_norm) == 5.0


# --- printed -------------------------------------------------------------------------------------


def test_printed():
    def f(x):
        y = jax.jit(lambda x: jnp.sin(x) @ W)(x)
        return jnp.sum(y[0]) * 2

    lines = str(record(f)(X)).splitlines()
    assert str(jax.device_get(record(f)(X))).splitlines() == lines
    assert lines[0].split() == ["step", "primitive", "result", "cotangent", "line"]
    cells = [re.split(r"\s{2,}", line) for line in lines[1:]]
    labels = [["1", "jit:<lambda>"], ["1.1", "sin"], ["1.2", "dot_general"]]
    assert [row[:2] for row in cells[:3]] == labels
    assert cells[1][2] == "f32[2,3]" and cells[1][3].startswith("norm ")
    assert cells[-1][3] == "1" and "test_record.py" in cells[-1][4]
    columns = {re.search(r"test_record\.py", line).start() for line in lines[1:]}
    assert len(columns) == 1


def test_printed_within_jit_and_in_part():
    shown = []

    def f(x, key):
        found = record(lambda x: in_scan(x, name))(x)
        shown.append(str(found))
        return found.value, record(lambda k: jax.random.split(k))(key)

    jax.jit(f)(X, jax.random.key(0))
    assert "norm" not in shown[0] and "f32[3,2,3]" in shown[0] and "scan:step x3" in shown[0]
    part = record(lambda x: in_scan(x, name), where=lambda e: e.primitive.name == "tanh")(X)
    assert str(part).count("norm") == 1
    assert str(part.steps[0].steps[0]).count("\n") == 1
    assert "tanh at" in repr(part.steps[0].steps[0]) and repr(part) == "<Record of 1 steps>"
    keys = record(lambda x, k: x * jax.random.uniform(k))(1.0, jax.random.key(0))
    assert "uniform" in str(keys) and keys.first_nonfinite() is None


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attempt", "error", "words"),
    [
        (lambda: record(3.0), TypeError, "record takes a function, but .* 3.0"),
        (lambda: record(jnp.sin, cotangent=(1.0,))(1.0), ValueError, "structure of the cotangent"),
        (lambda: record(jnp.sin, cotangent=jnp.ones(2))(1.0), ValueError, r"the cotangent: got"),
        (lambda: record(jnp.sin, cotangent=1)(1.0), ValueError, "expected float32"),
        (lambda: record(jnp.sin)("a"), TypeError, "not a valid JAX type"),
        (lambda: record(lambda x: "a")(1.0), TypeError, "not a valid JAX type"),
        (lambda: error_signals(3.0, 1.0), TypeError, "takes a function"),
    ],
)
def test_errors_are_one_line(attempt, error, words):
    with pytest.raises(error, match=words) as caught:
        attempt()
    assert "\n" not in str(caught.value)


def test_strict_refuses_what_has_no_rule():
    from jax.extend.core import Primitive
    from jax.interpreters import ad

    third = Primitive("third")
    third.def_impl(lambda x: x / 3)
    third.def_abstract_eval(lambda x: x)
    ad.primitive_jvps[third] = lambda xs, ts: (third.bind(*xs), ts[0] / 3)
    with pytest.raises(fb.MissingRule, match="third.*test_record"):
        record(lambda x: third.bind(x), strict=True)(1.0)
    found = record(lambda x: third.bind(x) * 2.0)(3.0)
    assert float(found.steps[0].leaving[0]) == pytest.approx(2 / 3)
    assert record(lambda x, y: third.bind(x) * y, strict=True)(3, 2.0) is not None


def test_an_error_in_a_rule_names_the_line():
    from jax.extend.core import Primitive

    wrong = Primitive("wrong")
    wrong.def_impl(lambda x: x)
    wrong.def_abstract_eval(lambda x: x)
    fb.defrule(wrong)(lambda ct: ct.astype(jnp.int32))
    with pytest.raises(TypeError, match="'wrong'.*test_record"):
        record(lambda x: wrong.bind(x))(1.0)
    del TABLE[wrong]  # other tests look at every row
