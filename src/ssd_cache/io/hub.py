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
    problem = _unreachable(repo_id, name, **options)
    try:
        return hf_hub_download(
            repo_id,
            name,
            etag_timeout=_timeout(),
            **options | ({} if problem is None else {"local_files_only": True}),
        )
    except LocalEntryNotFoundError as error:
        if problem is None:
            raise
        raise error from problem


def _unreachable(
    repo_id: str,
    name: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_dir: Any = None,
    local_files_only: bool = False,
    force_download: bool = False,
    **_: Any,
) -> Exception | None:
    """The error when the Hub cannot be reached for a file without a cached copy; None if it can or is not needed."""
    path = f"{subfolder}/{name}" if subfolder else name
    if local_files_only or force_download or constants.is_offline_mode():
        return None
    if isinstance(try_to_load_from_cache(repo_id, path, cache_dir=cache_dir, revision=revision), str):
        return None
    try:
        get_hf_file_metadata(
            hf_hub_url(repo_id, name, subfolder=subfolder, revision=revision), token=token, timeout=_timeout()
        )
    except (HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled):
        return None  # hf_hub_download raises them again
    except HfHubHTTPError as error:
        return error if error.response.status_code >= 500 else None
    except Exception as error:  # from the HTTP client: no connection, timeout, proxy, certificates
        return error
    return None


def _timeout() -> float:
    given = constants.HF_HUB_ETAG_TIMEOUT
    return ATTEMPT_SECONDS if given == constants.DEFAULT_ETAG_TIMEOUT else given
