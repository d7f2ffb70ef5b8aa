#!/usr/bin/env bash
# Makes the files of model_cards/mcdi-minilm-reviews: trajectories, then the generator.
#   examples/release_minilm_reviews.sh DATA     DATA is a folder that holds the data set fdu_mtl
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?name the folder that holds the data set fdu_mtl}
runs=runs/reviews configs=examples/configs

.venv/bin/python examples/collect_trajectories.py --config $configs/reviews_trajectories.json --mixture_root "$data" \
    --cache_dir runs/cache --output_dir $runs
.venv/bin/python examples/train_mcdi.py --config $configs/reviews.json --trajectories $runs/trajectories \
    --cache_dir runs/cache --output_dir $runs/generator
mkdir -p model_cards/mcdi-minilm-reviews
cp -r $runs/generator/pipeline/. model_cards/mcdi-minilm-reviews/
