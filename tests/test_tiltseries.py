"""Tilt series of every format: each image keeps its own pose, dose, CTF and pixels, whatever is done to the rows; faults are named in one line."""
import itertools
import json
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recon_nb.caches import open_cache
from recon_nb.cli import main
from recon_nb.consensus import backproject_stack, read_halves
from recon_nb.core import InputError, Selection
from recon_nb.datasets import StackSource, inspect_stack, load_stack
from recon_nb.dose import compute_damage
from recon_nb.files import open_stack, read_particles, write_particles, write_stack
from recon_nb.fourier import Lattice
from recon_nb.runs import DataConfig, choose_reading, open_run
from recon_nb.so3 import euler_to_matrix, matrix_to_euler
from recon_nb.tiltseries import make_tilt_rotations, read_table

ANGLES = np.array([0, 3, -3, 6, -6, 9, -9], float) + 0.31  # degrees, in the order of acquisition; the specimen is not level
EXPOSURE = 3.25  # e/Å²
WARP = 'tomo/warp_particleseries/sta_testing_bin8.star'
WARPTOOLS = 'tomo/warptools_70s/warptools_test_4-tomos_10-ptcls_box-32_angpix-12'
RELION5 = 'tomo/relion5_project'


# ---------------------------------------------------------------- small files of every format

def write_star(path, blocks):
    """Write {block name: (labels, rows)}; rows are lists of anything."""
    lines = []
    for name, (labels, rows) in blocks.items():
        lines += [f'data_{name}', '', 'loop_', *(f'_rln{label} #{i}' for i, label in enumerate(labels, 1)), *(' '.join(map(str, row)) for row in rows), '', '']
    Path(path).write_text('\n'.join(lines))


def read_rows(path, name):
    """Return the lines of a block's rows, as {line of the file: tokens}, and its labels."""
    lines, labels, rows, inside = Path(path).read_text().split('\n'), [], {}, False
    for number, line in enumerate(lines):
        inside = line.strip() == f'data_{name}' if line.startswith('data_') else inside
        if inside and line.startswith('_'):
            labels.append(line.split()[0][4:])
        elif inside and labels and line.strip():
            rows[number] = line.split()
    return lines, labels, rows


def make_images(n, seed, box=8):
    """Return images that all differ, as float16."""
    return np.random.default_rng(seed).normal(size=(n, box, box)).astype(np.float16)


def write_warp(folder, seed=0, kept=((0, 1, 2, 3, 4, 5, 6), (1, 2, 5), (0, 2, 3, 4), (0, 1, 2, 4, 5, 6)), doses='after'):
    """Write a Warp series of particles of two tomograms that miss different tilts; doses to the end of each image."""
    generator = np.random.default_rng(seed)
    tilt = make_tilt_rotations(np.zeros(7), ANGLES, np.full(7, 85.0))
    labels = ['Magnification', 'DetectorPixelSize', 'Voltage', 'SphericalAberration', 'AmplitudeContrast', 'DefocusU', 'DefocusV', 'DefocusAngle', 'ImageName', 'MicrographName',
              'AngleRot', 'AngleTilt', 'AnglePsi', 'OriginX', 'OriginY', 'CtfBfactor', 'CtfScalefactor', 'RandomSubset', 'GroupName', 'Mystery']
    rows = []
    for p, frames in enumerate(kept):
        turns = euler_to_matrix(*torch.from_numpy(generator.uniform(10, 170, 3)))
        for f in frames:
            angles = [round(float(a), 6) for a in matrix_to_euler(tilt[f] @ turns)]
            dose = EXPOSURE * (f + (doses == 'after'))
            rows.append([10000, 4.2, 300, 2.7, 0.07, 20000 + 100 * p + f, 19000 + f, 10 + f, f'{len(rows) + 1:06d}@series.mrcs', f'ts{p % 2}_{f}.mrc', *angles, p, -f,
                         -4 * dose, round(float(np.cos(np.deg2rad(ANGLES[f]))), 8), 1 + p % 2, f'ts{p % 2}_{p:07d}', f'kept_{p}_{f}'])
    write_star(folder / 'series.star', {'': (labels, rows)})
    write_stack(folder / 'series.mrcs', make_images(len(rows), seed), 4.2, dtype='f2')
    return folder / 'series.star'


OPTICS = ['OpticsGroup', 'OpticsGroupName', 'Voltage', 'SphericalAberration', 'AmplitudeContrast', 'ImagePixelSize', 'ImageSize', 'ImageDimensionality', 'CtfDataAreCtfPremultiplied']
SET_KEPT = ((1, 1, 1, 1, 1, 1, 1), (0, 1, 1, 0, 0, 1, 0), (1, 1, 0, 1, 1, 1, 1), (1, 1, 1, 1, 1, 1, 1), (0, 0, 1, 1, 1, 1, 0))


def write_set(folder, seed=0, style='relion5', full=False):
    """Write an optimisation set of five particles in two tomograms, interleaved, some tilts hidden; `full` stacks store those too."""
    generator, order = np.random.default_rng(seed), np.argsort(ANGLES)  # rows of a tilt series ascend by angle
    tilt = make_tilt_rotations(generator.normal(0, 0.2, 7), ANGLES, np.full(7, 85.0))
    series, loops = {}, {}
    for t in range(2):
        common = [[20000 + 1000 * t + f, 19500 + f, 5.0 + f, EXPOSURE * f] for f in range(7)]
        if style == 'warptools':
            rows = [[*(f'[{",".join(f"{v:.8f}" for v in tilt[f, i].tolist())},0]' for i in range(3)), '[0,0,0,1]', *common[f]] for f in order]
            loops[f'ts{t}'] = (['TomoProjX', 'TomoProjY', 'TomoProjZ', 'TomoProjW', 'DefocusU', 'DefocusV', 'DefocusAngle', 'MicrographPreExposure'], rows)
        else:
            rows = [[0.1, ANGLES[f], 85.0, *common[f], f'ts{t}_{f}.mrc'] for f in order]
            series[f'ts{t}'] = (['TomoXTilt', 'TomoYTilt', 'TomoZRot', 'DefocusU', 'DefocusV', 'DefocusAngle', 'MicrographPreExposure', 'MicrographName'], rows)
    labels = ['TomoName', 'TomoHand', 'TomoTiltSeriesPixelSize', 'TomoSizeX', 'TomoSizeY', 'TomoSizeZ', 'TomoTiltSeriesName' if style == 'warptools' else 'TomoTiltSeriesStarFile']
    write_star(folder / 'tomograms.star', {'global': (labels, [[f'ts{t}', -1.0, 1.05, 4000, 4000, 1400, 'dummy_tiltseries.mrc' if style == 'warptools' else f'tilts/ts{t}.star'] for t in range(2)]), **loops})
    (folder / 'tilts').mkdir(exist_ok=True)
    for name, block in series.items():
        write_star(folder / f'tilts/{name}.star', {name: block})
    places = ['CoordinateX', 'CoordinateY', 'CoordinateZ'] if style == 'warptools' else [f'CenteredCoordinate{a}Angst' for a in 'XYZ']
    levels = [] if style == 'warptools' else ['TomoSubtomogramRot', 'TomoSubtomogramTilt', 'TomoSubtomogramPsi']
    labels = ['TomoName', 'TomoParticleName', 'OpticsGroup', 'ImageName', 'TomoVisibleFrames', *places, *levels, 'AngleRot', 'AngleTilt', 'AnglePsi', 'OriginXAngst', 'OriginYAngst', 'OriginZAngst', 'RandomSubset', 'Mystery']
    rows = []
    for p, shown in enumerate(SET_KEPT):
        flags = np.array(shown)[order]
        angles = [round(float(a), 5) for a in generator.uniform(10, 170, 6 if levels else 3)]
        rows.append([f'ts{p % 2}', f'ts{p % 2}/{p}', 1, f'stacks/{p}.mrcs', f'[{",".join(map(str, flags))}]', 100 + 5 * p, 300 - p, 40 + 2 * p, *angles, 0.5 * p, -1, 2, 1 + p % 2, f'kept_{p}'])
        (folder / 'stacks').mkdir(exist_ok=True)
        images = make_images(7, 100 + p)[order]
        write_stack(folder / f'stacks/{p}.mrcs', images if full else images[flags == 1], 4.2, dtype='f2')
    write_star(folder / 'particles.star', {'optics': (OPTICS, [[1, 'og1', 300, 2.7, 0.07, 4.2, 8, 2, 1]]), 'particles': (labels, rows)})
    (folder / 'run_optimisation_set.star').write_text('data_\n\n_rlnTomoParticlesFile particles.star\n_rlnTomoTomogramsFile tomograms.star\n')
    return folder / 'run_optimisation_set.star'


def write_nextpyp(folder, seed=0):
    """Write an image series with an optics block, in which particles and tilts have numbers and no names."""
    generator, tilt = np.random.default_rng(seed), make_tilt_rotations(np.zeros(7), ANGLES, np.full(7, 85.0))
    labels = ['ImageName', 'OpticsGroup', 'GroupNumber', 'TiltIndex', 'MicrographPreExposure', 'TomoNominalStageTiltAngle', 'DefocusU', 'DefocusV', 'DefocusAngle', 'AngleRot', 'AngleTilt', 'AnglePsi', 'OriginXAngst', 'OriginYAngst']
    rows = []
    for p in range(3):
        turns = euler_to_matrix(*torch.from_numpy(generator.uniform(10, 170, 3)))
        for f in range(7 - p):
            angles = [round(float(a), 6) for a in matrix_to_euler(tilt[f] @ turns)]
            rows.append([f'{len(rows) + 1}@pyp.mrcs', 1, 7 + 2 * p, f, EXPOSURE * f, ANGLES[f], 20000 + p + 10 * f, 19000, 3, *angles, 1, 2])
    write_star(folder / 'pyp.star', {'optics': (OPTICS[:-1], [[1, 'og1', 300, 2.7, 0.07, 4.2, 8, 2]]), 'particles': (labels, rows)})
    write_stack(folder / 'pyp.mrcs', make_images(len(rows), seed), 4.2)
    return folder / 'pyp.star'


WRITERS = {
    'warp': write_warp,
    'nextpyp': write_nextpyp,
    'relion5': write_set,
    'relion5, all tilts stored': lambda folder: write_set(folder, full=True),
    'warptools': lambda folder: write_set(folder, style='warptools'),
}


@pytest.fixture(params=list(WRITERS))
def written(request, tmp_path):
    """Return a file of each format."""
    return WRITERS[request.param](tmp_path)


# ---------------------------------------------------------------- what an image is

def describe_images(path, rows=None, **options):
    """Return {pixels: particle, pose, shift, dose, tilt, CTF} of the images of a file, or of some of its rows."""
    stack = load_stack(path, **options)
    names = stack.table.particles['particle_name'].to_numpy()
    pixels = stack.read_images(torch.arange(stack.n_images)).numpy()
    ctf = np.stack([getattr(stack.ctf, name).numpy() for name in ('defocus_u', 'defocus_v', 'defocus_angle', 'phase_shift')], 1)
    found = {}
    for i in range(stack.n_images) if rows is None else rows:
        numbers = [*stack.poses.rot[i].flatten().tolist(), *stack.poses.shift[i].tolist(), float(stack.tilt.dose[i]), abs(float(stack.tilt.tilt_angle[i])), *ctf[i]]
        found[pixels[i].tobytes()] = (names[int(stack.particle[i])], np.array(numbers))
    assert len(found) == (stack.n_images if rows is None else len(rows))  # every image once
    return found


def require_same(found, expected):
    """Check that images are those expected, each with its own numbers."""
    assert set(found) == set(expected)
    for pixels, (name, numbers) in found.items():
        assert name == expected[pixels][0]
        np.testing.assert_allclose(numbers, expected[pixels][1], rtol=0, atol=2e-4)


def choose_rows(table, generator, what):
    """Return the rows that shuffling, filtering or splitting leaves, whole particles where a file can hold no less."""
    n, particle = table.n_images, table.rows['particle'].to_numpy()
    present = np.unique(particle)
    if what == 'shuffle':
        return [generator.permutation(n)]
    if what == 'filter':
        chosen = generator.permutation(present)[: max(2, 2 * len(present) // 3)]
        return [np.flatnonzero(np.isin(particle, chosen))]
    first = generator.permutation(present)[: len(present) // 2]
    return [np.flatnonzero(np.isin(particle, first)), np.flatnonzero(~np.isin(particle, first))]


def rewrite(path, operations, seed):
    """Read, apply one operation, write, read, apply the next; return the files that remain."""
    generator, files = np.random.default_rng(seed), [path]
    for number, what in enumerate(operations):
        after = []
        for file in files:
            table = read_table(file)
            if table.n_particles < 2 and what != 'shuffle':
                after.append(file)
                continue
            for part, rows in enumerate(choose_rows(table, generator, what)):
                name = f'{number}{part}_{len(after)}_particles.star'
                write_particles(path.parent / name, table, rows)
                after.append(path.parent / name)
        files = after
    return files


@pytest.mark.parametrize('operations', list(itertools.permutations(['shuffle', 'filter', 'split'])), ids=' '.join)
def test_images_keep_their_numbers_through_files(written, operations):
    whole = describe_images(written)
    parts = [describe_images(file) for file in rewrite(written, operations, seed=len(operations[0]))]
    merged = {pixels: image for part in parts for pixels, image in part.items()}
    assert sum(map(len, parts)) == len(merged) > len(whole) // 3
    require_same(merged, {pixels: whole[pixels] for pixels in merged})


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_rows_of_an_image_series_in_any_order(tmp_path_factory, seed):
    """Single images too may be left out of a file with a row for each."""
    generator, folder = np.random.default_rng(seed), tmp_path_factory.mktemp('warp')
    kept = [sorted(generator.choice(7, generator.integers(2, 8), replace=False).tolist()) for _ in range(generator.integers(2, 6))]
    path = write_warp(folder, seed % 1000, kept)
    table = read_table(path)
    rows = generator.permutation(table.n_images)[: generator.integers(2, table.n_images + 1)]
    write_particles(folder / 'some.star', table, rows)
    require_same(describe_images(folder / 'some.star'), describe_images(path, rows.tolist()))


def test_stacks_may_be_cut_in_memory_too(written):
    whole, stack = describe_images(written), load_stack(written)
    for chosen in itertools.combinations(range(stack.n_particles), 2):
        part = stack.select(chosen)
        assert part.particles.tolist() == list(chosen)
        rows = part.source_row.tolist()
        pixels = part.read_images(torch.arange(part.n_images)).numpy()
        for i, row in enumerate(rows):
            assert pixels[i].tobytes() in whole and float(part.tilt.dose[i]) == float(stack.tilt.dose[row])
            torch.testing.assert_close(part.poses.rot[i], stack.poses.rot[row])


def test_selection_is_of_particles(written, tmp_path):
    n = load_stack(written).n_particles
    Selection(torch.tensor([2, 0]), n, 'by hand').save(tmp_path / 'two.json')
    stack = load_stack(written, select=tmp_path / 'two.json')
    assert stack.particles.tolist() == [0, 2]
    assert stack.n_images == int(np.isin(stack.table.rows['particle'], [0, 2]).sum())
    Selection(torch.tensor([0]), n + 1, 'of another file').save(tmp_path / 'other.json')
    with pytest.raises(InputError, match=f'this input has {n}'):
        load_stack(written, select=tmp_path / 'other.json')


def test_every_format_knows_dose_order_and_angle(written):
    stack = load_stack(written)
    frame = np.array([int(np.argmin(np.abs(ANGLES - angle))) for angle in stack.tilt.tilt_angle.numpy()])
    np.testing.assert_allclose(stack.tilt.tilt_angle, ANGLES[frame], atol=0.25)
    later = EXPOSURE if stack.table.dose_convention == 'after' else 0.0
    np.testing.assert_allclose(stack.tilt.dose, EXPOSURE * frame + later, rtol=1e-6)
    for p in stack.particles:
        mine = stack.particle == p
        assert torch.equal(torch.argsort(stack.tilt.order[mine]), torch.argsort(stack.tilt.dose[mine]))
    facts = inspect_stack(stack)
    assert facts['has_tilts'] and facts['dose_convention'] in ('before', 'after') and 'dose' in facts['origins']


def test_pose_of_a_particle_is_the_product_of_both_levels(tmp_path):
    table = read_table(write_set(tmp_path))
    _, labels, rows = read_rows(tmp_path / 'particles.star', 'particles')
    euler = lambda row, names: euler_to_matrix(*(torch.tensor(float(row[labels.index(n)]), dtype=torch.float64) for n in names))
    for p, row in enumerate(rows.values()):
        tomogram = euler(row, ['TomoSubtomogramRot', 'TomoSubtomogramTilt', 'TomoSubtomogramPsi']) @ euler(row, ['AngleRot', 'AngleTilt', 'AnglePsi'])
        mine = table.rows['particle'] == p
        tilts = make_tilt_rotations(np.full(mine.sum(), 0.1), table.rows['tilt_angle'][mine].to_numpy(), np.full(mine.sum(), 85.0))
        torch.testing.assert_close(table.get_poses(torch.float64).rot[torch.from_numpy(mine.to_numpy(copy=True))], tilts @ tomogram, atol=1e-9, rtol=0)


def test_defocus_follows_depth_and_hand(tmp_path):
    tables = {}
    for hand in ('-1.0', '1.0'):
        folder = tmp_path / hand
        folder.mkdir()
        path = write_set(folder)
        text = (folder / 'tomograms.star').read_text()
        (folder / 'tomograms.star').write_text(text.replace(' -1.0 ', f' {hand} '))
        tables[hand] = read_table(path)
    mean = (tables['-1.0'].rows['defocus_u'] + tables['1.0'].rows['defocus_u']) / 2
    own = [20000 + 1000 * int(t[-1]) + int(round(d / EXPOSURE)) for t, d in zip(tables['1.0'].rows['tomogram'], tables['1.0'].rows['dose'])]
    np.testing.assert_allclose(mean, own, atol=1e-6)
    depth = (tables['1.0'].rows['defocus_u'] - mean).to_numpy()
    table = tables['1.0']
    centred = table.particles[['coord_x', 'coord_y', 'coord_z']].to_numpy(float)[table.rows['particle']] - 1.05 * np.array([2000, 2000, 700])
    tilts = make_tilt_rotations(np.full(table.n_images, 0.1), table.rows['tilt_angle'].to_numpy(), np.full(table.n_images, 85.0)).numpy()
    np.testing.assert_allclose(depth, (tilts[:, 2] * centred).sum(-1), atol=1e-6)


# ---------------------------------------------------------------- written back

def test_written_back_as_it_was_read(written):
    table = read_table(written)
    write_particles(written.parent / 'again.star', table)
    original = written if written.name in ('series.star', 'pyp.star') else written.parent / 'particles.star'
    assert (written.parent / 'again.star').read_bytes() == original.read_bytes()
    if original != written:
        write_particles(written.parent / 'more_optimisation_set.star', table)
        assert (written.parent / 'more_particles.star').read_bytes() == original.read_bytes()
        assert (written.parent / 'more_optimisation_set.star').read_text() == written.read_text().replace(' particles.star', ' more_particles.star')


def test_filtered_sets_keep_all_columns(written):
    table = read_table(written)
    write_particles(written.parent / 'part.star', table, (table.rows['particle'] != 1).to_numpy())
    original = written if written.name in ('series.star', 'pyp.star') else written.parent / 'particles.star'
    name = '' if written.name == 'series.star' else 'particles'
    _, labels, before = read_rows(original, name)
    _, again, after = read_rows(written.parent / 'part.star', name)
    assert again == labels
    assert [row for row in after.values() if row in list(before.values())] == list(after.values()) and 0 < len(after) < len(before)


def test_a_set_may_be_written_to_another_folder(tmp_path):
    (tmp_path / 'project').mkdir()
    (tmp_path / 'elsewhere').mkdir()
    path = write_set(tmp_path / 'project')
    table = read_table(path)
    write_particles(tmp_path / 'elsewhere/few_optimisation_set.star', table, (table.rows['particle'] > 1).to_numpy())
    found = describe_images(tmp_path / 'elsewhere/few_optimisation_set.star', datadir=tmp_path / 'project')
    whole = describe_images(path)
    require_same(found, {pixels: whole[pixels] for pixels in found})
    assert len({name for name, _ in found.values()}) == 3


def test_downsampled_series_are_series(written, tmp_path, capsys):
    assert main(['downsample', str(written), '-o', str(tmp_path / 'small.mrcs'), '--box', '6']) == 0, capsys.readouterr().err
    small, large = load_stack(tmp_path / 'small.star'), load_stack(written)
    assert (small.box, small.n_images, small.n_particles) == (6, large.n_images, large.n_particles) and abs(small.pixel_size - 5.6) < 1e-4
    np.testing.assert_allclose(small.tilt.dose, large.tilt.dose, atol=1e-4)
    np.testing.assert_allclose(small.tilt.tilt_angle, large.tilt.tilt_angle, atol=1e-3)
    torch.testing.assert_close(small.poses.rot, large.poses.rot, atol=1e-5, rtol=0)
    assert torch.equal(small.particle, large.particle) and small.premultiplied == large.premultiplied and small.dose_weighted == large.dose_weighted
    assert small.table.particles['particle_name'].tolist() == large.table.particles['particle_name'].tolist()


# ---------------------------------------------------------------- doses

def test_a_user_may_say_that_doses_count_to_the_end(tmp_path):
    before, after = (load_stack(write_warp(folder, doses=how), dose_scheme=scheme) for folder, how, scheme in (
        (make_folder(tmp_path / 'b'), 'before', None), (make_folder(tmp_path / 'a'), 'after', 'after')))
    np.testing.assert_allclose(before.tilt.dose, after.tilt.dose, atol=1e-5)
    assert before.table.dose_convention == after.table.dose_convention == 'before'
    assert load_stack(tmp_path / 'a/series.star').table.dose_convention == 'after'
    assert 'said to count after' in after.table.origins['dose']


def make_folder(path):
    """Make a folder and return it."""
    path.mkdir()
    return path


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_exposures_come_off_filtered_files_too(tmp_path_factory, seed):
    folder, generator = tmp_path_factory.mktemp('warp'), np.random.default_rng(seed)
    path = write_warp(folder, kept=[range(7)] * 4)
    table = read_table(path)
    rows = np.flatnonzero(table.rows['particle'] != generator.integers(4))
    lost = generator.integers(7)  # a tilt that is bad in the whole tomogram
    rows = rows[np.round(table.rows['dose'].to_numpy()[rows] / EXPOSURE) != lost + 1]
    write_particles(folder / 'part.star', table, generator.permutation(rows))
    require_same(describe_images(folder / 'part.star', dose_scheme='after'), describe_images(path, rows.tolist(), dose_scheme='after'))


def test_an_explicit_scheme_tells_doses_and_order(written, tmp_path):
    expected = load_stack(written, dose_scheme=None)
    spoken = load_stack(written, dose_scheme=f'{EXPOSURE}:' + ','.join(f'{a:g}' for a in np.round(ANGLES)))
    later = EXPOSURE if expected.table.dose_convention == 'after' else 0.0
    np.testing.assert_allclose(spoken.tilt.dose, expected.tilt.dose - later, atol=1e-5)
    assert torch.equal(spoken.tilt.order, expected.tilt.order) and spoken.table.dose_convention == 'before'
    assert spoken.table.origins['dose'] == '--dose-scheme'
    if 'micrograph' in expected.table.rows:
        lines = [f'ts{t}_{f}.mrc,{EXPOSURE * f}' for t in range(2) for f in range(7)]
        (tmp_path / 'doses.csv').write_text('\n'.join(['micrograph,dose', *lines]))
        told = load_stack(written, dose_scheme=str(tmp_path / 'doses.csv'))
        np.testing.assert_allclose(told.tilt.dose, spoken.tilt.dose, atol=1e-6)
        (tmp_path / 'doses.csv').write_text('\n'.join(['micrograph,dose', *lines[:-1]]))
        with pytest.raises(InputError, match='ts1_6.mrc'):
            load_stack(written, dose_scheme=str(tmp_path / 'doses.csv'))
    with pytest.raises(InputError, match='no tilt for tilt_angle'):
        load_stack(written, dose_scheme='3:0,3,-3')


def test_single_particles_have_no_doses(data_dir):
    with pytest.raises(InputError, match='rlnGroupName'):
        load_stack(data_dir / 'images/relion_proj_batch.star', dose_scheme='after')
    with pytest.raises(InputError, match='--dose-scheme'):
        load_stack(data_dir / 'metadata/empiar_10076_7.cs', datadir=data_dir / 'images', dose_scheme='after')
    for option in ('coordinates', 'tomograms'):
        with pytest.raises(InputError, match=f'--{option}'):
            load_stack(data_dir / 'images/relion_proj_batch.star', **{option: 'a.star'})
    assert load_stack(data_dir / 'images/relion_proj_batch.star').tilt is None


def test_doses_that_begin_at_zero_do_not_count_to_the_end(tmp_path):
    with pytest.raises(InputError, match=r'line \d+\).*leave out --dose-scheme after'):
        load_stack(write_set(tmp_path), dose_scheme='after')


# ---------------------------------------------------------------- conventions of the pixels

def test_dose_filter_is_taken_back(tmp_path):
    path = write_set(tmp_path, full=True)
    stack = load_stack(path)
    assert stack.premultiplied and stack.dose_weighted
    lattice = Lattice(stack.box, stack.pixel_size)
    index = torch.arange(stack.n_images)
    factor = compute_damage(lattice.radius / (stack.box * stack.pixel_size), stack.tilt.dose, stack.tilt.tilt_angle, 300.0).float()
    options = {'scale': 1.0, 'subtract_background': False, 'window_radius': 1.5}
    weighted = StackSource(load_stack(path, premultiplied=False), **options).read(index)
    plain = StackSource(load_stack(path, premultiplied=False, dose_weighted=False), **options).read(index)
    torch.testing.assert_close(weighted * (factor + 1e-3 / factor), plain, atol=1e-3, rtol=1e-3)


def test_filtered_images_need_doses(data_dir):
    with pytest.raises(InputError, match='dose-weighted'):
        StackSource(load_stack(data_dir / 'images/relion_proj_batch.star', dose_weighted=True))


def test_a_cache_belongs_to_the_doses_that_it_was_made_with(tmp_path):
    path = write_set(tmp_path)
    read = lambda **options: StackSource(load_stack(path, **options), scale=1.0, subtract_background=False)
    scheme = '2:' + ','.join(f'{a:g}' for a in np.round(ANGLES))
    for options in ({}, {'dose_scheme': scheme}, {'dose_weighted': False}, {}):
        source, index = read(**options), torch.arange(10)
        found = open_cache(source, tmp_path / 'caches').read(index)
        torch.testing.assert_close(found / found.abs().mean(), source.read(index) / source.read(index).abs().mean(), atol=5e-3, rtol=5e-3)
    part = StackSource(load_stack(path).select([1, 3]), scale=1.0, subtract_background=False)
    found = open_cache(part, tmp_path / 'caches').read(torch.arange(4))
    torch.testing.assert_close(found / found.abs().mean(), part.read(torch.arange(4)) / part.read(torch.arange(4)).abs().mean(), atol=5e-3, rtol=5e-3)


def test_user_has_the_last_word_on_conventions(tmp_path, capsys):
    path = write_set(tmp_path)
    for option, value in (('premultiplied', False), ('dose_weighted', False)):
        assert getattr(load_stack(path), option) and not getattr(load_stack(path, **{option: value}), option)
    assert main(['inspect', str(path), '--no-premultiplied', '--no-dose-weighted', '--json']) == 0
    facts = json.loads(capsys.readouterr().out)
    assert not facts['premultiplied'] and not facts['dose_weighted']


# ---------------------------------------------------------------- coordinates from another file

def write_places(path, names, unit=4.2):
    """Write a subvolume star file."""
    labels = ['ImageName', 'MicrographName', 'CoordinateX', 'CoordinateY', 'CoordinateZ', 'AngleRot', 'AngleTilt', 'AnglePsi', 'DetectorPixelSize', 'Magnification']
    write_star(path, {'': (labels, [[f'subtomo/{name}_4.20A.mrc', 'ts0.tomostar', 10 + i, 20, 30 - i, i, 40, 50, unit, 10000] for i, name in enumerate(names)])})


def test_coordinates_are_joined_by_name(tmp_path):
    path = write_warp(tmp_path)
    names = read_table(path).particles['particle_name'].tolist()
    write_places(tmp_path / 'vols.star', [*names[::-1], 'ts9_0000000'])
    table = load_stack(path, coordinates=tmp_path / 'vols.star').table
    assert table.particles['particle_name'].tolist() == names
    place = len(names) - 1 - np.arange(len(names))
    np.testing.assert_allclose(table.particles['coord_x'], 4.2 * (10 + place))
    np.testing.assert_allclose(table.particles['angle_rot'], place)
    assert table.origins['coordinates'].endswith('vols.star')
    write_places(tmp_path / 'fewer.star', names[:2])
    with pytest.raises(InputError, match=rf'2 of 4 particles are not there, the first is .{names[2]}.'):
        load_stack(path, coordinates=tmp_path / 'fewer.star')
    write_places(tmp_path / 'twice.star', [*names, names[0]])
    with pytest.raises(InputError, match=rf'row 4 \(line \d+\).*{names[0]}'):
        load_stack(path, coordinates=tmp_path / 'twice.star')


@pytest.mark.parametrize('written', [name for name in WRITERS if name not in ('warp', 'nextpyp')], indirect=True)
def test_a_downsampled_set_finds_its_places_in_the_original(written, tmp_path):
    assert main(['downsample', str(written), '-o', str(tmp_path / 'small.mrcs'), '--box', '6']) == 0
    original, small = read_table(written), load_stack(tmp_path / 'small.star', coordinates=written).table
    pandas.testing.assert_frame_equal(small.particles[original.particles.columns], original.particles)
    assert small.rows['tomogram'].tolist() == original.rows['tomogram'].tolist()


def test_coordinates_of_the_simulated_ribosomes(data_dir):
    folder = data_dir / 'tomo/simulated_10076'
    table = load_stack(folder / '10076_both_32_sim.star', coordinates=folder / '10076_both_32_sim_vols.star', require_images=False).table
    assert (table.n_particles, table.n_images) == (144, 1296)
    assert {'coord_x', 'coord_y', 'coord_z'} <= set(table.particles) and np.isfinite(table.particles[['coord_x', 'coord_y', 'coord_z']].to_numpy()).all()
    doses = table.rows.groupby('particle')['dose'].apply(lambda d: tuple(np.sort(d.to_numpy())))
    assert set(doses) == {tuple(2.0 * np.arange(1, 9)), tuple(3.0 * np.arange(1, 11))}


# ---------------------------------------------------------------- faults are named

FILES = {  # format to its files and the block in each
    'warp': [('series.star', '')],
    'nextpyp': [('pyp.star', 'optics'), ('pyp.star', 'particles')],
    'relion5': [('particles.star', 'optics'), ('particles.star', 'particles'), ('tomograms.star', 'global'), ('tilts/ts0.star', 'ts0')],
    'warptools': [('particles.star', 'optics'), ('particles.star', 'particles'), ('tomograms.star', 'global'), ('tomograms.star', 'ts0')],
}


@pytest.mark.parametrize('style', list(FILES))
def test_a_file_without_a_column_is_read_or_refused_in_one_line(tmp_path, style):
    path, n_refused = WRITERS[style](tmp_path), 0
    for name, block in FILES[style]:
        original = (tmp_path / name).read_text()
        lines, labels, rows = read_rows(tmp_path / name, block)
        for column, label in enumerate(labels):
            kept = [line for line in lines]
            for number, row in rows.items():
                kept[number] = ' '.join(row[:column] + row[column + 1 :])
            start = next(i for i, line in enumerate(kept) if line.strip() == f'data_{block}')
            place = next(i for i in range(start, len(kept)) if kept[i].split()[:1] == [f'_rln{label}'])
            (tmp_path / name).write_text('\n'.join(kept[:place] + kept[place + 1 :]))
            try:
                stack = load_stack(path)
                assert stack.n_images and (stack.tilt is not None or label in ('GroupName', 'CtfBfactor', 'GroupNumber', 'TiltIndex')), (name, label)
            except InputError as error:
                n_refused += 1
                assert '\n' not in str(error) and '.star' in str(error), (name, label, str(error))
            (tmp_path / name).write_text(original)
    assert n_refused >= 3


NUMERIC = {'warp': ['CtfBfactor', 'CtfScalefactor', 'AngleRot', 'DefocusU', 'OriginX'], 'nextpyp': ['MicrographPreExposure', 'AnglePsi', 'TomoNominalStageTiltAngle'],
           'relion5': ['AngleTilt', 'TomoSubtomogramPsi', 'OriginZAngst', 'CenteredCoordinateYAngst', 'DefocusV', 'MicrographPreExposure', 'TomoYTilt', 'TomoHand', 'TomoSizeZ', 'Voltage'],
           'warptools': ['CoordinateZ', 'AnglePsi', 'TomoProjY', 'DefocusAngle', 'MicrographPreExposure', 'TomoTiltSeriesPixelSize']}


@pytest.mark.parametrize('style', list(NUMERIC))
def test_a_wrong_number_is_named_with_file_and_row(tmp_path, style):
    path, seen = WRITERS[style](tmp_path), set()
    for name, block in FILES[style]:
        original = (tmp_path / name).read_text()
        lines, labels, rows = read_rows(tmp_path / name, block)
        for label in set(labels) & set(NUMERIC[style]):
            number = list(rows)[-1]
            row = list(rows[number])
            row[labels.index(label)] = '[1,nan,0,0]' if 'Proj' in label else 'nan'
            changed = list(lines)
            changed[number] = ' '.join(row)
            (tmp_path / name).write_text('\n'.join(changed))
            with pytest.raises(InputError) as caught:
                load_stack(path)
            text = str(caught.value)
            assert '\n' not in text and f'_rln{label}'[1:] in text and Path(name).name in text, text
            assert f'line {number + 1}' in text or block == 'optics', text
            seen.add(label)
            (tmp_path / name).write_text(original)
    assert seen == set(NUMERIC[style])


BROKEN = {  # what is done to which file of a RELION 5 set, and what the one line must say
    'no such tomogram': ('particles.star', 'ts1 ts1/1 ', 'ts7 ts7/1 ', ["no tomogram 'ts7'", '--tomograms']),
    'a tilt too many': ('particles.star', '[1,1,1,1,1,1,1]', '[1,1,1,1,1,1,1,1]', ['counts 8 tilts', "'ts0' has 7"]),
    'flags that are none': ('particles.star', '[1,1,1,1,1,1,1]', '[1,1,2,1,1,1,1]', ['rlnTomoVisibleFrames', 'expected']),
    'never visible': ('particles.star', '[1,1,1,1,1,1,1]', '[0,0,0,0,0,0,0]', ['no tilt shows this particle']),
    'a name twice': ('particles.star', 'ts1/1 ', 'ts0/0 ', ["'ts0/0'", 'second time']),
    'a dose twice': ('tilts/ts0.star', ' 3.25 ', ' 6.5 ', ['the same dose', '--dose-scheme']),
    'a negative dose': ('tilts/ts0.star', ' 3.25 ', ' -3.25 ', ['-3.25', '--dose-scheme']),
    'two pixel sizes': ('particles.star', '1 og1 300 2.7 0.07 4.2 8 2 1', '1 og1 300 2.7 0.07 4.2 8 2 1\n2 og2 300 2.7 0.07 4.2 8 3 1', None),
    'subtomograms': ('particles.star', '4.2 8 2 1', '4.2 8 3 1', ['3-D subtomograms', '2D stacks']),
    'another box': ('particles.star', '4.2 8 2 1', '4.2 16 2 1', ['16 px', '8 px']),
    'no particle file': ('run_optimisation_set.star', ' particles.star', ' nowhere.star', ["'nowhere.star' not found", 'rlnTomoParticlesFile']),
    'no tomogram file': ('run_optimisation_set.star', ' tomograms.star', ' nowhere.star', ["'nowhere.star' not found", '--tomograms']),
    'no tilt series file': ('tomograms.star', 'tilts/ts1.star', 'tilts/ts5.star', ["'tilts/ts5.star' not found", '--datadir']),
    'no stack': ('particles.star', 'stacks/2.mrcs', 'stacks/9.mrcs', ['stacks/9.mrcs', '--datadir']),
    'another stack': ('particles.star', 'stacks/1.mrcs', 'stacks/4.mrcs', ['4 images', '3 of them visible']),
    'a tilt that is mirrored': ('tomograms.star', 'TomoHand', 'TomoHandOff', ['rlnTomoHand is missing']),
}


@pytest.mark.parametrize('fault', list(BROKEN))
def test_faults_of_a_set_are_named(tmp_path, fault):
    path = write_set(tmp_path)
    name, before, after, parts = BROKEN[fault]
    text = (tmp_path / name).read_text()
    assert before in text
    (tmp_path / name).write_text(text.replace(before, after, 1))
    if parts is None:
        assert load_stack(path).n_images  # a group that no particle is of does no harm
        return
    with pytest.raises(InputError) as caught:
        load_stack(path)
    assert '\n' not in str(caught.value)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_sheared_or_binned_projections_are_refused(tmp_path):
    path = write_set(tmp_path, style='warptools')
    lines, labels, rows = read_rows(tmp_path / 'tomograms.star', 'ts1')
    number, row = list(rows.items())[2]
    values = [2 * float(v) for v in row[0].strip('[]').split(',')]
    lines[number] = ' '.join([f'[{",".join(map(str, values))}]', *row[1:]])
    (tmp_path / 'tomograms.star').write_text('\n'.join(lines))
    with pytest.raises(InputError, match=rf'line {number + 1}\).*no rotation'):
        load_stack(path)


def test_tomograms_may_be_named_by_the_user(tmp_path):
    path = write_set(tmp_path)
    whole = describe_images(path)
    path.unlink()
    with pytest.raises(InputError, match='--tomograms'):
        load_stack(tmp_path / 'particles.star')
    require_same(describe_images(tmp_path / 'particles.star', tomograms=tmp_path / 'tomograms.star'), whole)


def test_pose_files_do_not_belong_to_a_set(tmp_path):
    with pytest.raises(InputError, match='--poses'):
        load_stack(write_set(tmp_path), poses='poses.star')


# ---------------------------------------------------------------- what peers get wrong

def test_no_dose_is_guessed_from_the_cosine(data_dir):
    """A peer ranks the tilts by cosine: 62 of 219 images get another's dose, by up to 6.5 e/Å²."""
    table = load_stack(data_dir / WARP, pixel_size=15.0).table
    bfactor = np.array(table.source.table.read_columns(['rlnCtfBfactor'])['rlnCtfBfactor'], float)
    np.testing.assert_array_equal(table.rows['dose'], bfactor / -4)
    counts = table.rows.groupby('particle').size()
    assert (len(bfactor), counts.min(), counts.max()) == (219, 24, 39)
    for _, one in table.rows.groupby('particle'):
        assert one['dose'].is_unique and (one.sort_values('dose')['order'].diff().dropna() > 0).all()
    by_tilt = table.rows.groupby('micrograph')[['dose', 'order']].nunique()
    assert (by_tilt == 1).all().all()  # images of one tilt share them
    assert table.dose_convention == 'after'


def test_hidden_frames_shift_no_dose(data_dir):
    """A peer gives the doses of the first visible frames to those that are visible: 22 of 710 right under half-sets."""
    path = data_dir / f'{WARPTOOLS}_optimisation_set.star'
    table = load_stack(path).table
    counts = table.rows.groupby('particle').size()
    assert (table.n_images, table.n_particles, counts.min(), counts.max()) == (1430, 40, 34, 37)
    file = data_dir / f'{WARPTOOLS}_tomograms.star'
    for name, one in table.rows.groupby('tomogram'):
        _, labels, rows = read_rows(file, name)
        dose = np.array([float(row[labels.index('MicrographPreExposure')]) for row in rows.values()])
        np.testing.assert_allclose(one['dose'], dose[one['frame']])
    _, labels, rows = read_rows(data_dir / f'{WARPTOOLS}.star', 'particles')
    for p, row in enumerate(rows.values()):
        shown = np.flatnonzero([flag == '1' for flag in row[labels.index('TomoVisibleFrames')].strip('[]').split(',')])
        np.testing.assert_array_equal(table.rows['frame'][table.rows['particle'] == p], shown)


def link_warptools(data, folder):
    """Copy the star files of the real set to a folder, with a link to its stacks."""
    for suffix in ('.star', '_optimisation_set.star', '_tomograms.star'):
        source = data / f'{WARPTOOLS}{suffix}'
        (folder / source.name).write_text(source.read_text())
    (folder / Path(WARPTOOLS).name).symlink_to(data / WARPTOOLS)
    return folder / f'{Path(WARPTOOLS).name}_optimisation_set.star'


@pytest.mark.parametrize('operations', [('shuffle', 'filter', 'split'), ('split', 'shuffle', 'filter'), ('filter', 'split', 'shuffle')], ids=' '.join)
def test_real_particles_of_interleaved_tomograms_keep_their_poses(data_dir, tmp_path, operations):
    """A peer gives 38 of 40 particles another's pose where tomograms are interleaved."""
    path = link_warptools(data_dir, tmp_path)
    whole = describe_images(path)
    parts = [describe_images(file) for file in rewrite(path, operations, seed=1)]
    merged = {pixels: image for part in parts for pixels, image in part.items()}
    assert len(merged) == sum(map(len, parts)) > 600
    require_same(merged, {pixels: whole[pixels] for pixels in merged})


def test_halves_are_of_particles(tmp_path):
    """A peer splits half-maps by image."""
    path = write_warp(tmp_path)
    stack = load_stack(path)
    halves = read_halves(stack)
    assert halves.tolist() == [1, 2, 1, 2]
    lines, labels, rows = read_rows(path, '')
    number, row = list(rows.items())[0]
    row[labels.index('RandomSubset')] = '2'
    lines[number] = ' '.join(row)
    path.write_text('\n'.join(lines))
    with pytest.raises(InputError, match='both half-sets'):
        read_halves(load_stack(path))


def test_float16_stacks_of_real_data_are_read(data_dir):
    stack = load_stack(data_dir / f'{WARPTOOLS}_optimisation_set.star')
    assert stack.images.headers[0].dtype == np.dtype('f2')
    images = stack.read_images(torch.tensor([0, 700, 1429]))
    assert images.dtype == torch.float32 and bool(images.isfinite().all()) and float(images.std()) > 0.1
    assert stack.premultiplied and stack.dose_weighted


def test_a_complete_relion_project(data_dir, tmp_path):
    root = data_dir / RELION5
    options = {'tomograms': root / 'CtfRefine/job067/tomograms.star', 'require_images': False}
    for name in ('Refine3D/job074/run_data.star', 'Refine3D/job074/run_optimisation_set.star'):
        table = load_stack(root / name, **options).table
        assert (table.n_particles, table.particles['tomogram'].nunique(), table.box, table.premultiplied) == (9053, 5, 192, True)
    write_particles(tmp_path / 'out.star', table)
    assert (tmp_path / 'out.star').read_bytes() == (root / 'Refine3D/job074/run_data.star').read_bytes()
    chosen = np.isin(table.rows['particle'], np.arange(0, 9053, 3))
    write_particles(tmp_path / 'third_optimisation_set.star', table, chosen)
    again = read_table(tmp_path / 'third_optimisation_set.star', tomograms=options['tomograms'])
    pandas.testing.assert_frame_equal(again.rows.drop(columns='particle'), table.select(chosen).rows.drop(columns='particle'))


# ---------------------------------------------------------------- every verb

def test_settings_of_reading_reach_every_reader():
    names = set(choose_reading(DataConfig()))
    assert {'coordinates', 'tomograms', 'dose_scheme', 'premultiplied', 'dose_weighted', 'select'} <= names
    from recon_nb.cli import path_settings, reading

    assert names == set(reading)
    assert {'data.coordinates', 'data.tomograms'} <= set(path_settings)
    from recon_nb.encoding import file_settings

    assert names | {'particles'} == set(file_settings)


def test_inspect_says_what_came_from_where(written, capsys):
    assert main(['inspect', str(written)]) == 0
    text = capsys.readouterr().out
    for word in ('particles', 'tilts of a particle', 'accumulated dose', 'e/Å²', 'dose counted', 'tilt angles', 'degrees', 'dose read from', 'particle read from', 'Next: '):
        assert word in text, text
    assert ('tomograms  ' in text) == (written.name != 'pyp.star')
    assert ('8 of 35 frames are hidden' in text) == (written.name == 'run_optimisation_set.star')


def test_verbs_take_a_set_and_remember_how_it_was_read(tmp_path, capsys):
    path = write_set(tmp_path)
    path.unlink()
    tilts = tmp_path / 'doses.csv'
    tilts.write_text('\n'.join(['frame,dose', *(f'{frame},{EXPOSURE * rank}' for frame, rank in enumerate(np.argsort(np.argsort(ANGLES)).argsort()))]))
    given = ['--tomograms', str(tmp_path / 'tomograms.star'), '--dose-scheme', str(tilts)]
    particles = str(tmp_path / 'particles.star')
    assert main(['backproject', particles, '-o', str(tmp_path / 'map'), '--n-tilts', '3', *given]) == 0, capsys.readouterr().err
    assert main(['backproject', particles, '-o', str(tmp_path / 'fail')]) == 2 and '--tomograms' in capsys.readouterr().err
    small = ['--epochs', '1', '--zdim', '1', '--encoder-dim', '8', '--decoder-dim', '8', '--encoder-layers', '1', '--decoder-layers', '1', '--tilt-features', '4', '--no-analysis']
    assert main(['train', particles, '-o', str(tmp_path / 'run'), '--preset', 'et', *small, *given]) == 0, capsys.readouterr().err
    run = open_run(tmp_path / 'run')
    assert (run.config.data.dose_scheme, run.config.data.tomograms) == (str(tilts), str(tmp_path / 'tomograms.star'))
    assert {'tomograms', 'dose_scheme'} <= set(run.inputs['files'])
    assert main(['encode', str(tmp_path / 'run')]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(['encode', str(tmp_path / 'run'), particles, *given]) == 0
    assert 'normalise' not in capsys.readouterr().err  # on the run's scale, with what images were multiplied by taken back
    assert (tmp_path / 'run/latents/particles/0001.csv').read_text() == (tmp_path / 'run/latents/0001.csv').read_text()
    assert main(['train', '--resume', '-o', str(tmp_path / 'run'), '--epochs', '2', '--no-analysis']) == 0, capsys.readouterr().err


def test_backprojection_of_the_real_ribosomes(data_dir):
    """The tilts of each particle fit together, and the particles with each other."""
    stack = load_stack(data_dir / f'{WARPTOOLS}_optimisation_set.star')
    curve = backproject_stack(stack).fsc.fsc
    assert float(curve[1]) > 0.8 and float(curve[3]) > 0.55
    wrong = load_stack(data_dir / f'{WARPTOOLS}_optimisation_set.star').table
    assert len(open_stack(wrong)) == 1430
