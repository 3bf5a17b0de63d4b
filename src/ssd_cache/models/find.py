"""From a model's name to its checkpoint: the bundled model, a local folder, or a repository of the Hub.

Only `config.json` is read, or downloaded, here. Weights are `Checkpoint.load`'s business.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import transformers
from huggingface_hub import hf_hub_download
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

from ssd_cache.head_map_checks import HeadMapError, checked_grid
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
        ConnectionError: the Hub could not be asked.
    """
    if not name.strip():
        raise GeneratorError(f"model {name!r} is no name; give {BUNDLED}, a checkpoint folder, or a Hub id")
    if name == BUNDLED:
        folder = BUNDLED_FOLDER
    else:
        path = Path(name).expanduser()
        folder = path if path.exists() or _must_be_path(name) else _config_from_hub(name).parent
    if not (folder / "config.json").is_file():
        if (folder / PIPELINE_FILE).is_file():
            raise GeneratorError(f"model {name!r} is {_described_pipeline(folder / PIPELINE_FILE)}")
        problem = "no config.json in this folder" if folder.is_dir() else "no such folder"
        raise GeneratorError(
            f"model {name!r}: {problem} ({folder}); give {BUNDLED}, a folder that save_pretrained wrote, or a Hub id"
        )
    has_own_code = False
    try:
        values = PreTrainedConfig.get_config_dict(folder)[0]
        model_type, has_own_code = values.get("model_type"), "auto_map" in values
        config = FAMILIES.get(model_type, CausalLMGenerator).read_config(folder)
    except GeneratorError as error:
        raise GeneratorError(f"model {name!r}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if has_own_code:
            raise GeneratorError(
                f"model {name!r} comes with code of its own, which ssd-cache does not run: load model and tokenizer "
                "with transformers, trust_remote_code=True, and give them to generator_of(model, tokenizer, "
                "grid=(rows, columns)), or the model to enable"
            ) from error
        raise GeneratorError(f"model {name!r}: its config.json can not be read: {_first_line(error)}") from error
    if hasattr(config, "format_version"):  # of a map, which names the type of its model too
        raise GeneratorError(f"model {name!r} is a head map, not a model; give it as --head-map, or to HeadMap")
    is_local = name == BUNDLED or Path(name).expanduser().exists()
    family, grid = _choose_family(f"model {name!r}", config, grid)
    if family is CausalLMGenerator and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise GeneratorError(
            f"model {name!r} is of type {config.model_type!r}, which is no causal language model of transformers "
            f"(AutoModelForCausalLM); ssd-cache draws with these and with {', '.join(sorted(FAMILIES))}"
        )
    return Checkpoint(name, str(folder) if is_local else name, config, family, grid)


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
                f"no processor can be loaded from {source!r}, where the model came from: give processor=... "
                f"({_first_line(error)})"
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
            f"{what} is of type {config.model_type!r}; ssd-cache draws with {', '.join(sorted(FAMILIES))}; with any "
            "other causal language model as plain tokens, in a grid that you state: grid=(rows, columns), "
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
        parts = json.loads(index.read_text("utf-8"))
        names = {name: part[1] for name, part in parts.items() if isinstance(part, list)}
        kind = parts.get("_class_name", "of diffusers")
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


def _config_from_hub(name: str) -> Path:
    """The cached copy of a repository's config.json, downloaded when needed."""
    try:
        return _download(name)
    except HFValidationError as error:
        raise GeneratorError(
            f"model {name!r}: no such folder, and no Hub id either; a Hub id looks like 'user/name'"
        ) from error
    except GatedRepoError as error:
        raise GeneratorError(
            f"model {name!r} is gated: ask for access on its Hub page and log in with `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"model {name!r}: no such folder, none of that name in the Hub's cache here, and the Hub is out of reach; "
            "check the name, the network and HF_HUB_OFFLINE"
        ) from error
    except RepositoryNotFoundError as error:
        raise GeneratorError(
            f"model {name!r}: no such folder, and no such public repository on the Hub; check the name, or log in with "
            "`hf auth login` if it is private"
        ) from error
    except EntryNotFoundError as error:
        raise GeneratorError(
            f"model {name!r}: the Hub repository has no config.json, so it is no transformers checkpoint"
        ) from error
    except HfHubHTTPError as error:
        raise ConnectionError(f"model {name!r}: the Hub answered with an error: {_first_line(error)}") from error


def _download(name: str) -> Path:
    """config.json of a repository, or what diffusers has in its place; raises as `hf_hub_download`."""
    try:
        return Path(hf_hub_download(name, "config.json"))
    except LocalEntryNotFoundError:  # offline: nobody knows what is there
        raise
    except EntryNotFoundError:
        with suppress(EntryNotFoundError):
            return Path(hf_hub_download(name, PIPELINE_FILE))
        raise


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
