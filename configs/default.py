"""Every key of a run, explained, with its value: the one place where values stand.

The other config files start from `get_config()` and change what they are about. On the command line
any key can be changed again: --config.optimizer.learning_rate=1e-3. The values here make no
particular run; see tiny_cpu.py and small_gpu.py for two that are meant to be run.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """Returns all keys with their values."""
    config = ConfigDict()

    # The one seed. Parameters, data, dropout and the final sample each draw from a stream of their
    # own that is derived from it and from the stream's name.
    config.seed = 0
    # Updates of the parameters. The learning-rate schedule spans exactly these, so that a run with
    # another number of steps is another run.
    config.steps = 1000
    # Who computes the attention: "auto", or "mosaic_gpu", "triton", "xla", "reference" for NSA, or
    # "cudnn", "xla" for dense attention. A name that cannot run here is refused.
    config.implementation = "auto"
    # Write and show the metrics of every so-manieth update (of that update alone, no average).
    config.log_every = 10
    # Validate after every so many updates; 0 validates at the end only.
    config.eval_every = 200
    # Batches of these validations; 0 takes the whole set, as the end of a run always does.
    config.eval_batches = 8

    config.model = ConfigDict()
    config.model.attention = "nsa"  # or "dense": full attention with grouped queries
    config.model.num_layers = 4  # blocks of attention and MLP
    config.model.model_dim = 128  # width of the residual stream
    config.model.mlp_dim = 384  # hidden units of the SwiGLU MLP, which has three matrices
    config.model.num_heads = 4  # query heads
    config.model.num_kv_heads = 2  # key and value heads; divides num_heads
    config.model.head_dim = 32  # of queries and keys
    config.model.v_head_dim = config_dict.placeholder(int)  # of values; unset means head_dim
    config.model.output_gate = False  # "dense" only: a sigmoid gate on each head's output
    config.model.rope_theta = 10_000.0  # base of the rotary wavelengths, in tokens
    config.model.dropout = 0.0  # share of each part's output dropped in training
    config.model.tie_embeddings = True  # one matrix embeds tokens and reads logits
    config.model.remat = False  # recompute blocks in the backward pass: less memory, more time
    config.model.scan_layers = False  # compile one block for all layers: much faster compilation
    config.model.dtype = "float32"  # of the computation: or "bfloat16"
    config.model.param_dtype = "float32"  # of the parameters

    # Native Sparse Attention, in tokens and blocks; the paper's symbols in brackets. With "dense"
    # attention only select_block_size is used: documents start at its multiples in every run, so
    # that sparse and dense models see the same rows.
    config.nsa = ConfigDict()
    config.nsa.compress_block_size = 32  # tokens that one compressed key stands for [l]
    config.nsa.compress_stride = 16  # tokens from one such block to the next [d]; divides l and l'
    config.nsa.select_block_size = 64  # tokens of a block that is selected as a whole [l']
    config.nsa.num_selected_blocks = 16  # blocks a query attends, the forced ones included [n]
    config.nsa.num_initial_blocks = 1  # first blocks of the document, always selected
    config.nsa.num_local_blocks = 2  # last blocks up to the query's own, always selected
    config.nsa.window_size = 512  # keys of the sliding window, the query's own included [w]
    config.nsa.key_compression = "mlp"  # phi for keys: "mlp", "linear" or "mean"
    config.nsa.value_compression = "mlp"  # phi for values, likewise
    config.nsa.compression_width = 128  # hidden units of the "mlp" phi
    config.nsa.compressed_rope = "after"  # rotate compressed keys "after" or "before", or "none"
    config.nsa.gate_width = 0  # hidden units of the gates' MLP; 0 is one linear layer
    config.nsa.gate_activation = "sigmoid"  # or "softmax" over the branches, or "fixed": all are 1
    # The branches that count, for ablations.
    config.nsa.branches = ("compressed", "selected", "window")
    config.nsa.share_kv = False  # one key and value projection for all branches instead of three

    config.data = ConfigDict()
    # "stdlib" (the sources of the running Python's standard library), "text" (the file or folder
    # named by path), or a synthetic task: "recall", "needle", "copy", "markov".
    config.data.name = "stdlib"
    config.data.path = ""  # of "text" only
    config.data.seq_len = 512  # tokens of a row; a multiple of nsa.select_block_size
    config.data.batch_size = 16  # rows of an update, over all devices and microbatches
    config.data.validation_fraction = 0.05  # share of a text's documents that is held out
    config.data.task_validation_rows = 512  # rows of a task that are held out
    config.data.task_pairs = 16  # "recall": pairs in a row
    config.data.task_queries = 16  # "recall": queries in a row
    config.data.task_pair_tokens = 2  # "recall": tokens of a pair, 1 to 3
    config.data.task_depth = -1.0  # "needle": where it stands, 0 (start) to 1 (end); < 0 anywhere
    config.data.task_states = 32  # "markov": symbols of the source

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 1e-3  # at its peak, after the warm-up
    config.optimizer.final_fraction = 0.1  # of the peak, reached by half a cosine at the end
    config.optimizer.warmup_steps = 30  # updates from 0 to the peak
    config.optimizer.weight_decay = 0.1  # of matrices; norms, biases and positions have none
    config.optimizer.beta1 = 0.9  # AdamW's average of gradients
    config.optimizer.beta2 = 0.95  # AdamW's average of their squares
    config.optimizer.epsilon = 1e-8  # AdamW's guard against division by zero
    config.optimizer.clip_norm = 1.0  # largest norm of the whole gradient; 0 does not clip
    # Microbatches that a batch is cut into, one after the other: memory of the small, result of the
    # large. Divides data.batch_size.
    config.optimizer.accumulate = 1

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 200  # also written at the end, and on SIGTERM or Ctrl-C
    # Older ones are deleted. With 1 there is no other to go on from when the newest is damaged.
    config.checkpoint.max_to_keep = 2

    config.sample = ConfigDict()  # what a finished model writes; with synthetic tasks nothing
    config.sample.prompt = "def "  # the start of the text
    config.sample.length = 200  # bytes to write; 0 writes none
    config.sample.temperature = 0.8  # 0 takes the most probable byte each time
    return config
