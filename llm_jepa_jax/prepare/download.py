# SPDX-License-Identifier: Apache-2.0
"""Files by https, kept in the cache under their address."""

import hashlib
import http.client
import logging
import pathlib
import ssl
import urllib.error
import urllib.parse
import urllib.request
import uuid
from typing import Any

from llm_jepa_jax.errors import TryAgainError, UserError
from llm_jepa_jax.prepare.source_files import CHUNK

LOG = logging.getLogger("llm_jepa_jax")
TIMEOUT_SECONDS = 60


def fetch(url: str, cache_dir: pathlib.Path) -> pathlib.Path:
    """The file at a https address, from the cache where it was fetched before; whole or not at all.

    Raises:
        UserError: it is no https address, or the server refuses.
        TryAgainError: there is no way to the server, or it stopped in the middle.
    """
    parts = urllib.parse.urlsplit(url)
    name = pathlib.PurePosixPath(parts.path).name
    if parts.scheme != "https" or not parts.netloc or not name:
        raise UserError(f"--source={url}: not a https address of a file; name one, or a file or directory here")
    target = cache_dir / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:32] / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{uuid.uuid4().hex}.part")
    LOG.info("fetching %s", url)
    try:
        _copy(url, part)
        part.replace(target)
    except urllib.error.HTTPError as error:
        raise UserError(f"--source={url}: the server says {error.code} {error.reason}; fetch it by hand") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError, ssl.SSLError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise TryAgainError(f"--source={url}: cannot be fetched ({reason}); fetch it by hand, or try again") from error
    finally:
        part.unlink(missing_ok=True)
    return target


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request: Any, *arguments: Any) -> Any:
        following = super().redirect_request(request, *arguments)
        if following is not None and following.type != "https":
            address = request.full_url
            raise UserError(f"--source={address}: leads to {following.full_url}, which is not https; fetch it by hand")
        return following


def _copy(url: str, target: pathlib.Path) -> None:
    opener = urllib.request.build_opener(_OnlyHttps)
    with opener.open(url, timeout=TIMEOUT_SECONDS) as response, target.open("wb") as file:
        wanted, got = response.headers.get("Content-Length"), 0
        while chunk := response.read(CHUNK):
            file.write(chunk)
            got += len(chunk)
    if wanted is not None and got != int(wanted):
        raise ConnectionError(f"{got} of {wanted} bytes came")
