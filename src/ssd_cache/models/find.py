"""Find the checkpoint that a name means: a bundled model, a local folder, or a Hub repository.

This module reads or downloads only `config.json`. `Checkpoint.load` loads the weights.
"""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, RemoteEntryNotFoundError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from ssd_cache.io.hub import HubError, describe_failure, hub_download
from ssd_cache.io.showing import first_line, shown, suggestion
from ssd_cache.io.untrusted import name_problem
from ssd_cache.layout import Grid, ImageLayout
from ssd_cache.model_grids import GRIDS
from ssd_cache.models.base import Generator
from ssd_cache.models.bundled import BUNDLED_MODELS
from ssd_cache.models.causal_lm import CausalLMGenerator
from ssd_cache.models.checkpoint import Checkpoint
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

_NAMES = ", ".join(BUNDLED_MODELS)

PIPELINE_FILE = "model_index.json"
"""The file that diffusers writes instead of config.json."""


def find_generator(name: str, grid: Grid | None = None) -> Checkpoint:
    """Find the checkpoint that a name means. An existing folder has priority over a Hub repository of the same name.

    Args:
        name: "shapes-janus" or another bundled model, a folder with a transformers checkpoint, or a Hub id such as
            "deepseek-community/Janus-Pro-1B".
        grid: rows and columns, for a model that generates several sizes, and for any other causal language model,
            which then generates plain tokens (see `models/causal_lm.py`). End-of-row tokens count as the last columns.

    Raises:
        GeneratorError: an unknown name, a folder without a readable checkpoint, a model that is not supported, or a
            grid that the model cannot generate.
        HubError: a `ConnectionError`: the Hub is out of reach, and the name is not in its local cache.
    """
    what = f"model {shown(name)}"
    bundled = BUNDLED_MODELS.get(name)
    if bundled is not None and not bundled.folder.is_dir():
        raise GeneratorError(f"{what} comes with ssd-cache, but {bundled.folder} is missing: install ssd-cache again")
    folder = find_folder(name, what) if bundled is None else bundled.folder
    config = _read_config(folder, name, what)
    is_local = bundled is not None or os.path.exists(os.path.expanduser(name))
    return _checkpoint(what, name, str(folder) if is_local else name, config, grid)


def generator_of(
    model: PreTrainedModel, processor: ProcessorMixin | None = None, grid: Grid | None = None
) -> Generator:
    """Wrap a model that is already loaded. When no processor is given, it is loaded from the model's source.

    Args:
        model: a transformers model, or one of DeepSeek's package.
        processor: its processor, or the tokenizer of a causal language model.
        grid: as for `find_generator`.

    Raises:
        GeneratorError: a model that is not supported, a grid that it cannot generate, a processor that cannot be
            loaded, or a model with all of its weights offloaded.
    """
    source = model.name_or_path
    if model.device.type == "meta":
        raise GeneratorError(
            f"all weights of {shown(source or type(model).__name__)} are offloaded, so no device for its inputs is "
            "known: keep its embeddings on a device (device_map=...), or call its own generate inside `enable`"
        )
    checkpoint = _checkpoint("this model", source or type(model).__name__, source, model.config, grid)
    if processor is None:
        try:
            processor = checkpoint.family.processor_class.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise GeneratorError(
                f"no processor can be loaded from {shown(source)}, where the model came from: give processor=... "
                f"({first_line(error)})"
            ) from error
    return checkpoint.family(checkpoint, model, processor)


def family_of(config: PreTrainedConfig) -> type[Generator]:
    """The class for a model's configuration; `CausalLMGenerator` if `FAMILIES` has none."""
    return FAMILIES.get(config.model_type, CausalLMGenerator)


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
        raise GeneratorError(f"{what} is not a name ({problem}); give {_NAMES}, a checkpoint folder, or a Hub id")
    path = Path(os.path.expanduser(name))
    can_be_hub_id = not name.startswith((".", "/", "~")) and name.count("/") <= 1 and not name.endswith("/")
    if os.path.exists(path) or not can_be_hub_id:
        return path
    try:
        try:
            return Path(hub_download(name, "config.json")).parent
        except RemoteEntryNotFoundError:
            return Path(hub_download(name, PIPELINE_FILE)).parent
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError) as error:
        answered, reason = describe_failure(error, "has no config.json, so it is not a transformers checkpoint")
        nearest = suggestion(name, [*BUNDLED_MODELS, *KNOWN])
        raise (GeneratorError if answered else HubError)(f"{what}: {reason}{nearest}") from error


def _read_config(folder: Path, name: str, what: str) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        if (folder / PIPELINE_FILE).is_file():
            raise GeneratorError(
                f"{what} is a diffusers pipeline: load it with diffusers, and call pipe(...) inside `with "
                "ssd_cache.enable(pipe.PART, head_map, ...)`, where PART is its part that generates token by token "
                "(GLM-Image: vision_language_encoder; pipelines of diffusion alone have none)"
            )
        problem = "no config.json in this folder" if folder.is_dir() else "no such folder"
        raise GeneratorError(
            f"{what}: {problem} ({folder}); give {_NAMES}, a folder that save_pretrained wrote, or a Hub id"
            f"{suggestion(name, list(BUNDLED_MODELS))}"
        )
    has_own_code = False
    try:
        values = PreTrainedConfig.get_config_dict(folder)[0]
        has_own_code = "auto_map" in values
        config = FAMILIES.get(values.get("model_type"), CausalLMGenerator).read_config(folder)
    except GeneratorError as error:
        raise GeneratorError(f"{what}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if has_own_code:
            raise GeneratorError(
                f"{what} comes with code of its own, which ssd-cache does not run: load model and tokenizer with "
                "transformers, trust_remote_code=True, and give them to generator_of(model, tokenizer, "
                "grid=(rows, columns)), or the model to enable"
            ) from error
        raise GeneratorError(f"{what}: its config.json cannot be read: {first_line(error)}") from error
    if hasattr(config, "format_version"):  # only a head map has it; a map's config.json states a model_type too
        raise GeneratorError(f"{what} is a head map, not a model; give it as --head-map, or to HeadMap")
    if family_of(config) is CausalLMGenerator and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise GeneratorError(
            f"{what} is of type {shown(config.model_type)}, which is not a causal language model of transformers "
            f"(AutoModelForCausalLM); ssd-cache supports these and {', '.join(sorted(FAMILIES))}"
        )
    return config


def _checkpoint(what: str, name: str, source: str, config: PreTrainedConfig, grid: Grid | None) -> Checkpoint:
    """The checkpoint of a configuration, after a check of the requested grid."""
    family = family_of(config)
    if grid is None and family is CausalLMGenerator:
        raise GeneratorError(
            f"{what} is of type {shown(config.model_type)}; ssd-cache supports {', '.join(sorted(FAMILIES))}, and "
            "any other causal language model as a source of plain tokens, in a grid that you state: "
            "grid=(rows, columns), --grid ROWSxCOLUMNS"
        )
    if grid is not None:
        try:
            grid = ImageLayout(grid).grid
        except ValueError as error:
            raise GeneratorError(str(error)) from error
        facts = GRIDS.get(config.model_type)
        if facts and not facts.is_resizable and grid != (own := facts.layout(config)).grid:
            raise GeneratorError(f"grid={grid}: {what} always generates {own.text()} visual tokens; leave grid out")
    return Checkpoint(name, source, config, family, grid)
