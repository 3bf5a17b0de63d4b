"""Gets a file of a Hub repository from the cache or by download, with one short attempt if the Hub is unreachable.

huggingface_hub itself retries for half a minute before it reports an unreachable server, also for a misspelt name. The
errors are those of huggingface_hub; callers turn them into messages.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from ssd_cache.io.showing import printable

ATTEMPT_SECONDS = 5
"""Timeout of a request for a file's metadata; HF_HUB_ETAG_TIMEOUT overrides it."""


class HubError(ConnectionError):
    """A name that is not on this machine, while the Hub cannot be reached; the message is safe to print."""

    def __init__(self, message: object = ""):
        super().__init__(printable(str(message)))


def hub_download(repo_id: str, name: str, **options: Any) -> Any:
    """Call `hf_hub_download` with keyword `options`, but make only one short attempt to reach the Hub.

    Raises:
        LocalEntryNotFoundError: there is no cached copy, and the Hub cannot be reached; `__cause__` is the reason.
        Exception: as for `hf_hub_download`.
    """
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    timeout = ATTEMPT_SECONDS if timeout == constants.DEFAULT_ETAG_TIMEOUT else timeout
    problem = None
    if not (options.get("local_files_only") or options.get("force_download") or _is_cached(repo_id, name, options)):
        problem = _unreachable(repo_id, name, options, timeout)
    if problem is not None:
        options["local_files_only"] = True
    try:
        return hf_hub_download(repo_id, name, etag_timeout=timeout, **options)
    except LocalEntryNotFoundError as error:
        raise error from problem or error.__cause__


def _is_cached(repo_id: str, name: str, options: dict[str, Any]) -> bool:
    path = f"{options['subfolder']}/{name}" if options.get("subfolder") else name
    where = {key: options.get(key) for key in ("cache_dir", "revision")}
    return isinstance(try_to_load_from_cache(repo_id, path, **where), str)


def _unreachable(repo_id: str, name: str, options: dict[str, Any], timeout: float) -> Exception | None:
    """The error when the Hub cannot be reached; None if it answers, or if `hf_hub_download` raises the error itself."""
    try:
        url = hf_hub_url(repo_id, name, subfolder=options.get("subfolder"), revision=options.get("revision"))
        get_hf_file_metadata(url, token=options.get("token"), timeout=timeout)
    except (HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled):
        return None
    except HfHubHTTPError as error:
        return error if error.response.status_code >= 500 else None
    except Exception as error:  # from the HTTP client: no connection, timeout, proxy, certificates
        return error
    return None
