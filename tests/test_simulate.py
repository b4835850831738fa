"""Densities and simulated stacks against real models, maps and files."""
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from recon_nb.core import Volume
from recon_nb.files import read_volume
from recon_nb.simulate import make_hinge_phantom, make_phantom, read_atoms, render_images, simulate_bandlimited_density, simulate_density, simulate_stack

root = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("chain", "abmz")
def test_density_equals_molmap(data_dir, chain):
    folder = data_dir / "occupancy"
    expected = read_volume(folder / f"example_data/01_PDB_mrc/00_expected/prots1_chain{chain}.mrc")
    atoms = read_atoms(folder / "prots1.pdb", keep_hydrogen=True, keep_water=True)  # molmap takes all that there is
    atoms = atoms[atoms.chain == chain.upper()]
    middle = expected.box // 2 * expected.pixel_size  # its voxel (0, 0, 0) is at the origin of the model
    found = simulate_density(atoms, expected.box, expected.pixel_size, resolution=10.0, center=[middle] * 3)
    assert (found.data - expected.data).abs().max() < 1e-5
    assert found.origin == pytest.approx((0, 0, 0), abs=1e-4)
    assert torch.equal(found.data > 0.01, expected.data > 0.01)


def test_all_chains_are_quick(data_dir):
    started, n_chains = time.process_time(), 0
    for path in sorted((data_dir / "occupancy").glob("*.pdb")):
        atoms = read_atoms(path)
        for chain in np.unique(atoms.chain):
            part = atoms[atoms.chain == chain]
            density = simulate_density(part, 64, 6.55, resolution=10.0, center=[209.6] * 3)
            total = float(density.data.sum()) * 6.55**3
            assert total == pytest.approx(part.weight.sum(), rel=0.25)  # molmap's coarse read-out; all of the chain is there
            n_chains += 1
    print(f"{n_chains} chains: {time.process_time() - started:.1f} CPU s")
    assert n_chains == 136


def test_reads_compressed_cif(data_dir):
    atoms = read_atoms(data_dir / "simulated/models/7p6z.cif.gz")
    assert len(atoms) == 142_534
    assert atoms.element.min() > 1
    assert atoms.occupancy.min() >= 0 and atoms.occupancy.max() == 1


def test_bandlimited_density_equals_independent_map(data_dir):
    """Another program made the map of the 70S, by splatting onto a fine grid."""
    expected = read_volume(data_dir / "simulated/compositional_64/70S.mrc")
    found = simulate_bandlimited_density(read_atoms(data_dir / "simulated/models/7p6z.cif.gz"), 64, 6.0)
    assert np.corrcoef(found.data.flatten(), expected.data.flatten())[0, 1] > 0.995
    assert float(found.data.sum()) == pytest.approx(float(expected.data.sum()), rel=0.01)


def test_rendering_is_independent_of_batches_and_order():
    volumes = make_phantom("ribosome", 24)
    simulated = simulate_stack(volumes, 40, snr=float("inf"), seed=1)
    rows = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:17]
    torch.testing.assert_close(simulated.render_clean(rows), simulated.stack.images[rows])
    seen = torch.empty_like(simulated.stack.images)
    for part, images in render_images(volumes, simulated.labels, simulated.poses, ctf=simulated.stack.ctf, batch_size=3):
        seen[part] = images
    torch.testing.assert_close(seen, simulated.stack.images)


@pytest.mark.parametrize("box", [24, 25])
def test_volumes_are_resampled_to_the_box(box):
    fine = make_hinge_phantom(48, n_states=2)
    simulated = simulate_stack(fine, 6, box=box, snr=float("inf"), seed=0)
    assert simulated.stack.images.shape == (6, box, box)
    assert simulated.stack.pixel_size == pytest.approx(256 / box)
    assert [v.box for v in simulated.volumes] == [box, box]


def test_snr_counts_every_nuisance():
    """Contrast, shift and resampling are part of the signal whose variance the SNR is about."""
    volumes = [Volume(2 * v.data, v.pixel_size) for v in make_phantom("ribosome", 24)]
    simulated = simulate_stack(volumes, 300, weights=[1, 0, 3], snr=0.05, contrast_sigma=0.3, shift_sigma=10.0, apply_ctf=False, seed=2)
    clean = simulated.render_clean()
    noise = simulated.stack.images - clean
    assert float(clean.var(dim=(1, 2), correction=0).mean() / noise.var()) == pytest.approx(0.05, rel=0.01)
    assert simulated.stack.ctf is None
    assert set(simulated.truth.label) == {0, 2}
    assert simulated.truth.contrast.std() == pytest.approx(0.3, rel=0.2)


def test_benchmark_set_is_reproducible(data_dir, tmp_path):
    command = [sys.executable, "benchmarks/make_data.py", "--set", "s1", "--box", "32", "--n", "100"]
    environment = {**os.environ, "RECON_NB_DATA": str(data_dir), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    for name in "ab":
        subprocess.run([*command, "-o", tmp_path / name], cwd=root, env=environment, check=True)
    for file in ("particles.mrcs", "particles.star", "truth.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    labels = np.loadtxt(tmp_path / "a/truth.csv", delimiter=",", skiprows=1, usecols=1)
    assert np.bincount(labels.astype(int)).tolist() == [20, 30, 50]
