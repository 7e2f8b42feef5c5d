"""The errors that end a command with a message. Any other exception is a bug of effv2 and shows its traceback."""

import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

from effv2.core.secrets import masked

LISTED = 30  # names that an error message lists
LONGEST_VALUE = 500  # characters of a value that it shows


class InputError(Exception):
    """A wrong input: the name of the option, its value, the problem, and the remedy. Exit code 2.

    `what` begins with a dotted setting (`data.dir`), a parameter (`weights_dir`) or an environment variable. `problem`
    and `remedy` write settings by dotted name and parameters in backticks. Commands replace these by their options.
    If there are `choices`, the remedy names those nearest to the value.
    """

    def __init__(
        self, what: str, value: object = "", problem: str = "", remedy: str = "", choices: Iterable[str] = ()
    ) -> None:
        remedy = nearest(str(value), list(choices)) if choices else remedy
        shown = str(value) if len(str(value)) <= LONGEST_VALUE else f"{str(value)[:LONGEST_VALUE]}…"
        self.what, self.value, self.problem, self.remedy = map(masked, (what, shown, problem, remedy))
        named = f"{self.what} {self.value}" if self.value else self.what
        super().__init__(f"{named}: {'; '.join(filter(None, (self.problem, self.remedy)))}." if problem else named)

    def renamed(self, names: Mapping[str, str]) -> "InputError":
        """Return the error with the name of the option among `names`, if it is there."""
        first, space, more = self.what.partition(" ")
        return InputError(f"{names.get(first, first)}{space}{more}", self.value, self.problem, self.remedy)


class RunError(Exception):
    """A fault at run time, worded as an InputError. Exit code 1. After a fix, the same command `resumes` the work."""

    def __init__(self, problem: str, *, resumes: bool = False) -> None:
        self.resumes = resumes
        super().__init__(masked(problem))


class Diverged(RunError):
    """The loss is not finite. Another attempt would end in the same way."""


class StoreAway(RunError):
    """A database or the tracking store did not answer for longer than effv2 waits."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem, resumes=True)


class LeaseLost(BaseException):
    """Another process has the work now, because this one did not answer for too long."""


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt it is no Exception, so that no handler swallows it. Exit code 143."""


def close_names(name: str, names: Sequence[str], count: int = 3) -> str:
    """Return up to `count` of `names` that the user may have meant, for an error message; empty if none is near."""
    folded = {each.casefold(): each for each in names}
    near = get_close_matches(name.casefold(), list(folded), n=max(3, count), cutoff=0.5)
    near.sort(key=lambda each: not each.startswith(name.casefold()))  # a name cut short comes first
    return joined([repr(folded[each]) for each in near[:count]], "or")


def listed(names: Sequence[str], most: int, separator: str = "; ") -> str:
    """Write the first names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def joined(words: Sequence[str], last: str = "and") -> str:
    """Write words with commas, and `last` before the last of them."""
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def nearest(name: str, names: Sequence[str]) -> str:
    """Return the tail of an error message: the names that the user may have meant, and all names if they are few."""
    close = close_names(name, names, 1)
    if close and len(names) > LISTED:
        return f"the nearest is {close}"
    return f"{f'did you mean {close}? Choose' if close else 'choose'} from: {listed(names, LISTED, ', ')}"


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether memory ran out. torch's CPU allocator has no error class of its own."""
    import torch

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@contextmanager
def what_ran_out(settings: str = "optimiser.batch_size or data.image_size") -> Iterator[None]:
    """Raise RunError if memory or disk run out inside. `settings` names the settings that need the memory."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if is_out_of_memory(error):
            raise RunError(f"The device's memory is full; lower {settings}.") from error
        # torch's writer raises RuntimeError if the disk is full.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" at {cause.filename}" if cause.filename else ""
        raise RunError(f"The disk is full{where}; free space.", resumes=True) from error
