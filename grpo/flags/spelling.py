"""Flags as they stand in other trainers' commands: read where they mean the same, else all named.

Not here: what those trainers call things (elsewhere.py), and our own flags (config.py).
"""

import difflib
from collections.abc import Collection, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

from data.errors import UserError, shown
from grpo.flags.elsewhere import DOTTED, ELSEWHERE, PREFIXES

# Values that other trainers take, and what they mean here; None: as if the flag were not there.
SAME_VALUE = {
    "resume_from_checkpoint": {"true": "auto", "false": None},
    "scale_rewards": {"true": "group", "false": "none"},
    "lora_target_modules": {"all-linear": None},
}
AT_MOST = 40  # unknown flags that a message lists
PATHS = ("dataset_name",)  # lists whose values may hold a comma


class Kind(NamedTuple):
    """What a flag takes: values of a type, whether a list of them, and whether they are kept as
    they are typed."""

    type: type
    is_list: bool
    verbatim: bool = False


def respell(argv: Sequence[str], kinds: Mapping[str, Kind]) -> list[str]:
    """The command line in our own spelling, from --max-steps, --no_bf16, values between commas.

    Raises UserError that names every word that is no flag of `kinds` and no value of one, and for
    data sets in two places.
    """
    words, unknown, names = [], [], {}
    for typed, joined, values in _flags_with_values(argv):
        name = (typed or "").lstrip("-").replace("-", "_")
        if typed in ("-h", "--help"):
            words.append("--help")
        elif name in kinds and typed.startswith("--"):
            kept, stray = _values(name, [*joined, *values], kinds[name])
            unknown += stray
            if name in PATHS and names.setdefault(name, kept) != kept:  # argparse takes the last
                both = " ".join(names[name] + kept)
                raise UserError(f"--{name} is there twice: for several, --{name} {both}; else one")
            if kinds[name].verbatim and kept:
                words += [f"--{name}={value}" for value in kept]
            elif kept is not None:
                one = kept and (joined or kept[0][:1] == "-") and len(kept) == 1
                one = one and (name in PATHS or not kinds[name].is_list)
                words += [f"--{name}={kept[0]}"] if one else [f"--{name}", *kept]
        elif name.startswith("no_") and kinds.get(name[3:]) == Kind(bool, False) and not joined:
            words += [f"--{name[3:]}", "false"]
            unknown += values
        else:
            unknown += [typed] if typed else values
    if unknown:
        lines = [unknown_name(word, kinds, "flag", "--") for word in dict.fromkeys(unknown)]
        more = [f"and {len(lines) - AT_MOST} more"] if len(lines) > AT_MOST else []
        many = [f"{len(lines)} words are no flags:"] if len(lines) > 1 else []
        raise UserError("\n  ".join(many + lines[:AT_MOST] + more))
    return words


def _flags_with_values(argv: Sequence[str]) -> list[tuple[str | None, list[str], list[str]]]:
    """(flag, its value after "=", the words that follow it) in the order of `argv`; the flag is
    None for words before the first."""
    found: list[tuple[str | None, list[str], list[str]]] = [(None, [], [])]
    for word in argv:
        if word[:1] == "-" and word.lstrip("-")[:1].isalpha() and " " not in word.split("=")[0]:
            name, equals, value = word.partition("=")
            found.append((name, [value] if equals else [], []))
        else:
            found[-1][2].append(word)
    return found if found[0][2] else found[1:]


def _values(name: str, values: list[str], kind: Kind) -> tuple[list[str] | None, list[str]]:
    """(a flag's values in our spelling, None to leave it out; words that are none of them)."""
    if kind.verbatim or name in PATHS:
        return values, []
    if kind.is_list:
        values = [part.strip(" \"'[]") for value in values for part in value.split(",")]
        values = [_plain(value) for value in values if value]
    one = values[0].lower() if len(values) == 1 else None
    if one in SAME_VALUE.get(name, ()):
        value = SAME_VALUE[name][one]
        return (None if value is None else [value]), []
    return (values, []) if kind.is_list else (values[:1], values[1:])


def _plain(value: str) -> str:
    """A negative number without an exponent, with which argparse takes it for a flag."""
    if value[:1] != "-" or "e" not in value.lower():
        return value
    try:
        return format(Decimal(value), "f")
    except InvalidOperation:
        return value


def unknown_name(word: str, known: Collection[str], noun: str, prefix: str = "") -> str:
    """What to say of a flag or key that is not `known`: what to use instead."""
    name = word.lstrip("-").replace("-", "_")
    key, equals, value = name.partition("=")
    nearest = difflib.get_close_matches(name[:100], known, n=1)
    begins = next((one for one in PREFIXES if name.startswith(one)), None)
    last = key.rpartition(".")[2]
    if name in ELSEWHERE or begins:
        hint = ELSEWHERE.get(name) or PREFIXES[begins]
    elif equals and key in DOTTED:
        hint = f"use {DOTTED[key]}"
    elif equals and last in known:
        hint = f"write {prefix}{last} {value[:80]}"
    elif equals and "." in key:
        hint = "flags are written --name value; --help lists them all"
    elif prefix and word[:2] != "--" and word[:1] == "-" and not nearest:
        hint = "flags begin with two dashes; a value that begins with one is written --flag=-value"
    elif name in known:
        hint = f"write {prefix}{name}"
    else:
        hint = f"did you mean {prefix}{nearest[0]}?" if nearest else "--help lists them all"
    return f"unknown {noun} {word if len(word) <= 100 else shown(word)}: {hint}"
