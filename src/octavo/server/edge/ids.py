"""Request ids: the header field `x-request-id`, which a client or a proxy may set and every response repeats."""

import re
import uuid

HEADER = b"x-request-id"
_SOUND = re.compile(rb"[\x21-\x7e]{1,128}")  # visible ASCII: safe in a header and in a line of a log


def request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """Return the id in the request's header, or a new one if it is missing or not 1 to 128 visible ASCII characters.

    Args:
        headers: names, in lower case, and values.
    """
    for name, value in headers:
        if name == HEADER and _SOUND.fullmatch(value):
            return value.decode()
    return f"req-{uuid.uuid4().hex}"
