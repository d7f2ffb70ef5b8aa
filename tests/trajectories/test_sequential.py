"""A stack of tasks is as many runs of peft and torch.optim.AdamW, for every family of backbones and every LoraConfig."""

import numpy as np
import pytest
import torch
from model_families import EXAMPLES, FAMILIES, image_tasks, text_tasks
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

from mcdi_hf import AdapterLayout, FrozenBackbone, StackedLora, Task, TrajectorySettings, collect_trajectories
from mcdi_hf.adapters.head import class_means, imprint_head
from mcdi_hf.data.episodes import rows_and_labels
from mcdi_hf.trajectories.dataset import split_weights
from mcdi_hf.trajectories.shared import initial_adapter


START_SCALE = 5.0


class SequentialRun:
    """What a person with peft would write for one task: the whole model, every step, in a plain loop."""

    def __init__(self, backbone: FrozenBackbone, config: LoraConfig, layout: AdapterLayout, task: Task, start) -> None:
        self.backbone, self.task = backbone, task
        ways = len(task.classes)
        self.model = get_peft_model(backbone.classifier(ways), config).eval()
        head_start = dict(zip(layout.head_keys, (torch.zeros(ways, layout.feature_dim), torch.zeros(ways))))
        set_peft_model_state_dict(self.model, {key: value[0] for key, value in start.items()} | head_start)
        if not backbone.is_causal_lm:
            wrapper = getattr(self.model.base_model.model, backbone.head_name)
            head = wrapper.modules_to_save["default"] if layout.head_keys else wrapper
            for parameter, value in zip(head.parameters(), self.imprinted(wrapper)):
                parameter.data.copy_(value[0])
        self.parameters = {
            name.replace(".default", "").replace(".modules_to_save", ""): value
            for name, value in self.model.named_parameters()
            if value.requires_grad
        }

    def inputs(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.backbone.inputs([EXAMPLES[self.backbone.reads_images][row] for row in rows])

    def imprinted(self, head: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        rows, labels = rows_and_labels(self.task.support)
        seen = []
        hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        self.model(**self.inputs(rows))
        hook.remove()
        return imprint_head(class_means(seen[0][None], labels[None], len(self.task.classes)), START_SCALE)

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        inputs = self.inputs(rows)
        logits = self.model(**inputs).logits
        if not self.backbone.is_causal_lm:
            return logits
        words = [self.backbone.processor.convert_tokens_to_ids(name) for name in self.task.classes]
        return logits[torch.arange(len(rows)), inputs["attention_mask"].sum(dim=1) - 1][:, words]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stack_equals_sequential_runs_of_peft_and_adamw(family: str) -> None:
    make, config = FAMILIES[family]
    backbone = make()
    layout = AdapterLayout.from_model(backbone.model, config, backbone.head_name)
    assert bool(layout.head_keys) == bool(config.modules_to_save or config.task_type == "SEQ_CLS")
    stacked = StackedLora(backbone, layout)
    tasks = (image_tasks() if backbone.reads_images else text_tasks())[1]
    examples = stacked.encode(EXAMPLES[backbone.reads_images])
    settings = TrajectorySettings(
        num_steps=7, batch_size=6, learning_rate=0.02, weight_decay=0.1, lr_warmup_steps=2, imprint_scale=START_SCALE
    )
    start = {key: value + 0.1 for key, value in initial_adapter(layout, seed=3).items()}
    found = collect_trajectories(
        stacked, examples, start, stacked.features_of_all(start, examples), tasks, list(range(len(tasks))), settings
    )
    for number, (task, row) in enumerate(zip(tasks, found)):
        run = SequentialRun(backbone, config, layout, task, start)
        support, labels = rows_and_labels(task.support)
        optimizer = torch.optim.AdamW(run.parameters.values(), lr=0.02, weight_decay=0.1)
        warm_and_down = lambda step: min(step / 2, (7 - step) / 5)  # noqa: E731
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_and_down)
        random = np.random.default_rng((0, number))
        kept, losses = [{key: value.detach().clone() for key, value in run.parameters.items()}], []
        for step in range(1, 8):
            pick = random.choice(len(support), size=6, replace=len(support) < 6)
            loss = torch.nn.functional.cross_entropy(run.logits(support[pick]), labels[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step in (2, 5, 7):
                kept.append({key: value.detach().clone() for key, value in run.parameters.items()})
                losses.append(loss.item())
        tensors = split_weights(torch.from_numpy(row["weights"]), len(task.classes), layout)
        assert row["steps"] == [0, 2, 5, 7] and row["classes"] == list(task.classes)
        assert row["losses"] == pytest.approx(losses, rel=1e-3, abs=1e-5)
        for target, expected in enumerate(kept):
            assert expected.keys() == tensors.keys()
            for key, value in expected.items():
                torch.testing.assert_close(tensors[key][target], value, rtol=2e-4, atol=2e-4)
        query, query_labels = rows_and_labels(task.query)
        with torch.no_grad():
            said = run.logits(query).argmax(dim=-1)
        assert row["accuracy"] == pytest.approx((said == query_labels).float().mean().item())
