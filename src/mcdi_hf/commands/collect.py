"""Weight preparation: train a shared start, optimise an adapter for each of many tasks, write the trajectory data set.

    mcdi-hf collect --dataset_name CLINC150 --label_column intent --group_column domain \\
        --held_out_domains utility work small_talk meta oos --validation_domains utility --output_dir runs/intents

    accelerate launch -m mcdi_hf collect --mixture FILE --ways 2 2 ...

An interrupted run continues where it stopped, on any number of processes: each stack of tasks is a file of its own.
`--dry_run` says what a run would make and take, and trains nothing.
"""

from dataclasses import dataclass
from pathlib import Path

from datasets.utils.logging import disable_progress_bar
from transformers.hf_argparser import HfArg

from ..data.sources import Source, read_mixture
from ..trajectories.arguments import TrajectoryArguments
from ..trajectories.collector import TrajectoryCollector
from ..utils.arguments import check_fields, parse_arguments


@dataclass
class DataArguments:
    """Which data sets the tasks are drawn from."""

    dataset_name: str | None = HfArg(default=None, help="a Hub id or a local folder, with named classes")
    input_columns: list[str] = HfArg(default_factory=lambda: ["text"], help="texts or images, or two of sentences")
    label_column: str = HfArg(default="label", help="the classes")
    group_column: str | None = HfArg(default=None, help="tasks take their classes from one group")
    domain_column: str | None = HfArg(
        default=None, help="rows are held out by domain; None: the groups are the domains"
    )
    held_out_classes: float = HfArg(
        default=0.0, help="a share of the classes to validate on, for a data set without domains"
    )
    mixture: Path | None = HfArg(default=None, help="a JSON file of several sources, see read_mixture")
    mixture_root: Path | None = HfArg(default=None, help="a folder with the mixture's data sets, and excluded ones")
    dry_run: bool = HfArg(default=False, help="say what it would make and take, and train nothing")

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.mixture is None) == (self.dataset_name is None):
            raise ValueError("name either dataset_name or mixture")

    def sources(self) -> list[Source]:
        """The data sets, with the columns that make an example."""
        if self.mixture is not None:
            return read_mixture(self.mixture, self.mixture_root)
        columns = self.label_column, tuple(self.input_columns), self.group_column, self.domain_column
        return [Source(self.dataset_name, *columns, held_out_classes=self.held_out_classes)]


def report(summary: dict) -> None:
    """Print what a collection came to."""
    print(f"{summary['tasks']} trajectories, {summary['megabytes']:.1f} MB")
    print(f"{'group':<40} {'tasks':>6}")
    for group, count in summary["groups"].items():
        print(f"{group:<40} {count:>6}")
    for name, key in (
        ("training accuracy", "train_accuracy"),
        ("held-out accuracy", "accuracy"),
        ("the shared adapter's", "start_accuracy"),
    ):
        mean, deviation = summary[key]
        print(f"{name:<40} {mean:>6.3f} (sd {deviation:.3f})")
    for step, loss in summary["losses"].items():
        print(f"{f'loss at step {step}':<40} {loss:>6.3f}")


def main(argv: list[str] | None = None) -> None:
    """Run the command with its arguments, by default those of the process."""
    data, args = parse_arguments(DataArguments, TrajectoryArguments, description=__doc__, args=argv)
    if data.mixture_root is not None:
        args.exclude_texts_of = [str(data.mixture_root / name) for name in args.exclude_texts_of]
    disable_progress_bar()  # of `datasets`: the collector has its own
    collector = TrajectoryCollector(args, data.sources())
    if data.dry_run:
        for name, value in collector.dry_run().items():
            print(f"{name:<16} {value}")
        return
    folder = collector.collect()
    if collector.state.is_main_process:
        report(folder.summary())
        print(f"the trajectories are in {folder.folder}")
    collector.state.destroy_process_group()
