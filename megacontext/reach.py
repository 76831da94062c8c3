"""Whether a server answers, within a time that holds whatever is wrong with the network."""

from __future__ import annotations

import http.client
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping

_MOST_BYTES = 1 << 16


def reply_of(
    url: str,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 10.0,
    proxies: Mapping[str, str] | None = None,
) -> tuple[int, bytes]:
    """Status and the first 64 KiB of what a GET of an http or https URL answers, be it an error page.

    proxies: `{scheme: URL}` instead of those of the environment (`https_proxy`, `no_proxy`, …).
    Raises OSError when nothing answers within `timeout_s`: a ConnectionRefusedError, a gaierror for a name that is not
    known, a TimeoutError, an SSLCertVerificationError, a ConnectionError for a reply that is not HTTP. ValueError for a
    URL that cannot be one.
    """
    request = urllib.request.Request(url, headers=dict(headers or {}))
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler(dict(proxies))] if proxies else []))
    found: list[tuple[int, bytes] | OSError] = []

    def ask() -> None:
        try:
            with opener.open(request, timeout=timeout_s) as reply:
                found.append((reply.status, reply.read(_MOST_BYTES)))
        except urllib.error.HTTPError as error:
            found.append((error.code, b""))
        except urllib.error.URLError as error:
            found.append(error.reason if isinstance(error.reason, OSError) else ConnectionError(str(error.reason)))
        except OSError as error:
            found.append(error)
        except (http.client.HTTPException, ValueError) as error:
            found.append(ConnectionError(f"the reply is not HTTP ({type(error).__name__})"))

    # A thread, because the timeout of a socket holds for each packet, and not at all for the look-up of a name.
    thread = threading.Thread(target=ask, name="reach", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not found or isinstance(found[0], TimeoutError):
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    if isinstance(found[0], OSError):
        raise found[0]
    return found[0]


def why(error: OSError) -> str:
    """What went wrong, for a sentence: `Connection refused`."""
    return error.strerror or str(error) or type(error).__name__
