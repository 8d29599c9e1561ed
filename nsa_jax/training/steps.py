"""The compiled steps: initialisation, one update on one batch, the sums of one validation batch.

Each step runs under shard_map, so that a device sees its own rows as plain arrays. Kernels that the
compiler cannot partition thus work unchanged, and every sum over devices is written out.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from nsa_jax import determinism
from nsa_jax.model import Transformer
from nsa_jax.training import loss, parallel
from nsa_jax.training.errors import NonFiniteError
from nsa_jax.training.loss import TokenSums
from nsa_jax.typing import Array

Batch = dict[str, Array]


class TrainState(NamedTuple):
    """What an update reads and writes, and a checkpoint holds.

    Attributes:
      params: the model's parameters.
      opt_state: of the Optax transformation.
      step: int32 [], updates made; also the position in the data and in the dropout stream.
    """

    params: Any
    opt_state: Any
    step: Array


class StepMetrics(NamedTuple):
    """Scalars of one update, of the parameters before it. On the device until they are asked for.

    Attributes:
      sums: over the whole batch.
      gradient_norm: before clipping.
      update_norm: of what was added to the parameters.
      learning_rate: of this update.
    """

    sums: TokenSums
    gradient_norm: Array
    update_norm: Array
    learning_rate: Array


def new_state(
    model: Transformer, optimizer: optax.GradientTransformation, key: Array
) -> TrainState:
    """The state of step 0, with parameters drawn from `key`."""
    tokens = jnp.zeros((1, model.config.nsa.select_block_size), jnp.int32)
    params = model.init(key, tokens)["params"]
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def init_state(
    model: Transformer, optimizer: optax.GradientTransformation, key: Array, mesh: Mesh
) -> tuple[Callable[[], TrainState], TrainState]:
    """Returns a function that makes the state of step 0, and the state's abstract form.

    Args:
      model: the model.
      optimizer: the transformation that the train step will use.
      key: random key of the parameters.
      mesh: the state lies on every device of it.

    Returns:
      make: returns the state, the same on every device.
      abstract: jax.ShapeDtypeStruct with shardings in place of arrays; costs no memory.
    """
    make = partial(new_state, model, optimizer)
    sharding = parallel.replicated(mesh)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(make, key),
    )
    return lambda: determinism.jit(make, out_shardings=sharding)(key), abstract


def make_train_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Array], Array],
    *,
    accumulate: int,
    dropout_key: Array,
    mesh: Mesh,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Returns the compiled update; it donates the state that it is given.

    The gradient is that of sum(weight * nats) / sum(weight) over the whole batch, whatever the
    number of devices and microbatches, because the divisor is known before the first microbatch.
    What layers sow as "losses" is added to it, in the mean over devices and microbatches.
    Dropout draws from (step, microbatch, device), so with dropout the number of devices matters.

    Args:
      model: the model.
      optimizer: the transformation; sees the gradient of the whole batch.
      schedule: learning rate by updates made, for the metrics.
      accumulate: microbatches a batch is cut into; divides the rows of each device.
      dropout_key: random key of dropout.
      mesh: from `parallel.data_mesh`.
    """

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        total_weight = jax.lax.psum(jnp.sum(batch["weights"]), parallel.AXIS)
        key = jax.random.fold_in(dropout_key, state.step)
        key = jax.random.fold_in(key, jax.lax.axis_index(parallel.AXIS))

        def share(params: Any, rows: Batch, key: Array) -> tuple[Array, TokenSums]:
            logits, sown = model.apply(
                {"params": params},
                rows["tokens"],
                document_starts=rows["document_starts"],
                deterministic=False,
                rngs={"dropout": key},
                mutable=["losses"],
            )
            sums = loss.token_sums(logits, rows["targets"], rows["weights"])
            value = sums.nats / total_weight
            for extra in jax.tree.leaves(sown):
                value += jnp.sum(extra) / (accumulate * mesh.size)
            return value, sums

        def microbatch(carry, indexed):
            index, rows = indexed
            gradient, sums = jax.grad(share, has_aux=True)(
                state.params, rows, jax.random.fold_in(key, index)
            )
            return jax.tree.map(jnp.add, carry, (gradient, sums)), None

        # Row r of a device goes to microbatch r % accumulate.
        microbatches = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )
        zeros = (jax.tree.map(jnp.zeros_like, state.params), TokenSums(*[jnp.zeros(())] * 3))
        totals, _ = jax.lax.scan(microbatch, zeros, (jnp.arange(accumulate), microbatches))
        gradient, sums = jax.lax.psum(totals, parallel.AXIS)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        metrics = StepMetrics(
            sums=sums,
            gradient_norm=optax.tree.norm(gradient),
            update_norm=optax.tree.norm(updates),
            learning_rate=jnp.asarray(schedule(state.step), jnp.float32),
        )
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1), metrics

    # check_vma would make autodiff insert the sums over devices that are written out above.
    sharded = jax.shard_map(
        update, mesh=mesh, in_specs=(P(), P(parallel.AXIS)), out_specs=P(), check_vma=False
    )
    return determinism.jit(sharded, donate_argnums=0)


def make_eval_step(model: Transformer, mesh: Mesh) -> Callable[[Any, Batch], TokenSums]:
    """Returns the compiled sums of one batch over all devices, without dropout."""

    def sums(params: Any, batch: Batch) -> TokenSums:
        logits = model.apply(
            {"params": params}, batch["tokens"], document_starts=batch["document_starts"]
        )
        local = loss.token_sums(logits, batch["targets"], batch["weights"])
        return jax.lax.psum(local, parallel.AXIS)

    sharded = jax.shard_map(
        sums, mesh=mesh, in_specs=(P(), P(parallel.AXIS)), out_specs=P(), check_vma=False
    )
    return determinism.jit(sharded)


def evaluate(
    eval_step: Callable[[Any, Batch], TokenSums], params: Any, batches: Iterable, mesh: Mesh
) -> dict[str, float]:
    """Returns the means over all weighted targets of the batches.

    Sums of batches are added in float64 on the host: the size of the set costs no precision.

    Args:
      eval_step: from `make_eval_step`.
      params: the model's parameters.
      batches: an iterable of this process's shares of batches.
      mesh: from `parallel.data_mesh`.

    Returns:
      loss: nats a target. bits_per_byte: the same in bits. accuracy: share of targets guessed.

    Raises:
      NonFiniteError: if the loss is infinite or NaN.
    """
    totals, pending = [], None
    for batch in batches:
        dispatched = eval_step(params, parallel.global_batch(batch, mesh))
        if pending is not None:  # read with one batch in flight: waits, but queues no more than one
            totals.append(jax.device_get(pending))
        pending = dispatched
    totals.append(jax.device_get(pending))
    nats, weight, correct = (math.fsum(column) for column in zip(*totals, strict=True))
    mean = nats / weight
    if not math.isfinite(mean):
        raise NonFiniteError(f"the validation loss is {mean}, while that of training was finite")
    return {"loss": mean, "bits_per_byte": loss.bits(mean), "accuracy": correct / weight}
