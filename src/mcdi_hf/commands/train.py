"""Meta-train a generator on a trajectory data set, with REPTILE under Accelerate, and save it as a pipeline.

    accelerate launch -m mcdi_hf train --config examples/reproduce/configs/text.json \\
        --trajectories runs/text/trajectories --output_dir runs/text/generator

Every draw depends on the seed and the step's number only. So a run that is interrupted and continued with
`--resume_from_checkpoint latest`, or spread over several processes, gives the same generator. The best generator on
tasks of the validation domains is kept in OUTPUT_DIR/pipeline, and what was measured on the way in
OUTPUT_DIR/curve.json: accuracy, the same with shuffled labels and with another task's condition, and diagnostics.
"""

from ..training.arguments import MCDiTrainingArguments
from ..training.trainer import MCDiTrainer
from ..utils.arguments import parse_arguments


def main(argv: list[str] | None = None) -> None:
    """Run the command with its arguments, by default those of the process."""
    (args,) = parse_arguments(MCDiTrainingArguments, description=__doc__, args=argv)
    trainer = MCDiTrainer(args)
    folder = trainer.train()
    trainer.accelerator.print(
        f"best mean validation accuracy {trainer.state.best_metric:.4f}; the pipeline is in {folder}"
    )
    trainer.accelerator.end_training()
