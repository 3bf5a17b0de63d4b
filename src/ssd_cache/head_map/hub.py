"""Downloads a head map's two files from the Hugging Face Hub, and uploads them with a model card and a plot.

Every failure becomes a `HeadMapError` that names the place and the remedy. Transfers use huggingface_hub, with its
cache, offline mode (`HF_HUB_OFFLINE`), server (`HF_ENDPOINT`) and tokens. This module does not interpret the files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, hf_hub_download

from ssd_cache.head_map.checks import HeadMapError
from ssd_cache.head_map.files import CONFIG_NAME, MAX_CONFIG_BYTES, MAX_TENSORS_BYTES, TENSORS_NAME, read_file
from ssd_cache.io.hub import HubError, describe_failure, hub_download
from ssd_cache.io.showing import shown
from ssd_cache.io.suggesting import cached_repositories, nearby_folders, suggestion

LIBRARY_NAME = "ssd-cache"

MISSING = (
    f"has no {CONFIG_NAME} or no {TENSORS_NAME} there, so it is not the repository of a head map (a model's, perhaps?)"
    "; check the name and subfolder=, or make a map with profile_heads"
)


class HeadMapHubError(HeadMapError, HubError):
    """A map that is not on this machine, while the Hub cannot be reached."""


def download(repo_id: str, revision: str | None, subfolder: str | None, **options: Any) -> tuple[bytes, bytes, str]:
    """The bytes of config and tensors, and the commit that both come from; `options` as for `hf_hub_download`.

    The size of each file is checked before the download. The tensors are downloaded at the commit of the config, so a
    push between the two downloads cannot mix two versions.
    """
    options |= {"subfolder": subfolder, "library_name": LIBRARY_NAME}

    def fetch(name: str, limit: int, at: str | None) -> tuple[bytes, str]:
        with _refusing(repo_id, revision, is_read=True):
            planned = hub_download(repo_id, name, dry_run=True, revision=at, **options)
            if (planned.file_size or 0) > limit:
                raise HeadMapError(
                    f"{_place(repo_id, revision)}: {name} takes {planned.file_size} bytes, the limit is {limit}; "
                    "it is not a head map and was not downloaded"
                )
            path = Path(hf_hub_download(repo_id, name, revision=at, **options))
            return read_file(path, limit), path.parents[depth].name  # snapshots/<commit>/<subfolder>/<name>

    if revision is not None and ".." in revision:
        raise HeadMapError(f"revision={shown(revision)} is not a branch, tag or commit; give one like 'main'")
    depth = len(PurePosixPath(subfolder or "").parts)
    config, commit = fetch(CONFIG_NAME, MAX_CONFIG_BYTES, revision)
    tensors, _ = fetch(TENSORS_NAME, MAX_TENSORS_BYTES, commit)
    return config, tensors, commit


def create(repo_id: str, *, token: bool | str | None, private: bool | None, revision: str | None) -> str:
    """Creates the repository and the branch `revision` if missing; returns the full id, "user/map" for "map"."""
    api = HfApi(token=token, library_name=LIBRARY_NAME)
    with _refusing(repo_id, revision):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return repo_id


def upload(
    repo_id: str, files: dict[str, bytes], *, token: bool | str | None, revision: str | None, commit_message: str
) -> CommitInfo:
    """Uploads all files in one commit."""
    api = HfApi(token=token, library_name=LIBRARY_NAME)
    with _refusing(repo_id, revision):
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        return api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)


def _place(repo_id: str, revision: str | None) -> str:
    return f"{HfApi().endpoint}/{repo_id}" + (f"@{revision}" if revision else "")


@contextmanager
def _refusing(repo_id: str, revision: str | None, *, is_read: bool = False) -> Iterator[None]:
    """Turn every exception of huggingface_hub or its HTTP client into a `HeadMapError`.

    When a repository is read, the message ends with the nearest known name on this machine.
    """
    try:
        yield
    except HeadMapError:
        raise
    except Exception as error:
        known = [*nearby_folders(repo_id), *cached_repositories()] if is_read else []
        nearest = "" if repo_id in known else suggestion(repo_id, known)
        is_hub_there, reason = describe_failure(error, MISSING)
        kind = HeadMapError if is_hub_there else HeadMapHubError
        raise kind(f"{_place(repo_id, revision)}: {reason}{nearest}") from error
