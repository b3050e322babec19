"""ResNet feature pyramids: the network up to the deepest level wanted, and its weights.

A pyramid level is named by the side of its feature map for 224 x 224 pixels: 7, 14, 28, 56 for
the last, third, second and first stage of a torchvision ResNet.
"""

import hashlib
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from command_line import UserError, say

STAGE_OF_LEVEL = {56: 1, 28: 2, 14: 3, 7: 4}
INPUT_SIDE = 224  # pixels
# ImageNet statistics of torchvision's weights, for pixels in [0, 1].
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
RANDOM_WEIGHTS_SEED = 0


@dataclass(frozen=True)
class Weights:
    """A state dict, where it comes from, and the sha256 of the file ("random" has no file)."""

    name: str
    state: dict[str, Any] | None
    sha256: str


def net_names() -> list[str]:
    """Return torchvision's ResNets and ResNeXts."""
    names = torchvision.models.list_models(module=torchvision.models)
    return [name for name in names if name.startswith(("resnet", "resnext", "wide_resnet"))]


def load_weights(net: str, weights: str) -> Weights:
    """Find weights: `imagenet` (torchvision's IMAGENET1K_V1), `random`, or a state_dict file.

    Raises
    ------
    UserError
        If the net is unknown, the download fails, or the file is no state dict.
    """
    if net not in net_names():
        raise UserError(f"net must be one of {', '.join(net_names())}, got {net}; see --help")
    if weights == "random":
        return Weights("random", None, "random")
    path = _download(net) if weights == "imagenet" else Path(weights)
    if not path.is_file():
        raise UserError(f"weights must be imagenet, random or a file, got {weights} (no such file)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a file that is not its own
        raise UserError(
            f"weights must be a file written by torch.save, got {path} "
            f"({type(error).__name__}); download it again, or pass --weights FILE"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(
            f"weights must hold a state_dict of tensors, got {path}; pass --weights FILE"
        )
    name = "imagenet" if weights == "imagenet" else path.name
    return Weights(name, state, hashlib.sha256(path.read_bytes()).hexdigest())


def _download(net: str) -> Path:
    """Return torchvision's ImageNet weights in torch's cache, downloaded if need be."""
    url = torchvision.models.get_model_weights(net).IMAGENET1K_V1.url  # type: ignore[attr-defined]
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.is_file():
        say(f"downloading {url}")
        try:
            with redirect_stdout(sys.stderr):  # torch prints there
                torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)
        except (URLError, HTTPException, OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise UserError(
                f"weights must be reachable, got {reason} for {url}; download that file on another "
                f"machine and pass --weights FILE, or put it at {path}"
            ) from error
    return path


class Backbone(nn.Module):
    """A ResNet that ends at the deepest level wanted and returns the elements of every level.

    Batch norm is folded into the convolutions and the layout is channels last, which changes last
    bits and is up to twice as fast on a CPU.

    Parameters
    ----------
    net : str
        Name in torchvision.models.
    weights : Weights
    levels : tuple of int
        Pyramid levels wanted.

    Raises
    ------
    UserError
        If the weights are not of this net.
    """

    def __init__(self, net: str, weights: Weights, levels: tuple[int, ...]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_WEIGHTS_SEED)
            model: ResNet = getattr(torchvision.models, net)(weights=None)
        n_stages = max(STAGE_OF_LEVEL[level] for level in levels)
        for stage in range(n_stages + 1, 5):
            delattr(model, f"layer{stage}")
        del model.fc
        if weights.state is not None:
            _load_state(model, weights)
        model.eval()
        _fold_batch_norms(model)
        self.stem = nn.Sequential(model.conv1, model.relu, model.maxpool)
        self.stages = nn.ModuleList(getattr(model, f"layer{i}") for i in range(1, n_stages + 1))
        self.levels = {STAGE_OF_LEVEL[level]: level for level in levels}
        self.to(memory_format=torch.channels_last)
        self.requires_grad_(False)
        self.eval()

    def forward(self, crops: Tensor) -> dict[int, Tensor]:
        """Return the elements of each level.

        Parameters
        ----------
        crops : (n, 3, 224, 224), normalised

        Returns
        -------
        level -> (n, channels, level * level)
        """
        elements = {}
        features = self.stem(crops)
        for number, stage in enumerate(self.stages, start=1):
            features = stage(features)
            if number in self.levels:
                elements[self.levels[number]] = features.flatten(2)  # (crops, channels, elements)
        return elements


def _form(value: Tensor) -> tuple[torch.Size, torch.layout, bool]:
    """Return what a parameter's value must have in common with the net's."""
    return value.shape, value.layout, value.is_complex()


def _load_state(model: nn.Module, weights: Weights) -> None:
    """Load the parameters of the stages that are left; those of other stages count for nothing."""
    own = model.state_dict()
    stages = [f"layer{stage}." for stage in STAGE_OF_LEVEL.values()]
    unused = ("fc.", *(stage for stage in stages if not hasattr(model, stage[:-1])))
    state = {n: value for n, value in (weights.state or {}).items() if not n.startswith(unused)}
    missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
    extra = [n for n in state if n not in own]
    wrong = [n for n, v in state.items() if n in own and _form(v) != _form(own[n])]
    if missing or extra or wrong:
        found = (
            ("lacks", missing),
            ("also holds", extra),
            ("has another shape or layout of", wrong),
        )
        what = next(f"{verb} {names[0]}" for verb, names in found if names)
        raise UserError(
            f"weights must be of the net and levels asked for, got {weights.name}, which {what}; "
            "choose the --net these weights are of, or other --weights"
        )
    model.load_state_dict(state, strict=False)


def _fold_batch_norms(model: ResNet) -> None:
    """Fold every batch norm into the convolution before it."""
    model.conv1 = fuse_conv_bn_eval(model.conv1, model.bn1)
    for block in model.modules():
        if not isinstance(block, (BasicBlock, Bottleneck)):
            continue
        for i in (1, 2, 3):
            if hasattr(block, f"conv{i}"):
                fused = fuse_conv_bn_eval(getattr(block, f"conv{i}"), getattr(block, f"bn{i}"))
                setattr(block, f"conv{i}", fused)
                setattr(block, f"bn{i}", nn.Identity())
        if block.downsample is not None:
            block.downsample = fuse_conv_bn_eval(block.downsample[0], block.downsample[1])


def normalise_pixels(crops: Tensor) -> Tensor:
    """Turn uint8 pixels (n, 3, h, w) into what the network expects, padding included."""
    mean = torch.tensor(PIXEL_MEAN, device=crops.device)[:, None, None]
    std = torch.tensor(PIXEL_STD, device=crops.device)[:, None, None]
    return (crops.float() / 255.0 - mean) / std


class FeatureExtractor:
    """Runs the backbone over full batches on a device.

    Parameters
    ----------
    backbone : Backbone
    device : torch.device
    precision : "fp32", "tf32" (CUDA only; the same as fp32 on a CPU) or "bf16" (network only)
    """

    def __init__(self, backbone: Backbone, device: torch.device, precision: str = "fp32") -> None:
        self.device, self.precision = device, precision
        self.backbone = backbone.to(device)
        self.chunk = 0  # crops of one forward pass; 0: the whole batch

    @torch.inference_mode()
    def extract(self, crops: Tensor) -> dict[int, Tensor]:
        """Return level -> (n, channels, elements), float32, of uint8 crops (n, 3, 224, 224).

        Where the GPU's memory is too small the batch is halved, with one line, and stays halved.
        """
        # Kernels are not chosen by timing them, and are the same ones in every run: equal bytes.
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        torch.backends.cudnn.allow_tf32 = self.precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = False  # projections stay exact
        while True:
            chunk = self.chunk or len(crops)
            try:
                parts = [self._forward(crops[i : i + chunk]) for i in range(0, len(crops), chunk)]
                break
            except torch.cuda.OutOfMemoryError as error:
                if chunk == 1:
                    raise UserError(
                        "device must have memory for one crop, got out of memory; free the GPU, or "
                        "pass --device cpu"
                    ) from error
            # Only here, when the error with its frames is gone, is their memory free again.
            self.chunk = (chunk + 1) // 2
            say(f"GPU memory is too small for {chunk} crops at once, going on with {self.chunk}")
            torch.cuda.empty_cache()
        if len(parts) == 1:
            return parts[0]
        return {level: torch.cat([part[level] for part in parts]) for level in parts[0]}

    def _forward(self, crops: Tensor) -> dict[int, Tensor]:
        """Run the network once."""
        pixels = normalise_pixels(crops).contiguous(memory_format=torch.channels_last)
        enabled = self.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
            elements = self.backbone(pixels)
        return {level: values.float().contiguous() for level, values in elements.items()}
