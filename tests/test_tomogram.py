"""Particles in their tomograms: a particle is its number, whatever the order of the rows, and its volume stands at its place."""
import re
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from recon_nb.cli import main
from recon_nb.core import InputError, Selection, Volume
from recon_nb.datasets import load_stack
from recon_nb.files import make_mrc_header, make_star_block, read_mrc_header, read_volume, write_star_blocks, write_volume
from recon_nb.so3 import matrix_to_euler, rotation_distance, sample_rotations
from recon_nb.tiltsimulation import Placement, TiltScheme, build_warp_source, list_dose_symmetric, simulate_tilts, write_tilts
from recon_nb.tomogram import (
    check_particles, choose_tomogram, color_particles, compute_orientations, compute_placements, find_in_polygon, find_neighbors, join_labels,
    open_tomogram, particle_columns, place_run, place_volumes, show_context, view_slice, write_context,
)

tomogram_names = ['TS_01', 'TS_2/b', 'TS_2 b', 'TS_01_extra']  # two of them make the same file name


def make_particles(n=40, seed=0):
    """Return particles of four tomograms, interleaved, with numbers that are not their rows."""
    rng = np.random.default_rng(seed)
    angles = np.stack(matrix_to_euler(sample_rotations(n, torch.Generator().manual_seed(seed)).double()), 1)
    where = rng.uniform(0, 900, (n, 3))
    return pd.DataFrame({'particle': rng.permutation(5 * n)[:n], 'tomogram': [tomogram_names[i % 4] for i in range(n)],
                         **dict(zip(particle_columns, [*where.T, *angles.T])), 'class': rng.integers(0, 3, n)})


def write_map(path, value, box=8, pixel_size=12.0, origin=(0.0, 0.0, 0.0)):
    """Write a map whose densities say which one it is."""
    data = torch.full((box, box, box), 0.0)
    data[box // 2, box // 2, box // 2] = value
    write_volume(path, Volume(data, pixel_size, origin))
    return path


class Program:
    """Runs the commands that a scene may use, by their documentation alone; knows nothing of how scenes are written."""

    def __init__(self, monkeypatch):
        self.models, self.monkeypatch = {1: None}, monkeypatch

    def run(self, script):
        """Run a script in its folder and return the models."""
        for line in script.read_text().splitlines():
            if not line.startswith('#'):
                words = re.findall(r'"[^"]*"|\S+', line)
                getattr(self, words[0])(script.parent, *[word.strip('"') for word in words[1:]])
        return self.models

    def close(self, folder, what):
        assert what == 'session'
        self.models = {}

    def open(self, folder, path, *options):
        number = next(i for i in range(1, 10**6) if i not in self.models)  # the lowest that is free
        header = read_mrc_header(folder / path)
        assert options[0] == 'name'
        self.models[number] = SimpleNamespace(id_string=str(number), path=folder / path, name=options[1], step=np.array([header.pixel_size] * 3), origin=np.array(header.origin),
                                              positions=[np.eye(3, 4)], options={})

    def volume(self, folder, which, *options):
        model, options = self.models[int(which[1:])], dict(zip(options[::2], options[1::2]))
        model.origin = -np.array(options.pop('originIndex').split(','), float) * model.step
        size = float(options.pop('voxelSize'))
        model.origin, model.step = model.origin / model.step * size, np.array([size] * 3)
        model.options |= options

    def view(self, folder, *words):
        if words[:2] == ('matrix', 'models'):
            fields = words[2].split(',')
            while fields:
                self.models[int(fields[0][1:])].positions = [np.array(fields[1:13], float).reshape(3, 4)]
                fields = fields[13:]

    def runscript(self, folder, path):
        geometry = ModuleType('chimerax.geometry')
        geometry.Places = lambda place_array: [np.array(m, float) for m in place_array]
        self.monkeypatch.setitem(sys.modules, 'chimerax', ModuleType('chimerax'))
        self.monkeypatch.setitem(sys.modules, 'chimerax.geometry', geometry)
        exec(compile((folder / path).read_text(), path, 'exec'), {'session': SimpleNamespace(models=SimpleNamespace(list=lambda: list(self.models.values())))})


def list_scene(folder, monkeypatch):
    """Return {script: [(value at the centre of the map, where that voxel comes to lie, rotation)]} of every scene in a folder."""
    scenes = {}
    for script in sorted(folder.glob('*.cxc')):
        scenes[script.name] = []
        for model in Program(monkeypatch).run(script).values():
            data = read_volume(model.path).data.numpy()
            peak = np.array(np.unravel_index(data.argmax(), data.shape))[::-1] * model.step + model.origin
            scenes[script.name] += [(float(data.max()), position[:, :3] @ peak + position[:, 3], position[:, :3]) for position in model.positions]
    return scenes


def require_place(found, particle):
    """Check where a map was put against a row of the table."""
    np.testing.assert_allclose(found[1], particle[['coord_x', 'coord_y', 'coord_z']].to_numpy(float), atol=2e-3)  # copies are float32
    own = compute_orientations(pd.DataFrame([particle]))[0]
    assert rotation_distance(torch.as_tensor(found[2]), torch.as_tensor(own)) < 0.01


@pytest.fixture
def tomogram(tmp_path):
    """Return the file of a tomogram whose voxels count up."""
    data = np.arange(80 * 90 * 100, dtype=np.float32).reshape(80, 90, 100)
    with open(tmp_path / 'TS_01.mrc', 'wb') as file:
        file.write(make_mrc_header(data.shape, 10.0, is_stack=False) + data.astype('<f4').tobytes())
    return tmp_path / 'TS_01.mrc'


# ---------------------------------------------------------------- ChimeraX

@pytest.mark.parametrize('box,origin', [(8, (0.0, 0.0, 0.0)), (9, (-48.0, 3.0, 700.0))])
@pytest.mark.parametrize('order', ['as made', 'shuffled', 'by tomogram', 'filtered'])
def test_every_volume_stands_at_its_own_particle(tmp_path, monkeypatch, order, box, origin):
    particles = make_particles()
    volumes = {p: write_map(tmp_path / f'maps/{p}.mrc', 1 + p, box=box, origin=origin) for p in particles.particle}  # densities name the particle
    changed = {'as made': particles, 'shuffled': particles.sample(frac=1, random_state=1), 'by tomogram': particles.sort_values('tomogram'),
               'filtered': particles.sample(frac=0.5, random_state=2)}[order]
    volumes = {p: volumes[p] for p in changed.particle.sample(frac=1, random_state=3)}
    plan = place_volumes(changed, volumes, tmp_path, color='class')
    scenes = list_scene(tmp_path, monkeypatch)
    by_number = particles.set_index('particle', drop=False)
    scripts = dict(zip(plan.particle, plan.script))
    assert len(scenes) == 4 and sum(map(len, scenes.values())) == len(changed)
    for script, found in scenes.items():
        for value, *place in found:
            particle = by_number.loc[round(value) - 1]
            assert scripts[particle.particle] == script and set(plan.tomogram[plan.script == script]) == {particle.tomogram}
            require_place((value, *place), particle)
    kept = pd.read_csv(tmp_path / 'placements.csv')
    assert sorted(kept.particle) == sorted(changed.particle)
    for _, row in kept.iterrows():
        assert row.volume.endswith(f'/{row.particle}.mrc')


@pytest.mark.parametrize('copies', [True, False])
def test_classes_share_a_map(tmp_path, monkeypatch, copies):
    particles = make_particles().sample(frac=1, random_state=5)
    volumes = {c: write_map(tmp_path / f'class {c}.mrc', 10 + c) for c in range(3)}
    plan = place_volumes(particles, volumes, tmp_path, by='class', copies=copies, level=0.25)
    for script, found in list_scene(tmp_path, monkeypatch).items():
        own = particles[particles.particle.isin(plan.particle[plan.script == script])]
        models = Program(monkeypatch).run(tmp_path / script)
        assert len(models) == (own['class'].nunique() if copies else len(own)) and len(found) == len(own)
        colors = color_particles(particles, 'class').classes
        for value, *place in found:
            distance = np.linalg.norm(own[['coord_x', 'coord_y', 'coord_z']].to_numpy() - place[0], axis=1)
            particle = own.iloc[distance.argmin()]
            assert particle['class'] == round(value) - 10
            require_place((value, *place), particle)
        for model in models.values():
            assert model.options['level'] == '0.25' and model.options['color'] == colors[model.path.stem.split()[1]]


def test_the_tomogram_is_shown_in_the_same_frame(tmp_path, monkeypatch):
    particles = make_particles()
    particles['tomogram'] = 'TS_01'
    with open(tmp_path / 'TS_01.mrc', 'wb') as file:
        file.write(make_mrc_header((6, 8, 10), 100.0, is_stack=False, origin=(5000.0, 1.0, 2.0)) + np.zeros((6, 8, 10), '<f4').tobytes())
    place_volumes(particles, {particles.particle[0]: write_map(tmp_path / 'a.mrc', 1)}, tmp_path / 'out', tomograms={'TS_01': tmp_path / 'TS_01.mrc'})
    models = Program(monkeypatch).run(tmp_path / 'out/TS_01.cxc')
    assert len(models) == 2 and models[2].path == tmp_path / 'TS_01.mrc'
    np.testing.assert_allclose(models[2].origin, 0)  # coordinates count from voxel (0, 0, 0)
    with pytest.raises(InputError, match='No particle lies in tomogram TS_7'):
        place_volumes(particles, {particles.particle[0]: tmp_path / 'a.mrc'}, tmp_path / 'new', tomograms={'TS_7': tmp_path / 'TS_01.mrc'})


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Return a folder with a run of one epoch on 40 particles, and its particle file."""
    folder = tmp_path_factory.mktemp('trained')
    assert main(['simulate', '-o', str(folder / 'data'), '--n-particles', '40', '--box', '16', '--snr', '2']) == 0
    options = '--zdim 2 --start none --encoder-dim 16 --decoder-dim 16 --encoder-layers 1 --decoder-layers 1 --epochs 1 --batch-size 20 --n-workers 0 --device cpu --no-analysis'
    assert main(['train', str(folder / 'data/particles.star'), '-o', str(folder / 'run'), *options.split()]) == 0
    return folder


def test_a_run_places_the_volume_of_each_particle(trained, tmp_path, monkeypatch):
    from recon_nb.analysis import export_volumes
    from recon_nb.runs import open_run

    particles = make_particles(40).assign(particle=np.random.default_rng(1).permutation(40))
    plan = place_run(trained / 'run', tmp_path / 'placed', particles=particles, device='cpu')
    asked = [7, 31, 2, 18]
    export_volumes(trained / 'run', tmp_path / 'expected', particles=asked, device='cpu')
    volume = plan.set_index('particle').volume
    for number, particle in enumerate(asked):
        np.testing.assert_allclose(read_volume(volume[particle]).data, read_volume(tmp_path / f'expected/vol_{number:03d}.mrc').data, atol=1e-5)
    matrices = plan.set_index('particle').loc[particles.particle].filter(regex=r'^m\d\d$').to_numpy().reshape(-1, 3, 4)
    np.testing.assert_allclose(matrices, compute_placements(particles))
    shared = place_run(trained / 'run', tmp_path / 'clusters', particles=particles, kmeans=3, device='cpu')
    clusters = shared.groupby('cluster')
    assert (clusters.volume.nunique() == 1).all()
    assert shared.volume.nunique() == 3 and len(shared) == 40
    assert sum(map(len, list_scene(tmp_path / 'clusters', monkeypatch).values())) == 40
    few = place_run(open_run(trained / 'run'), tmp_path / 'few', particles=particles, chosen=[3, 5], device='cpu')
    assert sorted(few.particle) == [3, 5] and len(list((tmp_path / 'few/volumes').glob('*.mrc'))) == 2
    assert sorted(pd.read_csv(tmp_path / 'few/volumes/volumes.csv').particle) == [3, 5]
    with pytest.raises(InputError, match='mirrored'):
        place_run(trained / 'run', tmp_path / 'bad', particles=particles, flip_hand=True)
    with pytest.raises(InputError, match='Particle 99 has no latents'):
        place_run(trained / 'run', tmp_path / 'bad', particles=particles, chosen=[3, 99], device='cpu')
    with pytest.raises(InputError, match='does not say where its particles lie'):
        place_run(trained / 'run', tmp_path / 'none', device='cpu')


# ---------------------------------------------------------------- from the star file to the scene

def make_cell(folder, names, n_each, seed=0):
    """Write tilt series of particles of nine kinds in four tomograms, rows mixed; return star, subvolumes' star, truth and what maps are made of."""
    rng, n, pixel_size = np.random.default_rng(seed), len(names) * n_each, 12.0
    x, y, z = np.meshgrid(*[np.arange(-8, 8) * pixel_size] * 3, indexing='ij')
    blob = lambda *place: torch.as_tensor(np.exp(-((x - place[0]) ** 2 + (y - place[1]) ** 2 + (z - place[2]) ** 2) / (2 * 16**2)).T.copy()).float()
    basis = torch.stack([blob(0, 0, 0), blob(45, 0, 10), blob(0, 45, -15)])  # body and two parts
    kinds = np.array([(a, b) for a in (1.0, 2.0, 3.0) for b in (1.0, 2.0, 3.0)])  # how much of each part
    states = [Volume(torch.einsum('k,kzyx->zyx', torch.as_tensor([1.0, a, b]).float(), basis), pixel_size) for a, b in kinds]
    label = rng.permutation(n) % 9
    tomogram = np.array(names, object)[np.arange(n) % len(names)]
    truth = pd.DataFrame({'tomogram': tomogram, 'particle_name': [f'p_{i:03d}' for i in rng.permutation(n)], 'a': kinds[label, 0], 'b': kinds[label, 1]})
    rot, offset = sample_rotations(n, torch.Generator().manual_seed(seed)), rng.uniform(-18, 18, (n, 3))
    series = simulate_tilts(states, labels=label, placement=Placement(rot.float(), torch.as_tensor(offset).float()), scheme=TiltScheme(list_dose_symmetric(60, 20), 3.0),
                            snr=100.0, structural_snr=float('inf'), missing=0.2, seed=seed)
    particle, table = series.stack.particle.numpy(), series.stack.table
    rows = table.rows.assign(particle_name=truth.particle_name.to_numpy()[particle], micrograph=tomogram[particle])
    table = replace(table, rows=rows, source=build_warp_source(replace(table, rows=rows))).select(rng.permutation(table.n_images))
    star = write_tilts(folder / 'data', replace(series, stack=replace(series.stack, table=table)))
    picked = rng.uniform(100, 800, (n, 3))  # where boxes were cut out; the particle is off centre by minus its offset
    angles = np.stack(matrix_to_euler(rot.double()), 1)
    truth[list(particle_columns)] = np.concatenate([picked - offset, angles], 1)
    columns = {'rlnMicrographName': tomogram, 'rlnDetectorPixelSize': np.full(n, 4.0), 'rlnMagnification': np.full(n, 1e4), 'rlnGroupName': truth.particle_name,
               **{f'rlnCoordinate{axis}': picked[:, i] / 4 for i, axis in enumerate('XYZ')}, **{f'rlnOrigin{axis}Angst': offset[:, i] for i, axis in enumerate('XYZ')},
               **{f'rlnAngle{name}': angles[:, i] for i, name in enumerate(('Rot', 'Tilt', 'Psi'))}}
    order = rng.permutation(n)
    write_star_blocks(folder / 'data/subvolumes.star', [make_star_block('', {name: [list(values)[i] for i in order] for name, values in columns.items()})])
    return star, folder / 'data/subvolumes.star', truth, basis


@pytest.fixture(scope='module')
def cell(tmp_path_factory):
    """Return the particle files of four tomograms, their truth, and a run on them."""
    folder = tmp_path_factory.mktemp('cell')
    star, subvolumes, truth, basis = make_cell(folder, tomogram_names, 12)
    words = ['subspace', str(star), '--coordinates', str(subvolumes), '-o', str(folder / 'run'), '--linear', '--rank', '2', '--dose', 'model', '--contrast-sd', '0', '--full-passes', '6', '--no-test', '--no-analysis', '--device', 'cpu']
    assert main(words) == 0
    return SimpleNamespace(folder=folder, star=star, subvolumes=subvolumes, truth=truth, basis=basis)


def find_particle(cell, place):
    """Return the true particle that stands where a map was put."""
    distance = np.linalg.norm(cell.truth[['coord_x', 'coord_y', 'coord_z']].to_numpy() - place[1], axis=1)
    assert distance.min() < 0.01
    particle = cell.truth.iloc[distance.argmin()]
    require_place(place, particle)
    return particle


def measure_parts(path, basis):
    """Return how much of each part a map has, relative to its body."""
    data, columns = read_volume(path).data.flatten(), basis.flatten(1).T
    found = torch.linalg.lstsq(torch.column_stack([columns, torch.ones(len(data))]), data[:, None]).solution[:3, 0]
    return (found[1:] / found[0]).numpy()


def test_from_star_to_scene_every_particle_has_its_own_volume(cell, tmp_path, monkeypatch):
    """Four tomograms, mixed rows, missing tilts: what stands in a scene is the volume of the particle that was there."""
    assert main(['place', str(cell.folder / 'run'), '-o', str(tmp_path / 'scenes'), '--device', 'cpu']) == 0
    found = []
    for script in sorted((tmp_path / 'scenes').glob('*.cxc')):
        seen = set()
        for model in Program(monkeypatch).run(script).values():
            (position,) = model.positions
            centre = -model.origin / model.step  # the voxel that stands at the particle
            np.testing.assert_allclose(centre, 8)
            particle = find_particle(cell, (None, position[:, 3], position[:, :3]))
            seen.add(particle.tomogram)
            found.append([*measure_parts(model.path, cell.basis), particle.a, particle.b])
        assert len(seen) == 1  # a scene is one tomogram
    assert len(found) == len(cell.truth) and len(list((tmp_path / 'scenes').glob('*.cxc'))) == 4
    parts, true = np.array(found)[:, :2], np.array(found)[:, 2:]
    parts = 2 + np.std([1, 2, 3]) * (parts - parts.mean(0)) / parts.std(0)  # densities have a unit of their own
    assert (parts.round() == true).all(), np.column_stack([parts, true])
    plan = pd.read_csv(tmp_path / 'scenes/placements.csv').set_index('particle')
    names = load_stack(cell.star, coordinates=cell.subvolumes).table.particles.particle_name
    by_name = cell.truth.set_index('particle_name')
    for particle, row in plan.iterrows():
        assert row.tomogram == by_name.tomogram[names[particle]]


def test_a_network_places_what_it_decodes(cell, tmp_path, monkeypatch):
    """The map that stands at a particle is the one that `recon volumes --particles` gives for its number, whatever the selection."""
    tiny = '--encoder-dim 16 --tilt-features 8 --decoder-dim 16 --encoder-layers 1 --decoder-layers 1 --zdim 2 --epochs 1 --batch-size 8 --n-tilts 3 --n-workers 0 --device cpu --no-analysis'
    Selection(tuple(range(5, 40)), len(cell.truth), 'some').save(tmp_path / 'some.json')
    words = ['train', str(cell.star), '--coordinates', str(cell.subvolumes), '--select', str(tmp_path / 'some.json'), '-o', str(tmp_path / 'run'), '--preset', 'et', *tiny.split()]
    assert main(words) == 0
    assert main(['place', str(tmp_path / 'run'), '-o', str(tmp_path / 'scenes'), '--device', 'cpu']) == 0
    asked = [33, 7, 21, 38]
    assert main(['volumes', str(tmp_path / 'run'), '-o', str(tmp_path / 'volumes'), '--device', 'cpu', '--particles', *map(str, asked)]) == 0
    names = load_stack(cell.star).table.particles.particle_name
    expected = {names[p]: read_volume(tmp_path / f'volumes/vol_{i:03d}.mrc').data for i, p in enumerate(asked)}
    placed = [model for script in (tmp_path / 'scenes').glob('*.cxc') for model in Program(monkeypatch).run(script).values()]
    by_name = {find_particle(cell, (None, m.positions[0][:, 3], m.positions[0][:, :3])).particle_name: read_volume(m.path).data for m in placed}
    assert set(by_name) == set(names[5:40])
    for name, volume in expected.items():
        np.testing.assert_allclose(by_name[name], volume, atol=1e-5)
        assert min(by_name, key=lambda key: float((by_name[key] - volume).abs().max())) == name  # no other particle's map is as near


def test_the_verbs(cell, tomogram, tmp_path, capsys):
    assert main(['place', str(cell.folder / 'run'), '-o', str(tmp_path / 'scenes'), '--kmeans', '2', '--tomograms', str(tomogram), '--low-pass', '60', '--level', '0.1', '--device', 'cpu']) == 0
    assert capsys.readouterr().out == f'48 particles, 2 volumes, 4 scenes: {tmp_path / "scenes"}\n'
    names = load_stack(cell.star).table.particles.particle_name
    pd.DataFrame({'particle': range(48), 'label': cell.truth.set_index('particle_name').a[names].astype(int).to_numpy()}).to_csv(tmp_path / 'labels.csv', index=False)
    words = ['context', str(cell.star), '--coordinates', str(cell.subvolumes), '--tomogram', str(tomogram), '-o', str(tmp_path / 'context'), '--labels', str(tmp_path / 'labels.csv')]
    assert main(words) == 0
    assert capsys.readouterr().out == f'page: {tmp_path / "context/context.html"}\n'
    counts = pd.read_csv(tmp_path / 'context/composition.csv', index_col=0)
    pd.testing.assert_frame_equal(counts, pd.crosstab(cell.truth.tomogram, cell.truth.a.astype(int)).rename(columns=str), check_names=False)
    assert main([*words[:6], '-o', str(tmp_path / 'other'), '--color', 'klass']) == 2
    assert 'There is no column "klass"' in capsys.readouterr().err
    assert main(['context', str(cell.star), '--tomogram', str(tomogram), '-o', str(tmp_path / 'none')]) == 2
    assert '--coordinates' in capsys.readouterr().err


# ---------------------------------------------------------------- tables, neighbours, pictures

@pytest.mark.parametrize('seed', range(3))
def test_neighbours_do_not_depend_on_the_rows(seed):
    particles = make_particles(seed=seed)
    key = ['particle', 'rank']
    expected = find_neighbors(particles, n_neighbors=3).sort_values(key, ignore_index=True)
    mixed = find_neighbors(particles.sample(frac=1, random_state=seed), n_neighbors=3).sort_values(key, ignore_index=True)
    pd.testing.assert_frame_equal(mixed, expected)
    one = particles[particles.tomogram == 'TS_01']
    alone = find_neighbors(one, n_neighbors=3).sort_values(key, ignore_index=True)
    pd.testing.assert_frame_equal(alone, expected[expected.tomogram == 'TS_01'].reset_index(drop=True))
    near = find_neighbors(particles, n_neighbors=3, max_distance=200)
    pd.testing.assert_frame_equal(near.sort_values(key, ignore_index=True), expected[expected.distance <= 200].reset_index(drop=True))


def test_neighbours_of_lonely_and_coinciding_particles():
    particles = make_particles(9).assign(tomogram=['a'] * 3 + ['b'] + ['c'] * 5)
    assert find_neighbors(particles, n_neighbors=4).groupby('tomogram').size().to_dict() == {'a': 6, 'c': 20}
    same = particles.assign(tomogram='a', coord_x=1.0, coord_y=2.0, coord_z=3.0)
    found = find_neighbors(same, n_neighbors=2)
    assert len(found) == 18 and (found.particle != found.neighbor).all() and found.direction_z.isna().all()


def test_a_neighbour_along_the_own_axis():
    flat = pd.DataFrame({**dict.fromkeys(particle_columns, [0.0, 0.0]), 'particle': [3, 1], 'tomogram': 't'})
    found = find_neighbors(flat.assign(coord_x=[0.0, 50.0], angle_tilt=[90.0, 0.0])).set_index('particle')
    np.testing.assert_allclose(found.loc[3, ['direction_x', 'direction_y', 'direction_z']].to_numpy(float), [0, 0, -1], atol=1e-9)  # its z axis lies along -x
    np.testing.assert_allclose(found.loc[1, ['direction_x', 'direction_y', 'direction_z']].to_numpy(float), [-1, 0, 0], atol=1e-9)
    np.testing.assert_allclose(found.tilt, 90)


def test_tables_of_any_reader():
    particles = make_particles()
    indexed = check_particles(particles.set_index('particle'))
    assert indexed.particle.tolist() == particles.particle.tolist()
    with pytest.raises(InputError, match='--coordinates'):
        check_particles(particles.assign(coord_x=None))
    labels = pd.DataFrame({'particle': particles.particle[:30], 'label': range(30)}).sample(frac=1, random_state=0)
    joined = join_labels(particles, labels)
    assert joined.label[:30].tolist() == list(range(30)) and joined.label[30:].isna().all() and color_particles(joined, 'label').colors[-1] == '#999999'


def test_names_of_tomograms():
    particles = make_particles()
    assert set(choose_tomogram(particles, path='rec/TS_01_10.00Apx.mrc').tomogram) == {'TS_01'}
    assert set(choose_tomogram(particles, path='rec/TS_01_extra.mrc').tomogram) == {'TS_01_extra'}
    with pytest.raises(InputError, match='say which'):
        choose_tomogram(particles, path='TS_011.mrc')
    warp = particles.assign(tomogram=particles.tomogram.map({n: f'{i}.tomostar' for i, n in enumerate(tomogram_names)}))
    assert set(choose_tomogram(warp, path='2.mrc').tomogram) == {'2.tomostar'}
    assert set(choose_tomogram(warp, name='2').tomogram) == {'2.tomostar'}


@pytest.mark.parametrize('axis,array_axis', [('z', 0), ('y', 1), ('x', 2)])
def test_slabs_hold_their_voxels_and_particles(tomogram, axis, array_axis):
    opened, particles = open_tomogram(tomogram), make_particles()
    view = view_slice(opened, particles, axis=axis, position=400.0, thickness=100.0)
    np.testing.assert_allclose(view.image, np.take(opened.data, range(35, 46), array_axis).mean(array_axis), rtol=1e-5)
    assert set(view.particle) == set(particles.particle[(particles[f'coord_{axis}'] - 400).abs() <= 50])
    np.testing.assert_allclose(view.points, particles.set_index('particle').loc[view.particle, [f'coord_{a}' for a in view.plane]])
    everyone = find_in_polygon(view, [(-1, -1), (1000, -1), (1000, 1000), (-1, 1000)])
    assert everyone.tolist() == sorted(view.particle)


def test_viewer_turns_and_selects_without_a_screen(tomogram):
    pytest.importorskip('anywidget')
    particles = make_particles()
    viewer = show_context(tomogram, particles, color='class')
    for axis, end in (('x', 990.0), ('y', 890.0), ('z', 790.0)):
        viewer.axis.value, viewer.thickness.value = axis, 2000.0
        assert viewer.position.max == end
        own = particles[particles.tomogram == 'TS_01']
        shown = own.particle[(own[f'coord_{axis}'] - end / 2).abs() <= 990 / 2]  # the slider ends at the longest edge
        assert sorted(viewer.figure.data[1].customdata) == sorted(shown)
    viewer.thickness.value, viewer.position.value = 400.0, 500.0
    shown = viewer.figure.data[1].customdata
    viewer.select([0, len(shown) - 1])
    assert set(viewer.selected) == {shown[0], shown[-1]} <= set(own.particle[(own.coord_z - 500).abs() <= 200])
    assert str(shown[0]) in viewer.report.value


def test_context_folder(tomogram, tmp_path):
    pytest.importorskip('plotly')
    particles = make_particles()
    out = write_context(particles, tomogram, tmp_path / 'context', color='class', n_neighbors=2, kind='points')
    own = pd.read_csv(out / 'particles.csv')
    assert sorted(own.particle) == sorted(particles.particle[particles.tomogram == 'TS_01'])
    nearest = find_neighbors(particles).set_index('particle')
    assert (own.nearest_neighbor == nearest.loc[own.particle, 'neighbor'].to_numpy()).all()
    assert len(pd.read_csv(out / 'neighbors.csv')) == 80
    assert pd.read_csv(out / 'composition.csv', index_col=0).to_numpy().sum() == 40
    assert {path.name for path in out.glob('*.png')} == {'slice.png', 'neighbors.png', 'composition.png'}
    page = (out / 'context.html').read_text()
    assert 'plotly' in page and not re.search(r'<script[^>]+src=', page)  # opens without a network
    with pytest.raises(InputError, match='not an empty folder'):
        write_context(particles, tomogram, out)


def test_particles_outside_the_tomogram_are_said(tomogram, tmp_path, caplog):
    particles = make_particles()
    write_context(particles.assign(coord_z=particles.coord_z * 1.5), tomogram, tmp_path / 'a')
    assert 'lie outside the tomogram' in caplog.text
    with pytest.raises(InputError, match='is its pixel size 10 Å right'):
        write_context(particles.assign(coord_z=5000.0), tomogram, tmp_path / 'b')
