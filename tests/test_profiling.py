"""Profiling against a plain recomputation from eager attention, and what it does to the model: nothing."""

from __future__ import annotations

import pytest
import torch
from models import left_padded_prompts, tiny_janus

from ssd_cache.profiling import WindowMass, watching_cache


@pytest.mark.parametrize("window", [7, 1, 20])
def test_window_mass_equals_a_recomputation_from_eager_attention(window):
    model, grid = tiny_janus(grid_side=6), (6, 6)
    inputs = left_padded_prompts((5, 8, 3))
    statistics = WindowMass(num_layers=2, num_kv_heads=2, window=window)
    torch.manual_seed(0)
    tokens = model.generate(
        **inputs,
        generation_mode="image",
        guidance_scale=3.0,
        do_sample=True,
        past_key_values=watching_cache(grid, statistics),
    )
    # the same rows once more, all at once, with attention weights handed out
    ids = inputs["input_ids"].repeat(2, 1)
    ids[3:][(ids[3:] != 1) & (ids[3:] != 4)] = 0
    embeds = torch.cat(
        [
            model.get_input_embeddings()(ids),
            model.prepare_embeddings_for_image_generation(tokens[:, :-1].repeat(2, 1)),
        ],
        dim=1,
    )
    mask = torch.cat([inputs["attention_mask"].repeat(2, 1), torch.ones(6, 35, dtype=torch.long)], dim=1)
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        decoder = model.model.language_model
        attentions = decoder(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            output_attentions=True,
        ).attentions
    for layer in range(2):
        for head in range(2):
            near, visual = 0.0, 0.0
            for row in range(6):
                for token in range(window, 30):  # the last row of the grid is never full, so its queries are not scored
                    weights = attentions[layer][row, head, 8 + token, 8 : 8 + token + 1].double()
                    near += float(weights[token - window + 1 :].sum())
                    visual += float(weights.sum())
            assert statistics.score[layer, head].item() == pytest.approx(near / visual, abs=1e-5)
