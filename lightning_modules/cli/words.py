"""Words of a command: what a mistyped one was meant to be, and a parser whose complaints are one line."""

import argparse
from collections.abc import Iterable
from difflib import get_close_matches
from typing import NoReturn

# How alike a word must be to what it may have been meant to be, from 0 to 1.
_LIKENESS = 0.65


def suggestion(word: str, known: Iterable[str]) -> str:
    """What to add to a complaint about a word: the known one that it was meant to be, or nothing.

    Args:
        word: A word that is not known, such as `--nosie` or `--modle.noise_std=1`.
        known: The words that are.
    """
    name, known = word.partition("=")[0], sorted(set(known))
    found = get_close_matches(name, known, 1, _LIKENESS)
    head, dot, rest = name.partition(".")
    if not found and dot:  # the options of a class that is chosen by the command are not known before it is
        heads = {option.partition(".")[0] for option in known} - {head}
        found = [f"{match}.{rest}" for match in get_close_matches(head, heads, 1, _LIKENESS)]
    return f": did you mean {found[0]}?" if found else ""


def unknown_options(message: str) -> list[str]:
    """The options that a parser's message names as unknown."""
    _, found, words = message.partition("unrecognized arguments: ")
    return [word for word in words.split() if word.startswith("-")] if found else []


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    """The options of a parser, and of those of its commands."""
    known: list[str] = []
    for action in parser._actions:
        known += action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                known += options_of(inner)
    return known


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the words of a command in a line, without its usage, and what may have been meant."""

    def error(self, message: str) -> NoReturn:
        """End the command."""
        meant = "".join(suggestion(word, options_of(self)) for word in unknown_options(message)[:1])
        self.exit(2, f"{self.prog}: {message}{meant} (`{self.prog} --help` has the options)\n")
