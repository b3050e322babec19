"""Networks: each level's stage against the model's own layers, weights of all kinds, precision."""

import errno
import hashlib
import shutil
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from sinbad import backbones, errors

CPU = torch.device("cpu")
LEVELS = (56, 28, 14, 7)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def trained(net: str) -> nn.Module:
    """Return a network of torchvision whose batch norms are far from doing nothing."""
    torch.manual_seed(3)
    model = getattr(torchvision.models, net)(weights=None).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return model


def saved(path: Path, content: object) -> str:
    """Save weights; return the path as a flag takes it."""
    torch.save(content, path)
    return str(path)


def some_crops(n: int, side: int = 224) -> Tensor:
    """Return seeded pixels (n, 3, side, side), uint8."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=generator)


def slow_stages(model: nn.Module, crops: Tensor, n_stages: int) -> list[Tensor]:
    """Return the feature maps of a ResNet's first stages, layer by layer."""
    pixels = crops.float() / 255.0
    for channel in range(3):
        pixels[:, channel] = (pixels[:, channel] - MEAN[channel]) / STD[channel]
    with torch.no_grad():
        maps = [model.maxpool(model.relu(model.bn1(model.conv1(pixels))))]
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4)[:n_stages]:
            maps.append(stage(maps[-1]))
    return maps[1:]


# ---------------------------------------------------------------- levels


@pytest.mark.parametrize(("net", "levels"), [("resnet18", LEVELS), ("resnet50", LEVELS[:1])])
def test_every_level_is_its_stage_of_the_network(net: str, levels: tuple[int, ...]) -> None:
    model, crops = trained(net), some_crops(2)
    backbone = backbones.build_backbone(
        net, backbones.Weights("w.pth", model.state_dict(), "abc"), levels
    )
    elements = backbones.FeatureExtractor(backbone, CPU).extract(crops)
    assert sorted(elements) == sorted(levels)
    for level, features in zip(levels, slow_stages(model, crops, len(levels)), strict=True):
        assert elements[level].shape == (2, features.shape[1], level * level)
        assert elements[level].dtype == torch.float32
        assert elements[level].is_contiguous()
        expected = features.flatten(2)
        scale = float(expected.std())
        np.testing.assert_allclose(elements[level] / scale, expected / scale, atol=2e-4)


def test_stages_after_the_deepest_level_are_cut_off(tmp_path: Path) -> None:
    model = trained("resnet18")
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(("layer4", "fc"))}
    del state["bn1.num_batches_tracked"]  # not used
    weights = backbones.load_weights("resnet18", saved(tmp_path / "w.pth", state))
    backbone = backbones.build_backbone("resnet18", weights, (14,))
    assert len(backbone.stages) == 3
    elements = backbone(torch.zeros(1, 3, 224, 224))
    assert {level: values.shape for level, values in elements.items()} == {14: (1, 256, 196)}
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not any(module.training for module in backbone.modules())
    with pytest.raises(errors.UserError, match=r"got w\.pth, which lacks layer4\.0\.conv1\.weight"):
        backbones.build_backbone("resnet18", weights, (7, 14))


def test_random_weights_are_the_same_in_every_run() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    random = backbones.load_weights("resnet18", "random")
    with pytest.raises(errors.UserError, match=r"resnet18 \(7, 14, 28, 56\), or 224 .* got 10"):
        backbones.build_backbone("resnet18", random, (7, 10))
    first = backbones.build_backbone("resnet18", random, (56,))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    pixels = some_crops(1)
    elements = backbones.FeatureExtractor(first, CPU).extract(pixels)[56]
    np.testing.assert_allclose(elements, slow_stages(model, pixels, 1)[0].flatten(2), atol=1e-4)


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("wrapper", [None, *backbones.WRAPPERS])
@pytest.mark.parametrize("prefix", ["", *backbones.PREFIXES])
def test_weights_wrapped_or_with_a_prefix(
    wrapper: str | None, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {"conv1.weight": torch.ones(2), "fc.bias": torch.zeros(1)}
    content = {f"{prefix}{name}": value for name, value in state.items()}
    path = saved(tmp_path / "w.pth", content if wrapper is None else {wrapper: content})
    weights = backbones.load_weights("resnet18", path)
    assert weights.name == "w.pth"
    assert weights.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert weights.state is not None
    assert weights.state.keys() == state.keys()
    assert capsys.readouterr().err.count("note: ") == (wrapper is not None) + bool(prefix)


def test_a_prefix_of_some_names_stays(tmp_path: Path) -> None:
    state = {"model.a": torch.ones(2), "b": torch.ones(2)}
    weights = backbones.load_weights("resnet18", saved(tmp_path / "w.pth", state))
    assert list(weights.state or {}) == ["model.a", "b"]


def test_weights_in_safetensors(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"a": torch.arange(3.0)}, tmp_path / "w.safetensors")
    weights = backbones.load_weights("resnet18", str(tmp_path / "w.safetensors"))
    assert (weights.state or {})["a"].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("content", [[torch.ones(1)], {}, {"a": 1}, {"a": torch.ones(1), "b": "c"}])
def test_a_file_that_holds_no_state_dict(content: object, tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", content)
    with pytest.raises(errors.UserError, match="must hold a state_dict of tensors"):
        backbones.load_weights("resnet18", path)


def test_a_missing_and_a_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(errors.UserError, match=r"imagenet, random or a file, got .*No such file"):
        backbones.load_weights("resnet18", str(tmp_path / "none.pth"))
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(b"text")
        with pytest.raises(errors.UserError, match=r"written by torch\.save or safetensors"):
            backbones.load_weights("resnet18", str(tmp_path / name))


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EMFILE, errno.ENOMEM])
def test_an_error_of_the_system_is_no_damaged_file(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, "of the system")

    path = saved(tmp_path / "w.pth", {"a": torch.ones(1)})
    for module, name in ((Path, "read_bytes"), (torch, "load")):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="system") as caught:
            patch.setattr(module, name, fail)
            backbones.load_weights("resnet18", path)
        assert caught.value.errno == code


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("layer9.weight", torch.ones(1), "also holds"),
        ("conv1.weight", torch.ones(64, 3, 7, 8), r"has no .* of shape \[64, 3, 7, 7\] in"),
        ("bn1.weight", torch.full((64,), torch.nan), "has no finite"),
        ("bn1.bias", torch.full((64,), torch.inf), "has no finite"),
        ("bn1.bias", torch.ones(64, dtype=torch.int32), "has no finite floating-point"),
        ("bn1.bias", torch.ones(64, device="meta"), "has no"),
        ("bn1.bias", torch.ones(64).to_sparse(), "has no"),
    ],
)
def test_weights_of_another_net(name: str, value: Tensor, problem: str) -> None:
    state = torchvision.models.resnet18(weights=None).state_dict()
    weights = backbones.Weights("w.pth", {**state, name: value}, "abc")
    with pytest.raises(errors.UserError, match=rf"got w\.pth, which {problem}.* {name}; choose"):
        backbones.build_backbone("resnet18", weights, (56,))


def test_imagenet_weights_are_those_of_torchs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    downloads = []

    def fetch(url: str, *, check_hash: bool, **_: object) -> None:
        downloads.append((url, check_hash))
        print("torch prints on stdout")
        path.parent.mkdir()
        saved(path, {"a": torch.ones(1)})

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    for _ in range(2):  # the second time from the cache
        weights = backbones.load_weights("resnet18", "imagenet")
        assert weights.name == "imagenet"
        assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert downloads == [(f"https://download.pytorch.org/models/{path.name}", True)]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("downloading") == 1


@pytest.mark.parametrize(
    ("net", "message"),
    [
        ("resnet18", r"could not download https://.*: no network; .*put it at .*resnet18-.*pth"),
        (
            "timm:resnet18",
            r"could not download timm's .* \(URLError\).*huggingface\.co/timm/resnet18",
        ),
    ],
)
def test_imagenet_weights_without_network(
    net: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    create = timm.create_model

    def fetch(*arguments: object, pretrained: bool = True, **options: object) -> nn.Module:
        if pretrained:
            raise URLError("no network")
        return create(*arguments, **options)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    monkeypatch.setattr(timm, "create_model", fetch)
    with pytest.raises(errors.UserError, match=message):
        backbones.load_weights(net, "imagenet")


# ---------------------------------------------------------------- timm


def test_a_model_of_timm_gives_its_stages(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(4)
    model = timm.create_model("resnet18").eval()
    weights = backbones.load_weights("timm:resnet18", saved(tmp_path / "w.pth", model.state_dict()))
    backbone = backbones.build_backbone("timm:resnet18", weights, (7, 28))
    assert backbone.mean.flatten().tolist() == pytest.approx(model.pretrained_cfg["mean"])
    assert backbone.std.flatten().tolist() == pytest.approx(model.pretrained_cfg["std"])
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        elements = backbone(pixels)
        maps = model.forward_intermediates(pixels, intermediates_only=True)
    assert sorted(elements) == [7, 28]
    for level, features in {28: maps[2], 7: maps[4]}.items():
        np.testing.assert_allclose(elements[level], features.flatten(2), atol=1e-5)
    with pytest.raises(
        errors.UserError, match=r"timm:resnet18 \(7, 14, 28, 56, 112\), or 224 .* got 8"
    ):
        backbones.build_backbone("timm:resnet18", weights, (8,))


def test_the_last_of_several_maps_with_one_side_is_used() -> None:
    timm = pytest.importorskip("timm")
    backbone = backbones.build_backbone(
        "vit_tiny_patch16_224", backbones.Weights("random", None, "random"), (14,)
    )
    pixels = torch.randn(1, 3, 224, 224)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=224).eval()
    with torch.no_grad():
        last = model.forward_intermediates(pixels, intermediates_only=True)[-1]
        np.testing.assert_allclose(backbone(pixels)[14], last.flatten(2), atol=1e-5)


def test_an_unknown_net(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    with pytest.raises(
        errors.UserError, match=r"got resnet1\d\d\d; timm\.list_models\(\) names all"
    ):
        backbones.load_weights("resnet1999", "random")
    with pytest.raises(
        errors.UserError, match=r"got efficientnet_lit; similar: .*efficientnet_lite4$"
    ):
        backbones.load_weights("efficientnet_lit", "random")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        errors.UserError, match=r"torchvision's resnet101, .* not installed, got lenet"
    ):
        backbones.load_weights("lenet", "random")
    assert backbones.load_weights("resnext50_32x4d", "random") == backbones.Weights(
        "random", None, "random"
    )


def test_weights_of_timm_and_their_sha256(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18")
    created = []

    def create(name: str, pretrained: bool, **options: object) -> nn.Module:
        created.append((name, pretrained))
        if options:
            raise TypeError("img_size")
        return model

    monkeypatch.setattr(timm, "create_model", create)
    weights = backbones.load_weights("timm:resnet18", "imagenet")
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    assert (weights.name, weights.sha256) == ("imagenet", digest.hexdigest())
    assert created == [("resnet18", False)] * 2 + [("resnet18", True)] * 2
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: nn.Identity())
    with pytest.raises(errors.UserError, match="must be a model that gives feature maps"):
        backbones.load_weights("timm:resnet18", "imagenet")


@pytest.mark.parametrize("weights", ["random", "imagenet"])
def test_a_net_of_another_size_only(weights: str) -> None:
    pytest.importorskip("timm")
    net = "crossvit_9_240"
    with pytest.raises(errors.UserError, match=f"224 x 224 pixels, got {net}.* made for 240"):
        backbones.build_backbone(net, backbones.load_weights(net, weights), (14,))


# ---------------------------------------------------------------- precision, memory


def test_bf16_rounds_and_tf32_is_fp32_on_a_cpu() -> None:
    backbone = backbones.build_backbone(
        "resnet18", backbones.load_weights("resnet18", "random"), (56,)
    )
    crops = some_crops(1)
    fp32, tf32, bf16 = (
        backbones.FeatureExtractor(backbone, CPU, precision).extract(crops)[56]
        for precision in ("fp32", "tf32", "bf16")
    )
    assert torch.equal(tf32, fp32)
    assert bf16.dtype == torch.float32
    assert 1e-4 < float((bf16 - fp32).abs().mean() / fp32.abs().mean()) < 0.05


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_network_gives_the_same_up_to_rounding() -> None:
    backbone = Conv().to(memory_format=torch.channels_last).eval()
    crops = some_crops(3, 28)
    extractor = backbones.FeatureExtractor(backbone, CPU, compiled=True)
    expected = backbones.FeatureExtractor(backbone, CPU).extract(crops)
    torch.testing.assert_close(extractor.extract(crops), expected, rtol=1e-4, atol=1e-5)
    assert extractor.network is not backbone


@pytest.mark.parametrize("cause", ["no g\\+\\+ here", "file/cache"])
def test_a_network_that_cannot_be_compiled(
    cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiler(*_: object) -> None:
        raise OSError("no g++ here")

    if "g" in cause:
        compile_with = torch.compile
        monkeypatch.setattr(torch, "compile", lambda m, **_: compile_with(m, backend=compiler))
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    extractor = backbones.FeatureExtractor(Conv(), CPU, compiled=True)
    with pytest.raises(errors.UserError, match=f"compile the network: .*{cause}.*_CACHE_DIR"):
        extractor.extract(some_crops(2, 28))


class Conv(backbones.Backbone):
    """A network of one convolution."""

    def __init__(self) -> None:
        super().__init__((14,), MEAN, STD)
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1).requires_grad_(False)

    def forward(self, pixels: Tensor) -> dict[int, Tensor]:
        """See `Backbone`."""
        return {14: self.conv(pixels).relu().flatten(2)}


def switches() -> tuple[bool, ...]:
    """Return torch's switches for CUDA kernels; reading them fails where they contradict."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32


@pytest.mark.parametrize("callers", [(True, False, False, True), (False, True, True, False)])
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_switches_of_the_gpu_are_those_of_the_network_within_its_forward_pass_alone(
    precision: str, callers: tuple[bool, ...]
) -> None:
    cudnn, matmul, within = torch.backends.cudnn, torch.backends.cuda.matmul, []
    before = switches()
    try:
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = callers
        matmul.fp32_precision = "tf32" if callers[-1] else "none"  # none: torch's default
        network = Small(9)
        network.register_forward_pre_hook(lambda *_: within.append(switches()))
        backbones.FeatureExtractor(network, CPU, precision).extract(some_crops(1, 4))
        assert within == [(False, True, precision == "tf32", precision == "tf32")]
        assert switches() == callers
        with pytest.raises(errors.UserError):
            backbones.FeatureExtractor(Small(0), CPU, precision).extract(some_crops(1, 4))
        assert switches() == callers
        assert matmul.fp32_precision == ("tf32" if callers[-1] else "none")
    finally:
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = before


class Small(backbones.Backbone):
    """A network that returns its pixels and runs out of memory above some number of crops."""

    def __init__(self, most: int) -> None:
        super().__init__((7,), MEAN, STD)
        self.most = most
        self.sizes: list[int] = []

    def forward(self, pixels: Tensor) -> dict[int, Tensor]:
        """See `Backbone`."""
        self.sizes.append(len(pixels))
        if len(pixels) > self.most:
            raise torch.cuda.OutOfMemoryError
        return {7: pixels.flatten(2)}


def test_a_batch_too_large_for_the_memory_is_halved_and_stays_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    backbone, crops = Small(3), some_crops(9, 4)
    extractor = backbones.FeatureExtractor(backbone, CPU)
    elements = extractor.extract(crops)[7]
    assert backbone.sizes == [9, 5, 3, 3, 3]
    assert torch.equal(elements, backbones.pixel_elements(crops))
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) == 2
    assert messages[1].endswith("too small for 5 crops at once, going on with 3")
    extractor.extract(crops[:4])
    assert backbone.sizes[5:] == [3, 1]
    with pytest.raises(errors.UserError, match="out of GPU memory for a single crop"):
        backbones.FeatureExtractor(Small(0), CPU).extract(crops[:2])


@pytest.mark.parametrize(
    ("device", "precision", "compiled", "folds"),
    [
        ("cpu", "fp32", False, True),
        ("cpu", "bf16", False, True),
        ("cuda", "tf32", False, True),
        ("cuda", "bf16", False, False),
        ("cuda", "bf16", True, True),
    ],
)
def test_batch_norms_are_folded_where_that_is_faster(
    device: str, precision: str, compiled: bool, folds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = backbones.build_backbone(
        "resnet18", backbones.load_weights("resnet18", "random"), LEVELS
    )
    pixels = some_crops(1) / 255.0
    expected = backbone(pixels)
    monkeypatch.setattr(backbone, "to", lambda device: backbone)
    backbones.FeatureExtractor(backbone, torch.device(device), precision, compiled)
    n_norms = sum(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    assert n_norms == (0 if folds else 20)
    for level, elements in backbone(pixels).items():
        np.testing.assert_allclose(elements, expected[level], rtol=1e-4, atol=1e-4)


def test_pixels_as_elements_against_loops() -> None:
    crops = some_crops(2, 3)
    elements = backbones.pixel_elements(crops)
    assert elements.shape == (2, 3, 9)
    for image, channel, y, x in np.ndindex(2, 3, 3, 3):
        expected = (int(crops[image, channel, y, x]) / 255 - MEAN[channel]) / STD[channel]
        assert float(elements[image, channel, 3 * y + x]) == pytest.approx(expected, abs=1e-6)
