"""The suites, by name: what each asks, of which models, and what its hypothesis claims.

The sizes at scale "cpu" are for two cores and at most 20 minutes with three seeds, those at "gpu"
for one H100 and 10. The minutes at "cpu" are from what one core took, those at "gpu" are estimates
from the size of the models.
"""

from collections.abc import Mapping
from typing import Any

from experiments import measures
from experiments.maps import maps
from experiments.posthoc import POSTHOC, posthoc
from experiments.suite import Claim, Scale, Suite, Variant

_SMALL: dict[str, Any] = {
    "log_every": 20,
    "model.model_dim": 64,
    "model.mlp_dim": 128,
    "model.num_heads": 4,
    "model.num_kv_heads": 1,
    "model.head_dim": 32,
    "nsa.compression_width": 32,
    "data.batch_size": 16,
}
_LARGE: dict[str, Any] = {
    "log_every": 50,
    "model.model_dim": 256,
    "model.mlp_dim": 512,
    "model.num_heads": 16,  # a group of 16, as in the paper
    "model.num_kv_heads": 1,
    "model.head_dim": 64,
    "model.scan_layers": True,
    "model.dtype": "bfloat16",
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 100,
}

# One layer suffices where key and value are one token, and learns it in some hundred updates; where
# tokens stand says nothing, so rotations are slow. 48 pairs and 48 queries fill rows of 16 blocks,
# of which a query chooses one: three of its four are forced. Keys are compressed by their mean: it
# learns in this time with every seed, where an MLP leaves some seeds behind.
_RECALL_CPU = _SMALL | {
    "model.num_layers": 1,
    "model.rope_theta": 1e6,
    "nsa.compress_block_size": 4,
    "nsa.compress_stride": 2,
    "nsa.select_block_size": 8,
    "nsa.num_selected_blocks": 4,
    "nsa.window_size": 8,
    "nsa.key_compression": "mean",
    "data.name": "recall",
    "data.seq_len": 128,
    "data.task_pairs": 48,
    "data.task_queries": 48,
    "data.task_pair_tokens": 1,
    "data.task_validation_rows": 256,
    "optimizer.learning_rate": 5e-3,
}
# The same with four times the rows: what is learnt there is learnt here.
_RECALL_GPU = _RECALL_CPU | {
    "log_every": 50,
    "data.batch_size": 64,
    "data.task_validation_rows": 1024,
}
_TEXT_CPU = _SMALL | {
    "model.num_layers": 2,
    "nsa.compress_block_size": 8,
    "nsa.compress_stride": 4,
    "nsa.select_block_size": 16,
    "nsa.num_selected_blocks": 5,
    "nsa.window_size": 16,
    "data.name": "stdlib",
    "data.seq_len": 256,
    "data.batch_size": 8,
    "data.validation_fraction": 0.02,
    "optimizer.learning_rate": 5e-3,
}
_TEXT_GPU = _LARGE | {
    "model.num_layers": 4,
    "nsa.compress_block_size": 16,
    "nsa.compress_stride": 8,
    "nsa.select_block_size": 32,
    "nsa.num_selected_blocks": 8,
    "nsa.window_size": 64,
    "data.name": "stdlib",
    "data.seq_len": 2048,
    "data.batch_size": 16,
    "data.validation_fraction": 0.02,
}


def _branches(*names: str) -> dict[str, Any]:
    return {"nsa.branches": names}


def _dense(mlp_dim: int, **more: Any) -> Variant:
    """Full attention, with the MLP that gives it as many parameters as NSA has."""
    return Variant(overrides={"model.attention": "dense", "model.mlp_dim": mlp_dim, **more})


def _gated(mlp_dim: int) -> Variant:
    """The control that the paper lacks: NSA has gates, and gates alone help full attention."""
    return _dense(mlp_dim, **{"model.output_gate": True})


_NSA = Variant()


_BRANCHES = {
    "all": _NSA,
    "window": Variant(overrides=_branches("window")),
    "compressed+window": Variant(overrides=_branches("compressed", "window")),
    # Without the compressed output nothing trains the compressed scores: so either with scores from
    # the keys that are attended, or with untrained ones.
    "selected+window": Variant(overrides=_branches("selected", "window"), selector="mean_keys"),
    "selected+window_untrained": Variant(overrides=_branches("selected", "window")),
    "compressed+selected": Variant(overrides=_branches("compressed", "selected")),
}
# Compressed values can keep the two or three pairs in 4 tokens: without the selected branch as many
# were found. They cannot keep the five in 8.
_WIDE = {"nsa.compress_block_size": 8, "nsa.compress_stride": 4}
_RECALL = Suite(
    name="recall",
    hypothesis=(
        "Finding one pair among many needs the selected branch: compressed blocks and the window "
        "do not hold it, nor does the window alone."
    ),
    metric="accuracy",
    larger_is_better=True,
    claims=(
        Claim(better="all", worse="window"),
        Claim(better="all", worse="compressed+window"),
        Claim(better="selected+window", worse="compressed+window"),
    ),
    measures=(measures.validation, measures.selection, measures.gates),
    scales={
        "cpu": Scale(
            _RECALL_CPU | _WIDE | {"steps": 1200},
            _BRANCHES,
            9,
        ),
        "gpu": Scale(
            _RECALL_GPU | _WIDE | {"steps": 1500},
            _BRANCHES,
            7,
        ),
    },
)

# Everything but the choice of blocks is NSA's, the compressed output included. "_alone" is without
# that output: selected blocks and the window. The paper does not say which of the two it trained.
_ALONE = _branches("selected", "window")
_SELECTORS = {
    "nsa": _NSA,
    "quest": Variant(selector="quest"),
    "quest_alone": Variant(overrides=_ALONE, selector="quest"),
    # 1000 of the paper's 30000 updates.
    "quest_alone_warm": Variant(overrides=_ALONE, selector="quest", dense_share=1 / 30),
    "auxiliary_0.01": Variant(selector="auxiliary", options={"weight": 0.01}),
    "auxiliary_1": Variant(selector="auxiliary", options={"weight": 1.0}),
    "auxiliary_alone_0.1": Variant(overrides=_ALONE, selector="auxiliary", options={"weight": 0.1}),
    "mean_keys": Variant(selector="mean_keys"),
    "clusters": Variant(selector="clusters"),
    "random": Variant(selector="random"),
    "static": Variant(selector="static"),
    "oracle": Variant(selector="oracle"),
}
# The weights that the others leave out, and the loss without its effect on the model: it trains the
# choice alone. Not at scale "gpu", whose 10 minutes are full.
_MORE_AUXILIARY = {
    "auxiliary_0.1": Variant(selector="auxiliary", options={"weight": 0.1}),
    "auxiliary_1_detached": Variant(
        selector="auxiliary", options={"weight": 1.0, "detached": True}
    ),
    "auxiliary_alone_0.01": Variant(
        overrides=_ALONE, selector="auxiliary", options={"weight": 0.01}
    ),
    "auxiliary_alone_1": Variant(overrides=_ALONE, selector="auxiliary", options={"weight": 1.0}),
}


def _selectors(full: int, gated: int) -> dict[str, Variant]:
    return {"full": _dense(full), "full_gated": _gated(gated), **_SELECTORS}


_SELECTION = {
    "hypothesis": (
        "NSA's own selection trains better models than blocks chosen by Quest's bound or by an "
        "auxiliary loss, and than full attention."
    ),
    "larger_is_better": False,
    "metric": "loss",
    "claims": (
        Claim(better="nsa", worse="quest"),
        Claim(better="nsa", worse="quest_alone"),
        Claim(better="nsa", worse="quest_alone_warm"),
        Claim(better="nsa", worse="auxiliary_1"),
        Claim(better="nsa", worse="auxiliary_alone_0.1"),
        Claim(better="nsa", worse="full"),
    ),
}
_SELECTION_RECALL = Suite(
    name="selection",
    measures=(measures.validation, measures.selection),
    scales={
        "cpu": Scale(
            _RECALL_CPU | {"steps": 800},
            _selectors(202, 201) | _MORE_AUXILIARY,
            20,
        ),
        "gpu": Scale(
            _RECALL_GPU | {"steps": 600},
            _selectors(202, 201),
            10,
        ),
    },
    **_SELECTION,
)
_SELECTION_TEXT = Suite(
    name="selection_text",
    measures=(measures.validation, measures.gates),
    scales={
        "cpu": Scale(
            _TEXT_CPU | {"steps": 150},
            _selectors(274, 273) | _MORE_AUXILIARY,
            15,
        ),
        "gpu": Scale(
            _TEXT_GPU | {"steps": 200},
            _selectors(979, 974),
            9,
        ),
    },
    **_SELECTION,
)

_LOSS = Suite(
    name="loss",
    hypothesis=(
        "With equal parameters NSA's loss on text is below that of full attention, also where the "
        "past is longest."
    ),
    metric="loss",
    larger_is_better=False,
    claims=(
        Claim(better="nsa", worse="full"),
        Claim(better="nsa:loss_last_quarter", worse="full:loss_last_quarter"),
        Claim(better="nsa", worse="full_gated"),
    ),
    measures=(measures.validation, measures.gates),
    scales={
        "cpu": Scale(
            _TEXT_CPU | {"steps": 1000},
            {"nsa": _NSA, "full": _dense(274), "full_gated": _gated(273)},
            14,
        ),
        "gpu": Scale(
            _TEXT_GPU | {"steps": 1500},
            {"nsa": _NSA, "full": _dense(979), "full_gated": _gated(974)},
            9,
        ),
    },
)


def _designs(sizes: Mapping[str, tuple[int, int]]) -> dict[str, Variant]:
    """NSA, and NSA with one choice changed.

    Args:
      sizes: n and l' by name, of equal product, which leave at least one block to choose.
    """

    def nsa(**changes):
        return Variant(overrides={f"nsa.{name}": value for name, value in changes.items()})

    def phi(keys, values):
        return nsa(key_compression=keys, value_compression=values)

    return {
        "nsa": _NSA,
        "shared_kv": nsa(share_kv=True),
        "phi_mean": phi("mean", "mean"),
        "phi_linear": phi("linear", "linear"),
        "phi_mean_mlp": phi("mean", "mlp"),
        "phi_mlp_mean": phi("mlp", "mean"),
        "rope_before": nsa(compressed_rope="before"),
        "rope_none": nsa(compressed_rope="none"),
        "gates_softmax": nsa(gate_activation="softmax"),
        "gates_fixed": nsa(gate_activation="fixed"),
        **{
            name: nsa(num_selected_blocks=blocks, select_block_size=size)
            for name, (blocks, size) in sizes.items()
        },
    }


_DESIGN = Suite(
    name="design",
    hypothesis=(
        "Keys and values of their own for each branch, phi as an MLP and sigmoid gates, the "
        "paper's choices, give a lower loss on text than their alternatives."
    ),
    metric="loss",
    larger_is_better=False,
    claims=(
        Claim(better="nsa", worse="shared_kv"),
        Claim(better="nsa", worse="phi_mean"),
        Claim(better="nsa", worse="phi_linear"),
        Claim(better="nsa", worse="gates_softmax"),
        Claim(better="nsa", worse="gates_fixed"),
    ),
    measures=(measures.validation, measures.gates),
    scales={
        "cpu": Scale(
            _TEXT_CPU
            | {
                "steps": 250,
                "data.seq_len": 512,
                "data.batch_size": 4,
                "nsa.num_selected_blocks": 8,
            },
            _designs({"blocks_16x8": (16, 8), "blocks_4x32": (4, 32)}),
            12,
        ),
        "gpu": Scale(
            _TEXT_GPU | {"steps": 250},
            _designs({"blocks_16x16": (16, 16), "blocks_4x64": (4, 64)}),
            10,
        ),
    },
)

_NEEDLE_DATA = {"data.name": "needle", "data.task_validation_rows": 16}
_NEEDLE_VARIANTS = {"nsa": _NSA, "window": Variant(overrides=_branches("window"))}
_NEEDLE = Suite(
    name="needle",
    hypothesis=(
        "NSA finds a needle at depths that its window does not reach, up to the trained length and "
        "beyond it."
    ),
    metric="accuracy",
    larger_is_better=True,
    claims=(
        Claim(better="nsa", worse="window"),
        Claim(better="nsa:accuracy_beyond", worse="window:accuracy_beyond"),
    ),
    measures=(measures.needle,),
    figures=("needle",),
    scales={
        "cpu": Scale(
            _RECALL_CPU | _NEEDLE_DATA | {"steps": 2000},
            _NEEDLE_VARIANTS | {"full": _dense(202)},
            11,
        ),
        "gpu": Scale(
            _RECALL_GPU
            | _NEEDLE_DATA
            | {
                "steps": 3000,
                "nsa.compress_block_size": 8,
                "nsa.compress_stride": 4,
                "nsa.select_block_size": 16,
                "nsa.num_selected_blocks": 5,
                "nsa.window_size": 16,
                "data.seq_len": 512,
                "data.batch_size": 128,
            },
            _NEEDLE_VARIANTS | {"full": _dense(224)},
            9,
        ),
    },
)

_APPROXIMATE = ("h2o", "static", "infllm", "quest", "clusters")
_POSTHOC = Suite(
    name="posthoc",
    hypothesis=(
        "Trained with its sparsity, NSA has a lower loss on text than every method that makes a "
        "trained full-attention model sparse at NSA's budget of tokens, and the exact top keys "
        "have a lower one than the other methods."
    ),
    metric="loss",
    larger_is_better=False,
    claims=(
        *(Claim(better="nsa", worse=f"full:loss_{method}") for method in POSTHOC),
        *(
            Claim(better="full:loss_exact_top", worse=f"full:loss_{method}")
            for method in _APPROXIMATE
        ),
    ),
    measures=(measures.validation, posthoc),
    scales={
        "cpu": Scale(
            _TEXT_CPU | {"steps": 800},
            {"nsa": _NSA, "full": _dense(274)},
            6,
        ),
        "gpu": Scale(
            _TEXT_GPU | {"steps": 1500},
            {"nsa": _NSA, "full": _dense(979)},
            9,
        ),
    },
)
# One key alone holds the answer: exact top keys are full attention here, and nobody can beat them.
_POSTHOC_RECALL = Suite(
    name="posthoc_recall",
    hypothesis=(
        "Made sparse at NSA's budget of tokens, a trained full-attention model recalls less by any "
        "other method than by its exact top keys, and less than NSA."
    ),
    metric="accuracy",
    larger_is_better=True,
    claims=tuple(
        Claim(better=better, worse=f"full:accuracy_{method}")
        for better in ("full:accuracy_exact_top", "nsa")
        for method in _APPROXIMATE
    ),
    measures=(measures.validation, posthoc),
    scales={
        "cpu": Scale(
            _RECALL_CPU | {"steps": 1200},
            {"nsa": _NSA, "full": _dense(202)},
            3,
        ),
        "gpu": Scale(
            _RECALL_GPU | {"steps": 1500},
            {"nsa": _NSA, "full": _dense(202)},
            4,
        ),
    },
)

_MAPS = Suite(
    name="maps",
    hypothesis=(
        "Training makes full attention cluster by blocks: its best blocks hold more of it than "
        "blocks of the same keys in a random order do, and by more than before the training."
    ),
    metric="block_share",
    larger_is_better=True,
    claims=(
        Claim(better="full", worse="full:block_share_shuffled"),
        Claim(better="full:block_gain", worse="full:block_gain_untrained"),
    ),
    measures=(measures.validation, maps),
    figures=("maps",),
    scales={
        "cpu": Scale(
            _TEXT_CPU | {"steps": 800},
            {"full": _dense(274), "nsa": _NSA},
            5,
        ),
        "gpu": Scale(
            _TEXT_GPU | {"steps": 1500},
            {"full": _dense(979), "nsa": _NSA},
            7,
        ),
    },
)

SUITES = {
    suite.name: suite
    for suite in (
        _NEEDLE,
        _RECALL,
        _SELECTION_RECALL,
        _SELECTION_TEXT,
        _LOSS,
        _DESIGN,
        _POSTHOC,
        _POSTHOC_RECALL,
        _MAPS,
    )
}
