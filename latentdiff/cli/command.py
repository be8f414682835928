"""The frame of every command: signature, exit codes, options as dataclasses, quiet libraries."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from itertools import takewhile
from typing import Any, TypeAlias, TypeVar

from jsonargparse import ArgumentError, ArgumentParser

from latentdiff.cli.help import CommandParser, UnknownOptionError, help_of

# Adds its options to the parser, parses the arguments, calls the library, prints the result and
# returns 0, or 1 where the answer is no. Its docstring is its help.
Command: TypeAlias = Callable[[ArgumentParser, Sequence[str]], int]
Options = TypeVar("Options")

EXIT_CODES = {
    0: "done",
    1: "the answer is no, numbers went wrong, or a data worker died",
    2: "bad usage or bad input",
    130: "after Ctrl-C (SIGINT)",
    141: "the reader of the output ended first",
    143: "after SIGTERM",
}
UNHEARD = 141
DTYPE_HELP = "float32, float16 or bfloat16; by default as in the file"  # of weights to write


def run_command(command: Command, arguments: Sequence[str], *, prog: str) -> int:
    """Run a command and return its exit code, the only place where an error becomes one.

    EXIT_CODES has their meanings. A failed command leaves one message on stderr. Training handles
    SIGINT and SIGTERM itself and returns 130 or 143, its state saved; other commands end by SIGTERM
    at once, which a shell calls 143. Any other error is a bug and keeps its traceback.
    """
    parser = CommandParser(prog=prog)
    try:
        if (words := _help_words(arguments)) is not None:
            print(help_of(command, prog=prog).text(words))
            status = 0
        else:
            status = command(parser, arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:  # --print_config
        return int(end.code or 0)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - so that exiting does not fail on it too
        return UNHEARD
    except Exception as error:
        if (code := _code_of(error)) is None:
            raise
        print(f"{prog}: {_message_of(error, parser)}", file=sys.stderr)
        return code


def _code_of(error: Exception) -> int | None:
    """Return the exit code of an error that is no bug, and None for a bug."""
    if isinstance(error, (ArgumentError, ValueError, OSError)):
        return 2
    if isinstance(error, (FloatingPointError, UnknownOptionError)):
        return 1
    if isinstance(error, RuntimeError):
        from latentdiff.training.inputs.workers import DeadWorkerError

        return 1 if isinstance(error, DeadWorkerError) else None
    return None


def _message_of(error: Exception, parser: CommandParser) -> str:
    """Return an error's message; of the parser's in one line, with what to look at."""
    if not isinstance(error, ArgumentError):
        return str(error)
    message = re.sub(r"\s+", " ", str(error)).strip()
    is_late = re.search(r"unrecognized arguments: (?!-)", message, re.IGNORECASE)
    if is_late:
        message += "; prompts and paths come before the options"
    unknown = re.search(r"unrecognized arguments: (--\w+)", message, re.IGNORECASE)
    if unknown and (near := parser.nearest(unknown[1])):
        message += f"; did you mean {near}?"
    return f"{message} (--help lists the options)"


def _help_words(arguments: Sequence[str]) -> list[str] | None:
    """Return the words after --help; None where it is not asked for."""
    asked = [index for index, one in enumerate(arguments) if one in ("-h", "--help")]
    if not asked:
        return None
    return [*takewhile(lambda word: not word.startswith("-"), arguments[asked[0] + 1 :])]


def add_model(
    parser: ArgumentParser, name: str = "model", *, of: str = "", nargs: str | None = None
) -> None:
    """Add a model as an argument. of: which of several it is, such as "before"."""
    where = "its folder, a run's folder, a Hugging Face id, or latentdiff-mini, which ships"
    description = f"the model{f' {of}' if of else ''}: {where}"
    parser.add_argument(name, type=str, nargs=nargs, help=description)


def take_options(kind: type[Options], values: dict[str, Any]) -> Options:
    """Take a dataclass's fields out of the parsed values; return the dataclass."""
    dataclass: Any = kind
    return kind(**{field.name: values.pop(field.name) for field in fields(dataclass)})


def log_to_terminal() -> None:
    """Show this package's messages on stderr, each with its level."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")


def quieten_libraries(module: str = "") -> None:
    """Turn off diffusers' and transformers' progress bars and warnings; their errors stay.

    Called by commands alone: a program that imports this package keeps its own settings. Loading
    them takes seconds, in which a terminal shows a line that says so. module: one of this package
    that the command needs and that takes seconds more.
    """
    with _terminal_line("loading PyTorch and diffusers ..."):
        import diffusers.utils.logging
        import transformers.utils.logging
        from huggingface_hub.utils.tqdm import enable_progress_bars

        for library in (diffusers.utils.logging, transformers.utils.logging):
            library.disable_progress_bar()
            library.set_verbosity_error()
        import_module(f"latentdiff.{module}" if module else "latentdiff")
    enable_progress_bars()  # of downloads, which take long and were turned off along


@contextmanager
def _terminal_line(text: str) -> Iterator[None]:
    """Show a line on stderr inside the block where that is a terminal, and take it away again."""
    if not sys.stderr.isatty():
        yield
        return
    print(text, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(f"\r{' ' * len(text)}\r", end="", file=sys.stderr, flush=True)
