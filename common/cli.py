"""The command line of a method: `python -m methods.NAME.train PRESET --field value`, and errors as one sentence."""

import ast
import dataclasses
import difflib
import errno
import functools
import inspect
import io
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Protocol, TypeVar, get_args, get_type_hints

from common.bounds import bound_of, check_numbers
from common.errors import UserError


class Settled(Protocol):
    """A config that may change settings of its preset where a flag makes them meaningless, see `common.config`."""

    def settle(self, preset: Any, given: Collection[str]) -> str: ...


Config = TypeVar("Config", bound=Settled)
PREFIX = "error: "
NO_MEMORY = r"can't allocate memory|out of memory|Storage size calculation overflowed|invalid buffer size"
LOST_PROCESS = r"gloo.*(Connection (?:reset|closed) by peer|Broken pipe)"
"""What torch says of them in a RuntimeError."""
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR)


def parse(presets: Mapping[str, tuple[str, Config]], command: str, argv: list[str] | None = None) -> tuple[str, Config]:
    """(preset name, its config with the flags applied) from the command line.

    `presets` maps a name to (one line about it, config). Without a preset it prints the list; an unknown one is an
    error with near matches. Flags are the fields of the config, checked by tyro: unknown names and choices fail, as do
    numbers out of their bounds (`common/bounds.py`), before any network is made of them.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {command} PRESET [--field value ...]   (PRESET --help: all fields)\n\npresets:")
        width = max(map(len, presets))
        for name, (about, _) in presets.items():
            print(f"  {name:<{width}}  {about}")
        if argv:
            raise SystemExit(0)
        raise UserError("no preset given: choose one from the list above")
    name, *flags = argv
    if name not in presets:
        near = difflib.get_close_matches(name, presets, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        what = f"{name!r} is not a preset" if not name.startswith("-") else f"the preset comes before {name!r}"
        raise UserError(f"{what}: {hint}presets are {', '.join(presets)}")
    about, default = presets[name]
    for i in reversed(range(len(flags))):  # tyro has no flag with an optional value
        if flags[i] == "--plan" and (i + 1 == len(flags) or flags[i + 1].startswith("-")):
            flags.insert(i + 1, "short")
    import tyro  # not needed for the list

    parsed = default if not {"-h", "--help"} & set(flags) else _with_bounds(default)
    config = tyro.cli(type(parsed), default=parsed, args=flags, prog=f"{command} {name}", description=about)
    given = {flag[2:].split("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")}
    check_numbers(config)
    if note := config.settle(default, given | {flag.removeprefix("no_") for flag in given}):
        _note(note)
    return name, config


def _with_bounds(config: Any) -> Any:
    """`config` in a class of the same fields, whose help texts end in the bounds of the numbers."""
    import tyro

    config_class: type = type(config)
    docs, types = field_docs(config_class), get_type_hints(config_class)
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(config):
        name, kind, text = field.name, types[field.name], docs.get(field.name, "")
        if number := next((n for n in (int, float) if n in (kind, *get_args(kind))), None):
            text = f"{text} ({'>= 0' if name in config.zero_is_off else bound_of(name, number)})"
        fields.append((name, Annotated[kind, tyro.conf.arg(help=text)], getattr(config, name)))
    return dataclasses.make_dataclass(config_class.__name__, fields, kw_only=True)()


def _note(message: str) -> None:
    """A line of standard error, of the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"NOTE {message}", file=sys.stderr, flush=True)


def run_cli(main: Callable[[], None]) -> None:
    """Run `main`; a UserError, a full disk or memory, or a path without permission becomes one sentence on stderr and
    exit status 2, without a traceback.

    SIGTERM, SIGHUP and Ctrl-C end it in one sentence too, with 128 plus the signal's number; a closed pipe, as of
    `| head -1`, and the death of another process of the run (gloo) with 1. Characters that the terminal does not have
    are printed as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    ours = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]  # nohup ignores SIGHUP
    for number in ours:
        signal.signal(number, _end)
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
        print("stopped: nobody reads the output any more", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGINT) from None
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno in NOT_ALLOWED and error.filename:
            _fail(f"cannot use {error.filename} ({error.strerror}): check the path and its permissions")
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        _fail(
            f"no space left on device while writing {error.filename or 'the run directory'} ({error.strerror}). Free "
            "some space and rerun the same command."
        )
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error)):
            reason = str(error).partition("\n")[0] or "MemoryError"
            _fail(f"not enough memory: a smaller batch, image or network needs less ({reason})")
        lost = re.search(LOST_PROCESS, str(error), re.S)
        if not lost:
            raise
        print(
            f"{PREFIX}another process of this run has ended, or the network failed ({lost[1]}): its output says why. "
            "The same command continues from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(1) from None
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


guarded = run_cli  # its name of old, which scripts of users import


def _end(number: int, _frame: object) -> None:
    print(f"stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
    raise SystemExit(128 + number)


def _fail(message: str) -> None:
    shown = "".join(c if c.isprintable() or c == "\n" else "?" for c in message)  # names from files may hold escapes
    print(f"{PREFIX}{shown}", file=sys.stderr, flush=True)
    raise SystemExit(2)


@functools.cache
def field_docs(config_class: type) -> dict[str, str]:
    """The string under each field of a dataclass (its citation), one line each, base classes included."""
    docs: dict[str, str] = {}
    for cls in reversed(config_class.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        definition = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(definition, ast.ClassDef)
        for statement, following in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                assert isinstance(statement.target, ast.Name)
                docs[statement.target.id] = " ".join(ast.literal_eval(following.value).split())
    return docs
