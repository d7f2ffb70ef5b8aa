"""Write scikit-learn's handwritten digits as a data set of images, in the size and the colours of Omniglot.

    python examples/benchmark/prepare_digits.py DATA/digits

makes DATA/digits/train.parquet.
"""

import argparse
from pathlib import Path

import numpy as np
from commands import HelpFormatter
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow
from sklearn.datasets import load_digits


SIDE = 28  # pixels, as Omniglot's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("output_dir", type=Path, help="where the data set is written")
    args = parser.parse_args()
    digits = load_digits()  # 0 is the paper and 16 is ink
    pixels = np.rint(255 * (1 - digits.images / 16)).astype(np.uint8)
    images = [Pillow.fromarray(one).resize((SIDE, SIDE), Pillow.Resampling.BICUBIC) for one in pixels]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    table = Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    table.to_parquet(args.output_dir / "train.parquet")


if __name__ == "__main__":
    main()
