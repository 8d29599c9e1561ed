"""NSAConfig refuses what does not fit, in a sentence."""

import pytest

from nsa_jax import NSAConfig


def test_defaults_are_the_papers():
    config = NSAConfig()
    geometry = (config.compress_block_size, config.compress_stride, config.select_block_size)
    assert geometry == (32, 16, 64)
    assert (config.num_selected_blocks, config.window_size) == (16, 512)
    assert (config.num_initial_blocks, config.num_local_blocks) == (1, 2)
    assert not config.share_kv


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compress_stride": 12}, "compress_stride=12 must divide compress_block_size=32"),
        ({"select_block_size": 72}, "compress_stride=16 must divide select_block_size=72"),
        ({"select_block_size": 16}, "compress_block_size=32 must be at most select_block_size=16"),
        ({"num_selected_blocks": 2}, "force 3 blocks, but num_selected_blocks=2"),
        ({"num_local_blocks": 40}, "force 41 blocks, but num_selected_blocks=16"),
        ({"window_size": 0}, "window_size=0 must be at least 1"),
        ({"num_initial_blocks": -1}, "num_initial_blocks=-1 must be at least 0"),
        ({"window_size": 5.0}, "window_size=5.0 must be an integer"),
        ({"num_local_blocks": True}, "num_local_blocks=True must be an integer"),
        ({"key_compression": "max"}, "key_compression='max' must be one of .*mlp.*linear.*mean"),
        ({"compressed_rope": "first"}, "compressed_rope='first' must be one of"),
        ({"gate_activation": "relu"}, "gate_activation='relu' must be one of .*softmax.*fixed"),
        ({"branches": ()}, r"branches=\(\) must be one or more of"),
        ({"branches": ("all",)}, r"branches=\('all',\) must be one or more of .*'compressed'"),
        ({"gate_width": -1}, "gate_width=-1 must be at least 0"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        NSAConfig(**change)
