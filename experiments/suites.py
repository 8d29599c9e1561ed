"""The suites, by name: what each asks, of which models, and what its hypothesis claims.

The sizes at scale "cpu" are for two cores and 20 minutes, those at "gpu" for one H100 and 10.
"""

from typing import Any

from experiments import measures
from experiments.suite import Claim, Scale, Suite, Variant

# One layer suffices where key and value are one token, and learns it in a few hundred updates. 48
# pairs and 48 queries fill rows of 16 blocks, of which a query chooses one: three are forced.
_RECALL_CPU: dict[str, Any] = {
    "steps": 600,
    "log_every": 25,
    "model.num_layers": 1,
    "model.model_dim": 64,
    "model.mlp_dim": 128,
    "model.num_heads": 4,
    "model.num_kv_heads": 1,
    "model.head_dim": 32,
    "nsa.compress_block_size": 4,
    "nsa.compress_stride": 2,
    "nsa.select_block_size": 8,
    "nsa.num_selected_blocks": 4,
    "nsa.window_size": 8,
    "nsa.compression_width": 32,
    "data.name": "recall",
    "data.seq_len": 128,
    "data.batch_size": 32,
    "data.task_pairs": 48,
    "data.task_queries": 48,
    "data.task_pair_tokens": 1,
    "data.task_validation_rows": 256,
    "optimizer.learning_rate": 1e-2,
    "optimizer.warmup_steps": 30,
}
_BRANCHES = {
    "all": Variant(),
    "window": Variant(overrides={"nsa.branches": ("window",)}),
    "compressed+window": Variant(overrides={"nsa.branches": ("compressed", "window")}),
    # Without the compressed output nothing trains the compressed scores: so either with scores from
    # the keys that are attended, or with untrained ones.
    "selected+window": Variant(
        overrides={"nsa.branches": ("selected", "window")}, selector="mean_keys"
    ),
    "selected+window, untrained scores": Variant(
        overrides={"nsa.branches": ("selected", "window")}
    ),
    "compressed+selected": Variant(overrides={"nsa.branches": ("compressed", "selected")}),
}
_RECALL = Suite(
    name="recall",
    hypothesis=(
        "Recall of one pair among many needs the selected branch: with it and the window the "
        "answer is found, while compressed blocks and the window alone do not hold it."
    ),
    metric="accuracy",
    larger_is_better=True,
    claims=(Claim(better="all", worse="compressed+window"), Claim(better="all", worse="window")),
    measures=(measures.validation, measures.selection, measures.gates),
    scales={"cpu": Scale(base=_RECALL_CPU, variants=_BRANCHES, cost="not measured yet")},
)

SUITES = {suite.name: suite for suite in (_RECALL,)}
