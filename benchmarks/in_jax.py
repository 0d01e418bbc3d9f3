"""The same work in JAX, in its fastest forms on a CPU: what Koi is measured against.

For the sine net that is ``vmap`` over the tasks and either ``scan`` over the inner steps or the
steps unrolled; for the conv net tasks and steps are unrolled, because XLA runs convolutions inside
``scan``, or with a kernel for each task, many times slower on a CPU. Everything after sampling is
one ``jit``. Sampling is done by NumPy, which takes less time here than JAX's own generator.

It runs in a process of its own, which has as many cores as JAX is to use threads:
`python in_jax.py sine '{"num_tasks": 25, "unrolled": true}' 1` does as many meta-iterations as each
line of its input says, and answers with a line.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.tree_util import tree_map

Work = Callable[[int], object]
Params = Any
Data = tuple[Any, Any]
GRID = np.linspace(-5, 5, 50, dtype=np.float32)


def glorot(rng: np.random.Generator, *shape: int) -> jax.Array:
    fan = np.prod(shape[:-2]) * (shape[-2] + shape[-1])
    return jnp.asarray(rng.uniform(-1, 1, shape) * np.sqrt(6 / fan), jnp.float32)


def sine(num_tasks: int, unrolled: bool) -> Work:
    """5 SGD steps of 10 points at 0.02 on each of ``num_tasks`` waves, ε = 0.1."""
    rng = np.random.default_rng(0)

    def loss(params: Params, batch: Data) -> jax.Array:
        x, y = batch
        for weight, bias in params[:-1]:
            x = jnp.tanh(x @ weight + bias)
        weight, bias = params[-1]
        return jnp.mean((x @ weight + bias - y) ** 2)

    def step(params: Params, batch: Data) -> tuple[Params, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, batch)
        return tree_map(lambda p, g: p - 0.02 * g, params, grads), value

    def adapt(params: Params, x: jax.Array, y: jax.Array) -> tuple[Params, jax.Array]:
        steps = x.reshape(5, 10, 1), y.reshape(5, 10, 1)
        return jax.lax.scan(step, params, steps, unroll=5 if unrolled else 1)

    @partial(jax.jit, donate_argnums=0)
    def meta_iteration(phi: Params, x: jax.Array, y: jax.Array) -> tuple[Params, jax.Array]:
        adapted, losses = jax.vmap(adapt, (None, 0, 0))(phi, x, y)
        return tree_map(lambda p, a: p + 0.1 * (a.mean(0) - p), phi, adapted), losses

    def sample() -> Data:
        amplitude, phase = rng.random((2, num_tasks, 1), dtype=np.float32)
        x = rng.permuted(np.broadcast_to(GRID, (num_tasks, 50)), axis=1)
        return x, (0.1 + 4.9 * amplitude) * np.sin(x + np.float32(2 * np.pi) * phase)

    sizes = [1, 64, 64, 1]
    phi = [(glorot(rng, i, o), jnp.zeros(o)) for i, o in itertools.pairwise(sizes)]

    def train(num_iterations: int) -> None:
        nonlocal phi
        for _ in range(num_iterations):
            phi, losses = meta_iteration(phi, *sample())
            np.asarray(losses)  # as in Koi's records; waits until they are there

    return train


def images(num_tasks: int = 5) -> Work:
    """5 Adam steps of 10 images at 0.001, the second moment carried, ε = 1."""
    rng = np.random.default_rng(0)

    def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        *blocks, (weight, bias) = params
        for kernel, offset, scale, shift in blocks:
            layout = ("NHWC", "HWIO", "NHWC")
            pads = ((1, 1), (1, 1))
            x = jax.lax.conv_general_dilated(x, kernel, (2, 2), pads, dimension_numbers=layout)
            x = x + offset
            mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
            x = jax.nn.relu((x - mean) * jax.lax.rsqrt(variance + 1e-3) * scale + shift)
        scores = jax.nn.log_softmax(x.reshape(x.shape[0], -1) @ weight + bias)
        return -jnp.take_along_axis(scores, y[:, None], 1).mean()

    def adapt(
        params: Params, second: Params, count: jax.Array, x: jax.Array, y: jax.Array
    ) -> tuple[Params, Params, jax.Array]:
        losses = []
        for step in range(5):
            value, grads = jax.value_and_grad(loss)(params, x[step], y[step])
            second = tree_map(lambda v, g: 0.999 * v + 0.001 * g * g, second, grads)
            correction = 1 - 0.999 ** (count + step + 1)
            params = tree_map(
                lambda p, g, v, c=correction: p - 0.001 * g / (jnp.sqrt(v / c) + 1e-8),
                params,
                grads,
                second,
            )
            losses.append(value)
        return params, second, jnp.stack(losses)

    @partial(jax.jit, donate_argnums=(0, 1))
    def meta_iteration(
        phi: Params, second: Params, count: jax.Array, x: jax.Array, y: jax.Array
    ) -> tuple[Params, Params, jax.Array]:
        results = [adapt(phi, second, count, x[i], y[i]) for i in range(num_tasks)]
        adapted, seconds, losses = zip(*results, strict=True)
        mean = partial(tree_map, lambda *leaves: sum(leaves) / num_tasks)
        return mean(*adapted), mean(*seconds), jnp.stack(losses)

    phi: Params = [
        (glorot(rng, 3, 3, i, 64), jnp.zeros(64), jnp.ones(64), jnp.zeros(64))
        for i in (1, 64, 64, 64)
    ] + [(glorot(rng, 256, 5), jnp.zeros(5))]
    second, count = tree_map(jnp.zeros_like, phi), 0

    def train(num_iterations: int) -> None:
        nonlocal phi, second, count
        for _ in range(num_iterations):
            x = rng.random((num_tasks, 5, 10, 28, 28, 1), dtype=np.float32)
            y = rng.integers(5, size=(num_tasks, 5, 10), dtype=np.int32)
            phi, second, losses = meta_iteration(phi, second, np.float32(count), x, y)
            np.asarray(losses)
            count += 5

    return train


def main() -> None:
    kind, settings, threads = sys.argv[1:]
    if hasattr(os, "sched_setaffinity"):  # JAX has no option for the number of its threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(threads)])
    train = {"sine": sine, "images": images}[kind](**json.loads(settings))
    for line in sys.stdin:
        train(int(line))
        print("done", flush=True)


if __name__ == "__main__":
    main()
