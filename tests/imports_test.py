"""Imports run one way, and `import nsa_jax` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What each room may import of ours and of the heavier libraries, beside the standard library and
# NumPy. A file belongs to the longest name here that fits it, and every file to one.
ALLOWED = {
    "pallas_kernels": {"jax"},
    "pallas_kernels.mosaic_gpu": {
        "jax",
        "jaxlib",
        "pallas_kernels.calls",
        "pallas_kernels.lists",
        "pallas_kernels.mosaic_gpu",
    },
    "pallas_kernels.triton": {
        "jax",
        "jax_triton",
        "triton",
        "pallas_kernels.calls",
        "pallas_kernels.lists",
        "pallas_kernels.triton",
    },
    "nsa_jax.config": set(),
    "nsa_jax.typing": {"jaxtyping"},
    "nsa_jax.ops": {"jax", "nsa_jax.config", "nsa_jax.ops", "nsa_jax.typing"},
    "nsa_jax.ops.compression": {"jax", "nsa_jax.typing"},
    "nsa_jax.ops.selection": {"jax", "nsa_jax.typing"},
    "nsa_jax.ops.reference": {"jax"},
    "nsa_jax.ops.xla": {
        "jax",
        "nsa_jax.ops.compression",
        "nsa_jax.ops.selection",
        "nsa_jax.ops.xla",
        "nsa_jax.typing",
    },
    "nsa_jax.ops.dispatch": {"nsa_jax.ops.xla", "pallas_kernels"},
    "nsa_jax.rotary": {"jax", "nsa_jax.typing"},
    "nsa_jax.determinism": {"jax"},
    "nsa_jax.modules": {
        "flax",
        "jax",
        "nsa_jax.config",
        "nsa_jax.ops",
        "nsa_jax.rotary",
        "nsa_jax.typing",
    },
    "nsa_jax.model": {
        "flax",
        "jax",
        "nsa_jax.config",
        "nsa_jax.modules",
        "nsa_jax.ops.cache",
        "nsa_jax.ops.dense",
        "nsa_jax.ops.dispatch",
        "nsa_jax.typing",
    },
    "nsa_jax.decoding": {
        "jax",
        "nsa_jax.config",
        "nsa_jax.determinism",
        "nsa_jax.model",
        "nsa_jax.typing",
    },
    "nsa_jax.training": {
        "flax",
        "grain",
        "jax",
        "matplotlib",
        "ml_collections",
        "nsa_jax.config",
        "nsa_jax.decoding",
        "nsa_jax.determinism",
        "nsa_jax.model",
        "nsa_jax.ops.dense",
        "nsa_jax.ops.dispatch",
        "nsa_jax.training",
        "nsa_jax.typing",
        "optax",
        "orbax",
        "tensorboardX",
        "tqdm",
        "absl.logging",
    },
    "nsa_jax.command_line": {"absl"},
    "nsa_jax.main": {
        "absl",
        "jax",
        "ml_collections",
        "nsa_jax.command_line",
        "nsa_jax.ops.dispatch",
        "nsa_jax.training",
    },
    "nsa_jax.generate": {
        "absl",
        "nsa_jax.command_line",
        "nsa_jax.decoding",
        "nsa_jax.training",
    },
    "configs": {"ml_collections", "configs"},
    "experiments": {
        "absl",
        "configs",
        "experiments",
        "flax",
        "jax",
        "jaxlib",
        "matplotlib",
        "nsa_jax",
        "optax",
        "pallas_kernels",
        "tests.arg_specs",
    },
}
# The package's own file is no room: what lies beside it must have an entry above.
PUBLIC = {"nsa_jax.config", "nsa_jax.modules", "nsa_jax.ops", "nsa_jax.typing"}
FREE = set(sys.stdlib_module_names) | {"numpy"}


def modules():
    for top in ("nsa_jax", "pallas_kernels", "configs", "experiments"):
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name, room):
    return name == room or name.startswith(room + ".")


@pytest.mark.parametrize(
    ("module", "path"), list(modules()), ids=lambda x: x if type(x) is str else ""
)
def test_imports_run_one_way(module, path):
    rooms = [room for room in ALLOWED if within(module, room)]
    assert rooms or module == "nsa_jax", f"{module} has no entry in ALLOWED"
    allowed = ALLOWED[max(rooms, key=len)] if rooms else PUBLIC
    for name in imported(path):
        ours = any(within(name, room) for room in allowed)
        assert ours or name.split(".")[0] in FREE, f"{module} imports {name}"


def test_the_oracle_imports_nothing_of_ours():
    names = list(imported(ROOT / "nsa_jax/ops/reference.py"))
    assert names == ["jax.numpy"]


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_nsa_jax_is_light():
    code = "import nsa_jax, sys; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = set(run_python(code))
    assert not loaded & {"absl", "flax", "grain", "jax_triton", "optax", "orbax", "triton"}


def test_config_needs_no_jax():
    # The package's __init__ brings JAX; the module alone must not.
    code = (
        "import importlib.util, sys;"
        "spec = importlib.util.spec_from_file_location('config', 'nsa_jax/config.py');"
        "module = importlib.util.module_from_spec(spec); sys.modules['config'] = module;"
        "spec.loader.exec_module(module); module.NSAConfig();"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    assert "jax" not in run_python(code)


def test_every_public_name_exists():
    import nsa_jax

    for name in nsa_jax.__all__:
        assert getattr(nsa_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'NativeSparseAttentionn'"):
        _ = nsa_jax.NativeSparseAttentionn
