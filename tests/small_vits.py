"""A pair of vision transformers that take milliseconds, and images for them."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

CLASSES = 5


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For files that import it: threads that wait for each other cost more than they do where others use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def vit(embed_dim=12, depth=3, seed=0, dtype=torch.float64, **kwargs):
    torch.manual_seed(seed)
    options = {"img_size": 8, "patch_size": 2, "num_classes": CLASSES, "num_heads": 2, "weight_init": "reset"}
    model = VisionTransformer(embed_dim=embed_dim, depth=depth, **{**options, **kwargs})
    # The head starts at zero, where every logit and most gradients vanish.
    nn.init.normal_(model.head.weight, std=0.3)
    return model.to(dtype)


def models(dtype=torch.float64):
    return vit(dtype=dtype), vit(embed_dim=20, depth=4, seed=1, dtype=dtype)


def batch(dtype=torch.float64, size=6, seed=2):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(0, CLASSES, (size,), generator=generator)
