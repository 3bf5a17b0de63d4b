"""From a model's name to its checkpoint: the bundled model, a local folder, or a repository of the Hub.

Only `config.json` is read, or downloaded, here. Weights are `Checkpoint.load`'s business.
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

from ssd_cache.head_map.checks import HeadMapError, checked_grid
from ssd_cache.io.hub import HubError, hub_download
from ssd_cache.io.showing import first_line, shown
from ssd_cache.io.suggesting import cached_repositories, nearby_folders, suggestion
from ssd_cache.io.untrusted import name_problem, parse_json
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
"""The class for every `config.model_type` that is supported; a new model is one file and one entry."""

KNOWN = (
    *("deepseek-community/Janus-Pro-1B", "deepseek-community/Janus-Pro-7B", "deepseek-ai/Janus-Pro-1B"),
    *("deepseek-ai/Janus-Pro-7B", "BAAI/Emu3-Gen-hf", "zai-org/GLM-Image"),
)
"""Hub ids of the families in `FAMILIES`, suggested for misspelt names."""

PIPELINE_FILE = "model_index.json"
"""What diffusers writes in place of a config.json: the classes of a pipeline's parts, by name."""


def find_generator(name: str, grid: tuple[int, int] | None = None) -> Checkpoint:
    """The checkpoint that a name means; a folder that exists goes before a Hub repository of the same name.

    Args:
        name: "shapes-janus", a folder with a transformers checkpoint, or a Hub id such as
            "deepseek-community/Janus-Pro-1B".
        grid: rows and columns, for a model that draws in several sizes, and for any other causal language model, which
            is then drawn with as plain tokens (see `causal_lm.py`); tokens that end a row are its last columns.

    Raises:
        GeneratorError: nothing of that name, a folder without a readable checkpoint, a model that is not supported, or
            a grid that it can not draw.
        HubError: a `ConnectionError`: the Hub could not be asked, and the name is not in its cache.
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
    if hasattr(config, "format_version"):  # of a map, which names the type of its model too
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
    """The folder of a checkpoint: the name itself where it is or could only be a path, else in the Hub's cache.

    Args:
        name: a folder or a Hub id, of which config.json is downloaded when needed.
        what: the name and what it is for, in messages.

    Raises:
        GeneratorError: no name, or nothing of that name on the Hub.
        HubError: the Hub could not be asked, and the name is not in its cache.
    """
    if problem := name_problem(name) or ("" if name.strip() else "it is empty"):
        raise GeneratorError(f"{what} is no name ({problem}); give {BUNDLED}, a checkpoint folder, or a Hub id")
    path = Path(os.path.expanduser(name))
    return path if os.path.exists(path) or _must_be_path(name) else _config_from_hub(name, what).parent


def generator_of(
    model: PreTrainedModel, processor: ProcessorMixin | None = None, grid: tuple[int, int] | None = None
) -> Generator:
    """The generator around a model that is loaded already; its processor is loaded from where the model came from.

    Args:
        model: a transformers model, of DeepSeek's package too.
        processor: its processor, or the tokenizer of a causal language model.
        grid: as for `find_generator`.

    Raises:
        GeneratorError: a model that is not supported, a grid that it can not draw, or a processor that can not be
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
    """The class for a model's configuration, that of any causal language model where it is not in `FAMILIES`."""
    return FAMILIES.get(config.model_type, CausalLMGenerator)


def _choose_family(
    what: str, config: PreTrainedConfig, grid: tuple[int, int] | None
) -> tuple[type[Generator], tuple[int, int] | None]:
    """The class for a model, and the grid that was asked for, checked."""
    family = family_of(config)
    if family is CausalLMGenerator and grid is None:
        raise GeneratorError(
            f"{what} is of type {shown(config.model_type)}; ssd-cache draws with {', '.join(sorted(FAMILIES))}; with "
            "any other causal language model as plain tokens, in a grid that you state: grid=(rows, columns), "
            "--grid ROWSxCOLUMNS"
        )
    try:
        grid = None if grid is None else checked_grid(grid)
    except HeadMapError as error:
        raise GeneratorError(str(error)) from error
    if grid is not None and not family.is_resizable and grid != family.grid_of(config):
        rows, columns = family.grid_of(config)
        raise GeneratorError(
            f"grid={grid}: {what} draws {rows} x {columns} visual tokens and nothing else; leave grid out"
        )
    return family, grid


def _described_pipeline(index: Path) -> str:
    """What a folder of diffusers holds, and what to do with it."""
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
    """Whether a class of transformers is that of a family."""
    return getattr(getattr(model_class, "config_class", None), "model_type", None) in FAMILIES


def _must_be_path(name: str) -> bool:
    """Whether a name that does not exist here can not be a Hub id either."""
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
    """config.json of a repository, or what diffusers has in its place; raises as `hf_hub_download`."""
    try:
        return Path(hub_download(name, "config.json"))
    except LocalEntryNotFoundError:  # offline: nobody knows what is there
        raise
    except EntryNotFoundError:
        with suppress(EntryNotFoundError):
            return Path(hub_download(name, PIPELINE_FILE))
        raise


def _nearest(name: str) -> str:
    return suggestion(name, [BUNDLED, *KNOWN, *nearby_folders(name), *cached_repositories()])
