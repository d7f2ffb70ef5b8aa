"""Meta-train a generator on a trajectory data set, with REPTILE under Accelerate, and save it as a pipeline.

    accelerate launch examples/train_mcdi.py --config examples/reproduce/configs/text.json \\
        --trajectories runs/text/trajectories --output_dir runs/text/generator

Every draw depends on the seed and the step's number only. So a run that is interrupted and continued with
`--resume_from_checkpoint latest`, or spread over several processes, gives the same generator. The best generator on
tasks of the validation domains is kept in OUTPUT_DIR/pipeline, and what was measured on the way in
OUTPUT_DIR/curve.json: accuracy, the same with shuffled labels and with another task's condition, and diagnostics.
"""

import sys

from mcdi_hf import MCDiTrainer, MCDiTrainingArguments
from mcdi_hf.utils.arguments import parse_arguments


def main() -> None:
    (args,) = parse_arguments(MCDiTrainingArguments, description=__doc__)
    try:
        trainer = MCDiTrainer(args)
        folder = trainer.train()
    except OSError as error:  # a disk that is full or a folder that cannot be written is no bug of ours
        sys.exit(f"error: {error}")
    trainer.accelerator.print(
        f"best mean validation accuracy {trainer.state.best_metric:.4f}; the pipeline is in {folder}"
    )
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
