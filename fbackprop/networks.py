"""Reference networks: pure functions over plain pytrees of parameters.

Each constructor returns a `Network`, two functions:

    params = network.init(key)           # nested dicts and lists of arrays, nothing else
    prediction = network.apply(params, x)

``apply`` is written for ONE example; a batch is ``jax.vmap(network.apply, in_axes=(None, 0))``.
Real inputs are cast to the dtype of the parameters, so the parameters alone set the precision.
Dense kernels are (I, O), convolutions (height, width, I, O); biases start at zero and scales at
one.

The networks are small and plain on purpose. Tests, tutorials and benchmarks run on them, and
together they hold the ways in which a weight meets data: once, at every pixel, at every time step
of a loop, at every token, through an index.

Index legend: T positions (time steps, tokens), I in, O out, H height, W width, C channels.
"""

import itertools
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import Initializer, he_normal, lecun_normal, normal, orthogonal
from jax.typing import DTypeLike

# Variance 1/fan-in for activations near the identity at zero, 2/fan-in for ReLU.
_KERNEL_INIT = lecun_normal()
_RELU_KERNEL_INIT = he_normal()
_RECURRENT_INIT = orthogonal()
_EMBEDDING_INIT = normal(0.02)


class Network(NamedTuple):
    """A network as two pure functions.

    Attributes:
        init: ``init(key)`` draws the parameters.
        apply: ``apply(params, x)`` predicts for one example.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, Any], jax.Array]


def mlp(
    widths: Sequence[int],
    activation: Callable[[jax.Array], jax.Array] = jax.nn.tanh,
    *,
    kernel_init: Initializer = _KERNEL_INIT,
    dtype: DTypeLike = jnp.float32,
) -> Network:
    r"""Multilayer perceptron.

    $$h_0 = \mathrm{vec}(x), \qquad h_l = \phi(h_{l-1} W_l + b_l), \qquad o = h_{L-1} W_L + b_L$$

    Args:
        widths: of the input, of each hidden layer and of the output, so at least two.
        activation: φ, applied elementwise after every layer but the last.
        kernel_init: initialiser of the W.
        dtype: of the parameters.

    Returns:
        A `Network`. x: any shape of ``widths[0]`` numbers → (widths[-1],). The parameters are a
        list with one ``{"kernel": (I, O), "bias": (O,)}`` per layer.

    Raises:
        ValueError: fewer than two widths, or one below 1; in ``apply``, x of another size.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> network = mlp((16, 8, 10))
        >>> params = network.init(jax.random.key(0))
        >>> network.apply(params, jnp.ones((4, 4))).shape
        (10,)
    """
    if len(widths) < 2:
        raise ValueError(
            f"mlp: widths {tuple(widths)} name no layer; give at least an input and an output width"
        )
    _check_positive("mlp", widths=widths)

    def init(key: jax.Array) -> Any:
        sizes = list(itertools.pairwise(widths))
        keys = jax.random.split(key, len(sizes))
        return [
            _init_dense(k, i, o, kernel_init, dtype) for k, (i, o) in zip(keys, sizes, strict=True)
        ]

    def apply(params: Any, x: Any) -> jax.Array:
        x = jnp.ravel(x)
        if x.size != widths[0]:
            raise ValueError(
                f"x has {x.size} numbers and widths[0] is {widths[0]}: a perceptron takes one "
                "example; map over a batch with jax.vmap"
            )
        *hidden, last = params
        for layer in hidden:
            x = activation(_dense(layer, x))
        return _dense(last, x)

    return Network(init, apply)


def autoencoder(
    widths: Sequence[int],
    activation: Callable[[jax.Array], jax.Array] = jax.nn.tanh,
    *,
    kernel_init: Initializer = _KERNEL_INIT,
    dtype: DTypeLike = jnp.float32,
) -> Network:
    r"""Autoencoder: an encoder to a linear code and the mirrored decoder, both perceptrons.

    $$o = \mathrm{decoder}(\mathrm{encoder}(x))$$

    The code and the output have no activation. The output is a reconstruction for `squared_error`,
    or the logits of one for `sigmoid_binary_cross_entropy`.

    Args:
        widths: of the encoder, from the input to the code: (784, 128, 32) makes
            784–128–32–128–784.
        activation: applied elementwise after the hidden layers of both halves.
        kernel_init: initialiser of the kernels.
        dtype: of the parameters.

    Returns:
        A `Network`. x: any shape of ``widths[0]`` numbers → (widths[0],), to be compared with x
        raveled. The parameters are ``{"encoder": ..., "decoder": ...}``, each as of `mlp`.

    Raises:
        ValueError: fewer than two widths, or one below 1; in ``apply``, x of another size.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> network = autoencoder((16, 8, 2))
        >>> params = network.init(jax.random.key(0))
        >>> network.apply(params, jnp.ones((4, 4))).shape
        (16,)

    References:
        Hinton and Salakhutdinov, "Reducing the dimensionality of data with neural networks" (2006).
    """
    encoder = mlp(widths, activation, kernel_init=kernel_init, dtype=dtype)
    decoder = mlp(widths[::-1], activation, kernel_init=kernel_init, dtype=dtype)

    def init(key: jax.Array) -> Any:
        encoder_key, decoder_key = jax.random.split(key)
        return {"encoder": encoder.init(encoder_key), "decoder": decoder.init(decoder_key)}

    def apply(params: Any, x: Any) -> jax.Array:
        return decoder.apply(params["decoder"], encoder.apply(params["encoder"], x))

    return Network(init, apply)


def convnet(
    image_shape: Sequence[int],
    classes: int,
    *,
    channels: Sequence[int] = (16, 32),
    kernel_init: Initializer = _RELU_KERNEL_INIT,
    dtype: DTypeLike = jnp.float32,
) -> Network:
    """Convolutional network: stages of 3×3 convolution, ReLU and 2×2 max pooling; a dense head.

    Each stage halves height and width, rounding down.

    Args:
        image_shape: (H, W), or (H, W, C).
        classes: number of outputs.
        channels: of each stage, at least one.
        kernel_init: initialiser of all kernels.
        dtype: of the parameters.

    Returns:
        A `Network`. x: image_shape → (classes,) logits. The parameters are ``{"stages": [...],
        "head": ...}``, each a kernel and a bias.

    Raises:
        ValueError: image_shape has not 2 or 3 axes, the image is too small for the stages, or a
            size is below 1; in ``apply``, x of another shape.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> network = convnet((8, 8), 10)
        >>> params = network.init(jax.random.key(0))
        >>> network.apply(params, jnp.ones((8, 8))).shape
        (10,)

    References:
        LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition"
        (1998).
    """
    height, width, depth = _check_image("convnet", image_shape, channels, len(channels))
    _check_positive("convnet", classes=[classes])
    features = (height >> len(channels)) * (width >> len(channels)) * channels[-1]

    def init(key: jax.Array) -> Any:
        *keys, head_key = jax.random.split(key, len(channels) + 1)
        sizes = itertools.pairwise([depth, *channels])
        return {
            "stages": [
                _init_conv(k, 3, i, o, kernel_init, dtype)
                for k, (i, o) in zip(keys, sizes, strict=True)
            ],
            "head": _init_dense(head_key, features, classes, kernel_init, dtype),
        }

    def apply(params: Any, x: Any) -> jax.Array:
        x = _as_image("convnet", x, image_shape)
        for stage in params["stages"]:
            x = jax.nn.relu(_conv(stage, x))
            x = lax.reduce_window(x, -jnp.inf, lax.max, (2, 2, 1), (2, 2, 1), "VALID")
        return _dense(params["head"], jnp.ravel(x))

    return Network(init, apply)


def resnet(
    image_shape: Sequence[int],
    classes: int,
    *,
    channels: Sequence[int] = (16, 32),
    blocks: int = 1,
    groups: int = 4,
    kernel_init: Initializer = _RELU_KERNEL_INIT,
    dtype: DTypeLike = jnp.float32,
) -> Network:
    r"""Residual network of pre-activation blocks with group normalisation.

    $$x \leftarrow S(x) + K_2 * \phi(K_1 * \phi(x)), \qquad
      \phi(x) = \mathrm{relu}(\mathrm{norm}(x))$$

    A 3×3 convolution comes first, then one stage of blocks for each entry of ``channels``, then φ,
    the mean over all pixels and a dense layer. S is the identity, but for the first block of every
    stage after the first: that block halves height and width (rounding up) by a stride of 2 in K₁
    and in S, there a 1×1 convolution of φ(x). Normalisation is within one example, so examples stay
    independent.

    Args:
        image_shape: (H, W), or (H, W, C).
        classes: number of outputs.
        channels: of each stage, at least one.
        blocks: residual blocks in each stage.
        groups: of channels that are normalised together.
        kernel_init: initialiser of all kernels.
        dtype: of the parameters.

    Returns:
        A `Network`. x: image_shape → (classes,) logits. The parameters are ``{"stem": ...,
        "stages": [[block, ...], ...], "norm": ..., "head": ...}``.

    Raises:
        ValueError: image_shape has not 2 or 3 axes, the image is too small for the stages, a size
            is below 1, or ``groups`` does not divide the channels; in ``apply``, x of another
            shape.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> network = resnet((8, 8, 3), 10, channels=(8,))
        >>> params = network.init(jax.random.key(0))
        >>> network.apply(params, jnp.ones((8, 8, 3))).shape
        (10,)

    References:
        He, Zhang, Ren and Sun, "Identity mappings in deep residual networks" (2016), fig. 1(b).
        Wu and He, "Group normalization" (2018), eqs. 1–7.
    """
    *_, depth = _check_image("resnet", image_shape, channels, len(channels) - 1)
    _check_positive("resnet", classes=[classes], blocks=[blocks], groups=[groups])
    if any(width % groups for width in channels):
        raise ValueError(
            f"resnet: groups={groups} does not divide all of channels {tuple(channels)}; "
            "give a common divisor"
        )

    def init_block(key: jax.Array, inputs: int, outputs: int, halve: bool) -> Any:
        keys = jax.random.split(key, 3)
        block = {
            "norm1": _init_norm(inputs, dtype),
            "conv1": _init_conv(keys[0], 3, inputs, outputs, kernel_init, dtype),
            "norm2": _init_norm(outputs, dtype),
            "conv2": _init_conv(keys[1], 3, outputs, outputs, kernel_init, dtype),
        }
        if halve:
            block["shortcut"] = _init_conv(keys[2], 1, inputs, outputs, kernel_init, dtype)
        return block

    def init(key: jax.Array) -> Any:
        stem_key, head_key, stages_key = jax.random.split(key, 3)
        stages = []
        for stage, (i, o) in enumerate(itertools.pairwise([channels[0], *channels])):
            first, *others = jax.random.split(jax.random.fold_in(stages_key, stage), blocks)
            stages.append(
                [init_block(first, i, o, stage > 0)] + [init_block(k, o, o, False) for k in others]
            )
        return {
            "stem": _init_conv(stem_key, 3, depth, channels[0], kernel_init, dtype),
            "stages": stages,
            "norm": _init_norm(channels[-1], dtype),
            "head": _init_dense(head_key, channels[-1], classes, kernel_init, dtype),
        }

    def activate(norm: Any, x: jax.Array) -> jax.Array:
        grouped = x.reshape(*x.shape[:2], groups, -1)
        standard = _standardise(grouped, (0, 1, 3)).reshape(x.shape)
        return jax.nn.relu(_affine(norm, standard))

    def apply_block(block: Any, x: jax.Array) -> jax.Array:
        active = activate(block["norm1"], x)
        # Just the blocks that halve the image have a shortcut with parameters.
        stride = 2 if "shortcut" in block else 1
        shortcut = _conv(block["shortcut"], active, stride) if "shortcut" in block else x
        inner = _conv(block["conv1"], active, stride)
        return shortcut + _conv(block["conv2"], activate(block["norm2"], inner))

    def apply(params: Any, x: Any) -> jax.Array:
        x = _conv(params["stem"], _as_image("resnet", x, image_shape))
        for block in itertools.chain(*params["stages"]):
            x = apply_block(block, x)
        return _dense(params["head"], jnp.mean(activate(params["norm"], x), axis=(0, 1)))

    return Network(init, apply)


def lstm(
    inputs: int,
    hidden: int,
    outputs: int,
    *,
    kernel_init: Initializer = _KERNEL_INIT,
    recurrent_init: Initializer = _RECURRENT_INIT,
    dtype: DTypeLike = jnp.float32,
) -> Network:
    r"""Long short-term memory over a sequence, with a dense layer on its last hidden state.

    $$(i, f, g, o) = x_t W + h_{t-1} U + b, \qquad
      c_t = \sigma(f) \odot c_{t-1} + \sigma(i) \odot \tanh(g), \qquad
      h_t = \sigma(o) \odot \tanh(c_t)$$

    Both states start at zero. The forget gate's bias starts at one, so that a fresh network
    remembers.

    Args:
        inputs: features of x at each time step.
        hidden: width of h and c.
        outputs: width of the prediction.
        kernel_init: initialiser of W (all four gates at once) and of the last layer's kernel.
        recurrent_init: initialiser of U (all four gates at once).
        dtype: of the parameters.

    Returns:
        A `Network`. x: (T, inputs) → (outputs,). The parameters are ``{"input": {"kernel": (I, 4
        hidden), "bias": (4 hidden,)}, "recurrent": (hidden, 4 hidden), "output": ...}``, gates in
        the order i, f, g, o.

    Raises:
        ValueError: a size is below 1; in ``apply``, x of another shape or without time steps.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> network = lstm(3, 16, 2)
        >>> params = network.init(jax.random.key(0))
        >>> network.apply(params, jnp.ones((20, 3))).shape
        (2,)

    References:
        Hochreiter and Schmidhuber, "Long short-term memory" (1997). Gers, Schmidhuber and Cummins,
        "Learning to forget" (2000), for the forget gate.
    """
    _check_positive("lstm", inputs=[inputs], hidden=[hidden], outputs=[outputs])

    def init(key: jax.Array) -> Any:
        input_key, recurrent_key, output_key = jax.random.split(key, 3)
        layer = _init_dense(input_key, inputs, 4 * hidden, kernel_init, dtype)
        layer["bias"] = layer["bias"].at[hidden : 2 * hidden].set(1)
        # Orthogonal matrices come of a QR factorisation, which half precision does not have.
        precise = jnp.promote_types(dtype, jnp.float32)
        recurrent = recurrent_init(recurrent_key, (hidden, 4 * hidden), precise).astype(dtype)
        return {
            "input": layer,
            "recurrent": recurrent,
            "output": _init_dense(output_key, hidden, outputs, kernel_init, dtype),
        }

    def apply(params: Any, x: Any) -> jax.Array:
        x = jnp.asarray(x)
        if x.ndim != 2 or x.shape[1] != inputs or not x.shape[0]:
            raise ValueError(
                f"lstm: x has shape {x.shape}; give (T, {inputs}) with at least one time step"
            )

        def advance(state: tuple[jax.Array, jax.Array], drive: jax.Array) -> Any:
            h, c = state
            i, f, g, o = jnp.split(drive + h @ params["recurrent"], 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

        # What depends on the input alone is one product before the loop, not T inside it.
        drives = _dense(params["input"], x)
        zero = jnp.zeros(hidden, drives.dtype)
        (h, _), _ = lax.scan(advance, (zero, zero), drives)
        return _dense(params["output"], h)

    return Network(init, apply)


def transformer(
    vocabulary: int,
    outputs: int,
    *,
    length: int,
    width: int = 64,
    heads: int = 4,
    layers: int = 2,
    kernel_init: Initializer = _KERNEL_INIT,
    embedding_init: Initializer = _EMBEDDING_INIT,
    dtype: DTypeLike = jnp.float32,
) -> Network:
    r"""Causal transformer: pre-norm blocks on learned token and position embeddings.

    $$x \leftarrow x + \mathrm{attend}(\mathrm{norm}(x)), \qquad
      x \leftarrow x + \mathrm{gelu}(\mathrm{norm}(x) W_1 + b_1) W_2 + b_2$$

    Each head of width d attends by softmax(QKᵀ/√d)V, a position to itself and to those before it.
    The perceptron of a block is four times as wide as the block. A last normalisation and a dense
    layer make the logits.

    Args:
        vocabulary: number of tokens.
        outputs: logits per position, for a language model the vocabulary.
        length: the longest sequence, for which there are position embeddings.
        width: of the residual stream.
        heads: of attention; a divisor of ``width``.
        layers: number of blocks.
        kernel_init: initialiser of the dense kernels.
        embedding_init: initialiser of the token and position embeddings.
        dtype: of the parameters.

    Returns:
        A `Network`. x: (T,) integers in [0, vocabulary), T ≤ length → (T, outputs) logits. The
        parameters are ``{"tokens": (vocabulary, width), "positions": (length, width), "blocks":
        [...], "norm": ..., "head": ...}``. A token out of range is not detected: it is read as the
        nearest one in range.

    Raises:
        ValueError: a size is below 1, or ``heads`` does not divide ``width``; in ``apply``, x is
            not one sequence of integers of at most ``length``.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> network = transformer(100, 100, length=32, layers=1)
        >>> params = network.init(jax.random.key(0))
        >>> network.apply(params, jnp.arange(20)).shape
        (20, 100)

    References:
        Vaswani et al., "Attention is all you need" (2017), eq. 1. Radford et al., "Language models
        are unsupervised multitask learners" (2019), for the order of the normalisations.
    """
    _check_positive(
        "transformer",
        vocabulary=[vocabulary],
        outputs=[outputs],
        length=[length],
        width=[width],
        heads=[heads],
        layers=[layers],
    )
    if width % heads:
        raise ValueError(
            f"transformer: heads={heads} does not divide width={width}; give a divisor of the width"
        )

    def init_block(key: jax.Array) -> Any:
        keys = jax.random.split(key, 4)
        return {
            "norm1": _init_norm(width, dtype),
            "qkv": _init_dense(keys[0], width, 3 * width, kernel_init, dtype),
            "mix": _init_dense(keys[1], width, width, kernel_init, dtype),
            "norm2": _init_norm(width, dtype),
            "expand": _init_dense(keys[2], width, 4 * width, kernel_init, dtype),
            "contract": _init_dense(keys[3], 4 * width, width, kernel_init, dtype),
        }

    def init(key: jax.Array) -> Any:
        tokens_key, positions_key, head_key, *keys = jax.random.split(key, 3 + layers)
        return {
            "tokens": embedding_init(tokens_key, (vocabulary, width), dtype),
            "positions": embedding_init(positions_key, (length, width), dtype),
            "blocks": [init_block(k) for k in keys],
            "norm": _init_norm(width, dtype),
            "head": _init_dense(head_key, width, outputs, kernel_init, dtype),
        }

    def normalise(norm: Any, x: jax.Array) -> jax.Array:
        return _affine(norm, _standardise(x, (-1,)))

    def attend(block: Any, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split(_dense(block["qkv"], x).reshape(len(x), 3 * heads, -1), 3, axis=1)
        scores = jnp.einsum("qhd,khd->hqk", q, k) / (width // heads) ** 0.5
        causal = jnp.tri(len(x), dtype=bool)
        weights = jax.nn.softmax(jnp.where(causal[None], scores, -jnp.inf))
        return _dense(block["mix"], jnp.einsum("hqk,khd->qhd", weights, v).reshape(x.shape))

    def apply(params: Any, x: Any) -> jax.Array:
        x = jnp.asarray(x)
        if x.ndim != 1 or not 0 < x.size <= length or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(
                f"transformer: x has shape {x.shape} and dtype {x.dtype}; "
                f"give integer tokens of shape (T,), 1 <= T <= length = {length}"
            )
        tokens = params["tokens"].at[x].get(mode="clip", wrap_negative_indices=False)
        x = tokens + params["positions"][: x.size]
        for block in params["blocks"]:
            x = x + attend(block, normalise(block["norm1"], x))
            inner = jax.nn.gelu(_dense(block["expand"], normalise(block["norm2"], x)))
            x = x + _dense(block["contract"], inner)
        return _dense(params["head"], normalise(params["norm"], x))

    return Network(init, apply)


# Layers -----------------------------------------------------------------------------------------


def _init_dense(
    key: jax.Array, inputs: int, outputs: int, kernel_init: Initializer, dtype: DTypeLike
) -> dict[str, jax.Array]:
    return {"kernel": kernel_init(key, (inputs, outputs), dtype), "bias": jnp.zeros(outputs, dtype)}


def _dense(layer: Any, x: jax.Array) -> jax.Array:
    """x W + b: (..., I) → (..., O)."""
    product = x.astype(layer["kernel"].dtype) @ layer["kernel"]
    return product + jnp.broadcast_to(layer["bias"], product.shape)


def _init_conv(
    key: jax.Array,
    size: int,
    inputs: int,
    outputs: int,
    kernel_init: Initializer,
    dtype: DTypeLike,
) -> dict[str, jax.Array]:
    kernel = kernel_init(key, (size, size, inputs, outputs), dtype)
    return {"kernel": kernel, "bias": jnp.zeros(outputs, dtype)}


def _conv(layer: Any, x: jax.Array, stride: int = 1) -> jax.Array:
    """Convolution with zero padding: (H, W, I) → (⌈H/stride⌉, ⌈W/stride⌉, O)."""
    out = lax.conv_general_dilated(
        x.astype(layer["kernel"].dtype)[None],
        layer["kernel"],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )[0]
    return out + jnp.broadcast_to(layer["bias"], out.shape)


def _init_norm(width: int, dtype: DTypeLike) -> dict[str, jax.Array]:
    return {"scale": jnp.ones(width, dtype), "bias": jnp.zeros(width, dtype)}


def _standardise(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """To mean 0 and variance 1 over the axes, (x − mean) / √(variance + 1e-5)."""
    centred = x - jnp.mean(x, axes, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred**2, axes, keepdims=True) + 1e-5)


def _affine(norm: Any, x: jax.Array) -> jax.Array:
    """Learned scale and bias of the last axis, (..., C) → (..., C)."""
    return x * jnp.broadcast_to(norm["scale"], x.shape) + jnp.broadcast_to(norm["bias"], x.shape)


# Checks -----------------------------------------------------------------------------------------


def _check_positive(network: str, **sizes: Sequence[int]) -> None:
    for name, values in sizes.items():
        for value in values:
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(
                    f"{network}: {name} has a size of {value}; give a whole number, at least 1"
                )


def _check_image(
    network: str, image_shape: Sequence[int], channels: Sequence[int], halvings: int
) -> tuple[int, int, int]:
    """Height, width and depth of an image that can be halved so often."""
    if len(image_shape) not in (2, 3):
        raise ValueError(
            f"{network}: image_shape {tuple(image_shape)} is no image; give (H, W) or (H, W, C)"
        )
    if not channels:
        raise ValueError(f"{network}: channels is empty; give the channels of at least one stage")
    _check_positive(network, image_shape=image_shape, channels=channels)
    height, width, depth = (*image_shape, 1)[:3]
    if min(height, width) < 2**halvings:
        raise ValueError(
            f"{network}: an image of {height} by {width} is too small for {len(channels)} stages; "
            f"give one of at least {2**halvings} by {2**halvings}, or fewer channels"
        )
    return height, width, depth


def _as_image(network: str, x: Any, image_shape: Sequence[int]) -> jax.Array:
    """x as an (H, W, C) array."""
    x = jnp.asarray(x)
    if x.shape != tuple(image_shape):
        raise ValueError(
            f"{network}: x has shape {x.shape}; give one image of shape {tuple(image_shape)} "
            "(vmap over a batch)"
        )
    return x if x.ndim == 3 else x[..., None]
