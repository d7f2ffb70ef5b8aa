"""A page on which anybody makes an adapter: examples in, an adapter out, tried and downloaded. A Hugging Face Space as it stands.

    pip install -r examples/space/requirements.txt
    PIPELINE=model_cards/mcdi-minilm-text python examples/space/app.py

`PIPELINE` is a generator's folder or Hub id, `BASE_MODEL` a local copy of its backbone, if there is one.
"""

import os
import shutil
import tempfile
import time
from pathlib import Path

import gradio as gr
import torch
from huggingface_hub.errors import HfHubHTTPError

from mcdi_hf import GeneratedAdapter, MCDiPipeline
from mcdi_hf.commands.tables import labelled, read_table


MAX_BYTES, MAX_ROWS, MAX_CLASSES, MAX_SENTENCES = 200_000, 1000, 50, 100
EXAMPLE = """refund: where is my money
refund: I want my payment back
refund: please return what I paid
delivery: has it shipped yet
delivery: my parcel is late
delivery: the courier did not come"""
PLACES = {
    "generated": "mean of candidates",
    "shared adapter (free)": "shared adapter",
    "frozen backbone (free)": "frozen backbone",
}

pipe = MCDiPipeline.from_pretrained(os.environ.get("PIPELINE", "model_cards/mcdi-minilm-text"))
if base_model := os.environ.get("BASE_MODEL"):
    pipe.register_to_config(base_model_name_or_path=base_model)
pipe.set_progress_bar_config(disable=True)


def read_support(typed: str, file: str | None) -> dict[str, list[str]]:
    """The support set of lines `label: example`, or of a file. A `ValueError` says what is wrong."""
    if file is not None:
        pairs = list(zip(*reversed(labelled(read_table(file), None, None)), strict=True))
    else:
        lines = [line for line in typed[:MAX_BYTES].splitlines() if line.strip()]
        if wrong := [number for number, line in enumerate(lines, 1) if ":" not in line]:
            raise ValueError(f"Line {wrong[0]} has no colon: expected a label, a colon and an example.")
        pairs = [tuple(part.strip() for part in line.split(":", 1)) for line in lines]
    support: dict[str, list[str]] = {}
    for label, example in pairs[:MAX_ROWS]:
        support.setdefault(label, []).append(example)
    if len(support) > MAX_CLASSES:
        raise ValueError(f"There are {len(support)} classes: expected {MAX_CLASSES} at most. Is it the right column?")
    return support


def generate(typed: str, file: str | None, progress: gr.Progress = gr.Progress()) -> tuple:
    """What the page shows of a new adapter: a line, the table, the file, and the adapter for later."""
    try:
        support = read_support(typed, file)
        progress(0.2, "Generating")
        began = time.perf_counter()
        output = pipe(support, num_candidates=4, generator=torch.Generator().manual_seed(0))
        progress(0.6, "Comparing with what is free")
        (adapter,) = pipe.select(output).adapters
    except (ValueError, TypeError, OSError) as error:
        return f"Error: {error}", None, None, None
    seconds, details = time.perf_counter() - began, adapter.details
    found = details.support_accuracies or {}
    table = [[name, f"{100 * found[place]:.0f} %"] for name, place in PLACES.items() if place in found]
    folder = Path(tempfile.mkdtemp())
    adapter.save_pretrained(folder / "adapter")
    archive = shutil.make_archive(str(folder / "adapter"), "zip", folder / "adapter")
    kept = f" Kept: {details.chosen}." if table else " With one example of a class nothing can be held out to compare."
    line = f"An adapter of {len(adapter.labels)} classes from {sum(details.shots)} examples in {seconds:.1f} s.{kept}"
    return line, table, archive, adapter


def classify(adapter: GeneratedAdapter | None, sentences: str) -> tuple[str, list | None]:
    lines = [line for line in sentences.splitlines() if line.strip()][:MAX_SENTENCES]
    if adapter is None or not lines:
        return "Error: generate an adapter first, then give a sentence a line.", None
    return "", [[line, one["label"], f"{one['score']:.2f}"] for line, one in zip(lines, pipe.predict(adapter, lines))]


def push(adapter: GeneratedAdapter | None, repo_id: str, token: str) -> str:
    if adapter is None or not repo_id or not token:
        return "Error: generate an adapter first, then give a repository and a token that may write to it."
    try:
        return f"Pushed: {adapter.push_to_hub(repo_id, token=token)}"
    except (ValueError, OSError, HfHubHTTPError) as error:
        return f"Error: {str(error).splitlines()[0]}"


with gr.Blocks(title="Adapters without training") as page:
    gr.Markdown(
        "# Adapters without training\nGive some examples of each class. A diffusion model writes a LoRA adapter for "
        f"`{pipe.codec.config.base_model['name_or_path']}`, without a gradient step. It loads with plain PEFT."
    )
    made = gr.State()
    typed = gr.Textbox(EXAMPLE, lines=8, label="Examples, one a line: label: text", elem_id="examples")
    file = gr.File(
        label="or a file with columns label and text: CSV, TSV, JSON Lines", type="filepath", elem_id="file"
    )
    start = gr.Button("Generate", variant="primary", elem_id="generate")
    said = gr.Textbox(label="Result", interactive=False, elem_id="result")
    table = gr.Dataframe(headers=["held-out accuracy", ""], label="On held-out examples of yours", elem_id="table")
    archive = gr.File(label="The adapter", elem_id="adapter")
    sentences = gr.Textbox(
        "my package has not come\nI was charged twice", lines=3, label="Try sentences", elem_id="sentences"
    )
    ask = gr.Button("Classify", elem_id="classify")
    problem = gr.Markdown()
    answers = gr.Dataframe(headers=["sentence", "label", "score"], label="Answers", elem_id="answers")
    with gr.Accordion("Push to the Hub", open=False):
        repo_id, token = gr.Textbox(label="Repository: user/name"), gr.Textbox(label="Token", type="password")
        send, sent = gr.Button("Push"), gr.Markdown()
    start.click(generate, [typed, file], [said, table, archive, made])
    ask.click(classify, [made, sentences], [problem, answers])
    send.click(push, [made, repo_id, token], sent)


if __name__ == "__main__":
    page.launch(max_file_size=MAX_BYTES)
