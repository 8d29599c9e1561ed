"""What the commands of this package share: how they start, and how they end with a sentence."""

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging


class UsageError(Exception):
    """The command line is wrong, for the reason given."""


def run(
    name: str,
    description: str,
    own_flags: Sequence[flags.FlagHolder],
    parse: Callable[[list[str]], list[str]],
    main: Callable[[list[str]], int | None],
) -> None:
    """Runs a command and exits.

    Args:
      name: of the console script, to begin its messages with.
      description: the text of --help.
      own_flags: what --help lists.
      parse: parses the command line; raises UsageError on a mistake.
      main: does the work; gets what `parse` returns, and returns the exit status, None for 0.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by the shell
            stream.reconfigure(errors="backslashreplace")  # a sample has any character
    # When a console script is the main module, --help finds neither text nor flags by itself.
    sys.modules["__main__"].__doc__ = description
    for flag in own_flags:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])

    def begin(arguments: list[str]) -> int | None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # of what libraries tell, JAX and Orbax most
        return main(arguments)

    try:
        app.run(begin, flags_parser=parse)
    except UsageError as error:
        leave(name, str(error), 2)
    except KeyboardInterrupt:
        leave(name, "interrupted", 130)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses a command line of flags alone, and returns the program's name.

    Raises:
      UsageError: if a flag is wrong, or there is anything else.
    """
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise UsageError(str(error)) from error
    check_no_words(rest)
    return rest


def check_no_words(arguments: list[str]) -> None:
    """Raises UsageError if anything but the program's name is left of the command line."""
    if arguments[1:]:
        raise UsageError(f"what is {' '.join(arguments[1:])!r}? Flags are written --name=value.")


def leave(name: str, message: str, status: int) -> NoReturn:
    """Ends the process with a message of the command."""
    print(f"{name}: {message}", file=sys.stderr)
    sys.exit(status)
