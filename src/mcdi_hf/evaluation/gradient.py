"""The rival: LoRA trained by gradient descent on the same shots."""

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ..adapters.head import class_means, imprint_head
from ..backbones import FrozenBackbone


@torch.no_grad()
def frozen_features(backbone: FrozenBackbone, examples: list[Any]) -> torch.Tensor:
    """What the head of the plain backbone reads of texts, pairs of texts or images: `(examples, feature_dim)`."""
    seen = []
    head = getattr(backbone.model, backbone.head_name)
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    backbone.model(**backbone.inputs(examples))
    hook.remove()
    return seen[0]


def gradient_lora(
    backbone: FrozenBackbone,
    support: dict[str, list[Any]],
    lora_config: LoraConfig,
    num_steps: int,
    learning_rate: float,
    imprint_scale: float = 10.0,
) -> PeftModel:
    """Train a LoRA adapter on a support set, as a person with PEFT would, from a head imprinted on frozen features.

    That head is the best start known to us; from a random one the same steps end lower.

    Args:
        backbone (`FrozenBackbone`): The backbone; a fresh classifier is loaded for the adapter.
        support (`dict[str, list]`): Label -> texts, pairs of texts or PIL images.
        lora_config (`LoraConfig`): The adapter's config, with a head. PEFT has no task type for images: use
            `modules_to_save`.
        num_steps (`int`): Adam's steps, each on the whole support set, with a linear decay to zero.
        learning_rate (`float`): Adam's.
        imprint_scale (`float`, *optional*, defaults to 10.0): See [`imprint_head`].
    """
    examples = [example for group in support.values() for example in group]
    labels = torch.tensor([index for index, group in enumerate(support.values()) for _ in group]).to(backbone.device)
    means = class_means(frozen_features(backbone, examples)[None], labels[None], len(support))
    head = imprint_head(means, imprint_scale)
    model = backbone.classifier(num_labels=len(support))
    for parameter, value in zip(getattr(model, backbone.head_name).parameters(), head):
        parameter.data.copy_(value[0])
    model = get_peft_model(model, lora_config).eval()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=num_steps)
    batch = backbone.inputs(examples)
    for _ in range(num_steps):
        loss = torch.nn.functional.cross_entropy(model(**batch).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model
