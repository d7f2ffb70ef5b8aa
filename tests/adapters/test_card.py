"""The card of a generated adapter: complete, safe whatever the labels are, and its code runs."""

import configparser
import dataclasses
import json
import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub
from huggingface_hub import ModelCard
from tiny import tiny_pipeline
from versions import CARDS_ASK_ENDPOINT

from mcdi_hf import FrozenBackbone, GeneratedAdapter, MCDiPipeline


SUPPORT = {"red": ["a b c", "a c"], "green": ["x y z", "z y"], "blue": ["a z", "b y"]}
PACKAGE = Path(str(files("mcdi_hf")))


def generate(pipe: MCDiPipeline, support: dict[str, list[str]] = SUPPORT) -> GeneratedAdapter:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(support, generator=generator, num_inference_steps=3, temperature=2.0).adapters[0]


@pytest.fixture(scope="module", params=["mean", "default"])
def made(request: pytest.FixtureRequest) -> tuple[MCDiPipeline, FrozenBackbone, GeneratedAdapter]:
    pipe, backbone = tiny_pipeline(pooling=request.param)
    return pipe, backbone, generate(pipe)


def test_card(made: tuple, tmp_path: Path) -> None:
    pipe, backbone, _ = made
    secret = ["c b a y", "z z b"]
    adapter = generate(pipe, support={"it's | {odd}": secret, "plain": ["a"]})
    adapter.save_pretrained(tmp_path / "shelf")
    card = ModelCard.load(tmp_path / "shelf" / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model is None and f"`{backbone.name_or_path}`" in card.text  # a folder is no id of the Hub
    assert {"peft", "lora", "mcdi"} <= set(card.data.tags)
    assert "# shelf" in card.text and "from 3 labelled examples in 2 classes" in card.text
    assert "it's | {odd} (2), plain (1)" in card.text.replace("\\", "")
    assert not any(text in card.content for text in secret)


def test_card_names_the_commits_and_the_seed(made: tuple, hub: FakeHub, tmp_path: Path) -> None:
    _, _, adapter = made
    base = adapter.base_model | {"name_or_path": "tiny/bert", "revision": "b" * 40}
    details = dataclasses.replace(adapter.details, generator="tester/pipe", generator_revision="a" * 40)
    named = dataclasses.replace(adapter, base_model=base, details=details)
    card = named.card("me/shelf", license="apache-2.0")
    if CARDS_ASK_ENDPOINT:
        card.validate()
    assert card.data.base_model == "tiny/bert" and card.data.base_model_relation == "adapter"
    assert card.data.license == "apache-2.0"
    assert "[tiny/bert](https://huggingface.co/tiny/bert)" in card.text
    assert f"| backbone | tiny/bert, revision {'b' * 40}, weights {base['fingerprint']} |" in card.text
    assert f"| generator | tester/pipe, revision {'a' * 40} |" in card.text and "| seed | 0 |" in card.text
    with pytest.raises(ValueError, match='"license" must be one of'):
        named.push_to_hub("tester/shelf", license="mine")
    assert hub.files("tester/shelf").keys() == {".gitattributes"}
    named.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["revision"] == "b" * 40


def test_the_support_is_on_the_card_only_if_asked_for(made: tuple, tmp_path: Path) -> None:
    pipe, _, _ = made
    odd = {"it's | {odd}": ["c b ```` a", 'z "z" b'], "plain": ["a"]}
    adapter = generate(pipe, support=odd)
    adapter.save_pretrained(tmp_path / "without")
    adapter.save_pretrained(tmp_path / "with", include_support=True)
    assert "z z" not in repr(adapter) and "c b" not in repr(adapter)
    for name, count in (("without", 0), ("with", 1)):
        text = (tmp_path / name / "README.md").read_text()
        found = re.findall(r"## Support set\n\n(`{5})json\n(.*?)\n\1\n", text, flags=re.DOTALL)
        assert len(found) == count and ("c b" in text) == bool(count)
    assert json.loads(found[0][1]) == odd
    with pytest.raises(ValueError, match="leave include_support out"):
        generate(pipe, support=pipe.encode_support(odd)).save_pretrained(tmp_path / "batch", include_support=True)
    assert not (tmp_path / "batch").exists()


def test_the_card_tells_what_was_chosen_and_what_was_refined(made: tuple) -> None:
    pipe, _, _ = made
    output = pipe(SUPPORT, num_candidates=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0))
    chosen = pipe.select(output).adapters[0]
    text = chosen.card("me/chosen").text
    assert "No gradient step was taken." in text
    assert f"| option chosen | {chosen.details.chosen} |" in text and "| folds | 2 |" in text
    losses = chosen.details.support_losses
    assert set(losses) == {"frozen backbone", "shared adapter", "candidate 1", "candidate 2", "mean of candidates"}
    assert all(f"{name} {loss:.4f}" in text for name, loss in losses.items())
    assert all(f"{name} {share:.3f}" in text for name, share in chosen.details.support_accuracies.items())
    refined = pipe.refine(output, num_steps=2).adapters[0].card("me/refined").text
    assert "Then 2 gradient steps were taken." in refined and "| option chosen | - |" in refined


def test_no_name_on_the_card_is_read_as_a_template_or_ends_a_cell(made: tuple) -> None:
    _, _, adapter = made
    hostile = ["{{ 7 * 6 }} | b\n| c |", "${base} {% raw %} ```", "<script>"]
    card = dataclasses.replace(adapter, labels=hostile).card("me/shelf")
    (row,) = re.findall(r"^\| classes \(shots\) \| (.*) \|$", card.text, re.MULTILINE)
    assert row == r"{{ 7 * 6 }} \| b \| c \| (2), ${base} {% raw %} ``` (2), &lt;script> (2)"
    (code,) = re.findall(r"```python\n(.*?)\n```\n\n## How", card.text, flags=re.DOTALL)
    assert str(dict(enumerate(hostile))) in code


def test_the_wheel_has_the_templates_of_cards() -> None:
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[2] / "setup.cfg")
    (pattern,) = config["options.package_data"]["mcdi_hf"].split()
    there = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("templates/*")}
    assert there == {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob(pattern)}
    assert {"adapters/templates/adapter_card.md", "trajectories/templates/trajectory_card.md"} <= there
