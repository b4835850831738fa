"""Occupancy against what ChimeraX, RELION and the published scripts made; calibration against known presence."""
import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from recon_nb.assemblies import make_phantom_assembly, simulate_assembly_volumes, tabulate_presence, write_assembly, write_model
from recon_nb.calibration import calibrate_occupancies, score_presence
from recon_nb.core import InputError, NumericalError, Selection, Volume, make_generator
from recon_nb.files import read_volume
from recon_nb.occupancy import (
    OccupancyFit,
    check_model_fit,
    find_empty,
    find_limits,
    fit_occupancies,
    make_subunit_masks,
    measure_ratios,
    normalize_ratios,
    read_groups,
    read_subunits,
    simulate_subunits,
    solve_nonnegative,
)
from recon_nb.occupancyrun import measure_run
from recon_nb.runs import make_config
from recon_nb.simulate import read_atoms, simulate_stack, write_simulation
from recon_nb.subspace import run_subspace
from recon_nb.volumes import flip_hand, low_pass

root = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("occupancy_expected", root / "benchmarks/occupancy_expected.py")
expected = importlib.util.module_from_spec(spec)
spec.loader.exec_module(expected)


def test_equals_the_published_files(data_dir):
    """26 densities as ChimeraX made them, 26 masks as RELION made them, and the ratios of 20 maps."""
    folder = data_dir / "occupancy"
    table, densities, masks = expected.compare_densities(folder)
    worst = expected.compare_ratios(folder, densities, masks)
    print(f"26 maps: least correlation {table['correlation'].min():.7f}; masks identical {(table['voxels_of_mask_different'] == 0).sum()} of 26; occupancies to {worst:.1e}")
    assert len(table) == 26
    assert table["correlation"].min() >= 0.99999
    assert (table["voxels_of_mask_different"] == 0).all()
    assert worst < 5e-4


def test_all_subunits_in_all_real_maps(data_dir):
    """136 subunits x 20 maps: in 10 CPU seconds, and what biology says: the core is there, the late parts come together."""
    seconds, names, ratios, found = expected.measure_all(data_dir / "occupancy")
    print(f"{len(names)} subunits x {len(ratios)} maps: {sum(seconds.values()):.1f} CPU s")
    assert found.probability.shape == ratios.shape == (20, 136)
    assert sum(seconds.values()) < 10
    column = {name: found.probability[:, i] for i, name in enumerate(names)}
    core = ["H4", "H18", "H24", "H94", "H98", "L4", "L22", "L24"]
    assert min(column[name].min() for name in core) > 0.95
    protuberance = np.stack([column[name] for name in ("H1_5S", "H2_5S", "H3_5S", "H4_5S", "H5_5S", "H83", "H84", "L5", "L18", "L25", "L27")], 1) > 0.5
    assert (protuberance == protuberance[:, :1]).all() and 0 < protuberance[:, 0].sum() < 20
    assert max(column[name].max() for name in ("L32", "L35", "L11")) < 0.5


def place_balls(n, box, radius, seed):
    """Return densities (n, D, D, D) of soft balls that touch."""
    axis = torch.arange(box, dtype=torch.float32)
    centers = box / 2 + (torch.rand(n, 3, generator=make_generator(seed, "balls")) - 0.5) * box * 0.5
    square = (axis[None, :, None, None] - centers[:, 0, None, None, None]) ** 2 + (axis[None, None, :, None] - centers[:, 1, None, None, None]) ** 2 + (axis - centers[:, 2, None, None, None]) ** 2
    return torch.exp(-0.5 * square / radius**2)


def make_maps(densities, truth, *, noise, seed, shrink=0.0, gain=None, pixel_size=6.0):
    """Return noisy low-passed sums with a scale and a constant of their own."""
    rng = np.random.default_rng(seed)
    smooth = lambda data: low_pass(Volume(data, pixel_size), 18.0).data
    gain = np.ones(truth.shape[1]) if gain is None else gain
    part = ((1 - shrink) * truth + shrink * truth.mean(0)) * gain
    whole = smooth(densities.sum(0))
    level = noise * float(whole[whole > 0.1 * whole.max()].std())
    maps = []
    for row in part:
        hiss = smooth(torch.from_numpy(rng.normal(size=densities.shape[1:])).float())
        clean = smooth(torch.tensordot(torch.from_numpy(row).float(), densities, 1))
        maps.append(Volume(rng.uniform(0.8, 1.2) * clean + level * hiss / hiss.std() + rng.normal(), pixel_size))
    return maps


@pytest.mark.parametrize("noise, shrink", [(0.15, 0.0), (0.3, 0.3)])
def test_calibration_beats_the_ratio(noise, shrink):
    """Band-limited sums with correlated noise; some subunits always there, some never, gains from .7 to 1.4."""
    densities, rng = place_balls(24, 40, 2.6, 0), np.random.default_rng(3)
    truth = rng.random((18, 24)) < 0.5
    truth[:, :6], truth[:, 6:9] = True, False
    maps = make_maps(densities, truth, noise=noise, seed=1, shrink=shrink, gain=rng.uniform(0.7, 1.4, 24))
    ratios = measure_ratios(maps, densities, make_subunit_masks(densities, threshold=0.5))
    published = score_presence(normalize_ratios(ratios), truth)
    raw = score_presence(ratios / np.median(ratios[:, :6]), truth)
    found = calibrate_occupancies(fit_occupancies(maps, densities))
    made = score_presence(found.probability, truth)
    print(f"noise {noise}, shrunk by {shrink}: raw {raw}, published {published}, calibrated {made}")
    assert made["auroc"] > 0.97 and made["auroc"] > published["auroc"]
    assert made["brier"] < 0.6 * min(published["brier"], raw["brier"])
    assert found.probability[:, :6].mean() > 0.9 and found.probability[:, 6:9].mean() < 0.1
    assert abs(found.levels.shrinkage - shrink) < 0.2


@pytest.mark.parametrize("present", [1.0, 0.25])
def test_one_map_is_enough(present):
    densities = place_balls(16, 36, 2.6, 5)
    truth = np.arange(16)[None] < 16 * present
    found = calibrate_occupancies(fit_occupancies(make_maps(densities, truth, noise=0.1, seed=0), densities))
    assert found.probability[truth].min() > 0.8
    assert (found.probability[~truth] < 0.2).all()


def test_order_and_scale_do_not_matter():
    densities, rng = place_balls(12, 36, 2.6, 7), np.random.default_rng(0)
    truth = rng.random((8, 12)) < 0.6
    maps = make_maps(densities, truth, noise=0.1, seed=2)
    first = calibrate_occupancies(fit_occupancies(maps, densities)).probability
    turned = rng.permutation(12)
    other = calibrate_occupancies(fit_occupancies([replace(v, data=7 * v.data + 3) for v in maps[::-1]], densities[turned])).probability
    assert np.abs(other - first[::-1][:, turned]).max() < 0.02


def test_nonnegative_solution_is_the_optimum():
    """Against scipy's active-set method."""
    from scipy.optimize import nnls

    rng = np.random.default_rng(0)
    factor, target = rng.normal(size=(60, 15)) + 0.5, rng.normal(size=(4, 60)) + 1
    found = solve_nonnegative(factor.T @ factor, target @ factor, tolerance=1e-9, n_sweeps=3000)
    assert np.allclose(found, [nnls(factor, row)[0] for row in target], atol=1e-5)


def test_wrong_frame_hand_and_contrast_are_named(data_dir):
    folder = data_dir / "occupancy"
    volume = next(iter(expected.load_maps(folder).values()))
    parts = {"all": read_atoms(folder / "RNA1.pdb")}
    density = simulate_subunits(parts, volume).sum(0)
    assert check_model_fit(volume, density) > 0.25
    with pytest.raises(InputError, match="--flip-hand"):
        check_model_fit(flip_hand(volume), density)
    with pytest.raises(InputError, match="--invert"):
        check_model_fit(replace(volume, data=-volume.data), density)
    with pytest.raises(InputError, match=r"Moved by \(79, 0, 0\)"):
        check_model_fit(replace(volume, data=volume.data.roll(12, 2)), density)
    with pytest.raises(InputError, match="not in the frame of the map"):
        simulate_subunits(parts, replace(volume, origin=(600.0, 0.0, 0.0)))


def test_groups_and_several_models(data_dir, tmp_path):
    folder = data_dir / "occupancy"
    models = [folder / "prots1.pdb", folder / "prots2.pdb"]
    several = read_subunits(models)
    assert len(several) == 29 and {"prots1_A", "prots2_A"} <= set(several)
    table = tmp_path / "groups.csv"
    table.write_text("subunit,model,chain,first,last\nL34,prots2,A,,\nhalf,prots1,A,1,130\nhalf,prots2,B,,\n")
    groups = read_subunits(models, table)
    assert list(groups) == ["L34", "half"]
    assert len(groups["L34"]) == len(several["prots2_A"])
    one = several["prots1_A"]
    assert len(groups["half"]) == ((one.residue >= 1) & (one.residue <= 130)).sum() + len(several["prots2_B"])
    for text, words in [("subunit\nx\n", 'no column "chain"'), ("subunit,chain,first\nx,A,ten\n", "row 1: first"), ("subunit,chain,model\nx,A,prots3\n", "no atoms for x")]:
        table.write_text(text)
        with pytest.raises(InputError, match=words):
            read_groups(table)
            read_subunits(models, table)
    with pytest.raises(InputError, match="same file name"):
        read_subunits([models[0], models[0]])


def test_maps_that_cannot_be_measured_are_refused():
    densities = place_balls(4, 24, 2.5, 0)
    good = Volume(densities.sum(0), 6.0)
    with pytest.raises(InputError, match="boxes of"):
        fit_occupancies([good, Volume(torch.zeros(20, 20, 20), 6.0)], densities)
    with pytest.raises((InputError, NumericalError), match="contrast"):
        fit_occupancies([Volume(-good.data, 6.0)] * 2, densities)
    with pytest.raises(NumericalError, match="do not differ"):
        normalize_ratios(np.ones((3, 4)))
    blank = fit_occupancies([good, good, Volume(-good.data, 6.0)], densities)
    assert find_empty(blank, find_limits(blank)).tolist() == [False, False, True]
    with pytest.raises(NumericalError, match="Map 2 holds no density"):
        calibrate_occupancies(blank)
    assert (calibrate_occupancies(blank.take(np.arange(2))).probability > 0.8).all()
    with pytest.raises(InputError, match="nowhere exceeds"):
        make_subunit_masks(densities, threshold=9.0)
    with pytest.raises(InputError, match="Nothing to calibrate"):
        calibrate_occupancies(OccupancyFit((), np.zeros((0, 0)), np.zeros(0), np.zeros(0), np.zeros(0)))


@pytest.fixture(scope="module")
def phantom_run(tmp_path_factory):
    """A run in closed form on 2,000 particles of the phantom assembly, with its model and truth."""
    folder = tmp_path_factory.mktemp("occupancy")
    assembly = make_phantom_assembly()
    simulated = simulate_stack(simulate_assembly_volumes(assembly, 32), 2000, weights=assembly.weights, names=list(assembly.states.index), snr=0.3, seed=0)
    particles = write_simulation(folder / "images", simulated)
    changes = {"subspace.test": False, "model.rank": 8, "model.zdim": 8, "model.manifold": "linear"}
    run = run_subspace(folder / "run", make_config(str(particles), changes=changes))
    return run, write_assembly(folder / "model", assembly, box=32), assembly, simulated.truth.set_index("particle").name


def test_run_is_measured_as_it_was_made(phantom_run):
    run, model, assembly, state_of = phantom_run
    folder = measure_run(run, model=[str(model)], k=40, resolution=24.0)
    tables = {path.stem: pd.read_csv(path) for path in folder.glob("*.csv")}
    presence = tabulate_presence(assembly)
    names = list(presence.columns)
    truth = presence.loc[state_of.loc[tables["occupancy"]["particle"]]].to_numpy() == 1
    made, published = (score_presence(tables[name][names].to_numpy(), truth) for name in ("occupancy", "published"))
    print(f"probability {made}, published {published}")
    assert made["auroc"] > 0.98 and made["brier"] < min(0.03, published["brier"])
    block = tables["blocks"].set_index("subunit")["block"]
    assert block[list("ABCD")].tolist() == [0] * 4
    assert all(block[a] == block[b] for a, b in ("EF", "GH", "IJ", "KL", "MN"))
    labels = tables["labels"]
    assert len(labels) == 2000 and tables["classes"]["n_particles"].sum() == 2000
    chosen = [Selection.load(run.path / f"selections/occupancy_{c}.json") for c in tables["classes"]["class"]]
    assert sum(map(len, chosen)) == 2000 and all(s.n_total == 2000 for s in chosen)
    assert "occupancy" in (run.analysis_dir(1) / "report.html").read_text().lower()
    for name in ("clustermap", "classes", "cooccupancy", "latent"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_scripts_open_files_that_are_there(phantom_run):
    run, model, assembly, _ = phantom_run
    folder = measure_run(run, model=[str(model)], k=20, resolution=24.0, n_volumes=1)
    scripts = sorted(folder.glob("*.cxc"))
    assert len(scripts) == len(pd.read_csv(folder / "classes.csv")) + 1
    for script in scripts:
        opened = [folder / line.split('"')[1] for line in script.read_text().splitlines() if line.startswith("open ")]
        assert opened and all(path.exists() for path in opened)
        for path in opened[1:]:
            volume = read_volume(path)
            level = float(re.search(r"level (\S+)", script.read_text())[1])
            assert 0 < level < float(volume.data.max())
    assert len(list((run.path / "selections").glob("occupancy_*.json"))) == len(scripts) - 1


def test_selections_of_the_user_stay(phantom_run):
    """Only the selections of the last measurement are replaced; nothing changes where the particle file is gone."""
    run, model, assembly, _ = phantom_run
    folder = measure_run(run, model=[str(model)], k=20, resolution=24.0, n_volumes=1)
    selections = run.path / "selections"
    user = selections / "occupancy_good.json"
    Selection([3, 5], 2000, "good ones").save(user)
    (selections / "occupancy_0.star").write_text("of class 0\n")
    before = {path: path.read_bytes() for path in [*selections.iterdir(), *folder.glob("*.csv")]}
    particles = Path(run.config.data.particles)
    particles.rename(particles.with_name("away.star"))
    try:
        with pytest.raises(InputError):
            measure_run(run, model=[str(model)], k=10, resolution=24.0, n_volumes=1)
    finally:
        particles.with_name("away.star").rename(particles)
    assert all(path.read_bytes() == content for path, content in before.items())
    Selection([3], 2000, "of the user").save(selections / "occupancy_99.json")
    with pytest.raises(InputError, match="another name"):
        measure_run(run, model=[str(model)], k=10, resolution=24.0)
    (selections / "occupancy_99.json").unlink()
    measure_run(run, model=[str(model)], k=10, resolution=24.0, n_volumes=1)
    assert user.read_bytes() == before[user]
    assert not (selections / "occupancy_0.star").exists()
    assert len(list(selections.glob("occupancy_*.json"))) == len(pd.read_csv(folder / "classes.csv")) + 1
    user.unlink()


@pytest.mark.slow
def test_every_particle_is_measured(phantom_run):
    """Labels that particles have by themselves are at least as right as those of their clusters; groups and the ratio work."""
    run, model, assembly, state_of = phantom_run
    table = run.path / "groups.csv"
    table.write_text("subunit,chain\n" + "".join(f"{block},{chain}\n" for block, chains in assembly.blocks.items() for chain in chains))
    folder = measure_run(run, model=[str(model)], groups=str(table), k=40, resolution=24.0, all_particles=True)
    each = pd.read_csv(folder / "particles.csv").sort_values("particle")
    states = assembly.states.loc[state_of.loc[each["particle"]]].to_numpy() == 1
    score = score_presence(each[list(assembly.blocks)].to_numpy(), states)
    print(f"blocks in 2,000 single particles: {score}")
    assert score["auroc"] > 0.95
    ratio = measure_run(run, model=[str(model)], k=20, resolution=24.0, method="ratio")
    assert len(pd.read_csv(ratio / "classes.csv")) > 1


def test_what_cannot_be_measured_is_refused_in_words(phantom_run, tmp_path):
    run, model, assembly, _ = phantom_run
    with pytest.raises(InputError, match="not readable as PDB"):
        measure_run(run, model=[str(tmp_path / "none.pdb")])
    far = tmp_path / "far.cif"
    write_model(far, {name: replace(atoms, xyz=atoms.xyz + 900) for name, atoms in read_subunits(model).items()})
    with pytest.raises(InputError, match="not in the frame"):
        measure_run(run, model=[str(far)], k=10)
    with pytest.raises(InputError, match="--flip-hand"):
        measure_run(run, model=[str(model)], k=10, flip_hand=True)
    with pytest.raises(InputError, match="--invert"):
        measure_run(run, model=[str(model)], k=10, invert=True)
    with pytest.raises(InputError, match="method"):
        measure_run(run, model=[str(model)], k=10, method="guess")
    assert not (run.path / "occupancy").is_dir() or pd.read_csv(run.path / "occupancy/classes.csv").shape[0]  # what was there stays
