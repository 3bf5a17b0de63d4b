"""Small random judges of images, as folders: a Mask2Former, a CLIP, a BLIP for VQA and a LLaVA, of the real classes.

Their answers mean nothing; the tests check how they are loaded and called.
"""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BlipConfig,
    BlipForQuestionAnswering,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedTokenizerFast,
    SwinConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from ssd_cache.evaluation.geneval.prompts import CLASSES

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[BOS]", "<image>", "yes", "no", "Yes", "No", "USER", "ASSISTANT"]
WORDS += ["Is", "there", "a", "car", "dog", "photo", "this", "the", "red", "driven", "Answer", "with", "or", "?", "."]
WORDS += ["How", "many", "squares", "in", "one", "word", "two", "Two", "2", "three"]

CHAT = (
    "{% for message in messages %}USER {% for part in message.content %}"
    "{{ '<image> ' if part.type == 'image' else part.text + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT{% endif %}"
)


def write_detector(folder, labels=80):
    """A small random Mask2Former that detects a car and a bench in every image."""
    pytest.importorskip("scipy", reason="transformers' Mask2Former is built with scipy")

    backbone = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        num_labels=labels,
    )
    torch.manual_seed(3)
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        # queries that differ, whatever the version of transformers initialises them with
        for name, weights in model.named_parameters():
            if "queries" in name:
                weights.normal_()
            elif weights.ndim == 2 and name.startswith(("model.transformer_module", "class_predictor")):
                weights.normal_(std=0.3)
        model.model.pixel_level_module.decoder.mask_projection.weight.mul_(50)  # masks that are sure of themselves
        if labels == len(CLASSES):
            model.class_predictor.bias[CLASSES.index("car")] = 9.0
            model.class_predictor.bias[CLASSES.index("bench")] = 9.0
    model.save_pretrained(folder)
    return folder


def write_classifier(folder, seed=4):
    """A small random CLIP that reads letter by letter."""
    letters = [chr(code) for code in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(
        vocab_size=len(words), max_position_embeddings=77, bos_token_id=0, eos_token_id=1, pad_token_id=1, **small
    )
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **small)
    torch.manual_seed(seed)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def tiny_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        bos_token="[BOS]",
        extra_special_tokens={"image_token": "<image>"},
        model_input_names=["input_ids", "attention_mask"],
    )


def write_blip(folder, side):
    """A small random BLIP for VQA for images of `side` pixels, with the words of these tests."""
    torch.manual_seed(3)
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BlipConfig(
        text_config={
            **shared,
            "vocab_size": len(WORDS),
            "max_position_embeddings": 64,
            "initializer_range": 0.5,  # large enough that image and question matter
            "pad_token_id": 0,
            "sep_token_id": 3,
            "bos_token_id": 4,
            "eos_token_id": 3,
        },
        vision_config={**shared, "image_size": side, "patch_size": 16, "initializer_range": 0.5},
    )
    BlipForQuestionAnswering(config).save_pretrained(folder)
    images = BlipImageProcessorPil(size={"height": side, "width": side})
    BlipProcessor(images, tiny_tokenizer()).save_pretrained(folder)
    return folder


def write_llava(folder, side):
    """A small random LLaVA, a chat model, for images of `side` pixels, with the words of these tests."""
    torch.manual_seed(0)
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **shared, "image_size": side, "patch_size": 16},
        text_config={
            "model_type": "llama",
            **shared,
            "num_key_value_heads": 2,
            "vocab_size": len(WORDS),
            "initializer_range": 0.5,
            "pad_token_id": 0,
            "bos_token_id": 4,
            "eos_token_id": 3,
        },
        image_token_id=WORDS.index("<image>"),
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    LlavaProcessor(
        images,
        tiny_tokenizer(),
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)
    return folder
