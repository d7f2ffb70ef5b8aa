#!/usr/bin/env bash
# Makes the files of model_cards/mcdi-omniglot-vit: the backbone, trajectories, the generator.
#   examples/reproduce/release_omniglot_vit.sh DATA     DATA is a folder that holds the data set omniglot
set -euo pipefail
cd "$(dirname "$0")/../.."
data=${1:?name the folder that holds the data set omniglot}
runs=runs card=model_cards/mcdi-omniglot-vit configs=examples/reproduce/configs
backbone=$runs/omniglot-vit/model

.venv/bin/python examples/reproduce/pretrain_vit.py --config $configs/omniglot_vit.json --dataset_name "$data/omniglot" \
    --output_dir $runs/omniglot-vit
.venv/bin/python examples/collect_trajectories.py --config $configs/omniglot_trajectories.json --mixture_root "$data" \
    --pretrained_model_name_or_path $backbone --cache_dir $runs/cache --output_dir $runs/omniglot
.venv/bin/python examples/train_mcdi.py --config $configs/omniglot.json --pretrained_model_name_or_path $backbone \
    --trajectories $runs/omniglot/trajectories --cache_dir $runs/cache --output_dir $runs/omniglot/generator
mkdir -p $card/backbone
cp $backbone/* $card/backbone/
cp -r $runs/omniglot/generator/pipeline/. $card/
# The backbone is loaded from the release's own folder, or its repository on the Hub.
sed -i 's#"base_model_name_or_path": null#"base_model_name_or_path": "./backbone"#' $card/model_index.json
