"""Public PyTorch implementations of NSA, which kernel_bench times beside ours.

They depend on PyTorch and Triton, on which nsa_jax does not:

    fla     flash-linear-attention: pip install torch flash-linear-attention
    xunhao  github.com/XunhaoLai/native-sparse-attention-triton, on PYTHONPATH, with a Triton before
            3.9, which has no block pointers any more

What of them computes the same as one of our operations, on the same arrays, is timed: fla selects
by means of blocks of 64 keys that do not overlap, a quarter of the paper's compressed keys, so its
compressed branch is another operation. Neither has a kernel of its own for the window.
"""

import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from experiments import timing
from tests.arg_specs import ArgSpec


@dataclasses.dataclass(frozen=True)
class Peer:
    """A public implementation.

    Attributes:
      module: whose import shows that it is there.
      source: where to get it.
      operations: by the name of ours, from the shapes and a dict of arrays to a function without
        arguments that returns the output, and the tensors that have a gradient.
    """

    module: str
    source: str
    operations: dict[str, Callable]


def _torch():
    return importlib.import_module("torch")


def _tensor(x, needs_gradient: bool = False):
    """The same memory as a tensor."""
    return _torch().from_dlpack(x).detach().requires_grad_(needs_gradient)


def _variables(arrays, name):
    return [_tensor(x, True) for x in (arrays["q"], *arrays[name])]


def _lengths(length, like):
    """Where sequences begin and end, of which there is one; on the device of a tensor."""
    return _torch().tensor([0, length], dtype=_torch().int32, device=like.device)


def _blocks_first(blocks):
    """Blocks [B, T, K, n] in ascending order, those that are none (-1) last."""
    none = jnp.iinfo(jnp.int32).max
    ascending = jnp.sort(jnp.where(blocks < 0, none, blocks), axis=-1)
    return jnp.where(ascending == none, -1, ascending)


def _check_widths(spec: ArgSpec):
    """Raises ValueError for values of another width, with which xunhao returns something else."""
    if spec.head_dim != spec.v_head_dim:
        raise ValueError(
            f"xunhao takes as many features in v as in k, not {spec.v_head_dim} and {spec.head_dim}"
        )


def _xunhao_selected(name):
    def make(spec: ArgSpec, arrays):
        _check_widths(spec)
        ops = importlib.import_module("native_sparse_attention.ops.triton.topk_sparse_attention")
        variables = _variables(arrays, "selected")
        blocks = _tensor(jnp.moveaxis(_blocks_first(arrays[name])[0], 0, 1))
        lengths = _lengths(spec.length, blocks)

        def run():
            rows = (x.squeeze(0) for x in variables)
            size = spec.nsa.select_block_size
            return ops.topk_sparse_attention(*rows, blocks, size, lengths)[None]

        return run, variables

    return make


def _xunhao_compressed(selecting: bool):
    """The compressed branch; `selecting`, with the choice of blocks, which comes only with it."""

    def make(spec: ArgSpec, arrays):
        _check_widths(spec)
        ops = importlib.import_module("native_sparse_attention.ops.triton.compressed_attention")
        variables, nsa = _variables(arrays, "compressed"), spec.nsa
        lengths = spec.length, variables[1].shape[1]
        sizes = nsa.compress_block_size, nsa.compress_stride
        attend = ops.CompressedAttention.apply
        if selecting:
            sizes += nsa.select_block_size, nsa.num_selected_blocks
            fixed = {"init_blocks": nsa.num_initial_blocks, "local_blocks": nsa.num_local_blocks}
            attend = functools.partial(ops.compressed_attention, **fixed)

        def run():
            rows = (x.squeeze(0) for x in variables)
            ends = (_lengths(x, variables[0]) for x in lengths)
            out, _ = attend(*rows, *sizes, *ends, *lengths)
            return out[None]

        return run, [] if selecting else variables

    return make


def _fla_selected(name):
    def make(spec: ArgSpec, arrays):
        ops = importlib.import_module("fla.ops.nsa.parallel")
        variables = _variables(arrays, "selected")
        blocks = _tensor(_blocks_first(arrays[name]))
        counts = (blocks >= 0).sum(-1)

        def run():
            size, scale = spec.nsa.select_block_size, spec.head_dim**-0.5
            return ops.ParallelNSAFunction.apply(*variables, blocks, counts, size, scale, None)

        return run, variables

    return make


PEERS = {
    "fla": Peer(
        "fla.ops.nsa.parallel",
        "pip install torch flash-linear-attention",
        {
            "selected": _fla_selected("blocks"),
            "selected_overlap": _fla_selected("overlapping"),
        },
    ),
    "xunhao": Peer(
        "native_sparse_attention.ops.triton.topk_sparse_attention",
        "github.com/XunhaoLai/native-sparse-attention-triton on PYTHONPATH, beside PyTorch",
        {
            "compressed": _xunhao_compressed(selecting=False),
            "compressed_and_select_blocks": _xunhao_compressed(selecting=True),
            "selected": _xunhao_selected("blocks"),
            "selected_overlap": _xunhao_selected("overlapping"),
        },
    ),
}


def missing(name: str) -> str | None:
    """Why a peer cannot be timed here, or None."""
    peer = PEERS[name]
    try:
        importlib.import_module(peer.module)
    except Exception as error:  # a driver or a Triton that it does not go with, too
        return f"--peers={name}: {peer.module} cannot be imported ({error}). Get it: {peer.source}."
    return None


def versions(names: list[str]) -> dict[str, str]:
    """What peers that were found by `missing` say of their versions, and what they depend on."""
    modules = ("torch", "triton", *(PEERS[x].module.split(".")[0] for x in names))
    found = {x: sys.modules[x] for x in modules if x in sys.modules}
    return {x: getattr(module, "__version__", "unknown") for x, module in found.items()}


def measure(
    name: str, operations: list[str], spec: ArgSpec, arrays: dict, ours: dict, repeats: int
) -> Iterator[dict]:
    """Times a peer.

    Args:
      name: of PEERS.
      operations: which of its operations.
      spec: the shapes.
      arrays: the inputs of `timing.inputs`.
      ours: by operation, what ours returns of them.
      repeats: samples of each.

    Yields:
      By operation and pass, dicts with a `timing.Timing` or the sentence of why there is none as
      "result" and, forward, "difference", the largest one from what ours returns.
    """
    for operation in operations:
        make = PEERS[name].operations[operation]
        made = timing.attempt(lambda make=make: make(spec, arrays))
        if isinstance(made, str):
            yield {"operation": operation, "pass": "forward", "result": made}
            continue
        run, variables = made
        row = {"operation": operation, "pass": "forward", "result": _forward(run, repeats)}
        if operation in ours and not isinstance(row["result"], str):
            row["difference"] = timing.attempt(
                lambda run=run, out=ours[operation]: _difference(run, out)
            )
        yield row
        if variables:
            cotangent = _tensor(arrays["cotangent"])
            result = timing.attempt(lambda: _backward(run, variables, cotangent, repeats))
            yield {"operation": operation, "pass": "backward", "result": result}
        made = run = variables = None
        _torch().cuda.empty_cache()


def _wait(_):
    _torch().cuda.synchronize()


def _forward(run, repeats):
    def without_gradients():
        with _torch().no_grad():
            return run()

    return timing.attempt(lambda: timing.measure(without_gradients, (), repeats, wait=_wait))


def _backward(run, variables, cotangent, repeats):
    out = run()

    def pull():
        return _torch().autograd.grad(out, variables, cotangent, retain_graph=True)

    return timing.measure(pull, (), repeats, wait=_wait)


def _difference(run, ours):
    with _torch().no_grad():
        out = jnp.from_dlpack(run())
    return float(jax.jit(lambda x, y: jnp.abs(x.astype(jnp.float32) - y).max())(out, ours))
