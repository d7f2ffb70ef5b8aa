#!/usr/bin/env bash
# Makes the files of model_cards/mcdi-smollm2-sentiment: trajectories, then the generator.
#   examples/reproduce/release_smollm2_sentiment.sh DATA [BACKBONE]
# DATA is a folder that holds the data set fdu_mtl; BACKBONE is where SmolLM2-135M-Instruct lies, if not on the Hub.
set -euo pipefail
cd "$(dirname "$0")/../.."
data=${1:?name the folder that holds the data set fdu_mtl}
name=HuggingFaceTB/SmolLM2-135M-Instruct
backbone=${2:-$name} runs=runs/smollm2 configs=examples/reproduce/configs

.venv/bin/python examples/collect_trajectories.py --config $configs/smollm2_sentiment_trajectories.json \
    --mixture_root "$data" --pretrained_model_name_or_path "$backbone" --base_model_name $name \
    --cache_dir runs/cache --output_dir $runs
.venv/bin/python examples/train_mcdi.py --config $configs/smollm2_sentiment.json --trajectories $runs/trajectories \
    --pretrained_model_name_or_path "$backbone" --cache_dir runs/cache --output_dir $runs/generator
mkdir -p model_cards/mcdi-smollm2-sentiment
cp -r $runs/generator/pipeline/. model_cards/mcdi-smollm2-sentiment/
