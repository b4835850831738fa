"""The benchmark sets at toy size: each is made, says what it is, and holds what it says."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from recon_nb.datasets import load_stack
from recon_nb.files import read_volume
from recon_nb.so3 import euler_to_matrix, rotation_distance

root = Path(__file__).resolve().parent.parent
SETS = {  # set to options and number of states
    "s1": ([], 3),
    "s1_50s": ([], 1),
    "s2_uniform": ([], 50),
    "s2_cooperative": ([], 50),
    "s2_noncontiguous": ([], 50),
    "s2_null": ([], 1),
    "s2_small": (["--range", "0.4"], 50),
    "occupancy": (["--share", "0.3", "--mass-share", "0.1"], 2),
}


def run_make_data(*options, data=None):
    """Run the script; return the finished process."""
    environment = {name: value for name, value in os.environ.items() if name != "RECON_NB_DATA"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)} | ({} if data is None else {"RECON_NB_DATA": str(data)})
    return subprocess.run([sys.executable, root / "benchmarks/make_data.py", *map(str, options)], capture_output=True, text=True, env=environment)


def make_set(data, out, name, *options, n=50, box=32):
    """Make a toy set; return its truth, facts and stack."""
    done = run_make_data("--set", name, "--n", n, "--box", box, "-o", out, *options, data=data)
    assert done.returncode == 0, done.stderr
    return pd.read_csv(out / "truth.csv"), json.loads((out / "simulation.json").read_text()), load_stack(out / "particles.star")


def test_help_names_every_set():
    done = run_make_data("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in SETS)


@pytest.mark.parametrize("options, message", [
    (["--set", "s1", "--share", "0.2"], "--share is for --set occupancy"),
    (["--set", "s2_null", "--range", "0.2"], "--range is for --set s2_small"),
    (["--set", "s1", "--contrast", "-1"], "0 or more"),
    (["--set", "s1"], "RECON_NB_DATA"),
])
def test_wrong_options_are_refused(tmp_path, options, message):
    done = run_make_data(*options, "-o", tmp_path / "a")
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_every_set(data_dir, tmp_path, name):
    options, n_states = SETS[name]
    truth, facts, stack = make_set(data_dir, tmp_path / name, name, *options)
    assert (stack.n_images, stack.box, len(truth), facts["set"]) == (50, 32, 50, name)
    paths = sorted((tmp_path / name / "volumes").glob("*.mrc"))
    assert [path.stem for path in paths] == facts["states"]  # sorted names are in the order of the labels
    assert len(paths) == n_states
    assert np.isfinite(stack.read_images(torch.arange(50)).numpy()).all()


@pytest.mark.slow
def test_errors_of_poses_and_contrast(data_dir, tmp_path):
    """The star file is wrong by what was asked for, truth and images are those of the same set without errors."""
    truth, facts, stack = make_set(data_dir, tmp_path / "wrong", "s2_null", "--rot-error", 2, "--contrast", 0.2, n=600, box=16)
    right, _, right_stack = make_set(data_dir, tmp_path / "right", "s2_null", n=600, box=16)
    turned = make_set(data_dir, tmp_path / "turned", "s2_null", "--rot-error", 2, n=600, box=16)[2]
    assert torch.equal(turned.read_images(torch.arange(600)), right_stack.read_images(torch.arange(600)))
    assert torch.equal(turned.poses.rot, stack.poses.rot)
    angles = ["euler_rot", "euler_tilt", "euler_psi"]
    assert np.allclose(truth[angles], right[angles])
    true_rot = euler_to_matrix(*torch.tensor(truth[angles].to_numpy()).T)
    error = rotation_distance(stack.poses.rot.double(), true_rot)
    assert float(error.square().mean().sqrt()) == pytest.approx(2.0, rel=0.1)
    assert (facts["rot_error"], facts["contrast_sd"]) == (2.0, 0.2)
    assert truth.contrast.min() >= 0.2
    assert (truth.contrast.mean(), truth.contrast.std()) == (pytest.approx(1, abs=0.03), pytest.approx(0.2, rel=0.1))
    assert (right.contrast == 1).all()


@pytest.mark.slow
def test_wide_contrast_is_cut_off(data_dir, tmp_path):
    truth, _, _ = make_set(data_dir, tmp_path / "a", "s2_null", "--contrast", 1, n=400, box=16)
    assert truth.contrast.min() >= 0.2
    assert (truth.contrast < 0.3).any() and (truth.contrast == 0.2).mean() < 0.01  # drawn again, not clamped


@pytest.mark.slow
@pytest.mark.parametrize("mass_share, share", [(0.02, 0.5), (0.3, 0.2)])
def test_occupancy_lacks_what_it_says(data_dir, tmp_path, mass_share, share):
    truth, facts, _ = make_set(data_dir, tmp_path / "a", "occupancy", "--share", share, "--mass-share", mass_share)
    whole, without = (read_volume(tmp_path / f"a/volumes/{name}.mrc").data.double().sum() for name in ("whole", "without"))
    assert facts["mass_share"] == pytest.approx(mass_share, abs=1e-3)
    assert float(1 - without / whole) == pytest.approx(mass_share, abs=2e-3)
    assert (truth.label == 1).mean() == facts["share"] == share


@pytest.mark.slow
def test_small_motion_is_part_of_the_large_one(data_dir, tmp_path):
    """Over the whole range the small motion is S2; over less, states differ less; a part of the Fab moves less than all of it."""
    read = lambda name, state: read_volume(tmp_path / name / f"volumes/igg_{state:02d}.mrc").data
    difference = lambda name: float((read(name, 49) - read(name, 0)).norm() / read(name, 0).norm())
    make_set(data_dir, tmp_path / "s2", "s2_uniform", box=24)
    full, facts, _ = make_set(data_dir, tmp_path / "full", "s2_small", "--range", 1.47, box=24)
    for state in (0, 20, 49):
        torch.testing.assert_close(read("full", state), read("s2", state), rtol=0, atol=1e-4 * float(read("s2", 0).max()))
    assert np.allclose(full.coordinate, 0.03 * full.label, atol=1e-6)
    assert facts["mass_share"] == pytest.approx(0.326, abs=0.001)
    make_set(data_dir, tmp_path / "less", "s2_small", "--range", 0.2, box=24)
    _, facts, _ = make_set(data_dir, tmp_path / "part", "s2_small", "--range", 0.2, "--mass-share", 0.1, box=24)
    assert facts["mass_share"] == pytest.approx(0.1, abs=1e-3)
    assert difference("part") < difference("less") < difference("full")


@pytest.mark.slow
def test_impossible_shares_are_refused(data_dir, tmp_path):
    done = run_make_data("--set", "s2_small", "--mass-share", 0.5, "-o", tmp_path / "a", data=data_dir)
    assert done.returncode != 0
    assert "0.326" in done.stderr


@pytest.mark.slow
def test_tilt_inputs_are_read_as_they_should(data_dir, tmp_path):
    environment = {**os.environ, "RECON_NB_DATA": str(data_dir), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "MPLBACKEND": "agg"}
    command = [sys.executable, root / "benchmarks/tilt_inputs.py", "--quick", "--parts", "warp", "warptools", "relion5", "-o", tmp_path / "inputs.csv"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "inputs.csv", keep_default_na=False)
    values = dict(zip(table.input + ": " + table.quantity, table.value))
    for quantity, required in zip(table.input + ": " + table.quantity, table.required):
        if required.isdigit() or required == "True":
            assert values[quantity] == required, quantity
    for shell, required in enumerate((0.95, 0.91, 0.89, 0.81, 0.68, 0.53), 1):
        assert float(values[f"warp: even/odd FSC, shell {shell}, dose off"]) > required
    assert float(values["warptools: correlation with RELION's map, mirrored along z"]) > 0.9 > 0.7 > float(values["warptools: correlation with RELION's map, as it is"])
    assert values["warptools: frame of rank 1: axes zyx, z mirrored"] == values["warptools: correlation with RELION's map, mirrored along z"]
    assert float(values["relion5: largest error of 200 poses multiplied out by hand"]) < 1e-9
    assert (tmp_path / "inputs.png").stat().st_size > 10000


def run_benchmark(name, *options, data=None):
    """Run a benchmark at toy size; return its table."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "MPLBACKEND": "agg"} | ({} if data is None else {"RECON_NB_DATA": str(data)})
    out = Path(options[options.index("-o") + 1])
    done = subprocess.run([sys.executable, root / "benchmarks" / name, *map(str, options)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return pd.read_csv(out)


@pytest.mark.slow
def test_dose_mask_saves_what_it_should(tmp_path):
    table = run_benchmark("bench_dose_mask.py", "--quick", "-o", tmp_path / "mask.csv").set_index("masked")
    assert table.fewer[True] >= 2.5 and table.fewer[False] == 1
    assert (table.difference < 1e-5).all()
    assert table.evaluations[True] < table.of_whole_disc[True] < 2 * table.evaluations[True]


@pytest.mark.slow
def test_tilt_classes_are_measured_once(data_dir, tmp_path):
    options = ("tilt_classes.py", "--quick", "--settings", "tomodrgn", "et", "-o", tmp_path / "classes.csv")
    table = run_benchmark(*options, data=data_dir)
    assert list(zip(table.setting, table.input)) == [("tomodrgn", "images"), ("tomodrgn", "noise"), ("et", "images"), ("et", "noise")]
    pd.testing.assert_frame_equal(table, run_benchmark(*options, data=data_dir))


@pytest.fixture(scope="module")
def toy_s3(data_dir, tmp_path_factory):
    """Return the folder of an S3 of 40 particles."""
    folder = tmp_path_factory.mktemp("s3") / "s3"
    done = run_make_data("--set", "s3", "--n", 40, "-o", folder, data=data_dir)
    assert done.returncode == 0, done.stderr
    return folder


def run_quick(name, *options):
    """Run a benchmark with --quick; return what it wrote to standard output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, root / "benchmarks" / name, "--quick", *map(str, options)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_s3_is_measured(toy_s3, tmp_path):
    run_quick("bench_s3.py", "--data", toy_s3, "--settings", "et", "-o", tmp_path)
    table = pd.read_csv(tmp_path / "s3.csv", keep_default_na=False, na_values=[""]).set_index(["setting", "start", "tilts"])
    fits = table.loc["et"]
    assert set(fits.index) == {("closed form", 41), ("subspace", 41), ("nothing", 41), ("closed form", 1), ("nothing", 1)}
    assert fits.accuracy.between(0.25, 1).all() and (fits.cpu_s > 0).all()
    assert table.loc["told"].differences_area_mean.item() > 0.5 > fits.differences_area_mean.min()
    assert "differences" not in set(pd.read_csv(tmp_path / "s3_fsc.csv").query("setting == 'one map for all'")["map"])
    assert (tmp_path / "s3.png").stat().st_size > 10_000


@pytest.mark.slow
def test_tilt_ablations_are_measured_one_by_one(toy_s3, tmp_path):
    run_quick("tilt_ablations.py", "--data", toy_s3, "--ablation", "poses", "-o", tmp_path)
    first = pd.read_csv(tmp_path / "tilt_ablations.csv", dtype={"value": str})
    assert sorted(zip(first.method, first.value)) == [("network", "0"), ("network", "1"), ("subspace", "0"), ("subspace", "1")]
    assert first.difference_area[first.method == "subspace"].min() > 0.05
    run_quick("tilt_ablations.py", "--data", toy_s3, "--ablation", "dose", "-o", tmp_path)
    both = pd.read_csv(tmp_path / "tilt_ablations.csv", dtype={"value": str})
    pd.testing.assert_frame_equal(both[both.ablation == "poses"].reset_index(drop=True), first)
    assert set(both.ablation) == {"poses", "dose"}


@pytest.mark.slow
def test_landscape_of_known_occupancy_at_toy_size(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, root / "benchmarks/assembly.py", tmp_path / "data", "--quick", "--conditions", "clean", "-o", tmp_path / "found.csv"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = pd.read_csv(tmp_path / "found.csv").iloc[0]
    assert found.auroc_calibrated > 0.95 and found.auroc_calibrated_states > 0.95
    assert found.brier_calibrated < min(found.brier_raw, found.brier_published) / 2
    assert found.minor_recall > 0.5 and found.minor_purity > 0.5 and found.minor_particles == 24
    assert found.ratio_minor < 0.4 and found.ratio_neighbor > 0.8  # truth .01 and .99
    assert (tmp_path / "assembly_clean_0.png").exists()
