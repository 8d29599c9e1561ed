"""Kernels that are none, where the Triton ones would be."""

import sys
import types

import pallas_kernels

_MODULE = "fake_triton_kernels"


def register(monkeypatch, refusal, **functions) -> None:
    """Puts functions, by operation, in place of the Triton kernels, with one refusal for all."""
    module = types.ModuleType(_MODULE)
    module.refusal = refusal
    for operation, function in functions.items():
        setattr(module, operation, function)
        where = pallas_kernels.KERNELS[operation], "triton", f"{_MODULE}:{operation}"
        monkeypatch.setitem(*where)
    monkeypatch.setitem(sys.modules, _MODULE, module)
