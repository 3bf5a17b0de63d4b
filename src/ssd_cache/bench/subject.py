"""The measured model and its generation loop: `generate` of Janus, or a step-by-step loop for other models.

A model is a checkpoint, or a shape with random weights: the cost of a step does not depend on their values. `fill`
fills a cache up to any point of an image, and `generate` continues from there. Nothing is timed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import (
    AttentionInterface,
    Cache,
    Emu3ForCausalLM,
    Emu3TextConfig,
    GenerationConfig,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
)

from ssd_cache._compat import CACHE
from ssd_cache.cache.attention import NAME
from ssd_cache.cache.cache import SSDCache, decoder_shape
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.layout import Grid, ImageLayout
from ssd_cache.models import GeneratorError, find_generator
from ssd_cache.models.base import StepListener

GUIDANCE_SCALE = 5.0
NUM_PROMPT = 16
"""Prompt length in tokens, except for LlamaGen's one class token."""

BOS, EOS, PAD, BOI = 1, 2, 0, 4
"""Token ids of the random models' prompts."""

TINY_TOWERS = {
    "vision_config": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "mlp_ratio": 1.0,
        "depth": 1,
    },
    "vq_config": {"latent_channels": 32, "base_channels": 32, "channel_multiplier": [1] * 5, "num_res_blocks": 0},
}
"""Settings for a small Janus: minimal sizes of the parts that no generation step runs."""


@dataclass(frozen=True)
class Shape:
    """A model with random weights: its class and configuration, prompt tokens, and grids (end-of-line tokens count)."""

    model_class: type[PreTrainedModel]
    make_config: Callable[[], PreTrainedConfig]
    grid: Grid = (24, 24)
    num_prompt: int = NUM_PROMPT
    draft_grids: tuple[Grid, ...] = ()

    @property
    def layout(self) -> ImageLayout:
        """The grids of an image."""
        return ImageLayout(self.grid, self.draft_grids)


def llama_config(
    hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, *, vocab_size: int, length: int
) -> LlamaConfig:
    """Configuration of a Llama without grouped heads."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=length,
    )


def janus_config(*sizes: int, vocab_size: int = 102400, length: int = 16384, **towers) -> JanusConfig:
    """Configuration of a Janus-Pro with a decoder of these sizes; default towers and codes are those of Janus-Pro."""
    text, width = llama_config(*sizes, vocab_size=vocab_size, length=length), sizes[0]
    return JanusConfig(
        text_config=text.to_dict(),
        vision_config={**towers.get("vision_config", {}), "projection_dim": width},
        vq_config={**towers.get("vq_config", {}), "projection_dim": width, "image_token_embed_dim": width},
        image_token_id=6,
    )


SMALL_TEXT = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
"""A decoder that steps quickly on a CPU, with grouped heads of 64."""


def small_glm_image_config() -> GlmImageConfig:
    """Configuration of a GLM-Image with `SMALL_TEXT` and the codes of the model; other parts have minimal sizes."""
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    return GlmImageConfig(
        text_config={**SMALL_TEXT, "vocab_size": 17000, "rope_parameters": rotary},
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 1, "intermediate_size": 16, "image_size": 128},
        vq_config={"embed_dim": 8, "latent_channels": 16},
    )


SHAPES = {
    "small-cpu": Shape(
        JanusForConditionalGeneration,
        lambda: janus_config(512, 1408, 8, 8, vocab_size=64, length=1024, **TINY_TOWERS),
    ),
    "janus-pro-1b": Shape(JanusForConditionalGeneration, lambda: janus_config(2048, 5632, 24, 16)),
    "janus-pro-7b": Shape(JanusForConditionalGeneration, lambda: janus_config(4096, 11008, 30, 32)),
    "llamagen-xl": Shape(
        LlamaForCausalLM, lambda: llama_config(1280, 3584, 36, 20, vocab_size=16384, length=1024), num_prompt=1
    ),
    "emu3": Shape(Emu3ForCausalLM, Emu3TextConfig, grid=(90, 91)),
    "small-emu3": Shape(Emu3ForCausalLM, lambda: Emu3TextConfig(**SMALL_TEXT, vocab_size=40000), grid=(90, 91)),
    "glm-image": Shape(GlmImageForConditionalGeneration, GlmImageConfig, grid=(32, 32), draft_grids=((16, 16),)),
    "small-glm-image": Shape(
        GlmImageForConditionalGeneration, small_glm_image_config, grid=(32, 32), draft_grids=((16, 16),)
    ),
}
"""Shapes by name. Janus-Pro has the sizes of its checkpoints, Emu3 and GLM-Image the defaults of their configurations.
The small ones have as many visual tokens as their models, in decoders for a CPU.

LlamaGen's GPT-XL is here a Llama: the same layers, with positions along one axis instead of two, and with the class
token as part of the vocabulary (sizes from FoundationVision's `autoregressive/models/gpt.py`).
"""


def make_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Make the model with random weights; the state of torch's global generators is restored.

    Weights are made on their final device in their final dtype: 7 billion in bfloat16 take 14 GB on a GPU and no memory
    of the CPU.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        model = shape.model_class._from_config(shape.make_config(), dtype=dtype).eval()
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, generation_kwargs={"boi_token_id": BOI}
    )
    return model


@dataclass
class Subject:
    """The model to measure, a causal language model that runs step by step, with its head map and prompt length.

    GLM-Image gets no grid arguments and therefore uses text positions, because a step that starts in the middle of an
    image has no prompt from which M-RoPE positions could be counted. Both cost the same.

    Attributes:
        name: the model name that the user gave.
        model: a transformers model in evaluation mode.
        head_map: labels of its heads, and the grid.
        num_prompt: tokens of a prompt.
        rows_per_image: batch rows per image; two with guidance.
    """

    name: str
    model: PreTrainedModel
    head_map: HeadMap
    num_prompt: int
    rows_per_image: int = 2

    @property
    def config(self):
        """The decoder's configuration."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def head_dim(self) -> int:
        """Dimension of a key of one head."""
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    @property
    def length(self) -> int:
        """Tokens of a whole image, prompt included."""
        return self.num_prompt + self.head_map.num_visual_tokens

    def step_weights(self) -> list[torch.Tensor]:
        """Weights that every step reads completely; no embedding tables, since a step reads only a few rows of them."""
        decoder = self.model.get_decoder()
        return [
            weight for part in (decoder.layers, decoder.norm, *self.output_modules()) for weight in part.parameters()
        ]

    def output_modules(self) -> list[torch.nn.Module]:
        """Modules that a step runs in addition to the decoder."""
        return [self.model.lm_head]

    @torch.no_grad()
    def generate(self, cache: Cache, batch_size: int, num_tokens: int, on_step: Callable[[], object]) -> None:
        """Generate visual tokens of `batch_size` images, from the prompt or from the current end of the cache.

        Args:
            cache: an empty cache, or one that `fill` filled.
            batch_size: images, with `rows_per_image` rows each.
            num_tokens: steps.
            on_step: called at every step, between the decoder and the sampling.
        """
        ids = self._prompt(self.rows_per_image * batch_size, 1 if int(cache.get_seq_length()) else self.num_prompt)
        for _ in range(num_tokens):
            output = self.model(input_ids=ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
            on_step()
            conditional, *unconditional = output.logits[:, -1].float().chunk(self.rows_per_image)
            logits = conditional
            for other in unconditional:
                logits = other + GUIDANCE_SCALE * (conditional - other)
            ids = torch.multinomial(logits.softmax(-1), num_samples=1).repeat(self.rows_per_image, 1)

    def _prompt(self, *shape: int) -> torch.Tensor:
        ids = torch.randint(10, 60, shape, generator=torch.Generator().manual_seed(0))
        return ids.clamp(max=self.config.vocab_size - 1).to(self.model.device)

    @torch.no_grad()
    def fill(self, cache: Cache, batch_size: int, length: int) -> None:
        """Fill a cache up to `length` tokens, prompt included, with random keys, values and queries.

        A full cache receives all tokens in one update. `SSDCache` receives visual tokens one by one, with queries.
        """
        decoder, config, attend = self.model.get_decoder(), self.config, AttentionInterface()[NAME]
        rows, kv_heads = self.rows_per_image * batch_size, config.num_key_value_heads
        options = {"device": self.model.device, "dtype": self.model.dtype}
        seen, is_ours = int(cache.get_seq_length()), isinstance(cache, SSDCache)
        # the prompt runs through the model, because the cache decides at the prompt how later steps run
        if is_ours and seen == 0:
            embeds = torch.randn(rows, self.num_prompt, config.hidden_size, **options)
            decoder(inputs_embeds=embeds, **{CACHE: cache}, use_cache=True)
            seen = self.num_prompt
        new = 1 if is_ours else max(1, length - seen)
        for _ in range(seen, length, new):
            states = torch.randn(rows, kv_heads, new, self.head_dim, **options)
            query = states.repeat_interleave(config.num_attention_heads // kv_heads, dim=1)
            for index, layer in enumerate(decoder.layers):
                keys, values = cache.update(states, states, index)
                if is_ours:
                    attend(layer.self_attn, query, keys, values, None, scaling=self.head_dim**-0.5)


class JanusSubject(Subject):
    """Janus, run by the `generate` method of the model, including sampling, guidance and masks."""

    def output_modules(self) -> list[torch.nn.Module]:
        return [self.model.model.generation_head, self.model.model.generation_aligner]

    def generate(self, cache: Cache, batch_size: int, num_tokens: int, on_step: Callable[[], object]) -> None:
        model, seen = self.model, int(cache.get_seq_length())
        prompt, ids = self._prompt(batch_size, self.num_prompt), model.generation_config
        prompt[:, 0], prompt[:, -1] = ids.bos_token_id, ids.generation_kwargs["boi_token_id"]
        if seen:
            prompt = prompt[:, -1:]  # the last token before the next step; all earlier tokens are in the cache
        config = model.model.vision_model.config
        whole, config.num_image_tokens = config.num_image_tokens, num_tokens
        try:
            model.generate(
                prompt,
                attention_mask=prompt.new_ones(batch_size, seen + prompt.shape[1]),
                generation_mode="image",
                **{CACHE: cache},
                guidance_scale=GUIDANCE_SCALE,
                do_sample=True,
                logits_processor=LogitsProcessorList([StepListener(lambda rows: on_step())]),
            )
        finally:
            config.num_image_tokens = whole


def head_map_for(name: str, grid: Grid | None = None) -> HeadMap:
    """The head map in the model's folder, or else random labels; loads no weights. Arguments as for `load_subject`.

    Random labels are good enough, because the speed of a cache hardly depends on the labels.
    """
    if name in SHAPES:
        layout = SHAPES[name].layout
        if grid not in (None, layout.grid):
            raise GeneratorError(f"grid={grid}: the shape {name} has a grid of {layout.text()}; leave grid out")
        num_layers, num_kv_heads = decoder_shape(SHAPES[name].make_config().get_text_config(decoder=True))
    else:
        checkpoint = find_generator(name, grid)
        if (own := checkpoint.head_map()) is not None:
            return own
        num_layers, num_kv_heads, layout = checkpoint.num_layers, checkpoint.num_kv_heads, checkpoint.layout
    labels = torch.rand(num_layers, num_kv_heads, generator=torch.Generator().manual_seed(0)) < 0.5
    return HeadMap(labels, method="half of the heads spatial, chosen at random").with_layout(layout)


def load_subject(name: str, dtype: torch.dtype, device: torch.device, grid: Grid | None = None) -> Subject:
    """Load a model by name, with the head map of `head_map_for`.

    Args:
        name: a shape of `SHAPES`, or a checkpoint as for `find_generator`.
        dtype, device: of the model.
        grid: rows and columns for a checkpoint, as for `find_generator`.

    Raises:
        GeneratorError: an unknown name, a grid that the model does not generate, or a model that is not like Llama.
    """
    head_map = head_map_for(name, grid)
    if name in SHAPES:
        model, num_prompt = make_model(SHAPES[name], dtype, device), SHAPES[name].num_prompt
    else:
        model, num_prompt = find_generator(name, grid).load(dtype, device).language_model, NUM_PROMPT
    return make_subject(name, model, head_map, num_prompt)


def make_subject(name: str, model: PreTrainedModel, head_map: HeadMap, num_prompt: int = NUM_PROMPT) -> Subject:
    """The subject of a loaded language model; raises GeneratorError for a model that is not like Llama."""
    if not hasattr(model.get_decoder(), "layers") or not hasattr(model.get_decoder(), "norm"):
        raise GeneratorError(f"{name} is a {type(model).__name__}; the bench measures models that are built like Llama")
    family = JanusSubject if isinstance(model, JanusForConditionalGeneration) else Subject
    num_rows = 1 if isinstance(model, GlmImageForConditionalGeneration) else 2  # GLM-Image has no guidance
    return family(name, model, head_map, num_prompt, num_rows)
