"""Find the checkpoint that a name means: the bundled model, a local folder, or a Hub repository.

This module reads or downloads only `config.json`. `Checkpoint.load` loads the weights.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import transformers
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from ssd_cache.io.hub import HubError, hub_download
from ssd_cache.io.showing import first_line, shown
from ssd_cache.io.suggesting import cached_repositories, nearby_folders, suggestion
from ssd_cache.io.untrusted import name_problem, parse_json
from ssd_cache.layout import ImageLayout
from ssd_cache.models.base import BUNDLED, BUNDLED_FOLDER, Checkpoint, Generator
from ssd_cache.models.causal_lm import CausalLMGenerator
from ssd_cache.models.deepseek_janus import DeepSeekJanusGenerator
from ssd_cache.models.emu3 import Emu3Generator
from ssd_cache.models.glm_image import GlmImageGenerator
from ssd_cache.models.janus import JanusGenerator
from ssd_cache.models.settings import GeneratorError

FAMILIES: dict[str, type[Generator]] = {
    "emu3": Emu3Generator,
    "glm_image": GlmImageGenerator,
    "janus": JanusGenerator,
    "multi_modality": DeepSeekJanusGenerator,
}
"""The class for every supported `config.model_type`. A new model needs one file and one entry here."""

KNOWN = (
    *("deepseek-community/Janus-Pro-1B", "deepseek-community/Janus-Pro-7B", "deepseek-ai/Janus-Pro-1B"),
    *("deepseek-ai/Janus-Pro-7B", "BAAI/Emu3-Gen-hf", "zai-org/GLM-Image"),
)
"""Hub ids of the families in `FAMILIES`. Error messages suggest them for misspelt names."""

PIPELINE_FILE = "model_index.json"
"""The file that diffusers writes instead of config.json. It maps names of pipeline parts to their classes."""


def find_generator(name: str, grid: tuple[int, int] | None = None) -> Checkpoint:
    """Find the checkpoint that a name means. An existing folder has priority over a Hub repository of the same name.

    Args:
        name: "shapes-janus", a folder with a transformers checkpoint, or a Hub id such as
            "deepseek-community/Janus-Pro-1B".
        grid: rows and columns, for a model that generates several sizes, and for any other causal language model,
            which then generates plain tokens (see `models/causal_lm.py`). End-of-row tokens count as the last columns.

    Raises:
        GeneratorError: an unknown name, a folder without a readable checkpoint, a model that is not supported, or a
            grid that the model cannot generate.
        HubError: a `ConnectionError`: the Hub is out of reach, and the name is not in its local cache.
    """
    folder = BUNDLED_FOLDER if name == BUNDLED else find_folder(name, f"model {shown(name)}")
    if not (folder / "config.json").is_file():
        if (folder / PIPELINE_FILE).is_file():
            raise GeneratorError(f"model {shown(name)} is {_described_pipeline(folder / PIPELINE_FILE)}")
        problem = "no config.json in this folder" if os.path.isdir(folder) else "no such folder"
        nearest = "" if os.path.isdir(folder) else _nearest(name)
        raise GeneratorError(
            f"model {shown(name)}: {problem} ({folder}); give {BUNDLED}, a folder that save_pretrained wrote, or a Hub "
            f"id{nearest}"
        )
    has_own_code = False
    try:
        values = PreTrainedConfig.get_config_dict(folder)[0]
        model_type, has_own_code = values.get("model_type"), "auto_map" in values
        config = FAMILIES.get(model_type, CausalLMGenerator).read_config(folder)
    except GeneratorError as error:
        raise GeneratorError(f"model {shown(name)}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if has_own_code:
            raise GeneratorError(
                f"model {shown(name)} comes with code of its own, which ssd-cache does not run: load model and "
                "tokenizer with transformers, trust_remote_code=True, and give them to generator_of(model, tokenizer, "
                "grid=(rows, columns)), or the model to enable"
            ) from error
        raise GeneratorError(f"model {shown(name)}: its config.json can not be read: {first_line(error)}") from error
    if hasattr(config, "format_version"):  # only a head map has it; a map's config.json states a model_type too
        raise GeneratorError(f"model {shown(name)} is a head map, not a model; give it as --head-map, or to HeadMap")
    is_local = name == BUNDLED or os.path.exists(os.path.expanduser(name))
    family, grid = _choose_family(f"model {shown(name)}", config, grid)
    if family is CausalLMGenerator and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise GeneratorError(
            f"model {shown(name)} is of type {shown(config.model_type)}, which is no causal language model of "
            f"transformers (AutoModelForCausalLM); ssd-cache draws with these and with {', '.join(sorted(FAMILIES))}"
        )
    return Checkpoint(name, str(folder) if is_local else name, config, family, grid)


def find_folder(name: str, what: str) -> Path:
    """Find the folder of a checkpoint: the name itself if it is or can only be a path, else in the Hub cache.

    Args:
        name: a folder, or a Hub id whose config.json is downloaded when needed.
        what: the name and its purpose, for error messages.

    Raises:
        GeneratorError: an invalid name, or a name that the Hub does not have.
        HubError: the Hub is out of reach, and the name is not in its local cache.
    """
    if problem := name_problem(name) or ("" if name.strip() else "it is empty"):
        raise GeneratorError(f"{what} is no name ({problem}); give {BUNDLED}, a checkpoint folder, or a Hub id")
    path = Path(os.path.expanduser(name))
    return path if os.path.exists(path) or _must_be_path(name) else _config_from_hub(name, what).parent


def generator_of(
    model: PreTrainedModel, processor: ProcessorMixin | None = None, grid: tuple[int, int] | None = None
) -> Generator:
    """Wrap a model that is already loaded. When no processor is given, it is loaded from the model's source.

    Args:
        model: a transformers model, or one of DeepSeek's package.
        processor: its processor, or the tokenizer of a causal language model.
        grid: as for `find_generator`.

    Raises:
        GeneratorError: a model that is not supported, a grid that it cannot generate, or a processor that cannot be
            loaded.
    """
    family, grid = _choose_family("this model", model.config, grid)
    source = model.name_or_path
    if processor is None:
        try:
            loader = AutoTokenizer if family is CausalLMGenerator else AutoProcessor
            processor = loader.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise GeneratorError(
                f"no processor can be loaded from {shown(source)}, where the model came from: give processor=... "
                f"({first_line(error)})"
            ) from error
    return family(Checkpoint(source or type(model).__name__, source, model.config, family, grid), model, processor)


def family_of(config: PreTrainedConfig) -> type[Generator]:
    """The class for a model's configuration; `CausalLMGenerator` if `FAMILIES` has none."""
    return FAMILIES.get(config.model_type, CausalLMGenerator)


def _choose_family(
    what: str, config: PreTrainedConfig, grid: tuple[int, int] | None
) -> tuple[type[Generator], tuple[int, int] | None]:
    """The class for a model, and the requested grid after a check."""
    family = family_of(config)
    if family is CausalLMGenerator and grid is None:
        raise GeneratorError(
            f"{what} is of type {shown(config.model_type)}; ssd-cache draws with {', '.join(sorted(FAMILIES))}; with "
            "any other causal language model as plain tokens, in a grid that you state: grid=(rows, columns), "
            "--grid ROWSxCOLUMNS"
        )
    try:
        grid = None if grid is None else ImageLayout(grid).grid
    except ValueError as error:
        raise GeneratorError(str(error)) from error
    if grid is not None and not family.is_resizable and grid != (own := family.layout_of(config)).grid:
        raise GeneratorError(f"grid={grid}: {what} draws {own.text()} visual tokens and nothing else; leave grid out")
    return family, grid


def _described_pipeline(index: Path) -> str:
    """Describe a diffusers folder for an error message: the pipeline, and how to use it with ssd-cache."""
    try:
        parts = parse_json(index.read_bytes())
        names = {name: part[1] for name, part in parts.items() if isinstance(part, list)}
        kind = shown(parts["_class_name"]).strip("'") if "_class_name" in parts else "of diffusers"
    except (ValueError, AttributeError, IndexError):
        return f"a pipeline of diffusers whose {PIPELINE_FILE} can not be read"
    known = [name for name, class_name in names.items() if _draws(getattr(transformers, str(class_name), None))]
    if not known:
        return f"the diffusers pipeline {kind}, none of whose parts draws token by token: ssd-cache has nothing to do"
    return (
        f"the diffusers pipeline {kind}; load it with diffusers, and call pipe(...) inside "
        f"`with ssd_cache.enable(pipe.{known[0]}, head_map, ...)`"
    )


def _draws(model_class: type | None) -> bool:
    """Whether a transformers class belongs to a family in `FAMILIES`."""
    return getattr(getattr(model_class, "config_class", None), "model_type", None) in FAMILIES


def _must_be_path(name: str) -> bool:
    """Whether a name that does not exist locally cannot be a Hub id either."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/")


def _config_from_hub(name: str, what: str) -> Path:
    """The cached copy of a repository's config.json, downloaded when needed."""
    try:
        return _download(name)
    except HFValidationError as error:
        raise GeneratorError(
            f"{what}: no such folder, and no Hub id either; a Hub id looks like 'user/name'{_nearest(name)}"
        ) from error
    except GatedRepoError as error:
        raise GeneratorError(
            f"{what} is gated: ask for access on its Hub page and log in with `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        cause = "" if error.__cause__ is None else f" ({first_line(error.__cause__)})"
        raise HubError(
            f"{what}: no such folder, none of that name in the Hub's cache here, and the Hub is out of reach{cause}; "
            f"check the name, the network and HF_HUB_OFFLINE{_nearest(name)}"
        ) from error
    except RepositoryNotFoundError as error:
        raise GeneratorError(
            f"{what}: no such folder, and no such public repository on the Hub; check the name, or log in with "
            f"`hf auth login` if it is private{_nearest(name)}"
        ) from error
    except EntryNotFoundError as error:
        raise GeneratorError(
            f"{what}: the Hub repository has no config.json, so it is no transformers checkpoint"
        ) from error
    except HfHubHTTPError as error:
        raise HubError(f"{what}: the Hub answered with an error: {first_line(error)}") from error


def _download(name: str) -> Path:
    """Download a repository's config.json, or `PIPELINE_FILE` if it has none; raises as `hf_hub_download`."""
    try:
        return Path(hub_download(name, "config.json"))
    except LocalEntryNotFoundError:  # offline: unknown whether the repository has a config.json
        raise
    except EntryNotFoundError:
        with suppress(EntryNotFoundError):
            return Path(hub_download(name, PIPELINE_FILE))
        raise


def _nearest(name: str) -> str:
    return suggestion(name, [BUNDLED, *KNOWN, *nearby_folders(name), *cached_repositories()])
