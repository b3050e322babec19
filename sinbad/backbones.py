"""Networks and their weights: torchvision's ResNets and timm's models -> elements of every level.

A pyramid level is named by the side of its feature map at 224 x 224 pixels: 7, 14, 28, 56 for
strides 32 to 4. The names of torchvision's ResNets mean those; any other name is timm's
(`timm:resnet18` where both have one). timm is imported for its own networks only.
"""

import hashlib
import io
import logging
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sinbad import devices, errors

log = logging.getLogger(__name__)

STAGE_OF_LEVEL = {56: 1, 28: 2, 14: 3, 7: 4}  # of a torchvision ResNet
INPUT_SIDE = 224  # pixels
# ImageNet statistics of torchvision's weights, for pixels in [0, 1]; also used for raw pixels.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
RANDOM_WEIGHTS_SEED = 0
WRAPPERS = ("state_dict", "model", "model_state_dict")  # keys under which trainers save it
PREFIXES = ("module.", "backbone.", "model.")
# Arguments of timm's forward pass: maps (n, channels, side, side), no layer after the last of them.
MAP_OPTIONS = {"output_fmt": "NCHW", "intermediates_only": True, "stop_early": True}


# ---------------------------------------------------------------- weights


@dataclass(frozen=True)
class Weights:
    """A state dict (None: random), its name, and the sha256 of its file ("random" has none)."""

    name: str
    state: dict[str, Tensor] | None
    sha256: str


def torchvision_names() -> list[str]:
    """Return the names of torchvision's ResNets and ResNeXts."""
    names = torchvision.models.list_models(module=torchvision.models)
    return [name for name in names if name.startswith(("resnet", "resnext", "wide_resnet"))]


def load_weights(net: str, weights: str) -> Weights:
    """Read weights: `imagenet` (downloaded once), `random`, or a file with a state dict.

    Raises
    ------
    UserError
        If the net is unknown, the download fails, or the file holds no state dict.
    """
    is_torchvision = net in torchvision_names()
    if not is_torchvision:
        _import_timm(net)
    if weights == "random":
        return Weights("random", None, "random")
    if weights == "imagenet" and not is_torchvision:
        return _timm_imagenet(net)
    path = _download(net) if weights == "imagenet" else Path(weights)
    try:
        content = path.read_bytes()  # first: an error of the system is no damaged file
    except (FileNotFoundError, IsADirectoryError) as error:
        raise errors.UserError(
            f"weights must be imagenet, random or a file, got {weights} ({error.strerror})"
        ) from error
    name = weights if weights == "imagenet" else path.name
    return Weights(name, _parse_state(path, content), hashlib.sha256(content).hexdigest())


def _parse_state(path: Path, content: bytes) -> dict[str, Tensor]:
    """Parse a state dict, plain or wrapped, of torch or safetensors; remove a common prefix."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            state: Any = load(content)
        else:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except ImportError as error:
        raise errors.UserError(
            f"could not read {path}: {error}; pip install -r requirements-timm.txt"
        ) from error
    except Exception as error:  # for a damaged file both raise half a dozen types
        if isinstance(error, (MemoryError, OSError)) or "allocate memory" in str(error):
            raise
        raise errors.UserError(
            f"weights must be a file written by torch.save or safetensors, got {path} "
            f"({type(error).__name__}); download it again, or pass --weights FILE"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
            log.info(f"note: the weights are under {wrapper!r} in {path.name}")
    if not isinstance(state, dict) or not state or not all(map(torch.is_tensor, state.values())):
        raise errors.UserError(
            f"weights must hold a state_dict of tensors, got {path}; pass --weights FILE"
        )
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
            log.info(f"note: removed the prefix {prefix!r} of the names in {path.name}")
    return state


def _download(net: str) -> Path:
    """Return torchvision's ImageNet weights in torch's cache, downloaded where missing."""
    url = torchvision.models.get_model_weights(net).IMAGENET1K_V1.url  # type: ignore[attr-defined]
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.is_file():
        log.info(f"downloading {url}")
        try:
            with redirect_stdout(sys.stderr):  # torch prints to stdout
                torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)
        except (HTTPException, OSError, RuntimeError, ValueError) as error:
            raise errors.UserError(
                f"could not download {url}: {getattr(error, 'reason', error)}; download it on "
                f"another machine and pass --weights FILE, or put it at {path}"
            ) from error
    return path


def _load_state(model: nn.Module, all_names: set[str], weights: Weights) -> None:
    """Load weights into a model cut at the deepest level; `all_names` are those of the whole."""
    state = weights.state or {}
    expected = {n: v for n, v in model.state_dict().items() if not n.endswith("batches_tracked")}
    for name in [*expected, *state]:
        if name not in all_names:
            problem = "also holds"
        elif name in expected and name not in state:
            problem = "lacks"
        elif name in expected and not _is_usable(state[name], expected[name]):
            problem = f"has no finite floating-point values of shape {[*expected[name].shape]} in"
        else:
            continue
        raise errors.UserError(
            f"weights must be of the net and levels asked for, got {weights.name}, which {problem} "
            f"{name}; choose the --net of these weights, or other --weights"
        )
    model.load_state_dict({name: state[name] for name in expected}, strict=False)


def _is_usable(value: Tensor, expected: Tensor) -> bool:
    """Tell whether a tensor has the expected shape and, for parameters, finite floats."""
    if value.shape != expected.shape or value.is_sparse or value.is_meta:
        return False
    is_finite = value.is_floating_point() and bool(value.float().isfinite().all())
    return is_finite or not expected.is_floating_point()


# ---------------------------------------------------------------- networks


class Backbone(nn.Module):
    """A network cut after the deepest level asked for.

    `forward` maps normalised pixels (n, 3, 224, 224) to level -> (n, channels, elements).

    Attributes
    ----------
    levels : the levels it returns
    mean, std : (3, 1, 1), normalise pixels in [0, 1]
    """

    def __init__(self, levels: tuple[int, ...], mean: Any, std: Any) -> None:  # noqa: ANN401  any sequence
        super().__init__()
        self.levels = levels
        self.register_buffer("mean", torch.tensor(tuple(mean))[:, None, None])
        self.register_buffer("std", torch.tensor(tuple(std))[:, None, None])

    def fold_batch_norms(self) -> None:
        """Fold batch norms into convolutions where that is known how: equal up to rounding."""


def build_backbone(net: str, weights: Weights, levels: tuple[int, ...]) -> Backbone:
    """Build a network with its weights, in evaluation mode.

    Raises
    ------
    UserError
        If the weights do not fit the network, or it lacks one of the levels.
    """
    backbone_class = TorchvisionBackbone if net in torchvision_names() else TimmBackbone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_WEIGHTS_SEED)
        backbone = backbone_class(net, weights, levels)
    return backbone.to(memory_format=torch.channels_last).requires_grad_(False).eval()


def _check_levels(net: str, levels: tuple[int, ...], sides: dict[int, int]) -> None:
    """Stop if a network has no feature map of a level's side."""
    for level in levels:
        if level not in sides:
            raise errors.UserError(
                f"pyramid_level must be the side of a feature map of {net} ("
                f"{', '.join(map(str, sorted(sides)))}), or 224 for raw pixels, got {level}"
            )


class TorchvisionBackbone(Backbone):
    """A ResNet or ResNeXt."""

    def __init__(self, net: str, weights: Weights, levels: tuple[int, ...]) -> None:
        super().__init__(levels, PIXEL_MEAN, PIXEL_STD)
        _check_levels(net, levels, STAGE_OF_LEVEL)
        with torch.device("cpu" if weights.state is None else "meta"):  # no random numbers
            model = getattr(torchvision.models, net)(weights=None).eval()
        all_names = set(model.state_dict())
        n_stages = max(STAGE_OF_LEVEL[level] for level in levels)
        for part in ("fc", *(f"layer{stage}" for stage in range(n_stages + 1, 5))):
            delattr(model, part)
        if weights.state is not None:
            _load_state(model.to_empty(device="cpu"), all_names, weights)
        names = "conv1", "bn1", "relu", "maxpool"
        self.stem = nn.Sequential(OrderedDict((name, getattr(model, name)) for name in names))
        stages = (getattr(model, f"layer{stage}") for stage in range(1, n_stages + 1))
        self.stages = nn.ModuleList(stages)

    def fold_batch_norms(self) -> None:
        """See `Backbone`."""
        for block in list(self.modules()):  # the stem's convolution first, then each block's
            for i in (1, 2, 3):
                if isinstance(getattr(block, f"bn{i}", None), nn.BatchNorm2d):
                    fused = fuse_conv_bn_eval(*(getattr(block, f"{k}{i}") for k in ("conv", "bn")))
                    setattr(block, f"conv{i}", fused)
                    setattr(block, f"bn{i}", nn.Identity())
            if isinstance(getattr(block, "downsample", None), nn.Sequential):
                block.downsample = fuse_conv_bn_eval(*block.downsample)

    def forward(self, pixels: Tensor) -> dict[int, Tensor]:
        """See `Backbone`."""
        features, elements = self.stem(pixels), {}
        for level, stage in zip(STAGE_OF_LEVEL, self.stages, strict=False):
            features = stage(features)
            if level in self.levels:
                elements[level] = features.flatten(2)  # (crops, channels, elements)
        return elements


class TimmBackbone(Backbone):
    """A timm model with feature maps; of several maps with the same side the last is used."""

    def __init__(self, net: str, weights: Weights, levels: tuple[int, ...]) -> None:
        model, maps = _create_timm(net)
        super().__init__(levels, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
        self.map_of_level = {features.shape[-1]: index for index, features in enumerate(maps)}
        _check_levels(net, levels, self.map_of_level)
        self.map_indices = sorted(self.map_of_level[level] for level in levels)
        all_names = set(model.state_dict())
        # Position embeddings of another size and other makers' names, converted by timm itself.
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        if weights.state is not None and convert is not None:
            weights = replace(weights, state=convert(weights.state, model))
        model.prune_intermediate_layers(self.map_indices, prune_norm=True, prune_head=True)
        if weights.state is not None:
            _load_state(model, all_names, weights)
        self.model = model

    def forward(self, pixels: Tensor) -> dict[int, Tensor]:
        """See `Backbone`."""
        maps = self.model.forward_intermediates(pixels, indices=self.map_indices, **MAP_OPTIONS)
        by_index = dict(zip(self.map_indices, maps, strict=True))
        return {level: by_index[self.map_of_level[level]].flatten(2) for level in self.levels}


def _import_timm(net: str) -> Any:  # noqa: ANN401  a module
    """Import timm, if it is installed and has a model of that name."""
    try:
        import timm
    except ImportError:
        raise errors.UserError(
            f"net must be one of torchvision's {', '.join(torchvision_names())}, or a model of "
            f"timm, which is not installed, got {net}; pip install -r requirements-timm.txt"
        ) from None
    name = net.removeprefix("timm:")
    if not timm.is_model(name):
        similar = ", ".join(timm.list_models(f"*{name}*")[:5])
        raise errors.UserError(
            f"net must be a ResNet of torchvision or a model of timm, got {net}; "
            f"{f'similar: {similar}' if similar else 'timm.list_models() names all'}"
        )
    return timm


def _create_timm(net: str, pretrained: bool = False) -> tuple[nn.Module, list[Tensor]]:
    """Create a timm model for 224 x 224 pixels; return it and its feature maps of a black image."""
    timm, name = _import_timm(net), net.removeprefix("timm:")
    try:
        try:
            model = timm.create_model(name, pretrained=pretrained, img_size=INPUT_SIDE).eval()
        except TypeError:  # a convolutional network takes any size
            model = timm.create_model(name, pretrained=pretrained).eval()
        if not hasattr(model, "forward_intermediates"):
            raise errors.UserError(
                f"net must be a model that gives feature maps, got {net}; choose another"
            )
        with torch.inference_mode():
            black = torch.zeros(1, 3, INPUT_SIDE, INPUT_SIDE)
            return model, model.forward_intermediates(black, **MAP_OPTIONS)
    except (AssertionError, RuntimeError, ValueError) as error:
        if pretrained:  # the download's: the model itself was tried before
            raise
        side = getattr(timm.get_pretrained_cfg(name), "input_size", ("other sizes",))[-1]
        raise errors.UserError(
            f"net must take {INPUT_SIDE} x {INPUT_SIDE} pixels, got {net}, which is made for "
            f"{side} ({error}); choose another, such as a convolutional network"
        ) from error


def _timm_imagenet(net: str) -> Weights:
    """Return timm's own weights of a model, downloaded once; sha256 of the state dict's values."""
    _create_timm(net)
    try:
        state = _create_timm(net, pretrained=True)[0].state_dict()
    except (OSError, RuntimeError, ValueError, HTTPException) as error:
        raise errors.UserError(
            f"could not download timm's weights of {net} ({type(error).__name__}); download "
            f"https://huggingface.co/timm/{net.removeprefix('timm:')} on another machine and pass "
            "--weights FILE (model.safetensors)"
        ) from error
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return Weights("imagenet", state, digest.hexdigest())


# ---------------------------------------------------------------- features


def normalise_pixels(crops: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise uint8 pixels (n, 3, h, w) as the network expects, padding included."""
    return crops.float().div_(255.0).sub_(mean).div_(std)


def pixel_elements(crops: Tensor) -> Tensor:
    """Return the raw pixels of crops (n, 3, h, w), uint8, as elements (n, 3, h * w)."""
    statistics = torch.tensor([PIXEL_MEAN, PIXEL_STD])[:, :, None, None]
    mean, std = devices.to_device(statistics, crops.device)
    return normalise_pixels(crops, mean, std).flatten(2)


@contextmanager
def _kernel_switches(tf32: bool) -> Iterator[None]:
    """Set torch's switches for CUDA: no kernel chosen by timing, the same ones in every run."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    benchmark, deterministic = cudnn.benchmark, cudnn.deterministic
    precisions = cudnn.conv.fp32_precision, matmul.fp32_precision
    cudnn.benchmark, cudnn.deterministic = False, True
    cudnn.allow_tf32 = matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = benchmark, deterministic
        # torch has two interfaces to a precision and wants them to agree: first the older one.
        cudnn.allow_tf32, matmul.allow_tf32 = (value == "tf32" for value in precisions)
        cudnn.conv.fp32_precision, matmul.fp32_precision = precisions


class FeatureExtractor:
    """Runs a backbone over full batches on a device.

    On a CPU the process keeps freed memory for the next batch, see `devices`.

    Parameters
    ----------
    backbone : Backbone
    device : torch.device
    precision : "fp32", "tf32" (CUDA only; fp32 on a CPU) or "bf16", of the backbone alone
    compiled : whether to run the backbone through torch.compile, with frozen weights
    """

    def __init__(
        self,
        backbone: Backbone,
        device: torch.device,
        precision: str = "fp32",
        compiled: bool = False,
    ) -> None:
        self.device, self.precision = device, precision
        if device.type == "cpu":
            devices.keep_freed_memory()
        if compiled or (device.type, precision) != ("cuda", "bf16"):  # there it would be slower
            backbone.fold_batch_norms()
        self.backbone = backbone.to(device)
        self.network = None if compiled else self.backbone  # compiled at first use
        self.in_parts = devices.Halving()

    @torch.inference_mode()
    def extract(self, crops: Tensor) -> dict[int, Tensor]:
        """Return level -> (n, channels, elements), float32, of uint8 crops (n, 3, 224, 224).

        If the GPU runs out of memory the batch is halved, see `devices.Halving`.

        Raises
        ------
        UserError
            If the GPU's memory is too small for one crop, or the network cannot be compiled.
        """
        parts = self.in_parts(self._forward, crops)
        if len(parts) == 1:
            return parts[0]
        return {level: torch.cat([part[level] for part in parts]) for level in parts[0]}

    def _forward(self, crops: Tensor) -> dict[int, Tensor]:
        """Run the network once."""
        pixels = normalise_pixels(crops, self.backbone.mean, self.backbone.std)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        enabled = self.precision == "bf16"
        with (
            _kernel_switches(self.precision == "tf32"),
            torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled),
        ):
            try:
                if self.network is None:
                    self.network = torch.compile(self.backbone, options={"freezing": True})
                elements = self.network(pixels)
            except (torch._dynamo.exc.BackendCompilerFailed, OSError) as error:
                reason = " ".join(str(error).splitlines()[:2]).strip()
                raise errors.UserError(
                    f"--compile could not compile the network: {reason}; install a compiler (g++), "
                    "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written, or leave it out"
                ) from error
        return {level: values.float().contiguous() for level, values in elements.items()}
