"""Selections go back into the user's file and come out as the same particles; filters find what is no particle."""
import json

import numpy as np
import pandas as pd
import pytest
import torch

from recon_nb.assemblies import add_junk, make_phantom_assembly, simulate_assembly_volumes
from recon_nb.core import InputError, RunError, Selection
from recon_nb.datasets import load_stack
from recon_nb.export import export_selection, read_own_rows, write_selected
from recon_nb.files import CryosparcSource, StarSource, load_cryosparc, read_particles, read_star_blocks, write_particles
from recon_nb.filtering import choose_particles, filter_run, tabulate_particles
from recon_nb.runs import create_run, make_config
from recon_nb.simulate import make_phantom, simulate_stack, write_simulation
from recon_nb.subspace import run_subspace
from recon_nb.tiltseries import read_table
from recon_nb.tiltsimulation import TiltScheme, list_dose_symmetric, simulate_tilts, write_tilts
from recon_nb.training import train_run

METADATA = (  # every file in metadata/ that is a list of 2-D images; the rest is refused by the reader (test_files)
    'FinalRefinement-OriginalParticles-PfCRT.star', 'cryosparc_J2_particles_exported.cs', 'cryosparc_P12_J24_001_particles.cs', 'empiar_10076_7.cs', 'empiar_10076_7.star',
    'relion31.star', 'relion31.v2.star', 'relion5.star', 'sample_particles_relion30.star', 'sample_particles_relion31.star',
)
WITH_POSES = {name for name in METADATA if name not in ('cryosparc_J2_particles_exported.cs', 'empiar_10076_7.cs', 'empiar_10076_7.star')}
TOMO = {
    'warp': 'warp_particleseries/sta_testing_bin8.star',
    'warptools': 'warptools_70s/warptools_test_4-tomos_10-ptcls_box-32_angpix-12_optimisation_set.star',
    'simulated': 'simulated_10076/10076_both_32_sim.star',
}
CLOSED_FORM = {'model.rank': 4, 'model.manifold': 'linear', 'subspace.test': False, 'subspace.rounds': 0}


def draw(n_total, seed=0):
    """Select about half of the particles, never none and never all."""
    chosen = np.random.default_rng(seed).permutation(n_total)[: max(1, n_total // 2)]
    return Selection(chosen, n_total, 'half of them')


def require_same(table, chosen, back, atol=2e-5):
    """Compare what was read back with the chosen particles of the first table: images, poses, CTF, half-sets."""
    rows = np.flatnonzero(np.isin(table.rows['particle'], chosen.particles))
    assert back.n_images == len(rows) and back.n_particles == len(chosen)
    for name in ('stack', 'slice', 'half', 'particle_name', 'tomogram', 'frame', 'dose', 'order'):
        if name in back.rows:
            assert back.rows[name].tolist() == table.rows[name].to_numpy()[rows].tolist(), name
    for get, there in (('get_poses', table.has_poses), ('get_ctf', table.has_ctf)):
        if there:
            for name, values in vars(getattr(back, get)()).items():
                torch.testing.assert_close(values, getattr(getattr(table, get)(), name)[rows], rtol=1e-6, atol=atol)
    assert back.pixel_size == pytest.approx(table.pixel_size, rel=1e-7)


# ---------------------------------------------------------------- proof 6: round trips


def test_the_list_of_files_is_complete(data_dir):
    readable, posed = set(), set()
    for path in sorted((data_dir / 'metadata').iterdir()):
        try:
            table = read_table(path)
        except InputError:
            continue
        readable.add(path.name)
        posed |= {path.name} if table.has_poses else set()
    assert readable == set(METADATA) and posed == WITH_POSES


@pytest.mark.parametrize('name', METADATA)
def test_round_trip_in_the_files_own_format(data_dir, tmp_path, name):
    path = data_dir / 'metadata' / name
    table = read_table(path)
    chosen = draw(table.n_particles)
    chosen.save(tmp_path / 'half.json')
    written = export_selection(tmp_path / 'half.json', to=path.suffix[1:], particles=str(path))
    require_same(table, chosen, read_table(written))
    if path.suffix == '.cs':
        before, after = load_cryosparc(path), load_cryosparc(written)
        assert after.dtype == before.dtype
        assert after.tobytes() == before[list(chosen.particles)].tobytes()  # every field, uid among them
        assert after['uid'].tolist() == before['uid'][list(chosen.particles)].tolist()
    else:  # the very lines of the user's file, every other block untouched
        before, after = read_star_blocks(path), read_star_blocks(written)
        for old, new in zip(before, after, strict=True):
            rows = list(chosen.particles) if old.columns == table.source.table.columns and len(old) == table.n_images else range(len(old))
            assert new.columns == old.columns and new.lines == [old.lines[i] for i in rows]


@pytest.mark.parametrize('name', METADATA)
def test_round_trip_through_cryosparc(data_dir, tmp_path, name):
    path = data_dir / 'metadata' / name
    table = read_table(path)
    chosen = draw(table.n_particles, seed=2)
    chosen.save(tmp_path / 'half.json')
    written = export_selection(tmp_path / 'half.json', to='cs', particles=str(path))
    back = read_table(written)
    require_same(table, chosen, back, atol=2e-3)  # cryoSPARC keeps single precision: defoci of 20,000 Å to .002
    records = load_cryosparc(written)
    images = set(zip(back.rows['stack'], back.rows['slice']))  # relion5.star names one image twice
    assert len(set(records['uid'].tolist())) == len(images) >= len(chosen) - (name == 'relion5.star')
    whole = Selection(range(table.n_particles), table.n_particles)
    all_of_them = load_cryosparc(write_selected(tmp_path / 'all.cs', read_own_rows(path), whole))
    assert records['uid'].tolist() == all_of_them['uid'][list(chosen.particles)].tolist()  # the same particle has the same uid in every selection


@pytest.mark.parametrize('version', ['3.0', '3.1', '5'])
@pytest.mark.parametrize('name', METADATA)
def test_round_trip_through_every_relion(data_dir, tmp_path, name, version):
    path = data_dir / 'metadata' / name
    table = read_table(path)
    chosen = draw(table.n_particles, seed=1)
    chosen.save(tmp_path / 'half.json')
    written = export_selection(tmp_path / 'half.json', to='star', particles=str(path), version=version)
    back = read_table(written)
    require_same(table, chosen, back)
    assert (back.source.optics is None) == (version == '3.0')
    if isinstance(table.source, StarSource):  # what only the user knows is still there
        known = {'rlnVoltage', 'rlnSphericalAberration', 'rlnAmplitudeContrast', 'rlnMagnification', 'rlnDetectorPixelSize', 'rlnPixelSize', 'rlnImagePixelSize', 'rlnImageSize',
                 'rlnOpticsGroup', 'rlnOriginX', 'rlnOriginY', 'rlnOriginXAngst', 'rlnOriginYAngst'}
        columns = [c for c in table.source.table.columns if c not in known]
        kept = table.source.table.select(np.array(chosen.particles)).read_columns(columns)
        assert back.source.table.read_columns(columns) == kept


@pytest.mark.parametrize('name', TOMO)
def test_round_trip_of_tilt_series(data_dir, tmp_path, name):
    path = data_dir / 'tomo' / TOMO[name]
    table = read_table(path)
    chosen = draw(table.n_particles)
    out = tmp_path / ('half_optimisation_set.star' if 'optimisation_set' in path.name else 'half.star')
    write_selected(out, read_own_rows(path), chosen)
    back = read_table(out, datadir=data_dir / 'tomo' / TOMO[name].split('/')[0])
    require_same(table, chosen, back)
    assert back.particles['particle_name'].tolist() == table.particles['particle_name'].to_numpy()[list(chosen.particles)].tolist()
    with pytest.raises(InputError, match='leave out the version|out of'):
        write_selected(tmp_path / 'v.star', read_own_rows(path), Selection(chosen.particles, table.n_particles + (name in ('warp', 'simulated'))), '3.1')


@pytest.mark.slow
def test_round_trip_of_a_relion_project(data_dir, tmp_path):
    root = data_dir / 'tomo' / 'relion5_project'
    path, tomograms = root / 'Refine3D/job074/run_data.star', str(root / 'CtfRefine/job067/tomograms.star')
    table = read_table(path, tomograms=tomograms)
    run = create_run(tmp_path / 'run', make_config(str(path), changes={'data.tomograms': tomograms}))
    chosen = draw(table.n_particles)
    chosen.save(run.path / 'selections' / 'half.json')
    written = export_selection(run.path / 'selections' / 'half.json')
    require_same(table, chosen, read_table(written, tomograms=tomograms))
    before, after = (next(b for b in read_star_blocks(p) if b.name == 'particles') for p in (path, written))
    assert after.lines == [before.lines[i] for i in chosen.particles]


def test_images_follow_the_rows(data_dir, tmp_path):
    path = data_dir / 'images' / 'relion_proj_batch.star'
    stack = load_stack(path)
    chosen = draw(stack.n_particles)
    chosen.save(tmp_path / 'half.json')
    part = load_stack(export_selection(tmp_path / 'half.json', particles=str(path)), datadir=path.parent)
    same = load_stack(path, select=tmp_path / 'half.json')  # what recon train --select reads
    np.testing.assert_array_equal(part.images[np.arange(part.n_images)], stack.images[np.array(chosen.particles)])
    torch.testing.assert_close(part.read_images(torch.arange(part.n_images)), same.read_images(torch.arange(same.n_images)))


def test_a_bare_stack_becomes_a_star_file(tmp_path):
    star = write_simulation(tmp_path / 'data', simulate_stack(make_phantom('ribosome', 16), 9, seed=0))
    run = create_run(tmp_path / 'run', make_config(str(star.with_suffix('.mrcs')), changes={'data.poses': str(star), 'data.ctf': str(star)}))
    chosen = draw(9)
    chosen.save(run.path / 'selections' / 'half.json')
    require_same(read_table(star), chosen, read_table(export_selection(run.path / 'selections' / 'half.json')))


# ---------------------------------------------------------------- proof 4: junk, at the scale of a test


def make_run(folder, *, n=1200, box=32, snr=0.2, seed=0, **junk):
    """Make a landscape with junk and a closed-form run on it; return run and truth."""
    assembly = make_phantom_assembly()
    simulated = simulate_stack(simulate_assembly_volumes(assembly, box), n, weights=assembly.weights, names=list(assembly.states.index), snr=snr, seed=seed)
    for kind, fraction in junk.items():
        simulated = add_junk(simulated, fraction, kind=kind, seed=seed)
    star = write_simulation(folder / 'data', simulated)
    return run_subspace(folder / 'run', make_config(str(star), changes=CLOSED_FORM), device='cpu'), simulated.labels.numpy() < 0


@pytest.fixture(scope='module')
def mixed(tmp_path_factory):
    """A run on a set of which 10 % are noise and 10 % edges."""
    return make_run(tmp_path_factory.mktemp('mixed'), noise=0.125, edge=1 / 9)


@pytest.mark.parametrize('method', ['kmeans', 'gmm'])
def test_clusters_remove_a_fifth_of_junk(mixed, method):
    run, is_junk = mixed
    kept = filter_run(run, method=method, out=f'by_{method}', device='cpu').mask
    assert (~kept)[is_junk].mean() >= 0.95
    assert kept[~is_junk].mean() >= 0.95


@pytest.mark.slow
def test_zscore_removes_a_few_edges(tmp_path):
    run, is_junk = make_run(tmp_path, edge=0.03 / 0.97)
    kept = filter_run(run, method='zscore', out='clean', device='cpu').mask
    assert is_junk.mean() == pytest.approx(0.03, abs=0.001)
    assert (~kept)[is_junk].mean() >= 0.95
    assert kept[~is_junk].mean() >= 0.95
    assert (~kept)[~is_junk].sum() <= 0.1 * (~kept).sum()  # false alarms: 5 % are meant, in each of two columns


@pytest.mark.slow
def test_nothing_is_removed_where_there_is_no_junk(tmp_path):
    run, _ = make_run(tmp_path)
    table = tabulate_particles(run, device='cpu')
    for method in ('kmeans', 'gmm', 'zscore'):
        assert len(choose_particles(table, len(table), method)[0]) >= 0.98 * len(table), method
    kept = choose_particles(table, len(table), 'zscore')[0].mask
    state = pd.read_csv(tmp_path / 'data' / 'truth.csv')['name'].to_numpy()
    assert kept.mean() >= 0.995 and min(kept[state == name].mean() for name in np.unique(state)) >= 0.97  # no state is light enough to be thrown away


@pytest.mark.slow
def test_the_same_seed_filters_the_same(mixed):
    run, _ = mixed
    first, second = (filter_run(run, method='gmm', out=f'seed_{i}', seed=3, device='cpu') for i in range(2))
    assert first == second


# ---------------------------------------------------------------- what a filter leaves


def test_filter_writes_files_and_report(mixed):
    run, _ = mixed
    chosen = filter_run(run, method='zscore', out='z', device='cpu')
    written = json.loads((run.path / 'selections' / 'z.json').read_text())
    assert written['n_total'] == chosen.n_total and tuple(written['particles']) == chosen.particles and 'contrast' in written['reason']
    stack = load_stack(run.config.data.particles, select=run.path / 'selections' / 'z.json')
    assert stack.particles.tolist() == list(chosen.particles)
    assert read_table(run.path / 'selections' / 'z.star').rows['slice'].tolist() == list(chosen.particles)
    folder = run.analysis_dir(1) / 'filtering'
    assert {'measures.csv', 'z_particles.png', 'z_images.png'} <= {p.name for p in folder.iterdir()}
    report = (run.analysis_dir(1) / 'report.html').read_text()
    assert 'id="selection-z"' in report and report.count('id="selection-z"') == 1
    with pytest.raises(InputError, match='exists .*z.json.*; choose another name'):
        filter_run(run, out='z', device='cpu')


def test_filters_follow_one_another_and_are_compared(mixed):
    run, _ = mixed
    first = filter_run(run, method='column', columns=['contrast'], low=0.5, out='first', device='cpu')
    second = filter_run(run, method='column', columns=['residual'], high=1.2, out='second', within='first', compare=['first'], device='cpu')
    assert set(second.particles) < set(first.particles)
    counts = pd.read_csv(run.analysis_dir(1) / 'filtering' / 'second_overlaps.csv')
    assert counts['n_particles'].sum() == first.n_total
    assert counts[counts['second'] & ~counts['first']].empty
    Selection([0], 5).save(run.path / 'selections' / 'foreign.json')
    for compare, match in ((['first', 'second', 'foreign'], 'one or two others; found 3'), (['foreign'], 'Selections of one file'), (['first', 'first'], 'different names')):
        with pytest.raises(InputError, match=match):  # before anything is written
            filter_run(run, method='column', columns=['contrast'], low=0.5, out='third', compare=compare, device='cpu')
    assert not list((run.path / 'selections').glob('third.*'))


@pytest.mark.slow
def test_a_run_of_some_particles_selects_out_of_the_file(mixed, tmp_path):
    run, _ = mixed
    filter_run(run, method='column', columns=['contrast'], low=0.7, out='good', device='cpu')
    path = run.path / 'selections' / 'good.json'
    good = Selection.load(path)
    second = run_subspace(tmp_path / 'second', make_config(run.config.data.particles, changes=CLOSED_FORM | {'data.select': str(path)}), device='cpu')
    chosen = filter_run(second, method='zscore', out='again', device='cpu')
    rest = filter_run(second, method='zscore', out='rest', invert=True, device='cpu')
    assert chosen.n_total == good.n_total
    assert set(chosen.particles) | set(rest.particles) == set(good.particles) and not set(chosen.particles) & set(rest.particles)


@pytest.mark.slow
def test_a_homogeneous_run_has_outliers_but_no_clusters(tmp_path):
    simulated = add_junk(simulate_stack(make_phantom('ribosome', 24)[2:], 300, snr=0.3, seed=0), 0.1, kind='noise', seed=0)
    star = write_simulation(tmp_path / 'data', simulated)
    changes = {'model.zdim': 0, 'model.decoder': 'voxel', 'train.epochs': 3, 'train.n_workers': 0, 'train.learning_rate': 0.02}
    run = train_run(tmp_path / 'run', make_config(str(star), changes=changes), device='cpu')
    kept = filter_run(run, method='column', columns=['contrast'], low=float(tabulate_particles(run, device='cpu')['contrast'].median()) / 2, out='c', device='cpu').mask
    assert kept[:300].mean() > 0.95 and kept[300:].mean() < 0.1
    with pytest.raises(InputError, match='homogeneous'):
        filter_run(run, method='gmm', out='g', device='cpu')


def test_a_tilt_series_is_kept_or_removed_as_one(tmp_path):
    series = simulate_tilts(make_phantom('ribosome', 24), 120, scheme=TiltScheme(list_dose_symmetric(30, 15), 6.0), weights=[1, 1, 1], snr=0.3, missing=0.2, seed=0)
    star = write_tilts(tmp_path / 'data', series)
    run = run_subspace(tmp_path / 'run', make_config(str(star), changes=CLOSED_FORM | {'model.rank': 2}), device='cpu')
    table = tabulate_particles(run, device='cpu')
    assert len(table) == 120 and table['contrast'].between(0.6, 1.6).mean() > 0.95
    limit = float(table['contrast'].quantile(0.3))
    chosen = filter_run(run, method='column', columns=['contrast'], low=limit, out='upper', device='cpu')
    back = read_table(run.path / 'selections' / 'upper.star')
    whole = read_table(star).rows
    assert len(chosen) == 84 and back.n_particles == 84
    assert back.n_images == whole['particle'].isin(chosen.particles).sum()


def test_a_cryosparc_run_writes_cs_with_uid(data_dir, tmp_path):
    original = read_particles(data_dir / 'metadata' / 'cryosparc_P12_J24_001_particles.cs').select(np.arange(400))
    simulated = simulate_stack(make_phantom('ribosome', 24), labels=np.arange(400) % 3, ctf=original.get_ctf(), snr=0.5, max_shift=5.0, seed=0)
    star = write_simulation(tmp_path / 'data', simulated)
    cs = star.with_suffix('.cs')
    table = write_particles(cs, original, poses=simulated.stack.poses, stack='particles.mrcs', pixel_size=simulated.stack.pixel_size, box=24)
    assert isinstance(table.source, CryosparcSource)
    run = run_subspace(tmp_path / 'run', make_config(str(cs), changes=CLOSED_FORM | {'model.rank': 2}), device='cpu')
    chosen = filter_run(run, method='column', columns=['residual'], high=1.0, out='half', device='cpu')
    written = load_cryosparc(run.path / 'selections' / 'half.cs')
    assert written.tobytes() == load_cryosparc(cs)[list(chosen.particles)].tobytes()
    as_star = export_selection(run.path / 'selections' / 'half.json', to='star')
    require_same(read_table(cs), chosen, read_table(as_star))


def test_a_run_of_images_in_memory_is_refused(tmp_path):
    simulated = simulate_stack(make_phantom('ribosome', 16), 200, snr=0.5, seed=0)
    run = run_subspace(tmp_path / 'run', make_config('', changes=CLOSED_FORM | {'model.rank': 2}), stack=simulated.stack, device='cpu')
    with pytest.raises(RunError, match='images in memory'):
        filter_run(run, out='a', device='cpu')
