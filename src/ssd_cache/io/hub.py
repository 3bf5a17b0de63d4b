"""Gets a file of a Hub repository from the cache or by download, with one short attempt if the Hub is unreachable.

huggingface_hub itself retries for half a minute before it reports an unreachable server, also for a misspelt name. The
errors are those of huggingface_hub; `describe_failure` turns them into messages.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ssd_cache.io.showing import first_line, printable

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


def describe_failure(error: BaseException, missing: str) -> tuple[bool, str]:
    """Whether the Hub answered, and the reason of a failure with its remedy, in the caller's terms.

    Args:
        error: any exception of huggingface_hub or its HTTP client.
        missing: the reason where the repository lacks the file.
    """
    not_cached = isinstance(error, LocalEntryNotFoundError)
    if isinstance(error, (LocalEntryNotFoundError, RuntimeError, ValueError)) and error.__cause__ is not None:
        error = error.__cause__  # huggingface_hub wraps the server's answer in one of these
    login = "pass token=, or run `hf auth login`"
    for kind, reason in (
        (GatedRepoError, f"access to this repository is restricted; ask for it on its page, then {login}"),
        (
            RepositoryNotFoundError,
            "no such repository on the Hub, or a private one, and no such folder or file here; "
            f"check the name; for a private repository {login}",
        ),
        (RevisionNotFoundError, "no such revision; revision= takes a branch, a tag or a full commit hash"),
        (RemoteEntryNotFoundError, missing),
        (HFValidationError, "neither a folder or file here, nor the id of a repository; an id reads 'user/name'"),
        (OfflineModeIsEnabled, "offline mode is on; unset HF_HUB_OFFLINE, or give a folder"),
        (FileMetadataError, "this server does not answer like a Hub; check HF_ENDPOINT and the proxy"),
        (LocalEntryNotFoundError, "there is no cached copy; download it once without local_files_only=True"),
    ):
        if isinstance(error, kind):
            if not_cached and kind is not LocalEntryNotFoundError:
                reason = f"no cached copy, and {reason}"
            return kind is not OfflineModeIsEnabled, reason
    told = first_line(error)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return True, f"the Hub refuses the token ({status}), or it lacks the permission; {login}"
        return False, f"the Hub answered {status}; try again later ({told})"
    if not_cached:
        return False, f"the server cannot be reached and there is no cached copy; check the network ({told})"
    return False, f"the transfer failed: {type(error).__name__} {told}; check network and disk, then try again"


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
