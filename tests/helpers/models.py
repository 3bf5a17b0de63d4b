"""Small models with random weights, of the real classes: generators with their processors, and language models."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Digits, Punctuation, Sequence, WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ByT5Tokenizer,
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3ImageProcessor,
    Emu3Processor,
    GenerationConfig,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageProcessor,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil

from ssd_cache import LearnedScore

BOS, EOS, PAD, BOI = 1, 2, 0, 4


def random_score(num_layers, kv_heads, head_dim, grid, ranks_all=False) -> LearnedScore:
    """A learned score with random weights."""
    shape, (rows, columns) = (num_layers, kv_heads), grid
    sizes = {"key": (head_dim,), "value": (head_dim,), "row": (rows, rows), "column": (rows, columns)}
    return LearnedScore.of({name: torch.randn(*shape, *size) for name, size in sizes.items()}, ranks_all)


def tiny_janus(*, layers=2, hidden=32, heads=2, grid_side=24, seed=0, attn_implementation="ssd"):
    """A Janus whose images have `grid_side` squared visual tokens."""
    torch.manual_seed(seed)
    config = JanusConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 40,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 1024,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            "initializer_range": 0.2,  # sharp enough that attention is not flat
        },
        vision_config={
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "mlp_ratio": 1.0,
            "projection_dim": hidden,
            "depth": 1,
            "image_size": 16 * grid_side,
            "patch_size": 16,
            "num_image_tokens": grid_side**2,
        },
        vq_config={
            "embed_dim": 4,
            "num_embeddings": 32,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1, 1],
            "num_res_blocks": 0,
            "projection_dim": hidden,
            "image_token_embed_dim": hidden,
            "initializer_range": 0.2,
        },
        image_token_id=6,
    )
    config._attn_implementation = "sdpa"
    model = JanusForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, generation_kwargs={"boi_token_id": BOI}
    )
    model.set_attn_implementation({"text_config": attn_implementation})
    return model


def tiny_llama(*, layers=2, heads=4, kv_heads=2, seed=0, attn_implementation="ssd"):
    """A text model with `heads / kv_heads` query heads to a KV head."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=BOS,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation(attn_implementation)
    return model


def left_padded_prompts(lengths, seed=0):
    """Token ids and attention mask `[len(lengths), max(lengths)]`, BOS first and BOI last in each row."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        words = torch.randint(10, 40, (length,), generator=generator)
        words[0], words[-1] = BOS, BOI
        ids[row, width - length :] = words
        mask[row, width - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def tiny_causal(model_type, *, seed=0, attn_implementation="ssd", **settings):
    """A text model of any type that `AutoModelForCausalLM` knows, with two query heads to a KV head."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    tokens = {"bos_token_id": BOS, "eos_token_id": None, "pad_token_id": PAD}
    config = AutoConfig.for_model(model_type, max_position_embeddings=2048, **shape | tokens | settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation(attn_implementation)
    return model


EMU3_TOKENS = {
    "image_token": "<image>",
    "boi_token": "<|image start|>",
    "eoi_token": "<|image end|>",
    "image_wrapper_token": "<|image token|>",
    "eof_token": "<|extra_201|>",
    "eol_token": "<|extra_200|>",
}
EMU3_CODES = 16


def words_tokenizer(words, special, *, first=(), more=(), **settings):
    """A tokenizer of whole words, digits apart, with named special tokens besides bos, eos, pad and unk.

    `first` are the texts of the first ids, `more` further texts.
    """
    texts = [*first, "<pad>", "<bos>", "<eos>", "<unk>", *special.values(), *words, *"0123456789*", *more]
    core = Tokenizer(WordLevel({text: index for index, text in enumerate(dict.fromkeys(texts))}, unk_token="<unk>"))
    core.pre_tokenizer = Sequence([WhitespaceSplit(), Digits(individual_digits=True), Punctuation()])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=special,
        padding_side="left",
        **settings,
    )


def emu3_processor():
    """A real `Emu3Processor` with a few words and 16 visual tokens."""
    codes = [f"<|visual token {code:06d}|>" for code in range(EMU3_CODES)]
    tokenizer = words_tokenizer(
        ["a", "photo", "of", "red", "blue", "circle", "square", "lowres", "text"], EMU3_TOKENS, more=codes
    )
    tokenizer.add_special_tokens({"additional_special_tokens": codes}, replace_extra_special_tokens=False)
    return Emu3Processor(Emu3ImageProcessor(min_pixels=8 * 8, max_pixels=512 * 512, spatial_factor=8), tokenizer)


def tiny_emu3(processor, *, layers=2, heads=4, kv_heads=2, hidden=32, seed=0, attn_implementation="ssd"):
    """An Emu3 with grouped KV heads, whose images are of any size."""
    torch.manual_seed(seed)
    vocabulary = processor.tokenizer.get_vocab()
    config = Emu3Config(
        text_config={
            "vocab_size": len(vocabulary),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "attention_dropout": 0.0,
            "initializer_range": 0.2,
            "bos_token_id": processor.tokenizer.bos_token_id,
            "eos_token_id": processor.tokenizer.eos_token_id,
            "pad_token_id": processor.tokenizer.pad_token_id,
        },
        vq_config={
            "codebook_size": EMU3_CODES,
            "embed_dim": 4,
            "latent_channels": 4,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "hidden_size": 32,
        },
        vocabulary_map=vocabulary,
    )
    config._attn_implementation = "sdpa"
    model = Emu3ForConditionalGeneration(config).eval()
    model.set_attn_implementation({"text_config": attn_implementation})
    return model


GLM_TOKENS = {"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"}
GLM_CODES = 16
GLM_TEMPLATE = (
    "{%- for m in messages -%}{%- for c in m['content'] -%}"
    "{%- if c['type'] == 'image' -%}<bos><|image|><eos>{%- else -%}{{ c['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endfor -%}"
)


def glm_image_processor():
    """A real `GlmImageProcessor` with a few words; as in the real vocabulary codes come first, then start and end."""
    codes = [f"<|code {code}|>" for code in range(GLM_CODES)]
    words = ["a", "photo", "of", "red", "blue", "circle", "square"]
    tokenizer = words_tokenizer(words, GLM_TOKENS, first=[*codes, "<bos>", "<eos>"])
    images = GlmImageImageProcessorPil(
        patch_size=16, temporal_patch_size=1, merge_size=1, min_pixels=32 * 32, max_pixels=512 * 512
    )
    return GlmImageProcessor(images, tokenizer, chat_template=GLM_TEMPLATE)


def tiny_glm_image(processor, *, layers=2, seed=0, attn_implementation="ssd"):
    """GLM-Image's autoregressive part with two KV heads and M-RoPE, whose images are of any size."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    config = GlmImageConfig(
        text_config={
            "vocab_size": len(tokenizer.get_vocab()),
            "vision_vocab_size": GLM_CODES + 2,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.2,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "num_heads": 2,
            "image_size": 128,
            "patch_size": 16,
            "intermediate_size": 32,
        },
        vq_config={"embed_dim": 8, "num_embeddings": GLM_CODES, "latent_channels": 16},
        image_token_id=processor.image_token_id,
        image_start_token_id=tokenizer.bos_token_id,
        image_end_token_id=tokenizer.eos_token_id,
    )
    config._attn_implementation = "sdpa"
    model = GlmImageForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.set_attn_implementation({"text_config": attn_implementation})
    return model


def glm_image_pipeline(model=None, processor=None):
    """diffusers' own pipeline, all parts small and random; needs diffusers."""
    import diffusers

    processor = glm_image_processor() if processor is None else processor
    model = tiny_glm_image(processor, attn_implementation="sdpa") if model is None else model
    torch.manual_seed(0)
    pipe = diffusers.GlmImagePipeline(
        tokenizer=ByT5Tokenizer(),
        processor=processor,
        text_encoder=T5EncoderModel(
            T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ).eval(),
        vision_language_encoder=model,
        vae=diffusers.AutoencoderKL(
            block_out_channels=(4, 4, 4, 4),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ).eval(),
        transformer=diffusers.GlmImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=GLM_CODES + 2,
        ).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    # random weights end an image early, which a trained model does not: forbid it
    pipe.vision_language_encoder.generation_config.suppress_tokens = [GLM_CODES, GLM_CODES + 1]
    return pipe
