"""Rotation and shift signs, pixel size and CTF against images that other programs made."""

import importlib.util
from pathlib import Path

import pytest
import torch


def load_benchmark(name: str):
    """Import a script of benchmarks/, whose numbers are asserted here."""
    path = Path(__file__).parent.parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def relion():
    return load_benchmark("relion_conventions")


@pytest.fixture(scope="module")
def warp():
    return load_benchmark("warp_fsc")


@pytest.mark.parametrize("name", ["rln_proj_64", "rln_proj_65", "rln_proj_64_shifted"])
def test_reprojections_equal_relions(relion, data_dir, name):
    correlation = relion.compare_reprojections(data_dir / "images", name)
    assert correlation["as read"].min() > 0.999
    assert correlation["transposed rotation"].max() < 0.9
    if name.endswith("shifted"):  # the others have no shifts
        for wrong in ("opposite shift", "no shift", "x and y of the shift swapped"):
            assert correlation[wrong].max() < 0.5, wrong


def test_origin_of_an_odd_relion_box_is_one_pixel_on(relion, data_dir, monkeypatch):
    """RELION supports even boxes; its odd projections are centred on voxel D // 2 + 1, which a user of odd boxes must know."""
    monkeypatch.setitem(relion.offsets, "rln_proj_65", ((0.0, 0.0, 0.0), (0.0, 0.0)))
    assert relion.compare_reprojections(data_dir / "images", "rln_proj_65")["as read"].max() < 0.95


@pytest.mark.parametrize("stack", ["relion_proj_batch", "relion_proj_batch_pfac3", "hand"])
def test_backprojected_halves_agree_under_one_convention_only(relion, data_dir, stack):
    folder = data_dir / "images"
    if stack == "hand":  # poses from cryoDRGN's pickle
        fsc = relion.compare_backprojections(folder / "hand.mrcs", pixel_size=1.0, poses=folder / "hand_rot_trans.pkl")
    else:
        beside = folder / "relion_proj_batch.star"
        fsc = relion.compare_backprojections(folder / f"{stack}.mrcs", pixel_size=3.54, poses=beside, ctf=beside)
    mean = {label: float(curve[1:13].mean()) for label, curve in fsc.items()}
    best = mean.pop("as read")
    assert best > 0.6
    assert best > max(mean.values()) + 0.1, mean


def test_real_tilt_images_agree(warp, data_dir):
    fsc = warp.measure_fsc(data_dir)
    assert (fsc[1:7] >= torch.tensor(warp.required)).all(), fsc[1:7].tolist()


def test_wrong_pixel_size_and_missing_ctf_show(warp, data_dir):
    right = warp.measure_fsc(data_dir)[4:9].mean()
    assert warp.measure_fsc(data_dir, 1.96)[4:9].mean() < right - 0.05
    assert warp.measure_fsc(data_dir, with_ctf=False)[4:9].mean() < right - 0.05
