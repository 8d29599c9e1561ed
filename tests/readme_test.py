"""The README's code runs as it stands, and its commands exist."""

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(block):
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_plain_jax():
    names = run(BLOCKS[0])
    assert names["out"].shape == (1, 2048, 16, 64)
    assert names["block_indices"].shape == (1, 2048, 1, 16)


def test_flax_linen():
    names = run(BLOCKS[1])
    assert names["y"].shape == names["x"].shape
    assert names["gates"].shape == (1, 1024, 16, 3)
    dense = names["dense"]
    params = dense.init(jax.random.key(0), names["x"])
    assert dense.apply(params, names["x"]).shape == names["x"].shape


def test_flax_nnx():
    names = run(BLOCKS[2])
    leaves = jax.tree.leaves(names["gradients"])
    assert leaves
    assert all(bool(jax.numpy.isfinite(leaf).all()) for leaf in leaves)
    assert any(bool((leaf != 0).any()) for leaf in leaves)


def test_decoding():
    names = run(BLOCKS[3])
    assert names["logits"].shape == (2, 1, 256)
    assert names["cache"][0].length.tolist() == [5, 3]
    assert [len(row) for row in names["rows"]] == [8, 8]


def test_nothing_else_is_shown():
    assert len(BLOCKS) == 4, "each block of the README has its test here"
    assert not re.search(r"\b(TODO|TBD|FIXME|MEASURED|TRAIN_TIME)\b", README)


@pytest.mark.parametrize("target", ["train", "test", "test-latest", "lint"])
def test_the_makefile_has_what_the_texts_name(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"configs/\w+\.py", README))))
def test_config_files_exist(path):
    assert (ROOT / path).is_file()
