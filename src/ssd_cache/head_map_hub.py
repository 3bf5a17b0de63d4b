"""The road between a head map and the Hugging Face Hub: two files come down, four go up.

Everything that can go wrong on it becomes a `HeadMapError` that names the place and the remedy. The road itself is
huggingface_hub's: its cache, its offline mode (`HF_HUB_OFFLINE`), its server (`HF_ENDPOINT`), its tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import (
    DisabledRepoError,
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

from ssd_cache.head_map_checks import HeadMapError
from ssd_cache.head_map_files import CONFIG_NAME, MAX_CONFIG_BYTES, MAX_TENSORS_BYTES, TENSORS_NAME, read_file

LIBRARY_NAME = "ssd-cache"


def download(
    repo_id: str,
    *,
    revision: str | None,
    subfolder: str | None,
    token: bool | str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    force_download: bool,
) -> tuple[bytes, bytes, str]:
    """The bytes of config and tensors, and the commit both were taken from.

    The size of each file is asked for, and checked, before it is downloaded. The tensors are fetched at the very commit
    that the config came from, so that a push between the two cannot mix them.
    """

    def fetch(name: str, limit: int, at: str | None) -> tuple[bytes, str]:
        def call(dry_run: bool):  # a path, or what would be downloaded
            return hf_hub_download(
                repo_id,
                name,
                subfolder=subfolder,
                revision=at,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
                force_download=force_download,
                library_name=LIBRARY_NAME,
                dry_run=dry_run,
            )

        with _refusing(repo_id, revision):
            planned = call(dry_run=True)
            if (planned.file_size or 0) > limit:
                raise HeadMapError(
                    f"{_place(repo_id, revision)}: {name} takes {planned.file_size} bytes, the limit is {limit}; "
                    "it is not a head map and was not downloaded"
                )
            path = Path(call(dry_run=False))
            return read_file(path, limit), path.parents[depth].name  # snapshots/<commit>/<subfolder>/<name>

    if revision is not None and ".." in revision:
        raise HeadMapError(f"revision={revision!r} is no branch, tag or commit; give one like 'main'")
    depth = len(PurePosixPath(subfolder or "").parts)
    config, commit = fetch(CONFIG_NAME, MAX_CONFIG_BYTES, revision)
    tensors, _ = fetch(TENSORS_NAME, MAX_TENSORS_BYTES, commit)
    return config, tensors, commit


def create(repo_id: str, *, token: bool | str | None, private: bool | None, revision: str | None) -> str:
    """Makes the repository, and the branch `revision`, where they are missing; "map" comes back as "user/map"."""
    api = HfApi(token=token, library_name=LIBRARY_NAME)
    with _refusing(repo_id, revision):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return repo_id


def upload(
    repo_id: str, files: dict[str, bytes], *, token: bool | str | None, revision: str | None, commit_message: str
) -> CommitInfo:
    """Commits all files at once."""
    api = HfApi(token=token, library_name=LIBRARY_NAME)
    with _refusing(repo_id, revision):
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        return api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)


def _place(repo_id: str, revision: str | None) -> str:
    return f"{HfApi().endpoint}/{repo_id}" + (f"@{revision}" if revision else "")


@contextmanager
def _refusing(repo_id: str, revision: str | None) -> Iterator[None]:
    """Every failure on the road is a `HeadMapError`, whatever huggingface_hub or its HTTP client raised."""
    try:
        yield
    except HeadMapError:
        raise
    except Exception as error:
        raise HeadMapError(f"{_place(repo_id, revision)}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """What happened and what to do, in the caller's terms."""
    not_cached = isinstance(error, LocalEntryNotFoundError)
    if isinstance(error, (LocalEntryNotFoundError, RuntimeError, ValueError)) and error.__cause__ is not None:
        error = error.__cause__  # huggingface_hub wraps what the server said in one of these
    login = "pass token=, or run `hf auth login`"
    for kind, reason in (
        (GatedRepoError, f"access to this repository is restricted; ask for it on its page, then {login}"),
        (DisabledRepoError, "this repository was disabled; use another one"),
        (
            RepositoryNotFoundError,
            "no such repository on the Hub, or a private one, and no such folder or file here; "
            f"check the name; for a private repository {login}",
        ),
        (RevisionNotFoundError, "no such revision; revision= takes a branch, a tag or a full commit hash"),
        (
            RemoteEntryNotFoundError,
            f"has no {CONFIG_NAME} or no {TENSORS_NAME} there, so it is not the repository of a head map (a model's, "
            "perhaps?); check the name and subfolder=, or make a map with profile_heads",
        ),
        (HFValidationError, "neither a folder or file here, nor the id of a repository; an id reads 'user/name'"),
        (LocalTokenNotFoundError, f"token=True, but no token is saved here; {login}"),
        (OfflineModeIsEnabled, "offline mode is on; unset HF_HUB_OFFLINE, or give a folder"),
        (FileMetadataError, "this server does not answer like a Hub; check HF_ENDPOINT and the proxy"),
        (LocalEntryNotFoundError, "there is no cached copy; download it once without local_files_only=True"),
    ):
        if isinstance(error, kind):
            return f"no cached copy, and {reason}" if not_cached and kind is not LocalEntryNotFoundError else reason
    first_line = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"the Hub refuses the token ({status}), or it lacks the permission; {login}"
        if status == 404:
            return "not found (404); check the name, and HF_ENDPOINT"
        return f"the Hub answered {status}; try again later ({first_line})"
    if type(error) is ValueError:  # arguments that exclude each other
        return f"{first_line}; change one of the arguments"
    if not_cached:
        return f"the server cannot be reached and there is no cached copy; check the network ({first_line})"
    return f"the transfer failed: {type(error).__name__} {first_line}; check network and disk, then try again"
