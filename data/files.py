"""Opening the files that a user names: regular files of a sane size.

A pipe without a writer hangs whoever opens it, and a device such as /dev/zero has no end; so every
file that a flag, a row or a model folder names is opened through this page. Not here: what the
project writes itself.
"""

import json
import os
import stat
from pathlib import Path

from data.errors import UserError

MB = 2**20
SETTINGS = 16 * MB  # YAML, config.json and the like
IMAGE = 512 * MB
TABLE = 8192 * MB  # rows or annotations as text: LVIS has 1,100 MB
SHOWN = 200  # characters of an error's text in a message
POINTER = b"version https://git-lfs"  # how the text begins that git-lfs keeps in a file's place
NOT_PULLED = "a git-lfs pointer in place of the file: run `git lfs pull` in its folder"

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def fault(path: str | os.PathLike, at_most: int | None = None) -> str:
    """Why a file cannot be read, without its name; "" if it is a regular file.

    at_most: bytes.
    """
    try:
        info = os.stat(path)
    except FileNotFoundError:
        link = (
            "a link to a file that is not there"
            if os.path.islink(path)
            else "there is no such file"
        )
        return f"missing: {link}"
    except (OSError, ValueError) as error:  # a name that is too long, or holds a zero byte
        return f"unreadable: {getattr(error, 'strerror', None) or error}"
    if not stat.S_ISREG(info.st_mode):
        return f"not a regular file but {KINDS.get(stat.S_IFMT(info.st_mode), 'something else')}"
    if at_most is not None and info.st_size > at_most:
        return f"{info.st_size:,} bytes, and at most {at_most:,} are read"
    return ""


def regular(path: str | os.PathLike, at_most: int | None = None) -> Path:
    """The path, for a library that opens it itself. Raises UserError with its name as `fault`, and
    for a pointer of git-lfs."""
    try:
        if reason := fault(path, at_most):
            raise UserError(reason)
        with open(path, "rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise UserError(NOT_PULLED)
    except (UserError, OSError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{str(path)[:SHOWN]}: {why}") from error
    return Path(path)


def impossible(path: str | os.PathLike) -> str:
    """Why nothing can have this name: it is too long, or holds a zero byte; "" if it can."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return ""
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return ""


def read_bytes(path: str | os.PathLike, at_most: int) -> bytes:
    """The file's bytes. Raises UserError without the file's name as `fault`, if it cannot be read,
    and for a pointer of git-lfs."""
    if reason := fault(path, at_most):
        raise UserError(reason)
    try:
        with open(path, "rb") as file:
            # no more than it has: `read` reserves all that it is asked for
            data = file.read(min(at_most, os.fstat(file.fileno()).st_size + 1))
    except OSError as error:
        raise UserError(f"unreadable: {error.strerror}") from error
    if data.startswith(POINTER):
        raise UserError(NOT_PULLED)
    return data


def read_text(path: str | os.PathLike, at_most: int = SETTINGS) -> str:
    """UTF-8 text, without a byte order mark. Raises UserError with the file's name."""
    try:
        data = read_bytes(path, at_most)
    except UserError as error:
        raise UserError(f"{str(path)[:SHOWN]}: {error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:64]:
            todo = "UTF-16"
        else:
            todo = "cp1252"
        raise UserError(
            f"{path}: not UTF-8 text: line {line} holds the byte 0x{data[error.start]:02x}. If it "
            f"is {todo}: iconv -f {todo} -t UTF-8 {Path(path).name} > utf8-{Path(path).name}"
        ) from error


def read_json(path: str | os.PathLike, at_most: int = SETTINGS):
    """What a JSON file holds. Raises UserError with the file's name, also where it is damaged."""
    return parse_json(read_text(path, at_most), path)


def parse_json(text: str, where):
    """What a JSON text holds. where: for the message of the UserError that damage raises."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError
        raise UserError(f"{where}: not JSON: {str(error)[:SHOWN]}") from error
