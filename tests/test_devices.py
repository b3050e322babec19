"""Choice of the device, and freed memory: kept for the next batch, large blocks given back."""

import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from sinbad import backbones, devices, errors

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
ROOT = Path(__file__).resolve().parents[1]
PREAMBLE = """
    import re, resource, sys
    import numpy as np
    from pathlib import Path
    from sinbad import devices

    def held():  # MB
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\\s+([0-9]+)", status)[1]) / 1024

    def faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    if sys.argv[1] == "keep":
        devices.keep_freed_memory()
"""


def output_of(code: str, what: str = "leave") -> float:
    """Run some code in a process of its own, with or without `devices.keep_freed_memory`."""
    code = textwrap.dedent(PREAMBLE) + textwrap.dedent(code)
    words = [sys.executable, "-c", code, what]
    result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return float(result.stdout)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for present, names in ((0, ["cpu", "auto"]), (2, ["cpu", "auto", "cuda", "cuda:1"])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda n=present: n > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=present: n)
        chosen = [str(devices.choose_device(name)) for name in names]
        assert chosen == ["cpu", "cuda" if present else "cpu", "cuda", "cuda:1"][: len(names)]
        absent = ["cuda:2", "cuda:9999", *(() if present else ("cuda", "cuda:0"))]
        for name in (*absent, "gpu", "cuda:", "cuda:x", "cuda:10000", "cpu:0"):
            with pytest.raises(
                errors.UserError, match=rf"\({present} CUDA devices\), got {name}; "
            ):
                devices.choose_device(name)


@glibc
def test_what_is_freed_is_kept_for_the_next_batch() -> None:
    code = """
        def batch():
            activations = [np.ones(3 << 20) for _ in range(5)]  # 24 MB each
        batch()
        before = faults()
        for _ in range(5):
            batch()
        print(faults() - before)
    """
    assert output_of(code, "keep") < 0.1 * output_of(code)


@glibc
def test_large_blocks_go_back_at_once() -> None:
    code = """
        before = held()
        for _ in range(3):
            large, small = np.ones(8 << 20), np.ones(1000)  # 64 MB
            del large
        print(held() - before)
    """
    assert output_of(code, "keep") < 10


@glibc
def test_no_more_is_kept_at_the_end_of_the_heap_than_said() -> None:
    code = """
        before = held()
        [np.ones(1 << 20) for _ in range(100)]  # 8 MB each
        print(held() - before)
    """
    assert output_of(code, "keep") < devices.KEPT_BYTES / 1e6 + 20


@glibc
def test_repetitions_of_the_raw_pixels_pin_no_memory() -> None:
    code = """
        import torch
        from sinbad import crops, scoring, settings
        repetitions = tuple(scoring.Repetition(224, 0, rep) for rep in range(20))
        position = scoring.CropPosition(crops.CropGrid(224, 0.99, 4), 0, (0, 0), repetitions)
        batches = iter([{224: torch.rand(32, 3, 224**2)}])
        before = held()
        models = scoring.fit_models(batches, 32, position, settings.Settings(), devices.Halving())
        print(held() - before)
    """
    assert output_of(code, "keep") < 150


@glibc
def test_holes_between_small_blocks_go_back() -> None:
    code = """
        small = [np.ones(100_000 if i % 100 == 99 else 1_000) for i in range(40_000)]
        del small[::2]
        before = held()
        devices.give_freed_memory_back()
        print(before - held())
    """
    assert output_of(code) > 50


@pytest.mark.parametrize(("device", "expected"), [("cpu", 1), ("meta", 0)])
def test_a_network_on_a_cpu_keeps_freed_memory(
    device: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    monkeypatch.setattr(devices, "keep_freed_memory", lambda: calls.append(None))
    weights = backbones.load_weights("resnet18", "random")
    backbone = backbones.build_backbone("resnet18", weights, (7,))
    backbones.FeatureExtractor(backbone, torch.device(device))
    assert len(calls) == expected


def test_another_c_library_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: object())
    devices.keep_freed_memory()
    devices.give_freed_memory_back()
