"""Other libraries' signatures: each file translates names and values onto ours, and no more."""

import contextlib
import re
from collections.abc import Iterator


@contextlib.contextmanager
def errors_named(**theirs: str) -> Iterator[None]:
    """Errors about our options in the caller's words: `errors_named(scale="attn_scale")`."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        ours = "|".join(theirs)
        message = re.sub(rf"\b({ours})(?==| is traced)", lambda m: theirs[m[1]], str(error))
        raise type(error)(message) from error
