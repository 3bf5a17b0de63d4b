"""HeadMap: which KV heads of a generator are spatial and which semantic, with the scores behind the labels.

A map is a checked, immutable value that can be saved, loaded and shared. This module does not label heads (`profiling/`
does) and does not apply labels in a cache (`cache/layer.py` does). `files.py` reads and writes the files, `hub.py`
exchanges them with the Hub, and `card.py` makes the model card.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import CommitInfo

from ssd_cache.budget import Budget, resolve_budget, scale_counts
from ssd_cache.head_map import checks, files, hub
from ssd_cache.head_map.card import PLOT_NAME, card, png
from ssd_cache.head_map.checks import HeadMapError
from ssd_cache.head_map.learned_score import LearnedScore
from ssd_cache.io.showing import shown
from ssd_cache.layout import Grid, ImageLayout

__all__ = ["HeadMap", "HeadMapError"]

INVERTED = "inverted"


@dataclass(frozen=True, init=False, eq=False, repr=False)
class HeadMap:
    """The labels of all KV heads of one model.

    Args:
        is_spatial: boolean tensor `[layers, kv_heads]`; True is spatial, False semantic. At most 1024 x 4096.
        grid: rows and columns of the image in visual tokens; tokens that end a row count as its last columns.
        previews: draft grids that the model generates before the image, in order, as GLM-Image does; none by default.
        scores: the evidence behind the labels: one floating-point tensor `[layers, kv_heads]` (kept as "score"), or
            several by name. Finite; kept in float32.
        threshold: heads with at least this score were labelled spatial.
        model_id: the model that was profiled, as given to its `from_pretrained`.
        revision: the commit of that model.
        model_type: its `config.model_type`.
        method: how the labels were made, in a few words.
        budget: the budget that the map was fitted to, as for [`SSDCache`], which uses it when none is given.
        learned: a score by which semantic heads rank their tokens, or with `ranks_all` every head, made by
            [`learn_score`] for this grid. [`SSDCache`] uses it by default when the map has one. The first dimensions of
            its tensors are the shape of the labels.
        profile: further facts needed to make the map again (prompts, seeds, window, ...), a small dict of JSON values.

    Tensors are copied to the CPU; treat them as read-only.

    Raises:
        HeadMapError: a value is outside these limits.

    Example:
        >>> head_map = HeadMap(torch.tensor([[True, False], [False, False]]), grid=(24, 24))
        >>> head_map
        HeadMap(2 layers x 2 KV heads, 1 spatial, 3 semantic, grid 24x24, made in memory)
    """

    is_spatial: torch.Tensor
    grid: Grid
    scores: dict[str, torch.Tensor]
    threshold: float | None
    model_id: str | None
    revision: str | None
    model_type: str | None
    method: str | None
    budget: Budget | None
    learned: LearnedScore | None
    profile: dict[str, Any]
    previews: tuple[Grid, ...]
    is_online: bool = field(init=False)
    """Whether the map has no labels; see [`HeadMap.online`]."""
    layout: ImageLayout = field(init=False)
    """The grid and the draft grids together."""
    origin: str = field(init=False)
    """Where this map comes from: a path, a Hub repository with its commit, or "made in memory"."""

    def __init__(
        self,
        is_spatial: torch.Tensor,
        grid: Grid = (24, 24),
        *,
        scores: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        threshold: float | None = None,
        model_id: str | None = None,
        revision: str | None = None,
        model_type: str | None = None,
        method: str | None = None,
        budget: Budget | None = None,
        learned: LearnedScore | None = None,
        profile: Mapping[str, Any] | None = None,
        previews: Sequence[Grid] = (),
    ) -> None:
        labels, layout = checks.checked_labels(is_spatial), checks.checked_layout(grid, previews)
        texts = {"model_id": model_id, "revision": revision, "model_type": model_type, "method": method}
        self._set(
            is_spatial=labels,
            grid=layout.grid,
            previews=layout.draft_grids,
            layout=layout,
            scores=checks.checked_scores(scores, labels.shape),
            threshold=checks.checked_threshold(threshold),
            budget=checks.checked_budget(budget, labels, layout.num_tokens),
            learned=checks.checked_learned(learned, labels.shape, layout),
            profile=checks.checked_profile(profile),
            is_online=False,
            origin="made in memory",
            **{name: checks.checked_text(name, text) for name, text in texts.items()},
        )

    def _set(self, **values: Any) -> HeadMap:
        """Set attributes of this frozen object while it is made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)
        return self

    @classmethod
    def uniform(
        cls, kind: Literal["spatial", "semantic"], *, num_layers: int, num_kv_heads: int, grid: Grid = (24, 24)
    ) -> HeadMap:
        """A map whose heads are all of one `kind`, for baselines: StreamingLLM is all spatial, H2O all semantic."""
        if kind not in ("spatial", "semantic"):
            raise HeadMapError(f"kind={shown(kind)} is neither 'spatial' nor 'semantic'; give one of the two")
        checks.check_shape((num_layers, num_kv_heads))
        labels = torch.full((num_layers, num_kv_heads), kind == "spatial", dtype=torch.bool, device="cpu")
        return cls(labels, grid, method=f"uniform {kind}")

    @classmethod
    def online(cls, *, num_layers: int, num_kv_heads: int, grid: Grid = (24, 24)) -> HeadMap:
        """A map without labels: an `SSDCache` keeps tokens in every head by their keys alone (score="leverage").

        Use it for a model that nobody has profiled. An online map cannot be saved or inverted.
        """
        head_map = cls.uniform("semantic", num_layers=num_layers, num_kv_heads=num_kv_heads, grid=grid)
        return head_map._set(is_online=True, method="online", origin="made without profiling")

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str | None = None,
    ) -> HeadMap:
        """Load a map from a folder, from either of its two files, or from a repository on the Hub.

        A folder or file that exists takes precedence over a repository of the same name. The files may come from
        anyone: no code is run, sizes are checked before reading, and links that leave the folder are refused.
        The further arguments are those of `huggingface_hub.hf_hub_download`. When the Hub cannot be reached, its cached
        copy is used.

        Raises:
            HeadMapError: the map cannot be found or trusted; the message names the place and the remedy.
        """
        files.check_subfolder(subfolder)
        files.check_name("revision", revision)
        path = files.find_local(source)
        if path is not None:
            if revision is not None:
                raise HeadMapError(f"{path}: revision={shown(revision)} is for repositories of the Hub; leave it out")
            config, tensors = files.read_folder(path, subfolder)
            place = str(path / subfolder) if subfolder else str(path)
        else:
            config, tensors, commit = hub.download(
                str(source),
                revision,
                subfolder,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
                force_download=force_download,
            )
            place = f"{source}@{commit}" + (f"/{subfolder}" if subfolder else "")
        arguments = files.decode(config, tensors, place)
        try:
            return cls(**arguments)._set(origin=place)
        except HeadMapError as error:
            raise HeadMapError(f"{place}: {error}") from error

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write `config.json` and `head_map.safetensors` into `folder`, made if missing, and return its path.

        A crash during the write leaves either the old map or two files that [`from_pretrained`] refuses, never a wrong
        map.

        Raises:
            HeadMapError: the folder cannot be written, or the map is online.
        """
        path = Path(os.path.expanduser(folder))
        files.write_folder(path, self._files())
        return path

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: bool | str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload head map",
    ) -> CommitInfo:
        """Upload both files, a model card and its plot to a repository of the Hub, in one commit; raises HeadMapError.

        Creates the repository and the branch `revision` when they are missing, and replaces an existing model card.
        """
        for what, name in (("repo_id", repo_id), ("revision", revision)):
            files.check_name(what, name)
        contents = self._files() | {PLOT_NAME: png(self)}
        repo_id = hub.create(repo_id, token=token, private=private, revision=revision)
        contents["README.md"] = card(self, repo_id).encode()
        return hub.upload(repo_id, contents, token=token, revision=revision, commit_message=commit_message)

    @property
    def num_layers(self) -> int:
        return self.is_spatial.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.is_spatial.shape[1]

    @property
    def num_visual_tokens(self) -> int:
        """Cells of the grid, rows x columns, plus those of the draft grids."""
        return self.layout.num_tokens

    @property
    def slots(self) -> list[tuple[int, ...]] | None:
        """Slots of every KV head, layer by layer, under the map's budget; None for a map without a budget."""
        if self.budget is None:
            return None
        return resolve_budget(self.budget, self.is_spatial.tolist(), self.num_visual_tokens)

    def window_heads(self, score: str) -> torch.Tensor:
        """Which heads keep their newest tokens under a score of [`SSDCache`], `[layers, kv_heads]`; the others rank.

        These are the spatial heads, or none under a learned score that ranks the tokens of every head.
        """
        return torch.zeros_like(self.is_spatial) if score == "learned" and self.ranks_all else self.is_spatial

    @property
    def ranks_all(self) -> bool:
        """Whether the map has a learned score that ranks the tokens of every head."""
        return self.learned is not None and self.learned.ranks_all

    @property
    def ranking(self) -> str | None:
        """Whose tokens the learned score ranks, in words; None without one."""
        if self.learned is None:
            return None
        return "ranks the tokens of " + ("all heads" if self.ranks_all else "semantic heads")

    @property
    def facts_of_labels(self) -> dict[str, Any]:
        """The profile without the fidelity curve, which is not that of other slots or of another score."""
        return {name: fact for name, fact in self.profile.items() if name != "fidelity"}

    @property
    def digest(self) -> str:
        """Twelve hex digits of the sha256 of labels, grid and learned score, to identify the map in tables."""
        shape = f"{self.num_layers}x{self.num_kv_heads} {self.layout} "
        found = hashlib.sha256(shape.encode() + bytes(self.is_spatial.flatten().tolist()))
        if self.learned is not None:
            found.update(b"ranks all" if self.learned.ranks_all else b"")
            for tensor in self.learned.tensors().values():
                found.update(tensor.numpy().tobytes())
        return found.hexdigest()[:12]

    def with_grid(self, grid: Grid, previews: Sequence[Grid] = ()) -> HeadMap:
        """The same labels for images of another size; counts of slots scale with the cells of the grid.

        A learned score is left out, since it holds weights for the positions of its own grid.
        """
        return self.with_layout(checks.checked_layout(grid, previews))

    def with_layout(self, layout: ImageLayout) -> HeadMap:
        """As `with_grid`, with the grid and the draft grids in one object."""
        if layout == self.layout:
            return self
        head_map = replace(self, grid=layout.grid, previews=layout.draft_grids, learned=None, budget=None)
        if self.budget is not None:
            budget = scale_counts(self.budget, self.num_visual_tokens, head_map.num_visual_tokens)
            head_map = replace(head_map, budget=budget)
        return head_map._set(is_online=self.is_online, origin=self.origin)

    def check_fits(self, model: str, num_layers: int, num_kv_heads: int, layout: ImageLayout | None = None) -> None:
        """Refuse a model with other layers, KV heads or (if `layout` is given) grids; raises HeadMapError."""
        if (num_layers, num_kv_heads) != self.is_spatial.shape or layout not in (None, self.layout):
            ours = "" if layout is None else f" and a grid of {self.layout.text()}"
            theirs = "" if layout is None else f" and {layout.text()}"
            raise HeadMapError(
                f"the head map ({self.origin}) has {self.num_layers} layers x {self.num_kv_heads} KV heads{ours}, but "
                f"{model} has {num_layers} x {num_kv_heads}{theirs}: use the map that was made for this model"
            )

    def check_made_for(self, model_id: str) -> None:
        """Warn when the last part of `self.model_id` does not occur in `model_id` (a Hub id or a path).

        This is a warning, not an error, because a model can have several names.
        """
        made_for = (self.model_id or "").rstrip("/").rpartition("/")[2]
        if model_id and made_for.lower() not in model_id.lower():
            warnings.warn(
                f"the head map ({self.origin}) was made for {self.model_id}, and the model is {model_id}: its "
                "labels may be no better than chance here (`ssd-cache eval fidelity` measures them)",
                stacklevel=3,
            )

    def __invert__(self) -> HeadMap:
        """The map with every label inverted; `method` records it, and inverting twice gives this map again.

        Scores and budget stay: slots given for each head stay with the head. A learned score is left out, since it was
        trained for the original labels.
        """
        self._check_labelled("inverted")
        if self.method is None or self.method == INVERTED:
            method = None if self.method else INVERTED
        elif self.method.startswith(f"{INVERTED}: "):
            method = self.method.removeprefix(f"{INVERTED}: ")
        else:
            method = f"{INVERTED}: {self.method}"[: checks.MAX_TEXT]
        inverted = replace(self, is_spatial=~self.is_spatial, method=method, learned=None)
        return inverted._set(origin=f"{self.origin}, inverted")

    def __eq__(self, other: object) -> bool:
        """Whether labels, scores and facts are equal; the origin is ignored."""
        if not isinstance(other, HeadMap):
            return NotImplemented
        return (
            self.is_online == other.is_online
            and self._facts() == other._facts()
            and torch.equal(self.is_spatial, other.is_spatial)
            and self.digest == other.digest  # covers the learned score
            and self.scores.keys() == other.scores.keys()
            and all(torch.equal(score, other.scores[name]) for name, score in self.scores.items())
        )

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        num_spatial = int(self.is_spatial.sum())
        labels = f"{num_spatial} spatial, {self.is_spatial.numel() - num_spatial} semantic"
        place = self.origin if self.is_online or self.origin.startswith("made in memory") else f"from {self.origin}"
        return (
            f"HeadMap({self.num_layers} layers x {self.num_kv_heads} KV heads, "
            f"{'online' if self.is_online else labels}, grid {self.layout}, "
            f"{'' if self.learned is None else 'learned score, '}{place})"
        )

    def _check_labelled(self, what: str) -> None:
        if self.is_online:
            raise HeadMapError(
                f"an online map has no labels, so it cannot be {what}; profile_heads makes a map with labels"
            )

    def _facts(self) -> dict[str, Any]:
        """The fields of config.json, without version and checksum."""
        names = ("num_layers", "num_kv_heads", "model_id", "revision", "model_type", "method", "threshold", "budget")
        return {**self.layout.as_json(), **{name: getattr(self, name) for name in (*names, "profile")}}

    def _files(self) -> dict[str, bytes]:
        self._check_labelled("saved or pushed to the Hub")
        return files.encode(self._facts(), self.is_spatial, self.scores, self.learned)
