"""What BackPACK and Opacus take for the quantities, and PyTorch for the gradient: prints JSON.

    python experiments/torch_quantities.py '{"family": "mlp", "sizes": {...}, "batch": 128, ...}'

`experiments.quantity_benchmark` runs this in an interpreter that has them, which need not have JAX.
The argument is the network and what to measure on it (`main`). The answer is, for each quantity and
each library that has it, the seconds of runs and of the gradient in alternation:
``{quantity: {library: [[...], [...]]}}``.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn

EXTENSIONS = {
    "example-gradients": "BatchGrad",
    "example-norms": "BatchL2Grad",
    "second-moment": "SumGradSquared",
    "variance": "Variance",
    "ggn-diagonal-sampled": "DiagGGNMC",
    "ggn-diagonal": "DiagGGNExact",
    "kfac": "KFAC",
    "kflr": "KFLR",
}
"""BackPACK's names; it gives them together with the gradient."""

MAX_NORM = 0.5  # clips most of the examples


# --- the networks ---------------------------------------------------------------------------------


def mlp(widths):
    layers: list[nn.Module] = []
    for i, o in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(i, o), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def convnet(image, classes, channels, kernel):
    layers: list[nn.Module] = []
    for i, o in zip([1, *channels], channels, strict=False):
        layers += [nn.Conv2d(i, o, kernel, padding=kernel // 2), nn.ReLU(), nn.MaxPool2d(2)]
    features = (image[0] >> len(channels)) * (image[1] >> len(channels)) * channels[-1]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, classes))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).reshape(n, t, width))
        inner = nn.functional.gelu(self.expand(self.norm2(x)), approximate="tanh")
        return x + self.contract(inner)


class Transformer(nn.Module):
    def __init__(self, vocabulary, length, width, heads, layers):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, x):
        places = torch.arange(x.shape[1]).expand_as(x).contiguous()  # as Opacus needs it
        x = self.tokens(x) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(case) -> tuple[Callable, torch.Tensor, torch.Tensor]:
    """A function that makes the network, and a batch of inputs and labels."""
    family, n, sizes = case["family"], case["batch"], case["sizes"]
    if family == "mlp":
        inputs, classes = torch.randn(n, sizes["widths"][0]), sizes["widths"][-1]
        return lambda: mlp(**sizes), inputs, torch.arange(n) % classes
    if family == "convnet":
        inputs = torch.randn(n, 1, *sizes["image"])
        return lambda: convnet(**sizes), inputs, torch.arange(n) % sizes["classes"]
    tokens = torch.randint(sizes["vocabulary"], (n, sizes["length"]))
    return lambda: Transformer(**sizes), tokens, tokens.roll(-1, 1)


# --- a step of each kind, and what it needs before ------------------------------------------------


def mean_loss(prediction, labels):
    """Mean over examples of the sum over positions."""
    total = nn.functional.cross_entropy(
        prediction.flatten(0, -2), labels.flatten(), reduction="sum"
    )
    return total / len(labels)


def gradient(make, inputs, labels) -> Callable:
    network = make()

    def step():
        network.zero_grad()
        mean_loss(network(inputs), labels).backward()

    return step


def by_backpack(extension, make, inputs, labels) -> Callable:
    from backpack import backpack, extend, extensions

    network, loss = extend(make()), extend(nn.CrossEntropyLoss())
    wanted = getattr(extensions, extension)()

    def step():
        network.zero_grad()
        value = loss(network(inputs), labels)
        with backpack(wanted):
            value.backward()

    return step


def by_opacus(make, inputs, labels, *, clip: bool) -> Callable:
    """Every example's gradient is formed."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    network = GradSampleModule(make(), loss_reduction="mean")
    optimizer = DPOptimizer(
        torch.optim.SGD(network.parameters(), lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=MAX_NORM,
        expected_batch_size=len(labels),
    )

    def step():
        optimizer.zero_grad()
        mean_loss(network(inputs), labels).backward()
        if clip:
            optimizer.clip_and_accumulate()
            for p in network.parameters():  # as the step does that adds the noise
                p.grad = p.summed_grad
            optimizer.scale_grad()
        else:
            norms = [p.grad_sample.flatten(1).square().sum(1) for p in network.parameters()]
            torch.stack(norms).sum(0)

    return step


def by_ghost_clipping(make, inputs, labels) -> Callable:
    """Norms from activations and error signals, then a second backward pass."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    network = GradSampleModuleFastGradientClipping(
        make(), max_grad_norm=MAX_NORM, use_ghost_clipping=True, loss_reduction="mean"
    )

    def step():
        network.zero_grad()
        losses = nn.functional.cross_entropy(
            network(inputs).transpose(1, -1), labels, reduction="none"
        )
        losses = losses.reshape(len(labels), -1).sum(1)
        losses.mean().backward(retain_graph=True)
        coefficients = network.get_clipping_coef()
        network.zero_grad()
        network.disable_hooks()
        (coefficients * losses).mean().backward()
        network.enable_hooks()

    return step


def rivals(quantity, family) -> dict[str, Callable]:
    """By their names: what prepares a step, of the network and the batch."""
    found: dict[str, Callable] = {}
    if quantity in EXTENSIONS and family != "transformer":  # attention is no module of BackPACK's
        found["BackPACK"] = lambda *a: by_backpack(EXTENSIONS[quantity], *a)
    if quantity == "example-norms" and family == "transformer":
        found["Opacus"] = lambda *a: by_opacus(*a, clip=False)
    if quantity == "clipped-gradient":
        found["Opacus"] = lambda *a: by_opacus(*a, clip=True)
        found["Opacus ghost"] = by_ghost_clipping
    return found


# --- measuring ------------------------------------------------------------------------------------


def alternate(step: Callable, unit: Callable, repeats: int, seconds: float) -> list[list[float]]:
    """Seconds of the two, in pairs whose order changes; fewer than asked for if they take long."""
    for warming in (unit, step):
        warming()
    start = time.perf_counter()
    step()
    affordable = int(seconds / (time.perf_counter() - start))
    taken: list[list[float]] = [[], []]
    for i in range(min(repeats, max(affordable, 1))):
        for side in (i % 2, 1 - i % 2):
            start = time.perf_counter()
            (step, unit)[side]()
            taken[side].append(time.perf_counter() - start)
    return taken


def main(asked) -> dict:
    """The answer to a request.

    Args:
      asked: the network's "family", "sizes" and "batch", as of `quantity_benchmark.Case`; the names
        of the "quantities"; the "repeats" of each and about how many "seconds" these may take; the
        number of "threads".
    """
    torch.set_num_threads(asked["threads"])
    torch.manual_seed(0)
    problem = build(asked)
    unit = gradient(*problem)
    return {
        quantity: {
            rival: alternate(prepare(*problem), unit, asked["repeats"], asked["seconds"])
            for rival, prepare in rivals(quantity, asked["family"]).items()
            if importlib.util.find_spec(rival.split()[0].lower())
        }
        for quantity in asked["quantities"]
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of the libraries' own use of PyTorch
    answer = main(json.loads(sys.argv[1]))
    print(json.dumps(answer))
