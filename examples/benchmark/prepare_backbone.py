"""Make a smaller backbone of an image model: its lower layers, on smaller images.

    python examples/benchmark/prepare_backbone.py dinov2-small-focus DATA/dinov2-small-focus-84px \\
        --num_layers 8 --image_size 84

A ViT's position embeddings are interpolated to the size of its images, so a model of 224 pixels reads 84, at a seventh
of the cost. Layers above `--num_layers` are left out: of a model that was fine-tuned for pixels they know little of
classes.
"""

import argparse
from pathlib import Path

from commands import HelpFormatter
from transformers import AutoImageProcessor, AutoModel


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("pretrained_model_name_or_path", help="a model of images, a folder or a name on the Hub")
    parser.add_argument("output_dir", type=Path, help="where the smaller one is written")
    parser.add_argument("--num_layers", type=int, required=True, help="layers that are kept, from the lowest")
    parser.add_argument("--image_size", type=int, required=True, help="pixels, a multiple of the model's patches")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    processor = AutoImageProcessor.from_pretrained(args.pretrained_model_name_or_path)
    # Dinov2 and others name the layers that they would hand to a detector: only the last one is left to name.
    last = {"num_hidden_layers": args.num_layers, "out_features": None, "out_indices": [args.num_layers]}
    model = AutoModel.from_pretrained(args.pretrained_model_name_or_path, **last)
    if args.image_size % model.config.patch_size:
        raise ValueError(
            f"--image_size {args.image_size} is no multiple of patches of {model.config.patch_size} pixels."
        )
    processor.size = {"shortest_edge": args.image_size}
    processor.crop_size = {"height": args.image_size, "width": args.image_size}
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
