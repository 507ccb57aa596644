"""The Gauss-Newton family in training, with bad input, and by optax's contracts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from family import (
    FAMILY,
    MEMBERS,
    examples,
    linear,
    normal,
    one_step,
    perceptron,
    perceptron_params,
)
from jax.flatten_util import ravel_pytree

import fbackprop as fb

# --- what theory says -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gauss_newton", "natural_gradient", "kfac", "ekfac"])
def test_much_damping_gives_the_gradients_direction(name):
    params, batch = perceptron_params(), examples()
    problem = fb.Objective(perceptron, fb.losses.squared_error, params, batch)
    _, gradient = problem.value_and_gradient()
    optimizer = FAMILY[name](1e6, 1e6)
    found, _, _ = one_step(optimizer, problem.model, problem.loss, params, batch)
    change = ravel_pytree(jax.tree.map(jnp.subtract, params, found))[0]
    flat = ravel_pytree(gradient)[0]
    cosine = change @ flat / jnp.linalg.norm(change) / jnp.linalg.norm(flat)
    assert cosine > 0.9999


# --- training -------------------------------------------------------------------------------------


def test_weakly_typed_parameters_and_weights_of_any_type_are_compiled_for_once():
    step = fb.optim.step(lambda p, x: p["a"] * x + p["b"], fb.losses.squared_error, optax.adam(0.1))
    params = {"a": 0.5, "b": jnp.full(2, 0.1)}
    state = step.optimizer.init(params)
    for weights in ([1, 2, 0], [1.0, 0.5, 1.0], np.ones(3, bool)):
        batch = np.ones((3, 2), np.float32), jnp.ones((3, 2))
        params, state, _ = step(params, state, batch, weights=weights)
    assert step.compilations == 1


@MEMBERS
def test_trains_in_one_compilation_and_lets_nothing_through_that_is_not_finite(name):
    optimizer = FAMILY[name]()
    step = fb.optim.step(perceptron, fb.losses.squared_error, optimizer)
    params, batch = perceptron_params(), examples()
    state, losses = optimizer.init(params), []
    spoiled = batch[0].at[0, 0].set(jnp.nan), batch[1]
    for k in range(25):
        before = params
        params, state, info = step(params, state, spoiled if k in (0, 3) else batch)
        losses.append(info["loss"])
        if k in (0, 3):
            assert jnp.isnan(info["loss"])
            jax.tree.map(np.testing.assert_array_equal, params, before)
    assert losses[-1] < (0.9 if name == "diagonal_gauss_newton" else 0.6) * losses[1]
    assert step.compilations == 1
    leaves, structure = jax.tree.flatten(state)  # it checkpoints
    again, _, _ = step(params, structure.unflatten([np.asarray(x) for x in leaves]), batch)
    expected, _, _ = step(params, state, batch)
    jax.tree.map(np.testing.assert_array_equal, again, expected)


def test_steps_of_users_scan_and_map():
    """A step of one's own, scanned, and mapped over damping and seeds in one program."""
    batch = examples()

    def train(damping, key):
        optimizer = optax.chain(
            optax.clip_by_global_norm(10.0), fb.optim.kfac(0.1, damping, adaptive=False)
        )
        step = fb.optim.step(perceptron, fb.losses.squared_error, optimizer)
        params = jax.tree.map(
            lambda x: x + 0.1 * jax.random.normal(key, x.shape), perceptron_params()
        )

        def body(carry, _):
            params, state, info = step(*carry, batch)
            return (params, state), info["loss"]

        carry = params, step.init(params, batch)
        return jax.lax.scan(body, carry, None, length=8)[1]

    losses = jax.jit(jax.vmap(train))(jnp.array([0.1, 1.0]), jax.random.split(jax.random.key(0)))
    assert losses.shape == (2, 8)
    assert jnp.all(losses[:, -1] < losses[:, 0])
    alone = jax.jit(train)(0.1, jax.random.split(jax.random.key(0))[0])
    np.testing.assert_allclose(losses[0], alone, rtol=1e-3)


def test_injected_hyperparameters_and_schedules():
    optimizer = optax.inject_hyperparams(fb.optim.kfac)(
        learning_rate=optax.linear_schedule(0.1, 0.01, 10), damping=0.1
    )
    step = fb.optim.step(perceptron, fb.losses.squared_error, optimizer)
    params, batch = perceptron_params(), examples()
    state = optimizer.init(params)
    for _ in range(3):
        params, state, info = step(params, state, batch)
    np.testing.assert_allclose(state.hyperparams["learning_rate"], 0.1 - 2 * 0.009, rtol=1e-5)
    assert jnp.isfinite(info["loss"])


@pytest.mark.parametrize("name", ["kfac", "gauss_newton", "hessian_free"])
def test_parameters_that_are_not_trained(name):
    params, batch = perceptron_params(), examples()
    labels = {"w": "train", "b": "hold", "v": "train"}
    optimizer = optax.partition({"train": FAMILY[name](), "hold": optax.set_to_zero()}, labels)
    step = fb.optim.step(perceptron, fb.losses.squared_error, optimizer)
    found, state, first = step(params, optimizer.init(params), batch)
    found, state, second = step(found, state, batch)
    assert second["loss"] < first["loss"]
    np.testing.assert_array_equal(found["b"], params["b"])
    with_none = {"w": params["w"], "b": None, "v": params["v"]}  # as a partitioned model has

    def model(p, x):
        return perceptron({**p, "b": params["b"]}, x)

    same, _, _ = one_step(FAMILY[name](), model, fb.losses.squared_error, with_none, batch)
    after, _, _ = step(params, optimizer.init(params), batch)
    np.testing.assert_allclose(same["w"], after["w"], rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    "optimizer", [optax.adam(0.01), optax.lbfgs(), optax.sgd(0.01, momentum=0.9)], ids=range(3)
)
def test_any_optax_optimizer(optimizer):
    step = fb.optim.step(perceptron, fb.losses.squared_error, optimizer, chunk=8)
    params, state, batch = perceptron_params(), optimizer.init(perceptron_params()), examples()
    losses = []
    for _ in range(4):
        params, state, info = step(params, state, batch)
        losses.append(info["loss"])
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["kfac", "hessian_free"])
def test_parameters_of_half_precision(name):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), perceptron_params())
    found, _, info = one_step(
        FAMILY[name](), perceptron, fb.losses.squared_error, params, examples()
    )
    assert found["w"].dtype == jnp.bfloat16
    assert jnp.any(found["w"] != params["w"]) and jnp.isfinite(info["loss"])


@pytest.mark.slow
def test_leaves_of_two_precisions():
    with jax.enable_x64(True):
        params = perceptron_params() | {"v": jnp.ones((4, 2), jnp.float32)}

        def model(p, x):
            return jnp.tanh(x @ p["w"] + p["b"]).astype(jnp.float32) @ p["v"]

        problem = fb.Objective(model, fb.losses.squared_error, params, examples())
        factors = fb.KroneckerFactors(problem.sweep(factors=fb.Kronecker())["factors"])
        inverse = factors.inverse(0.1)
        for before, after in zip(jax.tree.leaves(factors), jax.tree.leaves(inverse), strict=True):
            assert before.dtype == after.dtype
        np.testing.assert_allclose(factors.trace(), jnp.trace(factors.dense()), rtol=1e-6)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("learning_rate", [None, 0.1])
@pytest.mark.parametrize("make", [fb.optim.kfac, fb.optim.ekfac])
def test_a_gradient_that_is_not_finite_where_the_model_does_not_look(make, learning_rate):
    params = perceptron_params() | {"idle": jnp.ones(2)}
    problem = fb.Objective(perceptron, fb.losses.squared_error, params, examples())
    optimizer = make(learning_rate)
    _, gradient = problem.value_and_gradient()
    spoiled = gradient | {"idle": jnp.array([jnp.nan, 0.0])}
    run = jax.jit(lambda g, state: optimizer.update(g, state, params, objective=problem))
    updates, state = run(spoiled, optimizer.init(params))
    assert all(jnp.all(x == 0) for x in jax.tree.leaves(updates))
    assert state.skipped == 1
    updates, state = run(gradient, state)
    assert jnp.any(updates["w"] != 0) and state.skipped == 1


@pytest.mark.slow
@MEMBERS
def test_singular_curvature_tiny_damping_and_a_batch_of_one(name):
    def model(p, x):  # of no effect: the curvature in p["idle"] is zero
        return x @ p["w"] + 0 * jnp.sum(p["idle"])

    tiny = {"damping": 1e-30} if name != "gauss_newton" else {"damping": 0.0}
    optimizer = FAMILY[name](**tiny)
    params = {"w": jnp.zeros((3, 2)), "idle": jnp.ones(2)}
    batch = jnp.ones((1, 3)), jnp.ones((1, 2))
    found, _, info = one_step(optimizer, model, fb.losses.squared_error, params, batch)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(found))
    assert jnp.isfinite(info["loss"])


@pytest.mark.slow
def test_a_loss_that_is_not_convex():
    def loss(z, y):
        return jnp.sum(jnp.cos(z - y))

    for name in ("gauss_newton", "levenberg_marquardt", "kfac", "hessian_free"):
        optimizer = FAMILY[name]()
        params, _, _ = one_step(optimizer, perceptron, loss, perceptron_params(), examples())
        assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params))


@pytest.mark.slow
@MEMBERS
def test_leaves_without_elements_and_of_integers(name):
    """They are left as they are, and the others are trained."""
    optimizer, model = FAMILY[name](), lambda p, x: perceptron(p, x) * p["scale"][1]
    odd = {"empty": jnp.zeros((0, 3)), "scale": jnp.arange(3), "is_on": jnp.array([True])}
    params, batch = perceptron_params() | odd, examples()
    step = fb.optim.step(model, fb.losses.squared_error, optimizer)
    found, state, infos = params, optimizer.init(params), []
    for _ in range(4):
        found, state, info = step(found, state, batch)
        infos.append(info)
    assert infos[3]["loss"] < infos[1]["loss"] < infos[0]["loss"]
    assert infos[3].get("skipped", 0) == 0 and step.compilations == 1
    for key, leaf in odd.items():
        assert found[key].dtype == leaf.dtype and jnp.array_equal(found[key], leaf)


@pytest.mark.slow
@MEMBERS
def test_leaves_of_integers_and_of_two_precisions(name):
    """In double precision what is computed of integers must be, too."""
    optimizer = FAMILY[name]()
    with jax.enable_x64(True):
        batch = jax.tree.map(lambda x: x.astype(float), examples())
        params = {"w": jnp.ones((3, 2)), "n": jnp.array([2]), "b": jnp.zeros(2, jnp.float32)}
        step = fb.optim.step(
            lambda p, x: p["n"] * (x @ p["w"] + p["b"]), fb.losses.squared_error, optimizer
        )
        found, state, before = step(params, optimizer.init(params), batch)
        found, _, after = step(found, state, batch)
    assert after["loss"] < before["loss"] and step.compilations == 1
    assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(params)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_data_of_double_precision_for_parameters_of_single(name):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float32), perceptron_params())
        batch = jax.tree.map(lambda x: x.astype(float), examples())
        found, state, _ = one_step(
            FAMILY[name](), perceptron, fb.losses.squared_error, params, batch
        )
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    assert state.skipped == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_a_schedule_of_damping_that_is_not_adaptive(name):
    rate, params, batch = 0.1, perceptron_params(), examples()
    damping = optax.piecewise_constant_schedule(0.5, {1: 4.0})
    make = lambda damping: FAMILY[name](rate, damping, adaptive=False, every=1)  # noqa: E731
    injected = optax.inject_hyperparams(FAMILY[name])(rate, damping, adaptive=False, every=1)
    for optimizer in (make(damping), injected):
        step = fb.optim.step(perceptron, fb.losses.squared_error, optimizer)
        found, state, found_damping = params, optimizer.init(params), []
        for _ in range(3):
            found, state, info = step(found, state, batch)
            found_damping.append(float(info["damping"]))
        assert found_damping == [0.5, 2.0, 2.0]
    with pytest.raises(TypeError, match="adapts itself: give the number"):
        FAMILY[name](damping=damping)


def test_the_diagonal_of_a_concave_loss_is_no_curvature():
    """A step goes down all the same."""
    optimizer = fb.optim.diagonal_gauss_newton(damping=0.1, curvature=fb.GGNDiagonal())
    step = fb.optim.step(linear, lambda z, y: jnp.sum(jnp.cos(z - y)), optimizer)
    params, batch = jnp.array([[0.5], [0.2], [0.1]]), (normal(0, 8, 3) / 3, jnp.zeros((8, 1)))
    state, losses = optimizer.init(params), []
    for _ in range(5):
        params, state, info = step(params, state, batch)
        losses.append(info["loss"])
    assert all(after < before for before, after in zip(losses, losses[1:], strict=False))


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(0.01),
        optax.lbfgs(),
        optax.chain(optax.trace(0.9), fb.optim.gauss_newton(damping=1.0)),
        optax.chain(fb.optim.gauss_newton(damping=1.0), optax.trace(0.5)),
    ],
    ids=["adam", "lbfgs", "after momentum", "before momentum"],
)
def test_a_batch_that_is_not_finite_leaves_no_trace(optimizer):
    step = fb.optim.step(perceptron, fb.losses.squared_error, optimizer)
    params, batch = perceptron_params(), examples()
    params, state, _ = step(params, optimizer.init(params), batch)
    bad = batch[0].at[0, 0].set(jnp.nan), batch[1]
    after, after_state, info = step(params, state, bad)
    jax.tree.map(np.testing.assert_array_equal, after, params)
    assert jnp.isnan(info["loss"])
    for x, y in zip(*map(jax.tree.leaves, (state, after_state)), strict=True):
        if jnp.issubdtype(x.dtype, jnp.inexact):  # counts go on
            np.testing.assert_array_equal(x, y)
    after, _, info = step(after, after_state, batch)
    assert step(after, state, batch)[2]["loss"] < info["loss"]


@pytest.mark.parametrize("mean", [True, False])
def test_what_several_batches_gathered_goes_with_a_bad_one(mean):
    step = fb.optim.step(
        perceptron,
        fb.losses.squared_error,
        optax.MultiSteps(optax.sgd(0.1), 2, use_grad_mean=mean),
    )
    start, batch = perceptron_params(), examples()
    bad = batch[0].at[0, 0].set(jnp.nan), batch[1]

    def after(*batches):
        params, state = start, step.optimizer.init(start)
        for each in batches:
            params, state, _ = step(params, state, each)
        return params

    found, expected = after(batch, bad, batch, batch), after(batch, batch)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, expected)


def test_gradients_of_several_batches():
    """optax.MultiSteps, which accumulates them."""
    optimizer = optax.MultiSteps(fb.optim.gauss_newton(damping=1.0), 2)
    step = fb.optim.step(perceptron, fb.losses.squared_error, optimizer)
    params, batch = perceptron_params(), examples()
    first, state, _ = step(params, optimizer.init(params), batch)
    jax.tree.map(np.testing.assert_array_equal, first, params)
    second, _, _ = step(first, state, batch)
    expected = one_step(
        fb.optim.gauss_newton(damping=1.0), perceptron, fb.losses.squared_error, params, batch
    )[0]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), second, expected)


def test_what_is_reported_is_the_optimizers_own():
    """Whatever the parameters are called."""
    params = {"ratio": normal(0, 3, 2), "damping": jnp.ones(())}

    def model(p, x):
        return p["damping"] * (x @ p["ratio"])

    _, _, info = one_step(fb.optim.kfac(), model, fb.losses.squared_error, params, examples())
    assert info["damping"].shape == () and info["ratio"].shape == ()


@pytest.mark.slow
@MEMBERS
def test_states_may_be_donated(name):
    optimizer, params = FAMILY[name](), perceptron_params()
    step = fb.optim.step(perceptron, fb.losses.squared_error, optimizer)
    state = step.init(params, examples())
    found, _, _ = jax.jit(step, donate_argnums=(0, 1))(params, state, examples())
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(found))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: fb.optim.gauss_newton(damping=np.float32(-1)), ValueError, "damping=-1.0"),
        (lambda: fb.optim.natural_gradient(damping=jnp.array(-1.0)), ValueError, "negative"),
        (lambda: fb.optim.gauss_newton(damping="0.1"), TypeError, "damping='0.1'"),
        (lambda: fb.optim.levenberg_marquardt(jnp.inf), ValueError, "damping=inf"),
        (lambda: fb.optim.hessian_free(lambda step: 1.0), TypeError, "adapts itself"),
        (lambda: fb.optim.hessian_free(warm_start=1.5), ValueError, "warm_start=1.5"),
        (lambda: fb.optim.diagonal_gauss_newton(momentum=jnp.nan), ValueError, "momentum=nan"),
        (lambda: fb.optim.kfac(decay=2.0), ValueError, "decay=2.0"),
        (lambda: fb.optim.kfac(every=2.5), ValueError, "every=2.5 must be a whole number"),
        (lambda: fb.optim.hessian_free(max_iterations=0.5), ValueError, "max_iterations=0.5"),
        (lambda: fb.optim.kfac(jnp.inf), ValueError, "learning_rate=inf"),
        (lambda: fb.optim.gauss_newton(None), TypeError, "learning_rate=None"),
        (lambda: fb.optim.diagonal_gauss_newton(np.nan), ValueError, "learning_rate=nan"),
        (lambda: fb.optim.kfac().init({"k": jax.random.key(0)}), TypeError, "'k'.*numbers"),
        (lambda: fb.optim.kfac(curvature=fb.GGNDiagonal()), TypeError, "fb.Kronecker"),
        (lambda: fb.optim.gauss_newton(curvature=fb.Kronecker()), TypeError, "fb.GGNRows"),
        (lambda: fb.optim.diagonal_gauss_newton(curvature=fb.Gram()), TypeError, "fb.GGNDiagonal"),
    ],
)
def test_wrong_settings_are_refused(make, error, words):
    with pytest.raises(error, match=words) as raised:
        make()
    assert "\n" not in str(raised.value)


@MEMBERS
def test_no_parameters_are_refused(name):
    with pytest.raises(ValueError, match="no parameters to update"):
        one_step(FAMILY[name](), lambda p, x: x[:2], fb.losses.squared_error, {}, examples())


def test_errors_name_what_was_wrong():
    optimizer, params = fb.optim.kfac(), perceptron_params()
    with pytest.raises(TypeError, match="pass objective="):
        optimizer.update(params, optimizer.init(params), params)
    with pytest.raises(ValueError, match="pass params to update"):
        optimizer.update(params, optimizer.init(params))
    with pytest.raises(ValueError, match="damping=-1 must be a finite number greater than zero"):
        fb.optim.kfac(damping=-1)
    with pytest.raises(ValueError, match="choose one of 'auto', 'primal', 'dual'"):
        fb.optim.gauss_newton(space="both")
    with pytest.raises(TypeError, match="is no fbackprop.Curvature"):
        scale = fb.optim.precondition_by_curvature(1.0)
        scale.update(params, scale.init(params), curvature=3)
    with pytest.raises(TypeError, match="pass value= or objective= to update, or a damping"):
        scale = fb.optim.precondition_by_curvature(None)
        scale.update(params, scale.init(params), curvature=fb.Diagonal(params))
    step = fb.optim.step(perceptron, fb.losses.squared_error, optimizer)
    with pytest.raises(ValueError, match="a batch must be a pair"):
        step(params, optimizer.init(params), jnp.ones(3))
    with pytest.raises(ValueError, match="pass gradients of these parameters"):
        optimizer.update({"w": params["w"]}, optimizer.init(params), params)


def test_later_calls_are_checked_as_the_first():
    def model(params, x, *, key):
        return perceptron(params, x) + jax.random.normal(key, (2,))

    params, (x, y), key = perceptron_params(), examples(), jax.random.key(0)
    optimizer = optax.sgd(0.1)
    step = fb.optim.step(model, fb.losses.squared_error, optimizer)
    params, state, _ = step(params, optimizer.init(params), (x, y), key=key)
    with pytest.raises(ValueError, match="the model takes a key"):
        step(params, state, (x, y))
    with pytest.raises(ValueError, match="inputs: 16, targets: 5"):
        step(params, state, (x, y[:5]), key=key)
    with pytest.raises(ValueError, match=r"a pair .*, but it is an array of shape \(16, 3\)"):
        step(params, state, x, key=key)
    with pytest.raises(TypeError, match="'b'.*is complex"):
        step({**params, "b": params["b"] + 0j}, state, (x, y), key=key)
    with pytest.raises(ValueError, match="weights must not be negative"):
        step(params, state, (x, y), weights=-jnp.ones(16), key=key)


@MEMBERS
def test_the_state_of_another_optimizer_is_refused(name):
    params, other = perceptron_params(), optax.adam(0.1)
    step = fb.optim.step(perceptron, fb.losses.squared_error, FAMILY[name]())
    with pytest.raises(
        TypeError, match=r"the state is a \w+, but must be a \w+State: pass that of"
    ):
        step(params, other.init(params), examples())
