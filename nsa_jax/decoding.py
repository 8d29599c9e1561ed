"""Text from a model: a prompt goes through it in chunks, then one token after the other.

    cache = model.init_cache(batch_size, capacity)
    logits, cache = prefill(model, params, prompts, cache)
    logits, cache = model.apply({"params": params}, tokens, cache=cache)  # one step, under jax.jit

`stream` and `generate` do all of that, and draw the tokens.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nsa_jax import determinism
from nsa_jax.config import check_integer
from nsa_jax.model import LayerCache, Transformer
from nsa_jax.typing import Array, Float, Int

CHUNK_SIZE = 256


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the logits.

    Attributes:
      temperature: divides the logits; 0 takes the most probable token, the lowest of equals.
      top_k: draws among so many of the most probable tokens; 0 among all.
      top_p: draws among the fewest most probable tokens that have this probability together, after
        temperature and top_k; 1 among all.

    Raises:
      ValueError: if a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        check_integer("top_k", self.top_k, 0)
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 (most probable) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")


def unrolled(model: Transformer, params: Any) -> tuple[Transformer, Any]:
    """The same model without scan_layers, and its parameters layer by layer.

    Args:
      model: of any config; one without scan_layers is returned as it is.
      params: its parameters.
    """
    config = model.config
    if not config.scan_layers:
        return model, params
    rest = {name: x for name, x in params.items() if name != "layers"}
    for layer in range(config.num_layers):
        rest[f"layers_{layer}"] = jax.tree.map(lambda x: x[layer], params["layers"])
    return Transformer(dataclasses.replace(config, scan_layers=False)), rest


def prefill(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    cache: tuple[LayerCache, ...],
    *,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Float[Array, "B vocab"], tuple[LayerCache, ...]]:
    """Puts a prompt a row into the cache, in chunks of one static shape.

    Not to be called while another function is traced: see `nsa_jax.determinism`.

    Args:
      model: without scan_layers; see `unrolled`.
      params: its parameters.
      prompts: B sequences of token ids, of any lengths from 1 on.
      cache: from `model.init_cache`, or what a call returned; donated, not to be used again.
      chunk_size: tokens of a row that are computed together.

    Returns:
      float32 logits of the token after each prompt, and the new cache.

    Raises:
      ValueError: if a prompt is empty, longer than what the cache has room for, or has an id that
        is no token.
    """
    check_integer("chunk_size", chunk_size, 1)
    _check_prompts(prompts, model.config.vocab_size, cache, 0)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    size = min(chunk_size, cache[0].capacity)
    tokens = np.zeros((len(prompts), -(-lengths.max() // size) * size), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = list(prompt)
    logits = jnp.zeros((len(prompts), model.config.vocab_size), jnp.float32)
    for start in range(0, tokens.shape[1], size):
        counts = np.clip(lengths - start, 0, size)
        chunk = tokens[:, start : start + size]
        logits, cache = _extend(model, params, chunk, counts, logits, cache)
    return logits, cache


@partial(determinism.jit, static_argnames="model", donate_argnames="cache")
def _extend(model, params, tokens, counts, logits, cache):
    """Logits behind the last token that counts, the old ones where none does; and the new cache."""
    new, cache = model.apply({"params": params}, tokens, cache=cache, counts=counts)
    last = jnp.maximum(counts - 1, 0)[:, None, None]
    new = jnp.take_along_axis(new, last, axis=1)[:, 0]
    return jnp.where(counts[:, None] > 0, new, logits), cache


def draw(
    logits: Float[Array, "B vocab"],
    keys: Array,
    temperature: Float[Array, ""] | float,
    top_k: Int[Array, ""] | int,
    top_p: Float[Array, ""] | float,
) -> Int[Array, " B"]:
    """One token a row; see `Sampling`.

    Args:
      logits: -inf for what must not be drawn.
      keys: a random key for each row.
      temperature: may be traced, as may the two below.
      top_k: 0 for all.
      top_p: 1 for all.

    Returns:
      int32 token ids.
    """
    order = jnp.argsort(logits, axis=-1, stable=True, descending=True)  # the lower of equals first
    logits = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    kept = (logits > -jnp.inf) & ((top_k == 0) | (rank < top_k))
    # Counted from the largest one, a logit over the smallest temperature is no positive infinity.
    scaled = (logits - logits[:, :1]) / jnp.where(temperature > 0, temperature, 1.0)
    scaled = jnp.where(kept, scaled, -jnp.inf)
    p = jax.nn.softmax(scaled, axis=-1)
    more_probable = jnp.cumsum(p, axis=-1) - p
    # Rounding may leave the sum below 1: a top_p of 1 cuts nothing.
    scaled = jnp.where((top_p >= 1) | (rank == 0) | (more_probable < top_p), scaled, -jnp.inf)
    drawn = jax.vmap(jax.random.categorical)(keys, scaled)
    place = jnp.where(temperature > 0, drawn, 0)
    return jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0].astype(jnp.int32)


@determinism.jit
def _draw(logits, positions, allowed, seed, sampling):
    """Draws row r's token at its position from a stream of its own: keys of (seed, r, position)."""
    fold = jax.vmap(jax.random.fold_in)
    rows = jnp.arange(logits.shape[0])
    keys = fold(fold(jnp.broadcast_to(jax.random.key(seed), rows.shape), rows), positions)
    return draw(jnp.where(allowed, logits, -jnp.inf), keys, *sampling)


def stream(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[Sequence[int]] = (),
    forbidden: Sequence[int] = (),
    seed: int = 0,
    capacity: int | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Iterator[list[int | None]]:
    """Continues each prompt, token by token; the same arguments give the same tokens.

    Args:
      model: any Transformer.
      params: its parameters.
      prompts: B sequences of token ids (bytes will do), of any lengths from 1 on.
      max_new_tokens: where a row ends at the latest.
      sampling: how tokens are drawn; as the model's probabilities say by default.
      stop: sequences of tokens (bytes will do), each of which ends the row that has come to end
        with it by its new tokens.
      forbidden: ids that are never drawn.
      seed: of what is drawn. The token at a position of a row depends on it, on the row's number
        and on the position, not on where the prompt ends.
      capacity: tokens of a row that the caches have room for; by default as many as are needed.
        Each capacity has programs of its own to compile: over many calls, give one.
      chunk_size: tokens of a prompt that are computed together.

    Returns:
      An iterator over the steps. Each gives B token ids, None for a row that has ended. It ends
      when all rows have.

    Raises:
      ValueError: at once, if a prompt is empty, has an id that is no token, or does not fit into
        the cache together with the new tokens.
    """
    check_integer("max_new_tokens", max_new_tokens, 0)
    check_integer("chunk_size", chunk_size, 1)
    check_integer("seed", seed, 0)
    if seed >= 2**31:
        raise ValueError(f"seed={seed} must be below 2**31")
    if capacity is None:
        capacity = max([1, *(len(prompt) + max_new_tokens for prompt in prompts)])
    vocab_size = model.config.vocab_size
    allowed = np.ones(vocab_size, bool)
    allowed[_ids(forbidden, vocab_size, "forbidden")] = False
    if not allowed.any():
        raise ValueError("forbidden leaves no token to draw")
    stop = [_ids(ending, vocab_size, "stop") for ending in stop]
    if [] in stop:
        raise ValueError("stop must not have an empty sequence")
    model, params = unrolled(model, jax.tree.map(jnp.asarray, params))
    cache = model.init_cache(max(len(prompts), 1), capacity)
    _check_prompts(prompts, vocab_size, cache, max_new_tokens)
    sampling = sampling or Sampling()
    top_k = min(sampling.top_k, vocab_size)
    settings = (allowed, seed, (sampling.temperature, top_k, sampling.top_p))
    return _steps(model, params, prompts, cache, settings, max_new_tokens, stop, chunk_size)


def _steps(model, params, prompts, cache, settings, max_new_tokens, stop, chunk_size):
    """The iterator that `stream` returns, of arguments that fit."""
    logits, cache = prefill(model, params, prompts, cache, chunk_size=chunk_size)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    rows, active = [[] for _ in prompts], np.ones(len(prompts), bool)
    for index in range(max_new_tokens):
        drawn = _draw(logits, lengths + index, *settings)
        step = [int(x) if on else None for x, on in zip(np.asarray(drawn), active, strict=True)]
        yield step
        for row in np.flatnonzero(active):
            rows[row].append(step[row])
            active[row] = not any(rows[row][-len(ending) :] == ending for ending in stop)
        if not active.any() or index + 1 == max_new_tokens:
            return  # nothing comes after the last tokens, and they go into no cache
        counts = active.astype(np.int32)
        logits, cache = _extend(model, params, drawn[:, None], counts, logits, cache)


def generate(
    model: Transformer, params: Any, prompts: Sequence[Sequence[int]], **keywords
) -> list[list[int]]:
    """The new tokens of each row, those of `stop` included; arguments and errors as of `stream`."""
    rows = [[] for _ in prompts]
    for tokens in stream(model, params, prompts, **keywords):
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                row.append(token)
    return rows


def _check_prompts(prompts, vocab_size, cache, max_new_tokens):
    """Raises ValueError unless the prompts are tokens that the cache has room for."""
    if not len(prompts):
        raise ValueError("there must be a prompt at least")
    capacity, held = cache[0].capacity, np.asarray(cache[0].length)
    if len(held) != len(prompts):
        raise ValueError(f"the cache is of {len(held)} rows, and there are {len(prompts)} prompts")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty; it must have a token at least")
        _ids(prompt, vocab_size, f"prompt {row}")
        parts = [f"prompt {row} of {len(prompt)} tokens"]
        parts += [f"{held[row]} before it"] if held[row] else []
        parts += [f"{max_new_tokens} new ones"] if max_new_tokens else []
        if held[row] + len(prompt) + max_new_tokens > capacity:
            raise ValueError(f"{' and '.join(parts)} do not fit into a cache of {capacity}")


def _ids(tokens, vocab_size, name) -> list[int]:
    """The ids as a list; raises ValueError if one of them is no token."""
    ids = list(tokens)
    for token in ids:
        if not hasattr(token, "__index__") or not 0 <= token < vocab_size:
            allowed = f"an integer from 0 to {vocab_size - 1}"
            raise ValueError(f"{name}: token {token!r} must be {allowed}")
    return list(map(int, ids))
