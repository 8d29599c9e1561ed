r"""Text from a trained model, as it is drawn.

    nsa-generate --workdir=runs/tiny_cpu --prompt="def " [--length=200 --temperature=0.8 ...]

`python -m nsa_jax.generate` is the same. Reads the newest checkpoint of the workdir and changes
nothing there. The same command gives the same text. Exit status: 0 done, 1 there is no model to
use or the text cannot be written, 2 the command line is wrong, 130 stopped by Ctrl-C.
"""

import codecs
import os
import signal
import sys
from pathlib import Path

from absl import flags

from nsa_jax import command_line
from nsa_jax.command_line import UsageError

_NAME = "nsa-generate"
_WORKDIR = flags.DEFINE_string("workdir", None, "the folder of a run of nsa-train")
_PROMPT = flags.DEFINE_string("prompt", None, "the start of the text; may be empty")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "a file that holds the start of the text")
_LENGTH = flags.DEFINE_integer("length", 200, "bytes to add, at most", lower_bound=0)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the most probable byte each time")
_TOP_K = flags.DEFINE_integer("top_k", 0, "draw among so many most probable bytes; 0 among all")
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "draw among the fewest most probable bytes of this probability together"
)
_STOP = flags.DEFINE_multi_string(
    "stop", [], r"end the text with this; \n is a new line; may be given several times"
)
_SEED = flags.DEFINE_integer("seed", 0, "of what is drawn", lower_bound=0, upper_bound=2**31 - 1)
_CACHE = flags.DEFINE_integer(
    "cache",
    None,
    "tokens that the cache has room for; if not given, as many as a row of the training has",
    lower_bound=1,
)
_FLAGS = (
    *(_WORKDIR, _PROMPT, _PROMPT_FILE, _LENGTH, _TEMPERATURE, _TOP_K, _TOP_P),
    *(_STOP, _SEED, _CACHE),
)


def run() -> None:
    """Runs the command line and exits: the console script `nsa-generate`."""
    command_line.run(_NAME, __doc__, _FLAGS, _parse, _main)


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags.

    Raises:
      UsageError: on a mistake.
    """
    rest = command_line.parse_flags(argv)
    if not _WORKDIR.value:
        raise UsageError("--workdir is missing: name the folder of a run, for instance runs/tiny")
    if (_PROMPT.value is None) == (_PROMPT_FILE.value is None):
        raise UsageError("give the start of the text by one of --prompt and --prompt_file")
    return rest


def _main(_: list[str]) -> None:
    # Imported here, so that --help and mistakes on the command line answer at once.
    from nsa_jax.decoding import Sampling
    from nsa_jax.training import sampling, trained
    from nsa_jax.training.errors import RunError

    prompt, stop = _prompt(), [_unescaped(text) for text in _STOP.value]
    try:
        settings = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    try:
        found = trained.load(_WORKDIR.value)
        capacity = _capacity(found.run, len(prompt))
    except RunError as error:
        command_line.leave(_NAME, str(error), 1)
    for note in found.notes:
        print(f"{_NAME}: {note}", file=sys.stderr)
    steps = sampling.stream(
        *(found.model, found.params, prompt, _LENGTH.value),
        sampling=settings,
        seed=_SEED.value,
        stop=stop,
        capacity=capacity,
    )
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever reads the text may have read enough
    try:
        _show(prompt, steps, sampling.shown)
    except OSError as error:
        command_line.leave(_NAME, f"the text cannot be written: {error.strerror}", 1)


def _prompt() -> bytes:
    if _PROMPT_FILE.value is None:
        return os.fsencode(_PROMPT.value)
    try:
        return Path(_PROMPT_FILE.value).expanduser().read_bytes()
    except OSError as error:
        raise UsageError(f"--prompt_file={_PROMPT_FILE.value}: {error.strerror}") from error


def _unescaped(text: str) -> bytes:
    r"""The bytes of a text in which \n, \t, \\ and the like mean what they do in Python."""
    try:
        ending = text.encode("latin-1", "backslashreplace").decode("unicode_escape").encode()
    except ValueError as error:
        raise UsageError(f"--stop={text}: {error}") from error
    if not ending:
        raise UsageError("--stop must not be empty")
    return ending


def _capacity(run, prompt_bytes: int) -> int:
    """The tokens that the cache has room for.

    Raises:
      RunError: if the model knows no text.
      UsageError: if the text does not fit.
    """
    from nsa_jax.training import config
    from nsa_jax.training.errors import RunError

    if run.data.name not in config.SAMPLED:
        raise RunError(f"the model was trained on data.name={run.data.name!r}, which is no text")
    capacity = run.data.seq_len if _CACHE.value is None else _CACHE.value
    if 1 + prompt_bytes + _LENGTH.value > capacity:
        raise UsageError(
            f"the document start, the prompt of {prompt_bytes} bytes and --length={_LENGTH.value} "
            f"do not fit into a cache of {capacity} tokens; make one shorter, or set --cache (the "
            f"model was trained on rows of {run.data.seq_len} tokens)"
        )
    return capacity


def _show(prompt: bytes, steps, shown) -> None:
    """Writes prompt and text, as far as they are characters already."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    on_terminal = sys.stdout is not None and sys.stdout.isatty()  # None: closed by the shell

    def write(data: bytes, final: bool = False) -> None:
        text = decoder.decode(data, final)
        print(shown(text) if on_terminal else text, end="", flush=True)

    write(prompt)
    for step in steps:
        write(step)
    write(b"", final=True)
    print()


if __name__ == "__main__":
    run()
