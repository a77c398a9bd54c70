"""Is a web service there? Exit code 0 when GET says 200. Standard library only: health checks run it every few seconds.

    python3 healthy.py URL [TEXT]        TEXT must be in the answer
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

TIMEOUT_S = 4.0


def main(url: str, text: str = "") -> int:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:  # noqa: S310 an address from our own compose file
            found = answer.read().decode(errors="replace")
    except (urllib.error.URLError, OSError) as error:
        print(f"{url}: {error}")  # noqa: T201
        return 1
    if text not in found:
        print(f"{url} does not say {text!r}")  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
