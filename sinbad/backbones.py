"""Networks and their weights: torchvision's ResNets, timm's models -> elements of every level.

A pyramid level is named by the side of its feature map for 224 x 224 pixels: 7, 14, 28, 56 for
strides 32 to 4. torchvision's ResNets are meant by their own names, any other name is timm's
(`timm:resnet18` is timm's where both have one); timm is needed for no other network.
"""

import hashlib
import logging
import re
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sinbad import errors

log = logging.getLogger(__name__)

STAGE_OF_LEVEL = {56: 1, 28: 2, 14: 3, 7: 4}  # of a torchvision ResNet
INPUT_SIDE = 224  # pixels
# ImageNet statistics of torchvision's weights, for pixels in [0, 1]; those of the raw pixels too.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
RANDOM_WEIGHTS_SEED = 0
WRAPPERS = ("state_dict", "model", "model_state_dict")  # where trainers put a state dict
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of weights
PREFIXES = ("module.", "backbone.", "model.")
# What timm's models are asked for: (n, channels, side, side), nothing behind the last map wanted.
MAPS = {"output_fmt": "NCHW", "intermediates_only": True, "stop_early": True}


def choose_device(name: str) -> torch.device:
    """Return the device named `auto` (CUDA if present), `cpu`, `cuda` or `cuda:<i>`.

    Raises
    ------
    UserError
        If the device is not one of these, or is not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    form = re.fullmatch(r"cpu|cuda(?::([0-9]{1,4}))?", name)
    if form is None:
        raise errors.UserError(
            f"device must be auto, cpu, cuda or cuda:<i>, got {name}; see --help"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name != "cpu" and int(form[1] or 0) >= count:
        raise errors.UserError(
            f"device must be on this machine ({count} CUDA devices), got {name}; pass --device cpu"
        )
    return torch.device(name)


# ---------------------------------------------------------------- weights


@dataclass(frozen=True)
class Weights:
    """A state dict, where it comes from, and the sha256 of the file ("random" has no file)."""

    name: str
    state: dict[str, Tensor] | None
    sha256: str


def torchvision_names() -> list[str]:
    """Return torchvision's ResNets and ResNeXts."""
    names = torchvision.models.list_models(module=torchvision.models)
    return [name for name in names if name.startswith(("resnet", "resnext", "wide_resnet"))]


def load_weights(net: str, weights: str) -> Weights:
    """Find weights: `imagenet` (downloaded once), `random`, or a file with a state_dict.

    Raises
    ------
    UserError
        If the net is unknown, the download fails, or the file is no state dict.
    """
    is_torchvision = net in torchvision_names()
    if not is_torchvision:
        _import_timm(net)
    if weights == "random":
        return Weights("random", None, "random")
    if weights == "imagenet" and not is_torchvision:
        return _timm_imagenet(net)
    path = _download(net) if weights == "imagenet" else Path(weights)
    if not path.is_file():
        raise errors.UserError(
            f"weights must be imagenet, random or a file, got {weights} (no such file)"
        )
    name = "imagenet" if weights == "imagenet" else path.name
    return Weights(name, _read_state(path), hashlib.sha256(path.read_bytes()).hexdigest())


def _read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict, plain or wrapped, by torch or safetensors; take off a common prefix."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise errors.UserError(
            f"reading {path} needs safetensors, got {error}; pip install -r requirements-timm.txt"
        ) from error
    except Exception as error:  # both raise half a dozen kinds for a file that is not theirs
        raise errors.UserError(
            f"weights must be a file written by torch.save or safetensors, got {path} "
            f"({type(error).__name__}); download it again, or pass --weights FILE"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
            log.info(f"note: weights are those under {wrapper!r} of {path.name}")
    if not isinstance(state, dict) or not state or not all(map(torch.is_tensor, state.values())):
        raise errors.UserError(
            f"weights must hold a state_dict of tensors, got {path}; pass --weights FILE"
        )
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
            log.info(f"note: prefix {prefix!r} taken off the names in {path.name}")
    return state


def _download(net: str) -> Path:
    """Return torchvision's ImageNet weights in torch's cache, downloaded if need be."""
    url = torchvision.models.get_model_weights(net).IMAGENET1K_V1.url  # type: ignore[attr-defined]
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.is_file():
        log.info(f"downloading {url}")
        try:
            with redirect_stdout(sys.stderr):  # torch prints there
                torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)
        except (HTTPException, OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise errors.UserError(
                f"weights must be reachable, got {reason} for {url}; download that file on another "
                f"machine and pass --weights FILE, or put it at {path}"
            ) from error
    return path


def _is_finite(value: Tensor) -> bool:
    """Tell whether all is finite, of a type that holds weights; of sparse ones the layout tells."""
    whole = value.dtype in FLOATS and value.device.type != "meta"
    return whole and (value.layout != torch.strided or bool(value.isfinite().all()))


def _load_state(model: nn.Module, all_names: set[str], weights: Weights) -> None:
    """Load what is left of a model that had parameters of all names before it was cut."""
    own, given = model.state_dict(), weights.state or {}
    state = {name: value for name, value in given.items() if name in own}
    found = {
        "lacks": [n for n in own if n not in given and not n.endswith("num_batches_tracked")],
        "also holds": [name for name in given if name not in all_names],
        "has another shape or layout of": [
            n for n, v in state.items() if (v.shape, v.layout) != (own[n].shape, own[n].layout)
        ],
        "holds no finite floating point numbers in": [
            n for n, v in state.items() if own[n].is_floating_point() and not _is_finite(v)
        ],
    }
    for verb, names in found.items():
        if names:
            raise errors.UserError(
                f"weights must be of the net and levels asked for, got {weights.name}, which "
                f"{verb} {names[0]}; choose the --net these weights are of, or other --weights"
            )
    model.load_state_dict(state, strict=False)


# ---------------------------------------------------------------- networks


class Backbone(nn.Module):
    """A network that ends at the deepest level wanted.

    `forward` turns normalised pixels (n, 3, 224, 224) into level -> (n, channels, elements).

    Attributes
    ----------
    levels : levels it returns
    mean, std : (3, 1, 1), what pixels in [0, 1] are normalised by
    """

    def __init__(self, levels: tuple[int, ...], mean: Any, std: Any) -> None:  # noqa: ANN401  any sequence
        super().__init__()
        self.levels = levels
        self.register_buffer("mean", torch.tensor(tuple(mean))[:, None, None])
        self.register_buffer("std", torch.tensor(tuple(std))[:, None, None])


def build_backbone(net: str, weights: Weights, levels: tuple[int, ...]) -> Backbone:
    """Build a network with its weights.

    Raises
    ------
    UserError
        If the weights are not of this net, or the net has no such level.
    """
    kind = TorchvisionBackbone if net in torchvision_names() else TimmBackbone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_WEIGHTS_SEED)
        backbone = kind(net, weights, levels)
    return backbone.to(memory_format=torch.channels_last).requires_grad_(False).eval()


def _check_levels(net: str, levels: tuple[int, ...], there: dict[int, int]) -> None:
    """Stop if a net has no map of a level's side."""
    for level in levels:
        if level not in there:
            raise errors.UserError(
                f"pyramid_level must be the side of a feature map of {net} ("
                f"{', '.join(map(str, sorted(there)))}), or 224 for raw pixels, got {level}"
            )


class TorchvisionBackbone(Backbone):
    """A ResNet or ResNeXt.

    Batch norm is folded into the convolutions, which changes last bits and is faster on a CPU.
    """

    def __init__(self, net: str, weights: Weights, levels: tuple[int, ...]) -> None:
        super().__init__(levels, PIXEL_MEAN, PIXEL_STD)
        _check_levels(net, levels, STAGE_OF_LEVEL)
        model = getattr(torchvision.models, net)(weights=None).eval()
        all_names = set(model.state_dict())
        n_stages = max(STAGE_OF_LEVEL[level] for level in levels)
        for part in ("fc", *(f"layer{stage}" for stage in range(n_stages + 1, 5))):
            delattr(model, part)
        if weights.state is not None:
            _load_state(model, all_names, weights)
        for block in list(model.modules()):  # the model's own first, then each block's
            for i in (1, 2, 3):
                if hasattr(block, f"bn{i}"):
                    fused = fuse_conv_bn_eval(*(getattr(block, f"{k}{i}") for k in ("conv", "bn")))
                    setattr(block, f"conv{i}", fused)
                    setattr(block, f"bn{i}", nn.Identity())
            if getattr(block, "downsample", None) is not None:
                block.downsample = fuse_conv_bn_eval(*block.downsample)
        self.stem = nn.Sequential(model.conv1, model.relu, model.maxpool)
        stages = (getattr(model, f"layer{stage}") for stage in range(1, n_stages + 1))
        self.stages = nn.ModuleList(stages)

    def forward(self, pixels: Tensor) -> dict[int, Tensor]:
        """See `Backbone`."""
        features, elements = self.stem(pixels), {}
        for level, stage in zip(STAGE_OF_LEVEL, self.stages, strict=False):
            features = stage(features)
            if level in self.levels:
                elements[level] = features.flatten(2)  # (crops, channels, elements)
        return elements


class TimmBackbone(Backbone):
    """Any model of timm that gives feature maps; where several have one side the last counts."""

    def __init__(self, net: str, weights: Weights, levels: tuple[int, ...]) -> None:
        model = _create_timm(net, pretrained=False).eval()
        config = model.pretrained_cfg
        super().__init__(levels, config["mean"], config["std"])
        with torch.inference_mode():
            maps = model.forward_intermediates(torch.zeros(1, 3, INPUT_SIDE, INPUT_SIDE), **MAPS)
        self.indices = {features.shape[-1]: index for index, features in enumerate(maps)}
        _check_levels(net, levels, self.indices)
        self.wanted = sorted(self.indices[level] for level in levels)
        all_names = set(model.state_dict())
        # Position embeddings of another size and other makers' names, as timm reads them.
        as_timm_reads = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        if weights.state is not None and as_timm_reads is not None:
            weights = replace(weights, state=as_timm_reads(weights.state, model))
        model.prune_intermediate_layers(self.wanted, prune_norm=True, prune_head=True)
        if weights.state is not None:
            _load_state(model, all_names, weights)
        self.model = model

    def forward(self, pixels: Tensor) -> dict[int, Tensor]:
        """See `Backbone`."""
        maps = self.model.forward_intermediates(pixels, indices=self.wanted, **MAPS)
        by_index = dict(zip(self.wanted, maps, strict=True))
        return {level: by_index[self.indices[level]].flatten(2) for level in self.levels}


def _import_timm(net: str) -> Any:  # noqa: ANN401  a module
    """Import timm, where it is installed and has a model of that name."""
    try:
        import timm
    except ImportError:
        raise errors.UserError(
            f"net must be one of torchvision's {', '.join(torchvision_names())}, or a model of "
            f"timm, which is not installed, got {net}; pip install -r requirements-timm.txt"
        ) from None
    name = net.removeprefix("timm:")
    if not timm.is_model(name):
        like = timm.list_models(f"*{name}*")[:5]
        raise errors.UserError(
            f"net must be a ResNet of torchvision or a model of timm, got {net}; "
            f"{'like it: ' + ', '.join(like) if like else 'timm.list_models() names all'}"
        )
    return timm


def _create_timm(net: str, pretrained: bool) -> nn.Module:
    """Create a model of timm for 224 x 224 pixels, where its size can be chosen."""
    timm, name = _import_timm(net), net.removeprefix("timm:")
    try:
        model = timm.create_model(name, pretrained=pretrained, img_size=INPUT_SIDE)
    except TypeError:  # a convolutional network takes any size
        model = timm.create_model(name, pretrained=pretrained)
    if not hasattr(model, "forward_intermediates"):
        raise errors.UserError(
            f"net must be a model that gives feature maps, got {net}; choose another"
        )
    return model


def _timm_imagenet(net: str) -> Weights:
    """Return timm's own weights of a model, downloaded once; sha256 of the state dict's values."""
    try:
        state = _create_timm(net, pretrained=True).state_dict()
    except (OSError, RuntimeError, ValueError, HTTPException) as error:
        raise errors.UserError(
            f"weights must be reachable, got {type(error).__name__} for {net} of timm; download "
            f"https://huggingface.co/timm/{net.removeprefix('timm:')} on another machine and pass "
            "--weights FILE (model.safetensors)"
        ) from error
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return Weights("imagenet", state, digest.hexdigest())


# ---------------------------------------------------------------- running them


def normalise_pixels(crops: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn uint8 pixels (n, 3, h, w) into what the network expects, padding included."""
    return (crops.float() / 255.0 - mean) / std


def pixel_elements(crops: Tensor) -> Tensor:
    """Return the raw pixels of crops (n, 3, h, w), uint8, as elements (n, 3, h * w)."""
    mean, std = torch.tensor([PIXEL_MEAN, PIXEL_STD], device=crops.device)[:, :, None, None]
    return normalise_pixels(crops, mean, std).flatten(2)


class FeatureExtractor:
    """Runs a backbone over full batches on a device.

    Parameters
    ----------
    backbone : Backbone
    device : torch.device
    precision : "fp32", "tf32" (CUDA only; the same as fp32 on a CPU) or "bf16" (network only)
    compiled : whether torch.compile makes the network, its weights frozen, faster at first use
    """

    def __init__(
        self,
        backbone: Backbone,
        device: torch.device,
        precision: str = "fp32",
        compiled: bool = False,
    ) -> None:
        self.device, self.precision = device, precision
        self.backbone = backbone.to(device)
        freeze = {"freezing": True}
        self.network = torch.compile(self.backbone, options=freeze) if compiled else self.backbone
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
                    raise errors.UserError(
                        "device must have memory for one crop, got out of memory; free the GPU, or "
                        "pass --device cpu"
                    ) from error
            # Only here, when the error with its frames is gone, is their memory free again.
            self.chunk = (chunk + 1) // 2
            log.info(
                f"GPU memory is too small for {chunk} crops at once, going on with {self.chunk}"
            )
            torch.cuda.empty_cache()
        if len(parts) == 1:
            return parts[0]
        return {level: torch.cat([part[level] for part in parts]) for level in parts[0]}

    def _forward(self, crops: Tensor) -> dict[int, Tensor]:
        """Run the network once."""
        pixels = normalise_pixels(crops, self.backbone.mean, self.backbone.std)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        enabled = self.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
            try:
                elements = self.network(pixels)
            except torch._dynamo.exc.BackendCompilerFailed as error:
                reason = " ".join(str(error).splitlines()[:2]).strip()
                raise errors.UserError(
                    f"--compile must find a compiler that works, got {reason}; install one (g++), "
                    "or leave the flag out"
                ) from error
        return {level: values.float().contiguous() for level, values in elements.items()}
