"""The pipeline on a tiny BERT: what it gives back, and what it refuses."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoModel, DDIMScheduler, DDPMScheduler, DiffusionPipeline
from fake_hub import FakeHub
from tiny import assert_close, seeded, tiny_backbone, tiny_lora_config, tiny_pipeline
from versions import needs

from mcdi_hf import (
    AdapterCodec,
    GeneratedAdapter,
    LocalConsistencyScheduler,
    MCDiDenoiser,
    MCDiPipeline,
    TaskEncoder,
)


SUPPORT = {"first": ["a b c", "a c", "b a"], "second": ["x y z", "z y"]}
TASKS = [
    SUPPORT,
    {"one": ["a x"], "two": ["b y b y"], "three": ["c z", "z c"], "four": ["a a a"]},
    {"left": ["c b a", "b", "c c", "a b", "b b c"], "middle": ["y x"], "right": ["z z z", "x"]},
]


def assert_same(one: GeneratedAdapter, other: GeneratedAdapter) -> None:
    assert one.labels == other.labels
    torch.testing.assert_close(one.tensors, other.tensors, rtol=0, atol=0)


@pytest.fixture(scope="module")
def pipe() -> MCDiPipeline:
    pipe, _ = tiny_pipeline()
    return pipe


@pytest.fixture(scope="module")
def saved(pipe: MCDiPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipe")
    pipe.save_pretrained(folder)
    return folder


def split(pipe: MCDiPipeline, adapter: GeneratedAdapter) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The LoRA matrices, and the head."""
    head = {key: adapter.tensors[key] for key in pipe.codec.layout.head_keys}
    return {key: value for key, value in adapter.tensors.items() if key not in head}, head


def starting_noise(pipe: MCDiPipeline, count: int) -> torch.Tensor:
    return torch.randn(count, *pipe.codec.filled.shape, generator=seeded(5))


def test_texts_become_an_adapter(pipe: MCDiPipeline) -> None:
    (adapter,) = pipe(SUPPORT, generator=seeded(), num_candidates=2).adapters
    assert isinstance(adapter, GeneratedAdapter)
    assert adapter.labels == ["first", "second"]
    assert adapter.details.shots == [3, 2] and adapter.details.num_candidates == 2
    assert set(adapter.tensors) == set(pipe.codec.layout.keys)
    pipe.codec.layout.check({key: value.unsqueeze(0) for key, value in adapter.tensors.items()})
    assert all(value.isfinite().all() for value in adapter.tensors.values())


def test_saved_and_loaded(pipe: MCDiPipeline, saved: Path) -> None:
    one, other = MCDiPipeline.from_pretrained(saved), DiffusionPipeline.from_pretrained(saved)
    adapters = [loaded(SUPPORT, generator=seeded()).adapters[0] for loaded in (one, other)]
    assert isinstance(other, MCDiPipeline)
    assert_same(*adapters)
    for name in ("denoiser", "task_encoder", "codec"):
        weights = pipe.components[name].state_dict(), one.components[name].state_dict()
        torch.testing.assert_close(*weights, rtol=0, atol=0)
    # Not bit for bit: weights in a file are aligned otherwise than weights in memory, and matmuls then round otherwise.
    assert_close(adapters[0].tensors, pipe(SUPPORT, generator=seeded()).adapters[0].tensors)


def test_saved_files(saved: Path) -> None:
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "MCDiPipeline"
    assert {name: value for name, value in index.items() if isinstance(value, list)} == {
        "denoiser": ["mcdi_hf", "MCDiDenoiser"],
        "task_encoder": ["mcdi_hf", "TaskEncoder"],
        "codec": ["mcdi_hf", "AdapterCodec"],
        "scheduler": ["mcdi_hf", "LocalConsistencyScheduler"],
    }
    assert {path.suffix for path in saved.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    assert isinstance(AutoModel.from_pretrained(str(saved), subfolder="denoiser"), MCDiDenoiser)


def test_defaults_of_a_call_are_saved(pipe: MCDiPipeline, tmp_path: Path) -> None:
    other = MCDiPipeline(**pipe.components, num_inference_steps=3, strength=0.25)
    other.save_pretrained(tmp_path)
    loaded = MCDiPipeline.from_pretrained(tmp_path)
    loaded.backbone = pipe.backbone
    adapter = loaded(SUPPORT, generator=seeded()).adapters[0]
    assert loaded.num_timesteps == adapter.details.num_inference_steps == 3
    expected = pipe(SUPPORT, generator=seeded(), num_inference_steps=3, strength=0.25).adapters[0]
    assert_close(adapter.tensors, expected.tensors)


def free_adapter(pipe: MCDiPipeline, support: dict[str, list[str]]) -> GeneratedAdapter:
    return pipe(support, strength=0.0).adapters[0]


def test_strength_zero_is_the_shared_adapter_with_the_head_of_its_features(pipe: MCDiPipeline) -> None:
    batch, layout = pipe.encode_support(TASKS), pipe.codec.layout
    heads = pipe.stacked.heads(batch, pipe.codec.head, pipe.codec.shared_adapter(3))
    for task, adapter in enumerate(pipe(TASKS, strength=0.0, num_candidates=2).adapters):
        expected = {key: value[0] for key, value in pipe.codec.shared_adapter().items()}
        expected |= {key: part[task, : len(TASKS[task])] for key, part in zip(layout.head_keys, heads)}
        torch.testing.assert_close(adapter.tensors, expected, rtol=0, atol=0)
        generated = pipe(TASKS[task], generator=seeded(), num_inference_steps=3).adapters[0]
        same = [key for key, value in adapter.tensors.items() if torch.allclose(generated.tensors[key], value)]
        assert same == [key for key in layout.lora_shapes if "lora_B" in key]


def test_strength_is_linear_in_the_tokens(pipe: MCDiPipeline) -> None:
    settings = {"num_inference_steps": 3, "output_type": "latent"}
    none, half, full = (pipe(SUPPORT, generator=seeded(), strength=s, **settings).adapters for s in (0, 0.5, 1))
    assert_close(half, full / 2)
    assert not none.any()


def test_without_temperature_nothing_is_random(pipe: MCDiPipeline) -> None:
    def twice(temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        settings = {"temperature": temperature, "num_inference_steps": 4, "output_type": "pt"}
        return pipe(SUPPORT, **settings).adapters, pipe(SUPPORT, **settings).adapters

    cold, warm = twice(0.0), twice(1.0)
    assert cold[0].equal(cold[1])
    assert not torch.allclose(*warm, atol=1e-3)


@pytest.mark.parametrize("select", [False, True])
def test_batch_is_its_tasks_one_by_one(pipe: MCDiPipeline, select: bool) -> None:
    def generate(support: dict | list[dict], generator: torch.Generator | list) -> list[GeneratedAdapter]:
        output = pipe(support, num_candidates=2, num_inference_steps=4, generator=generator)
        return (pipe.select(output) if select else output).adapters

    batch = generate(TASKS, [seeded(seed) for seed in range(3)])
    for seed, (task, adapter) in enumerate(zip(TASKS, batch, strict=True)):
        (single,) = generate(task, seeded(seed))
        assert adapter.labels == single.labels == list(task)
        assert_close(adapter.tensors, single.tensors)
        found, expected = asdict(adapter.details), asdict(single.details)
        losses, expected_losses = found.pop("support_losses"), expected.pop("support_losses")
        assert found == expected and (losses is not None) == (
            select and task is SUPPORT
        )  # the others have one-shot classes
        assert losses == (pytest.approx(expected_losses, rel=1e-3) if losses else None)


@pytest.mark.parametrize("output_type", ["peft", "pt", "latent"])
def test_batches_of_any_size_are_the_same(pipe: MCDiPipeline, output_type: str, capsys: pytest.CaptureFixture) -> None:
    settings = {"num_candidates": 2, "num_inference_steps": 3, "output_type": output_type}
    whole, single = (pipe(TASKS, generator=seeded(), batch_size=size, **settings).adapters for size in (64, 1))
    pipe.set_progress_bar_config(disable=False)
    parts = pipe(TASKS, generator=seeded(), batch_size=2, **settings).adapters
    pipe.set_progress_bar_config(disable=True)
    assert "3/3" in capsys.readouterr().err  # tasks, not parts
    if output_type == "peft":
        whole, parts, single = ([one.tensors for one in made] for made in (whole, parts, single))
    assert_close(parts, whole)
    assert_close(single, whole)


def test_permuted_classes_permute_the_head_alone(pipe: MCDiPipeline) -> None:
    task, order = TASKS[1], [2, 0, 3, 1]
    permuted = {list(task)[index]: list(task.values())[index] for index in order}
    plain, other = (pipe(one, temperature=0.0).adapters[0] for one in (task, permuted))
    (plain_lora, plain_head), (other_lora, other_head) = split(pipe, plain), split(pipe, other)
    assert other.labels == [plain.labels[index] for index in order]
    assert_close(other_lora, plain_lora)
    assert_close(other_head, {key: value[order] for key, value in plain_head.items()})


def test_order_of_examples_does_not_matter(pipe: MCDiPipeline) -> None:
    turned = {label: examples[::-1] for label, examples in SUPPORT.items()}
    plain, other = (pipe(one, generator=seeded()).adapters[0] for one in (SUPPORT, turned))
    assert_close(other.tensors, plain.tensors)


def test_tokens_of_one_task_with_the_head_of_another(pipe: MCDiPipeline) -> None:
    own, seen = pipe.encode_support(SUPPORT), pipe.encode_support({"other": ["z", "y x"], "one": ["a a"]})
    plain = pipe(SUPPORT, generator=seeded()).adapters[0]
    tokens = [pipe(batch, generator=seeded(), output_type="latent").adapters for batch in (own, seen)]
    same, other, free = (pipe.decode_adapters(one, own) for one in (*tokens, torch.zeros_like(tokens[0])))
    assert all(value[0].equal(plain.tensors[key]) for key, value in same.items())
    assert not any(value[0].equal(plain.tensors[key]) for key, value in other.items() if "lora_B" not in key)
    assert all(value[0].equal(free_adapter(pipe, SUPPORT).tensors[key]) for key, value in free.items())


def test_output_types(pipe: MCDiPipeline) -> None:
    settings = {"num_candidates": 2, "num_inference_steps": 3}
    peft = pipe(TASKS, generator=seeded(), **settings).adapters
    flat = pipe(TASKS, generator=seeded(), output_type="pt", **settings).adapters
    latent = pipe(TASKS, generator=seeded(), output_type="latent", **settings).adapters
    layout, ways = pipe.codec.layout, max(map(len, TASKS))
    assert flat.shape == (3, layout.numel + ways * (layout.feature_dim + 1))
    assert latent.shape == (3, pipe.codec.num_tokens, layout.token_dim)
    assert flat[1].equal(torch.cat([peft[1].tensors[key].flatten() for key in layout.keys]))
    (as_tuple,) = pipe(TASKS, generator=seeded(), output_type="latent", return_dict=False, **settings)
    assert as_tuple.equal(latent)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
def test_number_of_steps(pipe: MCDiPipeline, steps: int) -> None:
    seen = []

    def callback(_: MCDiPipeline, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        assert set(tensors) == {"latents"} and tensors["latents"].isfinite().all()
        seen.append((step, int(timestep)))
        return tensors

    plain = pipe(SUPPORT, generator=seeded(), num_inference_steps=steps).adapters[0]
    called = pipe(SUPPORT, generator=seeded(), num_inference_steps=steps, callback_on_step_end=callback).adapters[0]
    assert_same(called, plain)
    assert seen == list(enumerate(pipe.scheduler.timesteps.tolist()))
    assert len(seen) == pipe.num_timesteps == plain.details.num_inference_steps == steps


def test_callback_replaces_latents(pipe: MCDiPipeline) -> None:
    def callback(pipe: MCDiPipeline, step: int, _: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        return {"latents": torch.zeros_like(tensors["latents"])} if step == pipe.num_timesteps - 1 else {}

    assert_same(pipe(SUPPORT, callback_on_step_end=callback).adapters[0], free_adapter(pipe, SUPPORT))


def test_latents_are_the_starting_noise(pipe: MCDiPipeline) -> None:
    noise = starting_noise(pipe, 1)
    drawn = torch.randn(noise.shape, generator=seeded(3))
    settings = {"eta": 0.0, "num_inference_steps": 4}
    expected = pipe(SUPPORT, generator=seeded(3), **settings).adapters[0]
    assert_same(pipe(SUPPORT, latents=drawn, **settings).adapters[0], expected)
    assert not torch.allclose(
        pipe(SUPPORT, latents=noise, output_type="pt", **settings).adapters,
        pipe(SUPPORT, latents=drawn, output_type="pt", **settings).adapters,
    )


def test_mean_is_that_of_the_candidates(pipe: MCDiPipeline) -> None:
    settings = {"eta": 0.0, "num_inference_steps": 4, "output_type": "latent"}
    noise = starting_noise(pipe, 3)
    singles = [pipe(SUPPORT, latents=row.unsqueeze(0), **settings).adapters for row in noise]
    together = pipe(SUPPORT, latents=noise, num_candidates=3, **settings).adapters
    assert_close(together, torch.stack(singles).mean(dim=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_candidates": 0}, "num_candidates is 0"),
        ({"num_candidates": 1.5}, "num_candidates is 1.5"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"strength": 2}, "strength is 2: expected 0.*to below 2"),
        ({"generator": 0}, "generator is 0: expected a torch.Generator, such as"),
        ({"generator": [seeded(), 1]}, "generator is 1"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"output_type": "np"}, "output_type is 'np'"),
        ({"generator": [seeded(), seeded()]}, "2 generators for 1 support sets"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"\['noise'\]"),
        ({"latents": torch.zeros(1, 20, 20)}, r"latents have shape \(1, 20, 20\): expected \(1, 4, 2\)"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5: expected a whole number"),
        ({"eta": 1.5, "strength": 0.0}, "eta is 1.5: expected 0 to 1"),
        ({"num_inference_steps": 10_000}, "num_inference_steps"),
    ],
)
def test_wrong_arguments_are_refused(pipe: MCDiPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(SUPPORT, **arguments)


@pytest.mark.parametrize("change", [{"seed": 1}, {"pooling": "default"}])
def test_another_backbone_is_refused_by_name(pipe: MCDiPipeline, change: dict[str, Any]) -> None:
    other = tiny_backbone(**change)
    with pytest.raises(ValueError) as error:
        pipe.backbone = other
    wanted = pipe.codec.config.base_model
    for name in (wanted["name_or_path"], wanted["fingerprint"], other.name_or_path, other.fingerprint, other.pooling):
        assert name in str(error.value)


def test_another_backbone_is_refused_on_loading(pipe: MCDiPipeline) -> None:
    other = tiny_backbone(seed=1)
    misled = MCDiPipeline(**pipe.components, base_model_name_or_path=other.name_or_path)
    with pytest.raises(ValueError, match="Load the backbone"):
        misled(SUPPORT)


@pytest.mark.parametrize(
    ("overrides", "message"), [({"r": 8}, "tokens: "), ({"target_modules": ["query"]}, "tokens: ")]
)
def test_components_of_other_adapters_are_refused(pipe: MCDiPipeline, overrides: dict[str, Any], message: str) -> None:
    codec = AdapterCodec.from_backbone(pipe.backbone, tiny_lora_config(**overrides))
    with pytest.raises(ValueError, match=f"another layout than the codec .*{message}"):
        MCDiPipeline(**pipe.components | {"codec": codec})


def test_a_task_encoder_of_another_width_is_refused(pipe: MCDiPipeline) -> None:
    with pytest.raises(ValueError, match="token_dim of the task encoder: 3 there, 2 in the codec"):
        MCDiPipeline(
            **pipe.components | {"task_encoder": TaskEncoder(feature_dim=32, num_tokens=4, token_dim=3, dim=8)}
        )


def test_a_batch_of_another_pipeline_is_refused(pipe: MCDiPipeline) -> None:
    batch = pipe.encode_support(SUPPORT)
    with pytest.raises(ValueError, match=r"features \(1, \d+, 3\) of another pipeline"):
        pipe(replace(batch, features=batch.features[..., :3]))


def test_flat_weights_and_tokens_keep_no_encoded_examples(pipe: MCDiPipeline) -> None:
    for output_type, kept in (("pt", 0), ("latent", 0), ("peft", 3)):
        assert len(pipe(TASKS, batch_size=1, num_inference_steps=1, output_type=output_type).draws.batches) == kept


SCHEDULERS = [DDIMScheduler, DDPMScheduler, LocalConsistencyScheduler]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_compatible_schedulers_run_and_are_saved(pipe: MCDiPipeline, scheduler: type, tmp_path: Path) -> None:
    assert set(pipe.scheduler.compatibles) == set(SCHEDULERS)
    swapped = MCDiPipeline(**pipe.components | {"scheduler": scheduler.from_config(pipe.scheduler.config)})
    swapped.backbone = pipe.backbone
    first, other, again = (swapped(TASKS, generator=seeded(seed)).adapters for seed in (0, 1, 0))
    for one, two, three in zip(first, other, again):
        assert_same(one, three)
        assert any(not value.equal(two.tensors[key]) for key, value in one.tensors.items())
        assert all(value.isfinite().all() for value in one.tensors.values())
    swapped.save_pretrained(tmp_path)
    assert type(MCDiPipeline.from_pretrained(tmp_path).scheduler) is scheduler
    if scheduler.__name__ == "DDPMScheduler":
        with pytest.raises(ValueError, match="temperature is 0.*DDPMScheduler draws its own noise"):
            swapped(SUPPORT, temperature=0.0)


def test_an_interrupted_call_leaves_the_loop(pipe: MCDiPipeline) -> None:
    seen = []

    def stop(one: MCDiPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        seen.append(tensors["latents"])
        one._interrupt = step == 1
        return tensors

    settings = {"generator": seeded(), "num_inference_steps": 5, "output_type": "latent"}
    found = pipe(SUPPORT, callback_on_step_end=stop, **settings).adapters
    assert len(seen) == 2 and found.equal(seen[-1])
    whole = pipe(SUPPORT, **settings | {"generator": seeded()}).adapters  # the next call is not interrupted
    assert not whole.equal(found)


def test_sequential_offloading_is_refused_by_name(pipe: MCDiPipeline) -> None:
    with pytest.raises(NotImplementedError, match="no sequential offloading: call enable_model_cpu_offload"):
        pipe.enable_sequential_cpu_offload()


@needs("diffusers", "0.42", "does not tell what it keeps")
def test_a_change_of_dtype_warns_of_no_empty_list(caplog: pytest.LogCaptureFixture) -> None:
    tiny_pipeline()[0].to(torch.float32)
    assert "kept in float32: ['basis', 'std']" in caplog.text and "float32: []" not in caplog.text


def test_the_first_call_is_as_the_second(saved: Path) -> None:
    """The first one loads the backbone, whose head draws from the stream that is handed in here."""
    pipe = MCDiPipeline.from_pretrained(saved)
    first, second = (pipe(SUPPORT, generator=torch.manual_seed(0)).adapters[0] for _ in range(2))
    assert_same(first, second)
    assert first.details.seed == second.details.seed == 0


def test_predictions_are_those_of_peft(pipe: MCDiPipeline) -> None:
    (adapter,) = pipe(TASKS[1], generator=seeded()).adapters
    texts = ["a b", "z", "c c y", "x"] * 300  # more than are worked on at once
    found = pipe.predict(adapter, texts, top_k=None)
    model = adapter.load_into(pipe.backbone.classifier(num_labels=4))
    with torch.no_grad():
        scores = model(**pipe.backbone.inputs(texts[:4])).logits.softmax(dim=1)
    for number, ranked in enumerate(found):
        own = dict(zip(adapter.labels, scores[number % 4].tolist()))
        assert {one["label"]: one["score"] for one in ranked} == pytest.approx(own, abs=1e-5)
        assert ranked == sorted(ranked, key=lambda one: -one["score"])
    assert pipe.predict(adapter, texts[:4]) == [ranked[0] for ranked in found[:4]] and pipe.predict(adapter, []) == []
    for wrong, message in (({"examples": "a b"}, "are a str"), ({"examples": ["a"], "top_k": 0}, "top_k is 0")):
        with pytest.raises((TypeError, ValueError), match=message):
            pipe.predict(adapter, **wrong)
    with pytest.raises(ValueError, match="Load the backbone"):
        pipe.predict(replace(adapter, base_model=tiny_backbone(seed=1).record), ["a"])


def test_a_backbone_in_the_pipelines_own_folder(pipe: MCDiPipeline, hub: FakeHub, tmp_path: Path, monkeypatch) -> None:
    home = tmp_path / "made"
    pipe.save_pretrained(home)
    shutil.copytree(tiny_backbone().name_or_path, home / "backbone")
    index = json.loads((home / "model_index.json").read_text())
    (home / "model_index.json").write_text(json.dumps(index | {"base_model_name_or_path": "./backbone"}))
    monkeypatch.chdir(tmp_path)
    loaded = MCDiPipeline.from_pretrained("made")
    expected = pipe(SUPPORT, generator=seeded()).adapters[0]
    assert_close(loaded(SUPPORT, generator=seeded()).adapters[0].tensors, expected.tensors)
    loaded.push_to_hub("tester/whole")  # its backbone goes along
    of_the_hub = MCDiPipeline.from_pretrained("tester/whole")
    assert_close(of_the_hub(SUPPORT, generator=seeded()).adapters[0].tensors, expected.tensors)
    shutil.rmtree(home / "backbone")
    with pytest.raises(FileNotFoundError, match="backbone is missing"):
        MCDiPipeline.from_pretrained(home)(SUPPORT)
    with pytest.raises(ValueError, match="expected a folder within that of the pipeline"):
        MCDiPipeline.from_pretrained(home, base_model_name_or_path="./../other")(SUPPORT)
