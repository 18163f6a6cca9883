"""Files: written completely or not at all, and read as data, with each field's type checked."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError


def sha256(path: Path) -> str:
    """Of a file, as `sha256sum` and the hub print it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` to a temporary file next to `path`, sync it and rename it into place.

    Text is UTF-8; characters of file names that no encoding knows become question marks.
    After a kill or on a full disk the old file is unchanged. Raises OSError where the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("wb") as file:
            file.write(content.encode(errors="replace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        error.filename = error.filename or str(path)
        raise


def read_json(path: Path, *, limit: int = 1 << 28) -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError, in one sentence, for anything else.

    limit: bytes; a larger file is refused unread, as are pipes and devices.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path} {'is not a regular file' if path.exists() else 'does not exist'}")
        if (size := path.stat().st_size) > limit:
            raise UserError(f"{path} has {size} bytes, more than the {limit} such a file may have")
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise UserError(f"{path} is damaged: its JSON is nested too deeply") from None
    except (OSError, ValueError) as error:
        reason = "it is empty" if path.is_file() and not path.stat().st_size else one_line(error)
        raise UserError(f"{path} is damaged, not readable as JSON: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__} {shown(content)}, not a JSON object")
    return content


# ---- fields ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What a field may hold: a test, and its description for the error message."""

    text: str
    fits: Callable[[Any], bool]


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("text", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
NUMBER = Kind("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool))
FINITE = Kind("a finite number", lambda value: NUMBER.fits(value) and math.isfinite(value))


def integer(low: int, high: int) -> Kind:
    """A whole number from `low` to `high`."""
    return Kind(
        f"a whole number from {low} to {high}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
    )


def choice(*values: str) -> Kind:
    return Kind(f"one of {', '.join(map(repr, values))}", lambda value: isinstance(value, str) and value in values)


def optional(kind: Kind) -> Kind:
    return Kind(f"{kind.text} or null", lambda value: value is None or kind.fits(value))


def list_of(kind: Kind, *lengths: int) -> Kind:
    """A list, or tuple, of `kind`; `lengths`: the allowed numbers of entries, any if none is given."""
    count = f" of {' or '.join(map(str, lengths))} entries" if lengths else ""
    return Kind(
        f"a list{count}, each {kind.text}",
        lambda value: (
            isinstance(value, list | tuple) and (not lengths or len(value) in lengths) and all(map(kind.fits, value))
        ),
    )


def object_of(kind: Kind) -> Kind:
    return Kind(
        f"an object, each value {kind.text}",
        lambda value: isinstance(value, dict) and all(map(kind.fits, value.values())),
    )


def field_problems(
    content: Mapping[str, Any], kinds: Mapping[str, Kind], *, required: Iterable[str] = (), others: bool = False
) -> list[str]:
    """What is wrong with the fields of `content`, one phrase each; empty if nothing is.

    kinds: the known fields. required: those that must be there. others: whether unknown fields are allowed.
    """
    problems = [f"{name} is missing" for name in required if name not in content]
    for name, value in content.items():
        if name not in kinds:
            problems += [] if others else [f"the field {shown(name)} is unknown"]
        elif not kinds[name].fits(value):
            problems.append(f"{name} is {shown(value)}, not {kinds[name].text}")
    return problems


def check_fields(
    content: Mapping[str, Any], kinds: Mapping[str, Kind], where: object, *, required: Iterable[str] = ()
) -> None:
    """Raise a UserError that begins with `where` unless `content` has the fields of `kinds` and no others."""
    if problems := field_problems(content, kinds, required=required):
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(f"{where}: {'; '.join(problems[:4])}{more}")


def shown(value: object) -> str:
    """A value for a message: on one line, control characters escaped, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def one_line(error: BaseException) -> str:
    """The message of a foreign exception on one line of at most 200 characters, or its type if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text)[:200]


def rounded(value: object) -> object:
    """The same JSON value with floats of six significant digits: half the size, and more than a measurement means."""
    match value:
        case dict():
            return {k: rounded(v) for k, v in value.items()}
        case list():
            return [rounded(v) for v in value]
        case float():
            return float(f"{value:.6g}")
    return value
