"""What a run would cost, without training: parameters, attention, memory."""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from nsa_jax.config import NSAConfig
from nsa_jax.training import checkpoint, parallel
from nsa_jax.training.setup import Setup, parameter_count, prepare


def report(settings: ConfigDict) -> str:
    """Returns the report as lines of text; compiles the train step but runs nothing.

    Args:
      settings: the keys of configs/default.py.

    Raises:
      ConfigError: if the configuration is wrong.
      UnsupportedError: if the implementation asked for by name cannot run here.
    """
    setup = prepare(settings)
    run, params = setup.run, setup.abstract_state.params
    lines = [f"parameters: {parameter_count(params):,}"]
    lines += _parameter_lines(params)
    lines += attention_lines(run.model.nsa, run.data.seq_len, run.model.attention)
    lines += _memory_lines(setup)
    return "\n".join(lines)


def keys_attended(nsa: NSAConfig, seq_len: int) -> dict[str, float]:
    """Counts the keys that a query of each branch scores, averaged over the positions of a row.

    The row is one document, which is the most expensive case. Every branch is counted on its own,
    so a token in two branches counts twice, as it costs twice.

    Args:
      nsa: the geometry.
      seq_len: T.

    Returns:
      compressed: blocks complete at the query: i * d + l - 1 <= t.
      selected: tokens up to the query in its selected blocks. With num_local_blocks=0 the query's
        own block may be left out; it is counted in.
      window: min(t + 1, w).
      full: t + 1, what full attention scores.
    """
    t = np.arange(seq_len)
    complete = (t - nsa.compress_block_size + 1) // nsa.compress_stride + 1
    own_block = t // nsa.select_block_size
    older = np.minimum(own_block, nsa.num_selected_blocks - 1) * nsa.select_block_size
    counts = {
        "compressed": np.maximum(complete, 0),
        "selected": older + t % nsa.select_block_size + 1,
        "window": np.minimum(t + 1, nsa.window_size),
        "full": t + 1,
    }
    return {name: float(count.mean()) for name, count in counts.items()}


def attention_lines(nsa: NSAConfig, seq_len: int, attention: str) -> list[str]:
    """Returns the lines on the cost of attention at this length."""
    keys = keys_attended(nsa, seq_len)
    full = keys.pop("full")
    if attention == "dense":
        return [f"attention at T={seq_len}: {full:,.1f} keys a query, full attention"]
    total = sum(keys.values())
    lines = [f"attention at T={seq_len}, keys a query on average over the positions:"]
    lines += [f"  {name:<10} {count:>10,.1f}" for name, count in keys.items()]
    lines += [
        f"  {'NSA':<10} {total:>10,.1f}",
        f"  {'full':<10} {full:>10,.1f}",
        f"  NSA attends {total / full:.1%} of the keys of full attention, "
        f"{full / total:.2f} times fewer"
        if total <= full
        else f"  NSA attends {total / full:.2f} times the keys of full attention at this length",
    ]
    return lines


def _parameter_lines(params) -> list[str]:
    sizes: dict[str, int] = {}
    for name, leaf in checkpoint.state_names(params).items():
        parts = [part for part in name.split("/") if not part.startswith("layers")]
        sizes[parts[0]] = sizes.get(parts[0], 0) + leaf.size
    return [f"  {name:<15} {size:>12,}" for name, size in sizes.items()]


def _memory_lines(setup: Setup) -> list[str]:
    run, mesh = setup.run, setup.mesh
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(parallel.AXIS))
    shape = (run.data.batch_size, run.data.seq_len)
    dtypes = {
        "tokens": jnp.int32,
        "targets": jnp.int32,
        "weights": jnp.float32,
        "document_starts": jnp.int32,
    }
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, dtype in dtypes.items()
    }
    memory = setup.train_step.lower(setup.abstract_state, batch).compile().memory_analysis()
    if memory is None:
        return ["memory: this backend's compiler gives no estimate"]
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    # The new state is written over the donated old one, so only the rest of the output counts.
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts = {
        "state and batch": arguments,
        "temporaries": temporaries,
        "outputs": output,
        "together": arguments + temporaries + output,
    }
    lines = [f"memory of a train step on each of {mesh.size} device(s), the compiler's estimate:"]
    return lines + [f"  {name:<15} {size / 2**20:>10,.1f} MiB" for name, size in parts.items()]
