"""`vjp`, `grad`, `value_and_grad`: the semantics and errors of their JAX namesakes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_close, assert_same_vjp, two_devices
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fbackprop as fb

X = jnp.linspace(0.1, 1.0, 6).reshape(2, 3)


def loss(params, x, power=2):
    return jnp.sum(jnp.tanh(x @ params["w"] + params["b"]) ** power)


PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "b": jnp.full((2, 4), 0.1)}


@pytest.mark.parametrize("argnums", [0, 1, (0,), (1, 0), -1, (0, -1)])
def test_argnums_as_int_or_tuple(argnums):
    ours = fb.grad(loss, argnums)(PARAMS, X)
    assert_close(ours, jax.grad(loss, argnums)(PARAMS, X))


def test_value_and_grad_with_aux_and_keywords():
    def f(x, *, scale):
        return jnp.sum(x) * scale, {"twice": 2 * x, "label": "any object", "number": 3}

    ours = fb.value_and_grad(f, has_aux=True)(X, scale=3.0)
    (value, aux), gradient = ours
    assert_close(value, jnp.sum(X) * 3)
    assert_close(gradient, jnp.full_like(X, 3.0))
    assert_close(aux["twice"], 2 * X)
    assert aux["label"] == "any object" and aux["number"] == 3
    assert fb.grad(f, has_aux=True)(X, scale=3.0)[1]["label"] == "any object"


def test_static_arguments_may_be_anything():
    gradient = fb.grad(lambda x, how: jnp.sum(getattr(jnp, how)(x)))(X, "sin")
    assert_close(gradient, jnp.cos(X))


def test_integer_inputs_have_float0_cotangents():
    _, pullback = fb.vjp(lambda x, n: x * n, X, jnp.arange(6).reshape(2, 3))
    ct_x, ct_n = pullback(jnp.ones_like(X))
    assert_close(ct_x, jnp.arange(6.0).reshape(2, 3))
    assert ct_n.dtype == jax.dtypes.float0 and ct_n.shape == (2, 3)
    f = lambda x, n: jnp.sum(x * n)  # noqa: E731
    ours = fb.grad(f, (0, 1), allow_int=True)(X, 3)
    assert_close(ours, jax.grad(f, (0, 1), allow_int=True)(X, 3))


def test_integer_outputs_take_float0_cotangents():
    value, pullback = fb.vjp(lambda x: (jnp.sum(x), jnp.argmax(x)), X)
    (ct,) = pullback((1.0, np.zeros((), jax.dtypes.float0)))
    assert int(value[1]) == 5
    assert_close(ct, jnp.ones_like(X))


def test_holomorphic():
    z = jnp.array(1.0 + 2.0j)
    f = lambda z: z**3 + jnp.sin(z)  # noqa: E731
    assert_close(fb.grad(f, holomorphic=True)(z), jax.grad(f, holomorphic=True)(z))
    g = lambda z: jnp.abs(z * z) + jnp.real(z)  # noqa: E731
    assert_close(fb.grad(g)(z), jax.grad(g)(z))


def test_pullback_is_a_pytree_and_reusable():
    pullback = jax.jit(lambda x: fb.vjp(jnp.sin, x)[1])(X)
    for _ in range(2):
        assert_close(pullback(jnp.ones_like(X))[0], jnp.cos(X))


def test_unused_and_constant_outputs():
    assert_close(fb.grad(lambda x: 1.0)(X), jnp.zeros_like(X))
    assert_close(fb.grad(lambda x, y: jnp.sum(x))(X, 1.0), jnp.ones_like(X))
    _, pullback = fb.vjp(lambda x: (x, x), X)
    assert_close(pullback((X, X))[0], 2 * X)


@pytest.mark.parametrize("scalar", [3.0, np.float32(3.0), np.array(3.0, np.float32)])
def test_scalar_types_and_weak_types(scalar):
    f = lambda x: x**2  # noqa: E731
    ours, theirs = fb.grad(f)(scalar), jax.grad(f)(scalar)
    assert ours.dtype == theirs.dtype and ours.weak_type == theirs.weak_type
    assert float(ours) == 6.0


def test_functions_that_look_at_values():
    def f(x):
        y = jnp.sin(x) if x[0, 0] > 0 else jnp.cos(x)
        for _ in range(2 if x[1, 1] > 0.5 else 1):
            y = jax.nn.relu(y) * x
        return jnp.sum(y[x > 0.3]) + jax.jit(jnp.sum)(jax.nn.softmax(x)[0] ** 2)

    assert_close(fb.grad(f)(X), jax.grad(f)(X))
    twice = fb.grad(lambda x: jnp.sum(fb.grad(f)(x) ** 2))(X)
    assert_close(twice, jax.grad(lambda x: jnp.sum(jax.grad(f)(x) ** 2))(X))
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(fb.grad(f))(X)


# --- composition with JAX's transformations ---------------------------------------------------


def f(x):
    y = jax.nn.softmax(x @ jnp.ones((3, 3))) * jax.nn.relu(x - 0.5)
    return jnp.sum(jnp.prod(jnp.sin(y + x), axis=1) ** 2)


OURS, THEIRS = fb.grad(f), jax.grad(f)
COMPOSITIONS = {
    "jit": lambda g: jax.jit(g)(X),
    "vmap": lambda g: jax.vmap(g)(jnp.stack([X, 2 * X])),
    "jit of vmap": lambda g: jax.jit(jax.vmap(g))(jnp.stack([X, 2 * X])),
    "jvp": lambda g: jax.jvp(g, (X,), (jnp.cos(X),)),
    "jacfwd": lambda g: jax.jacfwd(g)(X),
    "jacrev": lambda g: jax.jacrev(g)(X),
    "jax.grad of it": lambda g: jax.grad(lambda x: jnp.sum(g(x) ** 2))(X),
    "fb.grad of it": lambda g: fb.grad(lambda x: jnp.sum(g(x) ** 2))(X),
    "third order": lambda g: fb.grad(lambda x: jnp.sum(fb.grad(lambda y: jnp.sum(g(y)))(x)))(X),
    "grad of vmap": lambda g: fb.grad(lambda xs: jnp.sum(jax.vmap(g)(xs) ** 2))(X[None]),
    "checkpoint": lambda g: fb.grad(jax.checkpoint(lambda x: jnp.sum(g(x))))(X),
    "scan": lambda g: jax.lax.scan(lambda x, _: (x - 0.1 * g(x), None), X, None, length=3)[0],
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_composes(name):
    assert_close(COMPOSITIONS[name](OURS), COMPOSITIONS[name](THEIRS), scale=20)


def test_closed_over_tracers():
    def scaled(c):
        return fb.grad(lambda x: jnp.sum(jnp.sin(c * x)))(X)

    expected = jax.vmap(lambda c: c * jnp.cos(c * X))(jnp.arange(3.0))
    assert_close(jax.vmap(scaled)(jnp.arange(3.0)), expected)
    assert_close(jax.jit(scaled)(2.0), 2 * jnp.cos(2 * X))


def test_leaks_no_tracers():
    with jax.checking_leaks():
        jax.jit(OURS)(X)
        jax.vmap(OURS)(X[None])


@jax.custom_jvp
def doubled_slope(x):
    return jnp.sin(x) if x > 0 else jnp.cos(x)


@doubled_slope.defjvp
def _doubled_slope_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return doubled_slope(x), 2 * t * (jnp.cos(x) if x > 0 else -jnp.sin(x))


@jax.custom_vjp
def tripled_slope(x, y):
    return jnp.sin(x) * y if x > 0 else x + y


def _tripled_slope_fwd(x, y):
    return (tripled_slope(x, y), (x, y)) if x > 0 else (x + y, None)


def _tripled_slope_bwd(residuals, ct):
    if residuals is None:
        return 3 * ct, ct
    x, y = residuals
    return 3 * ct * jnp.cos(x) * y, ct * jnp.sin(x) * float(x)


tripled_slope.defvjp(_tripled_slope_fwd, _tripled_slope_bwd)


@pytest.mark.parametrize("x", [1.3, -0.7])
def test_custom_rules_that_look_at_values(x):
    def f(x):
        y = tripled_slope(doubled_slope(x) * 2, x)
        return y * x if y > 0.5 else y + doubled_slope(jnp.floor(x)) + x**2

    assert_close(fb.grad(f)(x), jax.grad(f)(x))

    def twice(lib):  # a rule looks at a value that a gradient's gradient depends on
        return lib.grad(lib.grad(doubled_slope))(x)

    assert_close(twice(fb), twice(jax))

    def constant_inside(lib):  # values are there though the argument is a batch
        return jax.vmap(lib.grad(lambda y: doubled_slope(x) * y**2))(jnp.arange(3.0))

    assert_close(constant_inside(fb), constant_inside(jax))


def test_values_decide_the_shape_of_the_result():
    x = jnp.array([3.0, 1.0, 3.0, 2.0])
    for f in (
        lambda x: jnp.unique(x) ** 2,
        lambda x: x[x > 1.5] * 2,
        lambda x: jnp.tile(x, int(x[1]) + 1),
    ):
        ours, theirs = fb.vjp(f, x), jax.vjp(f, x)
        assert_close(ours[0], theirs[0])
        assert_close(ours[1](ours[0]), theirs[1](theirs[0]))


def test_loops_whose_length_is_known_from_values():
    """Outside of `jit` the bounds of a loop may be computed from the arguments."""

    def f(x):
        n = x.astype(np.int32)[0] + 2
        return jnp.sum(lax.fori_loop(0, n, lambda i, c: c * x, x))

    x = jnp.array([1.5, 0.5])
    assert_close(fb.grad(f)(x), jax.grad(f)(x))
    with pytest.raises(ValueError, match=r"while_loop.*test_reverse.py"):
        jax.jit(fb.grad(f))(x)


def test_references():
    """What a function writes to references of its own carries derivatives; others do not."""
    outside = jax.new_ref(jnp.zeros(()))

    def f(x):
        ref = jax.new_ref(jnp.zeros(4))

        def step(i, carry):
            ref[i] = jnp.sin(x[i]) * (i + 1.0)
            return carry

        lax.fori_loop(0, 4, step, None)
        ref[1:3] += x[:2]
        outside[...] = lax.stop_gradient(jnp.sum(x))
        return jnp.sum(jax.freeze(ref) ** 2)

    x = jnp.arange(1.0, 5.0)
    for transform in (lambda g: g, jax.jit):
        assert_close(transform(fb.grad(f))(x), transform(jax.grad(f))(x))
    assert outside[...] == 10.0


def test_references_of_a_function_that_looks_at_values():
    def f(x, n=3):
        ref = jax.new_ref(jnp.zeros(3))
        ref[...] = x * 3 if x[0] > 0 else x
        ref[1] += jnp.prod(x)

        def step(i, carry):
            ref[i] = ref[i] ** 2 + jnp.sin(carry)
            return ref[i]

        last = jax.jit(lambda: lax.fori_loop(0, n, step, x[2]))()
        untouched = jax.new_ref(jnp.ones(2))
        return jnp.sum(jax.freeze(ref) ** 2) * last if untouched[0] > 0 else last

    x = jnp.arange(1.0, 4.0) / 3
    assert_close(fb.grad(f)(x), jax.grad(f)(x), scale=10)
    assert_close(fb.record(f)(x).gradients[0], jax.grad(f)(x), scale=10)
    second = [jax.jvp(lib.grad(f), (x,), (jnp.cos(x),))[1] for lib in (fb, jax)]
    assert_close(*second, scale=100)


@pytest.mark.parametrize(
    "constant",
    [
        lax.stop_gradient,
        lambda x: jnp.floor(x * 2),
        jax.jit(lambda x: jnp.round(lax.stop_gradient(x) * 2)),
        jax.jit(lambda x: (jnp.sin(x), jax.jit(lax.stop_gradient)(x))),
    ],
    ids=["stopped", "rounded", "within jit", "one of two"],
)
def test_what_has_no_derivative_is_a_plain_array(constant):
    """NumPy may read it, as under `jax.grad`."""

    def last(x):
        return jax.tree.leaves(constant(x))[-1]

    def f(x):
        order = np.argsort(np.asarray(last(x)), kind="stable")
        return jnp.sum(x[order] * jnp.arange(3.0)) * float(last(x[1])) + last(x)[2]

    x = jnp.array([0.3, 1.2, -0.4])
    assert_close(fb.grad(f)(x), jax.grad(f)(x))
    assert_close(*(jax.grad(lambda x, lib=lib: lib.grad(f)(x)[0])(x) for lib in (fb, jax)))


def test_other_rules_reach_what_has_no_derivative_where_values_are_read():
    def f(x):
        y = jnp.floor(2 * x)
        assert np.asarray(y).tolist() == y.tolist() == [0.0, 2.0, 0.0]
        return jnp.sum(y * x) if f"{y[1]:.1f}" == "2.0" else x[0]

    x = jnp.array([0.3, 1.2, 0.4])
    straight = {"floor": lambda ct: ct}
    assert_close(fb.grad(f)(x), jnp.floor(2 * x))
    assert_close(fb.grad(f, rules=straight)(x), jnp.floor(2 * x) + 2 * x)


@jax.custom_vjp
def stash(ref, x):
    return x


def stash_backward(ref, ct):
    ref[...] += ct
    return None, ct


stash.defvjp(lambda ref, x: (x, ref), stash_backward)


@pytest.mark.parametrize(
    "within",
    [
        jax.jit,
        lambda f: lambda x: lax.cond(x[0] < 9, f, lambda x: x, x),
        lambda f: lambda x: lax.scan(lambda c, _: (f(c), None), x, length=1)[0],
    ],
    ids=["jit", "cond", "scan"],
)
def test_a_backward_rule_may_write_to_a_reference(within):
    x, found = jnp.arange(4.0), []
    for grad, placed in ((fb.grad, within), (jax.grad, lambda f: f)):
        ref = jax.new_ref(jnp.zeros(4))
        called = placed(lambda x, ref=ref: jnp.sin(stash(ref, x**2)))
        found.append((grad(lambda x, f=called: jnp.sum(f(x)))(x), ref[...]))
    assert_close(*found)


@jax.custom_vjp
def ruled(x):
    return jnp.sin(x)


ruled.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (ct * jnp.cos(x),))


@pytest.mark.parametrize(
    "wrapped",
    [jax.jit(ruled), jax.jit(jax.jit(ruled)), jax.checkpoint(ruled), lambda x: lax.map(ruled, x)],
    ids=["jit", "nested", "checkpoint", "loop"],
)
def test_forward_over_reverse_goes_through_a_rules_forward_half(wrapped):
    """The function itself has no forward mode."""

    def f(x):
        return jnp.sum(wrapped(x) ** 2)

    x = jnp.arange(1.0, 4.0)
    _, product = jax.jvp(fb.grad(f), (x,), (x,))
    assert_close(product, 2 * jnp.cos(2 * x) * x, scale=10)


def test_quotients_do_not_leave_the_range_of_a_narrow_dtype():
    """Scaled losses are what narrow dtypes are trained with."""
    half = jnp.float16
    for f, y, expected in [
        (lambda y: half(4) / y * half(32768), 2.0, -32768.0),
        (lambda y: jnp.sum(jnp.full(8, 100, half) / y) * half(1024), 50.0, -327.7),
        (lambda y: half(1e-3) / y * half(1e-5), 1e-2, -1e-4),
    ]:
        assert float(fb.grad(f)(half(y))) == pytest.approx(expected, rel=3e-3)


def windowed(w, x):
    return lax.reduce_window(jnp.sin(x * w), 0.0, lax.add, (1, 2), (1, 1), "SAME")


@pytest.mark.parametrize(
    "f",
    [
        lambda w, x: jnp.std(x * w),
        lambda w, x: jax.checkpoint(lambda y: jnp.sin(y * w))(x),
        lambda w, x: lax.scan(lambda c, y: (jnp.sin(c + y * w), None), jnp.zeros(3), x)[0],
        lambda w, x: jnp.abs(jnp.fft.rfft(x * w)) ** 2,
        lambda w, x: jax.vmap(fb.losses.softmax_cross_entropy)(x * w, jnp.zeros(x.shape[0], int)),
        windowed,
    ],
    ids=["std", "checkpoint", "scan", "fft", "loss", "window"],
)
def test_exports_with_a_symbolic_batch_size(f):
    (n,) = jax.export.symbolic_shape("n")
    types = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((n, 3), jnp.float32)
    gradient = jax.jit(fb.grad(lambda w, x: jnp.sum(f(w, x))))
    exported = jax.export.export(gradient)(*types)
    assert_close(exported.call(jnp.float32(0.7), X), gradient(jnp.float32(0.7), X), scale=10)


def test_a_look_at_values_beside_a_shard_map():
    """And a mistake within one is told as the user's."""
    mesh = two_devices()

    def mapped(f):
        specs = {"in_specs": (P(), P("i")), "out_specs": P("i")}
        return jax.shard_map(f, mesh=mesh, **specs)

    def f(w):
        y = mapped(lambda w, x: jnp.tanh(x @ w))(w, X)
        return jnp.sum(y) * (2.0 if w[0, 0] > 0 else 1.0)

    w = jnp.linspace(0.1, 1.0, 6).reshape(3, 2)
    assert_close(fb.grad(f)(w), jax.grad(f)(w), scale=10)
    with pytest.raises(TypeError, match="dot_general requires contracting dimensions"):
        fb.grad(lambda w: jnp.sum(mapped(lambda w, x: x @ w.T)(w, X)))(w)


def test_sums_and_contractions_on_an_explicit_mesh():
    """A value used twice where axes are automatic; sums that are still to be made over devices."""

    def twice(x, w):
        inner = jax.sharding.auto_axes(lambda x: jnp.sin(x) * x, out_sharding=P("i", None))
        return jnp.sum(inner(x)) + jnp.sum(w)

    def unreduced(x, w):
        out = P(None, None, unreduced={"i"})
        y = jnp.einsum("ni,nj->ij", x, x, out_sharding=out)
        return jnp.sum(jax.reshard(y, P(None, None)) ** 2) + jnp.sum(w)

    def reduced(x, w):
        return jnp.sum(jnp.sin(x @ jax.reshard(w, P(None, None, reduced={"i"}))))

    mesh = two_devices(AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = jax.reshard(jnp.arange(8.0).reshape(4, 2) / 9, P("i", None))
        for f in (twice, unreduced, reduced):
            ours, theirs = (lib.grad(f, (0, 1))(x, jnp.ones((2, 3))) for lib in (fb, jax))
            assert_close(ours, theirs, scale=10)
            assert [str(jax.typeof(a)) for a in ours] == [str(jax.typeof(a)) for a in theirs]


@pytest.mark.parametrize("jit", [lambda g: g, jax.jit])
def test_explicitly_sharded_arrays(jit):
    mesh = two_devices(AxisType.Explicit)

    def f(x, w):
        y = jnp.dot(jnp.sin(x), w, out_sharding=P("i", None))
        y = lax.scan(lambda c, _: (jnp.tanh(c), None), y, length=2)[0]
        y = jax.sharding.reshard(y - y.mean(0, keepdims=True), P(None, None))
        return jnp.sum(jnp.max(y.reshape(-1, 2), 1) ** 2)

    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.arange(24.0).reshape(4, 6) / 9, jax.NamedSharding(mesh, P("i")))
        w = jax.device_put(jnp.cos(jnp.arange(12.0)).reshape(6, 2), jax.NamedSharding(mesh, P()))
        ours, theirs = (jit(lib.grad(f, (0, 1)))(x, w) for lib in (fb, jax))
        assert_close(ours, theirs, scale=10)
        assert [str(jax.typeof(a)) for a in ours] == [str(jax.typeof(a)) for a in theirs]


SHARDED = {  # of an image (4, 2, 4, 4) along its first axis, and of something on every device
    "bias": (lambda x, b: jnp.sum((x + b) ** 2), (4, 4)),
    "scale": (lambda x, s: jnp.sum((x * s) ** 2), (4, 2, 4, 4)),
    "convolution": (lambda x, k: jnp.sum(lax.conv(x, k, (1, 1), "SAME") ** 2), (3, 2, 3, 3)),
    "tile": (lambda x, s: jnp.sum(jnp.tile(x, (1, 1, 1, 2)) ** 2 * s), ()),
    "pooling": (
        lambda x, s: jnp.sum(
            s * lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID") ** 2
        ),
        (),
    ),
}


@pytest.mark.parametrize("name", SHARDED)
def test_gradients_lie_as_their_arguments_do(name):
    mesh = two_devices(AxisType.Explicit)
    f, shape = SHARDED[name]
    with jax.set_mesh(mesh), jax.numpy_rank_promotion("allow"):
        x = jax.device_put(
            jnp.sin(jnp.arange(128.0)).reshape(4, 2, 4, 4), jax.NamedSharding(mesh, P("i"))
        )
        w = jnp.cos(jnp.arange(float(np.prod(shape)))).reshape(shape)
        w = jax.device_put(w, jax.NamedSharding(mesh, P()))
        ours, theirs = (jax.jit(lib.grad(f, (0, 1)))(x, w) for lib in (fb, jax))
    assert_close(ours, theirs, scale=10)
    assert [str(jax.typeof(a)) for a in ours] == [str(jax.typeof(a)) for a in theirs]


def test_sorting_sharded_arrays():
    """Beside the same on one device: some releases of JAX refuse it on a mesh."""
    mesh = two_devices(AxisType.Explicit)

    def f(x):
        key = (x * 7).astype(np.int32)  # of integers, which have no cotangent
        return jnp.sum(lax.sort((key, x), dimension=1, num_keys=1)[1] ** 3 * jnp.sort(-x, 1))

    x = jnp.sin(jnp.arange(12.0)).reshape(4, 3)
    with jax.set_mesh(mesh):
        found = fb.grad(f)(jax.device_put(x, jax.NamedSharding(mesh, P("i"))))
    assert found.sharding.spec[0] == "i"
    assert_close(np.asarray(found), jax.grad(f)(x))


def test_an_unsharded_constant_among_sharded_arrays():
    """A weight of NumPy's has no sharding, and its gradient is a copy on each device."""
    mesh = two_devices(AxisType.Explicit)

    def f(w, x):
        return jnp.sum((x @ w) ** 2)

    w = np.ones((3, 2), np.float32)
    with jax.set_mesh(mesh):
        x = jnp.sin(jnp.arange(12.0)).reshape(4, 3)
        x = jax.device_put(x, jax.NamedSharding(mesh, P("i")))
        assert_close(*(jax.jit(lib.grad(f))(w, x) for lib in (fb, jax)))


def test_no_recompilation_of_inner_calls():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def layer(x):
        return jnp.tanh(x)

    def deep(x):
        for _ in range(6):
            x = layer(x)
        return jnp.sum(x)

    text = jax.jit(fb.grad(deep)).lower(X).as_text()
    assert text.count("func.func private @layer(") == 1
    assert text.count("func.func private @layer_pullback(") == 1


# --- errors ---------------------------------------------------------------------------------------

ERRORS = {
    "vector output": (lambda: fb.grad(jnp.sin)(X), TypeError, "scalar-output"),
    "integer input": (lambda: fb.grad(jnp.sin)(1), TypeError, "int32 at argument"),
    "complex output": (lambda: fb.grad(lambda x: 1j * x)(1.0), TypeError, "holomorphic=True"),
    "integer output": (lambda: fb.grad(lambda x: 3)(1.0), TypeError, "real-valued outputs"),
    "real holomorphic": (
        lambda: fb.grad(lambda x: x, holomorphic=True)(1.0),
        TypeError,
        "inputs with complex dtype",
    ),
    "too few arguments": (
        lambda: fb.grad(lambda x: x, argnums=2)(1.0),
        TypeError,
        "requires at least 3 positional arguments",
    ),
    "argnums of no int": (lambda: fb.grad(jnp.sin, argnums="x"), TypeError, "argnums must be"),
    "no function": (lambda: fb.grad(3), TypeError, "differentiates functions"),
    "string input": (lambda: fb.grad(lambda x: x)("a"), TypeError, "not a valid JAX type"),
    "string output": (lambda: fb.grad(lambda x: "a")(1.0), TypeError, "not a valid JAX type"),
    "no pair": (lambda: fb.grad(jnp.sin, has_aux=True)(1.0), TypeError, "returns a pair"),
    "wrong tree": (
        lambda: fb.vjp(jnp.sin, 1.0)[1]((1.0, 2.0)),
        ValueError,
        "unexpected tree structure",
    ),
    "wrong shape": (lambda: fb.vjp(jnp.sin, 1.0)[1](X), ValueError, "unexpected JAX type"),
    "wrong dtype": (lambda: fb.vjp(jnp.sin, 1.0)[1](1), ValueError, "unexpected JAX type"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_wrong(name):
    call, exception, message = ERRORS[name]
    with pytest.raises(exception, match=message) as info:
        call()
    assert "\n" not in str(info.value).strip()


def test_many_argument_function():
    assert_same_vjp(lambda *xs: sum(x * i for i, x in enumerate(xs)), *[X] * 5)
