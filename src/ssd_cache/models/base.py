"""The generator interface: prompts to visual tokens, visual tokens to images, and the facts a cache needs.

A model family subclasses `Generator` and states what differs from the defaults here (see `models/janus.py`).
`models/find.py` finds the checkpoint that a name means. The cache decides which visual tokens are kept.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoProcessor,
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from ssd_cache._compat import CACHE
from ssd_cache.cache.attention import NAME
from ssd_cache.io.showing import shown
from ssd_cache.layout import ImageLayout
from ssd_cache.models.settings import GeneratorError, ResolvedSampling, check_texts

if TYPE_CHECKING:
    from ssd_cache.models.checkpoint import Checkpoint

OnTokens = Callable[[int], object]


class StepListener(LogitsProcessor):
    """Calls a function with the number of rows at every step of `generate`, and changes no logits.

    It is a class because transformers reads the signature of each logits processor at every step, which takes seven
    times as long for a function.
    """

    def __init__(self, on_step: OnTokens):
        self.on_step = on_step

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.on_step(input_ids.shape[0])
        return scores


class Generator(ABC):
    """A loaded image model with its processor. `Checkpoint.load` makes it, or `generator_of` wraps a loaded model.

    From `Checkpoint.load`, the model is in evaluation mode and uses the attention "ssd". Facts of the family:

    Attributes:
        model_class, processor_class: the classes that load a checkpoint.
        image_decoder: the submodule that decodes images; it is float32 in any dtype.
        decode_batch: number of images decoded at once.
        decoding_hint: how users decode tokens that `to_images` cannot decode; None if it can.
        default_guidance: the scale for a checkpoint that names none; None for a family without guidance.
        has_own_guidance: whether the model's `generate` runs the guidance rows itself, in one batch. If not, `enable`
            adds them for a call with `guidance_scale` (see `decode/guidance.py`).
    """

    model_class: Any
    processor_class: Any = AutoProcessor
    image_decoder: str | None = None
    decode_batch: int = 4
    decoding_hint: str | None = None
    default_guidance: float | None = 5.0
    has_own_guidance: bool = False

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, processor: ProcessorMixin):
        self.checkpoint, self.model, self.processor = checkpoint, model, processor

    @staticmethod
    def generates_images(call: Mapping[str, Any]) -> bool:
        """Whether a call of the model's `generate` with these keyword arguments generates an image, not text."""
        return True

    @staticmethod
    def layout_of_call(call: Mapping[str, Any]) -> ImageLayout | None:
        """Layout of the images that such a call generates; None if the arguments do not state it."""
        return None

    @staticmethod
    def text_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
        """The configuration of the decoder, which gives its numbers of layers and heads."""
        return config.get_text_config(decoder=True)

    @classmethod
    def read_config(cls, folder: str | Path) -> PreTrainedConfig:
        """Read the configuration in a folder; raises GeneratorError if a package that the family needs is missing."""
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Generator:
        """Load the model and processor of a checkpoint; code in a checkpoint is never run."""
        processor = cls.processor_class.from_pretrained(checkpoint.source, trust_remote_code=False)
        stored = dtype if cls.image_decoder is None else "auto"  # the image decoder's weights are not rounded
        model = cls.model_class.from_pretrained(checkpoint.source, dtype=stored, trust_remote_code=False)
        if cls.image_decoder is not None:
            in_float32 = set(model.get_submodule(cls.image_decoder).float().parameters())
            for parameter in set(model.parameters()) - in_float32:  # buffers stay: RoPE's frequencies are float32
                parameter.data = parameter.data.to(dtype)
        model.get_decoder().set_attn_implementation(NAME)
        return cls(checkpoint, model.to(device).eval(), processor)

    @property
    def language_model(self) -> PreTrainedModel:
        """The transformers model whose attention must be "ssd"; a part of `model` if `model` has no such setting."""
        return self.model

    @property
    def visual_head(self) -> torch.nn.Module | None:
        """The module that computes logits of visual tokens; the output head unless the family has a separate one."""
        return self.model.get_output_embeddings()

    @property
    def visual_embeddings(self) -> torch.nn.Module:
        """The module that gets the ids of generated tokens; the input embeddings unless the family has others."""
        return self.model.get_input_embeddings()

    @abstractmethod
    def prepare(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Make inputs for `model.generate`, left-padded `[batch, prompt length]`, on the model's device."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise GeneratorError, before any generation, for a prompt that is empty or leaves no room for the image."""
        check_texts(prompts)
        checkpoint = self.checkpoint
        limit = getattr(self.text_config_of(checkpoint.config), "max_position_embeddings", None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # generation repeats these warnings
            for text in dict.fromkeys(prompts):
                length = self.prepare([text])["attention_mask"].shape[1]
                if limit is not None and length > (room := limit - checkpoint.num_visual_tokens):
                    raise GeneratorError(
                        f"prompt {shown(text)} is {length} tokens long; {checkpoint.name} has {limit} positions, and "
                        f"the image leaves {room} for the prompt: shorten it"
                    )

    def call_arguments(self, inputs: Mapping[str, torch.Tensor], sampling: ResolvedSampling) -> dict[str, Any]:
        """Arguments of `model.generate` in addition to inputs, cache and temperature; by default the number of tokens.

        `top_k` is only for temperatures above 0.
        """
        number = self.checkpoint.num_visual_tokens
        return {"min_new_tokens": number, "max_new_tokens": number}

    def is_unconditional(self, num_prompts: int) -> torch.Tensor:
        """Which decoder rows are unconditional, boolean `[rows]`: the second half with guidance, else none."""
        num_rows = num_prompts if self.default_guidance is None else 2 * num_prompts
        return torch.arange(num_rows) >= num_prompts

    @torch.no_grad()
    def to_images(self, tokens: torch.Tensor) -> list[Image.Image]:
        """Decode visual tokens `[batch, cells]` to images; raises GeneratorError if ssd-cache cannot decode them."""
        self.checkpoint.check_decodable()
        parts = tokens.to(self.model.device).split(self.decode_batch)
        return [image for part in parts for image in self._decode(part)]

    def _decode(self, tokens: torch.Tensor) -> list[Image.Image]:
        """Decode visual tokens `[at most decode_batch, cells]`."""
        raise NotImplementedError(f"{type(self).__name__} has neither a decoding_hint nor _decode")

    def generate(
        self,
        prompts: Sequence[str],
        cache: Cache | None = None,
        *,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        seed: int = 0,
        on_tokens: OnTokens | None = None,
    ) -> torch.Tensor:
        """Generate one image per prompt, all in one batch; returns visual tokens `[batch, cells]`, draft grids first.

        The seed applies to the batch: a prompt alone or in another batch gives another image. The state of torch's
        global generators is restored.

        Args:
            prompts: one text per image; repeat a prompt to generate several images of it.
            cache: a new cache, or one after `reset()`. Default: the cache that the model makes.
            guidance_scale: above 1, for a model with guidance. Default: the checkpoint's or the family's value.
            temperature: 0 always takes the likeliest token. Default: the value in the checkpoint.
            seed: seed of the batch.
            on_tokens: called at every step with the number of visual tokens that the step generated.

        Raises:
            GeneratorError: `prompts` is not a list, is empty, or contains an empty text; or a setting is out of range.
        """
        check_texts(prompts)
        sampling = self.sampling(guidance_scale, temperature, seed)
        device = self.model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            return self._generate_tokens(prompts, cache, sampling, on_tokens)

    def _generate_tokens(
        self, prompts: Sequence[str], cache: Cache | None, sampling: ResolvedSampling, on_tokens: OnTokens | None
    ) -> torch.Tensor:
        """Visual tokens `[batch, cells]` of the model's own `generate`."""
        inputs = self.prepare(prompts)
        call = {**inputs, CACHE: cache, **self.call_arguments(inputs, sampling)}
        if sampling.temperature > 0:
            call |= {"do_sample": True, "temperature": sampling.temperature}
        else:
            call["do_sample"] = False
            call.pop("top_k", None)
        if on_tokens is not None:
            call["logits_processor"] = LogitsProcessorList([StepListener(on_tokens)])
        return self.model.generate(**call)[:, -self.checkpoint.num_visual_tokens :]

    def sampling(
        self, guidance_scale: float | None = None, temperature: float | None = None, seed: int = 0
    ) -> ResolvedSampling:
        """Check settings as `Checkpoint.sampling` does; None stands for the value in the model's generation config."""
        own = getattr(self.model, "generation_config", None) or GenerationConfig()
        return self.checkpoint.sampling(guidance_scale, temperature, seed, own)
