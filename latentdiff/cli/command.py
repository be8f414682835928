"""The frame of every command: signature, exit codes, options as dataclasses, quiet libraries."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from inspect import getdoc
from typing import Any, TypeAlias, TypeVar

from jsonargparse import ArgumentError, ArgumentParser

# Adds its options to the parser, parses the arguments, calls the library, prints the result and
# returns 0, or 1 where the answer is no. Its docstring is its help.
Command: TypeAlias = Callable[[ArgumentParser, Sequence[str]], int]
Options = TypeVar("Options")


def run_command(command: Command, arguments: Sequence[str], *, prog: str) -> int:
    """Run a command and return its exit code, the only place where an error becomes one.

    0 done; 1 the answer is no, numbers went wrong or a data worker died; 2 bad usage or input;
    130 after Ctrl-C. A failed command leaves one message on stderr. Training handles SIGINT and
    SIGTERM itself and returns 130 or 143. Any other error is a bug and keeps its traceback.
    """
    parser = ArgumentParser(
        prog=prog, description=getdoc(command), exit_on_error=False, allow_abbrev=False
    )
    try:
        return command(parser, arguments)
    except KeyboardInterrupt:
        return 130
    except ArgumentError as error:
        message = re.sub(r"\s+", " ", str(error)).strip()
        is_late = re.search(r"unrecognized arguments: (?!-)", message, re.IGNORECASE)
        place = "; prompts and paths come before the options" if is_late else ""
        return _fail(prog, f"{message}{place} (--help lists the options)", code=2)
    except (ValueError, OSError) as error:
        return _fail(prog, error, code=2)
    except FloatingPointError as error:
        return _fail(prog, error, code=1)
    except RuntimeError as error:
        from latentdiff.training.inputs.workers import DeadWorkerError

        if not isinstance(error, DeadWorkerError):
            raise
        return _fail(prog, error, code=1)


def _fail(prog: str, message: object, *, code: int) -> int:
    print(f"{prog}: {message}", file=sys.stderr)
    return code


def take_options(kind: type[Options], values: dict[str, Any]) -> Options:
    """Take a dataclass's fields out of the parsed values; return the dataclass."""
    dataclass: Any = kind
    return kind(**{field.name: values.pop(field.name) for field in fields(dataclass)})


def quieten_libraries() -> None:
    """Turn off diffusers' and transformers' progress bars and warnings; their errors stay.

    Called by commands alone: a program that imports this package keeps its own settings.
    """
    import diffusers.utils.logging
    import transformers.utils.logging
    from huggingface_hub.utils.tqdm import enable_progress_bars

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    enable_progress_bars()  # of downloads, which take long and were turned off along
