"""A tiny SAM with random weights, in the form in which the published ones are read."""

from pathlib import Path

import pytest
import torch


def sam_checkpoint(folder: Path, *, size: int) -> Path:
    """Write a SAM of 32 thousand weights for size x size images; skips where transformers is not installed."""
    transformers = pytest.importorskip(
        "transformers", reason="the extra 'sam' (transformers) is not installed"
    )
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": size,
        "patch_size": 8,
        "output_channels": 16,
        "window_size": 4,
        "global_attn_indexes": [1],
        "mlp_dim": 32,
        "num_pos_feats": 8,
    }
    prompts = {"hidden_size": 16, "image_size": size, "patch_size": 8, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "mlp_dim": 32,
        "iou_head_hidden_dim": 16,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.SamConfig(
            vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder
        )
        transformers.utils.logging.disable_progress_bar()
        transformers.SamModel(config).save_pretrained(folder)
    return folder
