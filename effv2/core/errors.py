"""The two ways in which a command ends badly on purpose.

Anything else that escapes is a bug of ours and shows its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class InputError(Exception):
    """A wrong input: what was given, the value that it was given, what is wrong with that, and the remedy. Exit code 2.

    `what` is a dotted setting (`data.dir`), a parameter (`weights_dir`) or an environment variable. In `problem` and
    `remedy` settings stand under their dotted names and parameters in backticks, for commands to name their options.
    """

    def __init__(self, what: str, value: object = "", problem: str = "", remedy: str = "") -> None:
        self.what, self.value, self.problem, self.remedy = what, str(value), problem, remedy
        named = f"{what} {value}" if self.value else what
        super().__init__(f"{named}: {problem}; {remedy}." if problem else named)


class RunError(Exception):
    """A fault while running (a loss that is no number, memory that is full). Exit code 1.

    `resumes` says that the same command resumes the work once the fault is mended.
    """

    def __init__(self, problem: str, *, resumes: bool = False) -> None:
        self.problem, self.resumes = problem, resumes
        super().__init__(self.sentences(fresh=False))

    def sentences(self, fresh: bool) -> str:
        """Return the problem, and how to resume what was begun, `fresh` or not."""
        return f"{self.problem} Then {same_command(fresh)} resumes." if self.resumes else self.problem


class Diverged(RunError):
    """A loss that is no finite number: another attempt would end alike."""


class LeaseLost(BaseException):
    """The work was given to another process, since this one didn't answer for too long."""


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt not an Exception, so that nothing swallows it. Exit code 143."""


def same_command(fresh: bool) -> str:
    """Name the command that resumes what was begun; `fresh` again would begin it anew once more."""
    return "the same command without `fresh`" if fresh else "the same command"


def close_names(name: str, names: Sequence[str]) -> str:
    """Return up to three of `names` that the user may have meant, for an error message; empty if none is near."""
    from difflib import get_close_matches

    folded = {each.casefold(): each for each in names}
    words = [repr(folded[near]) for near in get_close_matches(name.casefold(), list(folded), n=3, cutoff=0.5)]
    return " or ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def nearest(name: str, names: list[str]) -> str:
    """Say which of `names` the user may have meant, and what there is: the tail of an error message."""
    from difflib import get_close_matches

    close = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Choose from: {', '.join(names)}"
