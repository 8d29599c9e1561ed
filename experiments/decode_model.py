"""What decode_bench times of whole models: one step of a transformer over a cache of random data.

Nothing here reads flags.
"""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments import timing
from experiments.decode_cases import RUNS
from nsa_jax.model import Transformer, TransformerConfig
from tests.arg_specs import ArgSpec

#: The paper's model is as wide (section 4.1), its MLP a mixture of experts.
SIZES = {"num_layers": 2, "model_dim": 2560, "mlp_dim": 6912, "vocab_size": 32768}


def measure(
    spec: ArgSpec, implementation: str, repeats: int, sizes: dict[str, int] | None = None
) -> Iterator[dict[str, Any]]:
    """Times a step of a model with NSA, and of one with dense attention.

    Embedding, projections, writes to the cache, MLPs and logits are part of it; both models have
    the same sizes and compute in bfloat16. `RUNS` steps are one program.

    Args:
      spec: batch, heads and features; its length is that of the caches, which are nearly full.
      implementation: of NSA; dense attention takes "auto".
      repeats: samples of each.
      sizes: of the model; `SIZES` by default.

    Yields:
      Rows with "operation", and "ms" or the "reason" why there are none.
    """
    for attention, name in (("nsa", implementation), ("dense", "auto")):
        config = TransformerConfig(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            v_head_dim=spec.v_head_dim,
            attention=attention,
            nsa=spec.nsa,
            implementation=name,
            dtype="bfloat16",
            param_dtype="bfloat16",
            **(sizes or SIZES),
        )
        model = Transformer(config)
        result = timing.attempt(lambda model=model: _milliseconds(model, spec, repeats))
        found = {"reason": result} if isinstance(result, str) else {"ms": result}
        yield {"operation": f"model_{attention}"} | found


def _milliseconds(model: Transformer, spec: ArgSpec, repeats: int) -> float:
    steps = RUNS * (repeats + 1)
    if spec.length <= steps:
        raise ValueError(f"a cache of {spec.length} tokens has no room for {steps} steps")
    params, cache = jax.jit(lambda: _filled(model, spec, spec.length - steps))()

    def run(params, token, cache):
        def step(_, carry):
            token, cache = carry
            logits, cache = model.apply({"params": params}, token, cache=cache)
            return logits[:, -1:].argmax(axis=-1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, RUNS, step, (token, cache))

    run = jax.jit(run, donate_argnums=2)
    token, samples = jnp.zeros((spec.batch, 1), jnp.int32), []
    for _ in range(repeats + 1):  # the first one compiles and warms up
        start = time.perf_counter()
        token, cache = run(params, token, cache)
        jax.block_until_ready(token)
        samples.append(1e3 * (time.perf_counter() - start) / RUNS)
    return statistics.median(samples[1:])


def _filled(model: Transformer, spec: ArgSpec, length: int):
    """Small random parameters, and a cache of so many random tokens."""
    keys = iter(jax.random.split(jax.random.key(0), 1000))

    def normal(x, scale):
        if x.dtype == jnp.int32:
            return jnp.full(x.shape, length, jnp.int32)
        # Row by row: no single draw has more numbers than 32 bits can count.
        rows = jax.random.split(next(keys), x.shape[0])
        draw = jax.lax.map(lambda key: jax.random.normal(key, x.shape[1:], x.dtype), rows)
        return scale * draw

    token = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), token)["params"]
    cache = jax.eval_shape(lambda: model.init_cache(spec.batch, spec.length))
    return jax.tree.map(lambda x: normal(x, 0.02), shapes), jax.tree.map(
        lambda x: normal(x, 1.0), cache
    )
