"""Support sets for the tiny pipelines of every kind of backbone."""

import numpy as np
from PIL import Image
from tiny import tiny_image_pipeline, tiny_language_pipeline, tiny_pipeline

from mcdi_hf import FrozenBackbone, MCDiPipeline


RANDOM = np.random.default_rng(0)
IMAGES = [Image.fromarray(RANDOM.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(8)]
TEXTS = {"p": ["a b c", "a c", "b a"], "q": ["x y z", "z y"], "r": ["k l", "m", "l a"]}
SUPPORTS = {"bert": TEXTS, "llama": TEXTS, "vit": {"p": IMAGES[:3], "q": IMAGES[3:5], "r": IMAGES[5:]}}
PIPELINES = {"bert": tiny_pipeline, "llama": tiny_language_pipeline, "vit": tiny_image_pipeline}
Made = tuple[MCDiPipeline, FrozenBackbone, dict]
