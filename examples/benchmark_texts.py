"""What the benchmark's page says in words: the ways, how to read the tables, how test tasks are kept apart."""

from benchmark_ways import (
    CEILING,
    FROZEN,
    GRADIENT,
    GRADIENT_TIME,
    LOGISTIC,
    MC_DI,
    MEAN,
    MIXED,
    MV_DI,
    NEAREST,
    NOISE,
    NOISED,
    ONE_DRAW,
    PCA_SAMPLE,
    REPTILE,
    SETFIT,
    SHARED,
    SHUFFLED,
    SINGLE_LEVEL,
    TW_DI,
)

from mcdi_hf.evaluation.statistics import LEVEL, RESAMPLES


FAMILIES = ("few_shot", "transfer", "domain", "language")

ABOUT = {
    FROZEN: "the backbone as it is, its head made of the means of the classes' examples",
    LOGISTIC: "logistic regression on the same features",
    SHARED: "one adapter trained on all training tasks, a head made for each test task",
    MEAN: "the mean of all training adapters, a head made for each test task",
    NEAREST: "the training adapter whose examples lie nearest to the test task's",
    MIXED: "a weighted sum of training adapters, the weights searched without gradients on the task's examples",
    REPTILE: "a start meta-learned on the training tasks, then gradient steps on the task's examples",
    GRADIENT: "LoRA trained on the task's examples",
    GRADIENT_TIME: "the same, for as many steps as fit into the time of one generation",
    SETFIT: "the library, on the same encoder, with its documented defaults; texts only",
    CEILING: "LoRA trained on what all other ways may not see: many more examples of the task's classes",
    SINGLE_LEVEL: f"{MV_DI} without the inner loop of meta-training",
    MV_DI: "vanilla diffusion: only the last adapter of each trajectory is a target",
    TW_DI: "every adapter of a trajectory is treated as if it were the last",
    ONE_DRAW: "local consistency diffusion, a single draw",
    MC_DI: "the same generator, the mean of several draws",
    SHUFFLED: "shown the examples of another test task",
    NOISE: "shown random inputs instead of examples",
    NOISED: "noise around the nearest training adapter, of the scale that validation liked best",
    PCA_SAMPLE: "drawn from the Gaussian of all training adapters, whatever the task",
}

READING = f"""\
A row is a way to an adapter (or to a classifier without one), a column a kind of task: `5x1` is 5-way 1-shot, and a word
before it names what the classes are about. All ways of a table see the same test tasks; slow ones see the first of them, and
ablations those of the seeds that they were trained for. Behind such a mean stands the number of its episodes: it is of other
tasks than the means without one, so it is not to be compared with them; the table of differences does that.

* **Intervals**: `±` is half the width of a {100 * LEVEL:g} % interval over test episodes: percentiles of {RESAMPLES} bootstrap
  draws of the episodes of each trained generator, never across generators, since how far these lie apart is no noise of the
  mean. It says what other episodes would change; the deviation over training seeds, in a family's page, says what another
  training would. `±?` stands for a single episode. Intervals of ways that saw few episodes are rough, and rather too narrow.
* **Differences** are paired: of two ways on the episodes that both have, in points of accuracy. A `tie` is a difference
  whose interval includes zero; few episodes make ties. Of many comparisons of ways that are alike, some
  {100 * (1 - LEVEL):.0f} % are called otherwise by chance.
* **The best rival** of a kind is the one that is highest beside {MC_DI} on the episodes that both have; among rivals that saw
  all episodes it is the one with the highest mean. It is picked on the test episodes themselves, which flatters the rival:
  nobody could have picked it beforehand.
* **Times** are from a task's examples to its adapter, one task at a time, medians; what was trained beforehand is not in them.
  Other tables were measured beside, on the same two cores: a table's times are to be compared with each other only.
"""

SEALING = """\
Whatever could be chosen was chosen on validation tasks, of the first fold where there are several: steps, learning rates,
penalties, noise, pooling. Every rival may try at most four settings for each number of shots, on as many tasks; the generator
chose its checkpoint and its strength among four, too. Then the choices are sealed: their fingerprint, together with that of
the trained generators and of all sizes, is written down and nothing can be chosen any more.
[`examples/benchmark_seal.py`](../examples/benchmark_seal.py) gives out test tasks only behind a closed seal, writes each line
of results once with the seal's fingerprint, and refuses any run whose settings or choices differ. So test tasks are used once,
and after every choice.
"""
