"""Broken data sets on disk, each broken in one way that occurs: `recon doctor` names it, says what to do, and ends with status 2."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recon_nb import doctor
from recon_nb.cli import main
from recon_nb.core import Poses, Volume, make_generator
from recon_nb.files import write_particles, write_stack, write_volume
from recon_nb.simulate import make_phantom, simulate_stack, tabulate_stack

root = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def sound():
    """Return 400 images of 32 px, far enough from focus for their CTF to change sign within the 24 Å that they show."""
    pool = torch.tensor([[40_000.0, 39_800, 0], [55_000, 54_700, 30], [70_000, 69_900, 60]])
    return simulate_stack([make_phantom('ribosome', 32)[-1]], 400, snr=0.3, defocus_pool=pool, seed=5).stack


def write(folder, stack, *, poses=None, ctf=None, images=None, pixel_size=None, stack_name='particles.mrcs'):
    """Write a set with some of its numbers replaced; return the star file."""
    write_stack(folder / stack_name, [np.asarray(stack.images if images is None else images)], stack.pixel_size)
    star = folder / 'particles.star'
    write_particles(star, tabulate_stack(poses or stack.poses, ctf or stack.ctf, particle=stack.particle, pixel_size=pixel_size or stack.pixel_size, box=stack.box))
    return star


@pytest.fixture
def examine(capsys):
    """Return a function that examines a file and returns exit status, findings, and standard error."""
    def run(*words):
        capsys.readouterr()
        status = main(['doctor', *map(str, words), '--json', '--device', 'cpu'])
        captured = capsys.readouterr()
        return status, json.loads(captured.out), captured.err
    return run


def find(findings, level):
    """Return {subject: sentence and remedy} of the findings of a level."""
    return {f['subject']: f"{f['sentence']} {f['remedy']}" for f in findings if f['level'] == level}


def test_a_sound_set_has_no_problem(examine, sound, tmp_path):
    status, findings, err = examine(write(tmp_path, sound))
    assert (status, err, find(findings, 'problem')) == (0, '', {})
    said = find(findings, 'ok')
    assert '400 particles' in said['file'] and 'no other reading' in said['poses'] and 'bright on dark' in said['contrast'] and 'belongs to these images' in said['CTF, pixels']
    assert 'poses of other images' in said['resolution']


turn = lambda stack, rot: Poses(rot.contiguous(), stack.poses.shift)
mix = lambda stack: torch.randperm(stack.n_images, generator=make_generator(3, 'mix'))

# name: what is written instead; the finding, and words that it must hold
faults = {
    'inverse rotations': (lambda s: {'poses': turn(s, s.poses.rot.mT)}, 'poses', ['from the image to the molecule']),
    'poses of other images': (lambda s: {'poses': s.poses[mix(s)]}, 'poses', ['do not know their poses', 'row by row', 'recon abinit']),
    'a row lost': (lambda s: {'poses': s.poses[torch.arange(400).roll(-1)]}, 'poses', ['row before', 'A row was lost']),
    'shifts negated': (lambda s: {'poses': Poses(s.poses.rot, -s.poses.shift)}, 'poses', ['other sign']),
    'shifts left behind': (lambda s: {'poses': Poses(s.poses.rot, s.poses.shift + 0), 'images': _centre(s)}, 'poses', ['centred already', 'to 0']),
    'shifts in pixels': (lambda s: {'poses': Poses(s.poses.rot, s.poses.shift / s.pixel_size)}, 'poses', ['in pixels of 12 Å']),
    'mirrored stack': (lambda s: {'images': s.images.flip(-1).roll(1, -1)}, 'poses', ['mirrored']),
    'dark particles': (lambda s: {'images': -s.images}, 'contrast', ['negative', '--invert-contrast']),
    'binned stack': (lambda s: {'pixel_size': s.pixel_size / 2}, 'CTF, pixels', ['about 12 Å, not 6 Å', '--pixel-size']),
    'CTF of other images': (lambda s: {'ctf': s.ctf[mix(s)]}, 'CTF, pixels', ['belong to other images', 'row by row']),
    'defocus in nm': (lambda s: {'ctf': replace(s.ctf, defocus_u=s.ctf.defocus_u / 10, defocus_v=s.ctf.defocus_v / 10)}, 'CTF, pixels', ['defoci are in nm', 'by 10']),
    'defocus in µm': (lambda s: {'ctf': replace(s.ctf, defocus_u=s.ctf.defocus_u / 1e4, defocus_v=s.ctf.defocus_v / 1e4)}, 'inspection', ['median defocus', 'nm or µm']),
}


def _centre(stack):
    """Return the images with their shifts undone."""
    from recon_nb.fourier import Lattice, compute_phase_ramp
    lattice = Lattice(stack.box, stack.pixel_size)
    ramp = compute_phase_ramp(lattice.coords, stack.poses.shift / stack.pixel_size)
    return lattice.scatter(lattice.gather(stack.images) * ramp)


@pytest.mark.parametrize('name', faults)
def test_a_fault_is_named_with_what_to_do(examine, sound, tmp_path, name):
    change, subject, words = faults[name]
    status, findings, err = examine(write(tmp_path, sound, **change(sound)))
    problems = find(findings, 'problem')
    assert status == 2 and err.count('\n') == 1 and 'to fix' in err and subject in err, err
    assert subject in problems, problems
    assert not [word for word in words if word not in problems[subject]], problems
    assert all(f['remedy'] for f in findings if f['level'] == 'problem' and f['subject'] != 'inspection'), problems


def test_a_stack_that_is_not_there(examine, sound, tmp_path):
    status, findings, _ = examine(write(tmp_path, sound, stack_name='elsewhere.mrcs'))
    assert status == 2 and '--datadir' in find(findings, 'problem')['inspection']
    assert 'seen from all sides' in find(findings, 'ok')['views']  # what the file says is examined all the same


def test_images_that_cannot_be_read(examine, sound, tmp_path):
    star = write(tmp_path, sound)
    raw = bytearray((tmp_path / 'particles.mrcs').read_bytes())
    raw[1024:1028] = np.float32(np.nan).tobytes()
    (tmp_path / 'particles.mrcs').write_bytes(raw)
    status, findings, _ = examine(star)
    assert status == 2 and 'NaN' in find(findings, 'problem')['file']
    star = write(tmp_path, sound)
    (tmp_path / 'particles.mrcs').write_bytes((tmp_path / 'particles.mrcs').read_bytes()[:-5000])
    status, findings, _ = examine(star)
    assert status == 2 and 'truncated' in find(findings, 'problem')['file']


def test_too_few_images_are_no_verdict(examine, sound, tmp_path):
    status, findings, _ = examine(write(tmp_path, sound.take(torch.arange(6))))
    assert status == 0 and 'Too little to tell' in find(findings, 'advice')['poses']


def test_one_defocus_for_all_is_no_verdict_on_the_ctf(examine, tmp_path):
    same = simulate_stack([make_phantom('ribosome', 32)[-1]], 200, snr=0.3, defocus_pool=torch.tensor([[20_000.0, 20_000, 0]]), seed=5).stack
    status, findings, _ = examine(write(tmp_path, same))
    assert status == 0 and 'nothing for it' in find(findings, 'advice')['CTF, pixels']


def test_a_ctf_of_their_own_is_no_problem_under_poor_poses(examine, sound, tmp_path):
    poor = simulate_stack([make_phantom('ribosome', 32)[-1]], 400, snr=0.3, defocus_pool=torch.tensor([[40_000.0, 39_800, 0], [55_000, 54_700, 30], [70_000, 69_900, 60]]), seed=5, rot_error=12.0).stack
    status, findings, err = examine(write(tmp_path, poor))
    assert status == 0 and 'belongs to these images' in find(findings, 'ok')['CTF, pixels'], findings


def test_a_mask_of_another_grid(examine, sound, tmp_path):
    star = write(tmp_path, sound.take(torch.arange(6)))
    levels = {}
    for name, box, pixel_size in (('same', 32, 12.0), ('sampled', 48, 8.0), ('other', 32, 6.0)):
        write_volume(tmp_path / f'{name}.mrc', Volume(torch.ones(box, box, box), pixel_size))
        found = [f for f in examine(star, '--mask', tmp_path / f'{name}.mrc')[1] if f['subject'] == 'mask'][0]
        levels[name] = found['level'], found['remedy']
    assert [level for level, _ in levels.values()] == ['ok', 'problem', 'problem']
    assert '--box 48' in levels['sampled'][1] and 'recon mask' in levels['other'][1]


def test_the_installation_alone(examine):
    status, findings, _ = examine()
    assert {'python', 'torch', 'processor', 'memory', 'disk', 'extra app'} <= {f['subject'] for f in findings}
    assert status == (2 if find(findings, 'problem') else 0)


def test_an_extra_that_is_not_installed_is_optional(monkeypatch):
    monkeypatch.setattr(doctor, 'find_missing', lambda extra='': ['a', 'b', 'c', 'd', 'e'] if extra == 'app' else [])
    app, *others = doctor.check_extras()
    assert (app.level, app.sentence) == ('optional', 'Not installed (only for recon explore): a, b, c, d and 1 more.')
    assert app.remedy == f"To have it: pip install -c {root}/constraints.txt -e '{root}[app]'"
    assert doctor.format_findings([app]).startswith('optional extra app') and {other.level for other in others} == {'ok'}


def test_installations_that_need_something(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, 'find_missing', lambda extra='': ['mrcfile'] if not extra else [])
    assert doctor.check_packages() == doctor.Finding('problem', 'packages', 'Not installed: mrcfile.', f'pip install -c {root}/constraints.txt mrcfile')
    monkeypatch.setattr(doctor.shutil, 'which', lambda name: '/usr/bin/nvidia-smi')
    if not torch.cuda.is_available():
        assert doctor.check_torch().level == 'problem'  # a GPU that torch does not find
    monkeypatch.setattr(doctor.os, 'access', lambda folder, mode: False)
    assert doctor.check_disk(tmp_path).level == 'problem'
