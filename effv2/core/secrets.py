"""Secrets in addresses: passwords and tokens, which must be neither shown nor recorded."""

import ctypes
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

NAMED = re.compile(  # in the query of an address, or in a driver's options
    r"((?:^|[?&#;,\s'\"(])(?:key|[\w.-]*(?:pass|passw(?:or)?d|passphrase|pwd|token|secret|credentials?|sig|signature|sas"
    r"|auth|authorization|jwt|odbc_connect|(?:api|access|account|secret)[-_]?key(?:[-_]?id)?))=)(?:'[^']*'|[^&\s]+)",
    re.IGNORECASE,
)
# Up to the last @ of the word, because a password may hold all of / ? # @; bounded, so that long words take no time. A
# web address may have a token in the place of a user.
OF_WEB = re.compile(r"(https?://)(?:[^/\s]{0,2000}|[^/:@\s]{0,200}:\S{0,2000})@", re.IGNORECASE)
OF_OTHERS = re.compile(r"(://[^/:@\s]{0,200}):\S{0,2000}@")
OF_HEADER = re.compile(r"(\bBearer )[^\s'\"]+")
WITHOUT_SCHEME = re.compile(r"((?:^|[\s='\"(])(?!models:/)[^\s:='\"(]{1,200}):(?!//)\S{0,2000}@")


def masked(text: str) -> str:
    """Return an address, or a text with addresses in it, with *** instead of secrets."""
    text = OF_HEADER.sub(r"\1***", text)
    if "@" not in text and "=" not in text:
        return text
    text = OF_OTHERS.sub(r"\1:***@", OF_WEB.sub(r"\1***@", NAMED.sub(r"\1***", text)))
    return WITHOUT_SCHEME.sub(r"\1:***@", text)


def masked_values(values: Mapping[str, str]) -> dict[str, str]:
    """Return named values, such as tags, with *** instead of secrets."""
    return {name: masked(value) for name, value in values.items()}


def mask_command_line() -> None:
    """Overwrite secrets in this process's command line, as other users see it; on Linux."""
    with suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = map(int, fields[45:47])  # proc(5): arg_start, arg_end
        words = ctypes.string_at(start, end - start).split(b"\0") if start else []
        for word in words:
            shown = masked(word.decode(errors="surrogateescape")).encode(errors="surrogateescape")
            if shown != word:
                ctypes.memmove(start, shown[: len(word)].ljust(len(word), b"\0"), len(word))
            start += len(word) + 1
