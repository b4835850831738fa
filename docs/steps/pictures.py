"""Pictures of the page of conventions, drawn by the package itself so that they cannot say anything else than it does."""
import hashlib
from pathlib import Path

from steps.execute import trace_module


def hash_pictures():
    """Return a hash of this file and of the modules that it draws with."""
    modules = {}
    for name in ('imaging', 'so3', 'fourier', 'ctf', 'core'):
        modules |= trace_module(name)
    parts = [Path(__file__).read_text(encoding='utf-8'), *(modules[name] for name in sorted(modules))]
    return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:20]


def make_letter(box=64):
    """Return a volume without any symmetry: a letter F in the plane of x and y, thicker at one end of its stem, and a ball above it in z."""
    import torch

    from recon_nb.core import Volume

    data, c = torch.zeros(box, box, box), box // 2
    z, y, x = torch.meshgrid(*[torch.arange(box) - c] * 3, indexing='ij')
    flat = z.abs() < 4
    data[flat & (x > -10) & (x < -4) & (y > -20) & (y < 20)] = 1.0  # the stem
    data[flat & (x >= -4) & (x < 14) & (y >= 14) & (y < 20)] = 1.0  # the long bar
    data[flat & (x >= -4) & (x < 8) & (y >= 0) & (y < 6)] = 1.0  # the short bar
    data[(x - 6) ** 2 + (y + 12) ** 2 + (z - 14) ** 2 < 30] = 2.0
    return Volume(data, 2.0)


def show(axis, picture, title, cmap='gray', names=('x (px)', 'y (px)')):
    """Draw an image with x to the right and y up, the origin marked."""
    box = picture.shape[-1]
    axis.imshow(picture, cmap=cmap, origin='lower', extent=(-box // 2 - 0.5, box // 2 - 0.5, -box // 2 - 0.5, box // 2 - 0.5))
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(names[0], fontsize=8)
    axis.set_ylabel(names[1], fontsize=8)
    axis.tick_params(labelsize=7)
    axis.plot(0, 0, '+', color='#D55E00', ms=8)


def project(volume, angles=(0.0, 0.0, 0.0), shift=(0.0, 0.0), ctf=None):
    """Return the image of a volume at RELION's angles (degrees) with a shift (Å) that centres it."""
    import torch

    from recon_nb.core import Poses
    from recon_nb.fourier import Lattice
    from recon_nb.imaging import project_volume
    from recon_nb.so3 import euler_to_matrix

    rot = euler_to_matrix(*[torch.tensor([a], dtype=torch.float64) for a in angles]).float()
    image = project_volume(volume, Poses(rot, torch.tensor([shift])), ctf)
    return Lattice(volume.box, volume.pixel_size).scatter(image)[0]


def draw_rotations(path, plt):
    """One object seen under each of RELION's three angles."""
    volume = make_letter()
    figure, axes = plt.subplots(1, 4, figsize=(11, 3.1), layout='constrained')
    for axis, angles, title in zip(axes, [(0, 0, 0), (0, 0, 30), (30, 0, 0), (0, 40, 0)], ['rot, tilt, psi = 0', 'psi = 30', 'rot = 30 (tilt 0: as psi)', 'tilt = 40']):
        show(axis, project(volume, tuple(map(float, angles))), title)
    figure.savefig(path)


def draw_shifts(path, plt):
    """What a shift in a star file means."""
    import torch

    from recon_nb.fourier import Lattice
    from recon_nb.imaging import shift_images

    volume = make_letter()
    lattice = Lattice(volume.box, volume.pixel_size)
    figure, axes = plt.subplots(1, 3, figsize=(8.4, 3.1), layout='constrained')
    show(axes[0], project(volume), 'centred')
    moved = project(volume, shift=(20.0, -12.0))
    show(axes[1], moved, 'image with shift (+20, -12) Å')
    axes[1].annotate('', xy=(0, 0), xytext=(-10, 6), arrowprops={'arrowstyle': '->', 'color': '#E69F00', 'lw': 2})
    back = lattice.scatter(shift_images(lattice.gather(moved), torch.tensor([20.0, -12.0]), lattice))
    show(axes[2], back, 'moved by +shift: centred again')
    figure.savefig(path)


def draw_contrast(path, plt):
    """The CTF, what it does to an image, and the sign of the data."""
    import torch

    from recon_nb.core import CTFParams
    from recon_nb.ctf import compute_ctf

    volume = make_letter()
    ctf = CTFParams.from_values(1, defocus_u=15000.0).map(lambda t: t.float())
    figure, axes = plt.subplots(1, 4, figsize=(11.5, 3), layout='constrained', width_ratios=[1.5, 1, 1, 1])
    k = torch.linspace(0, 0.25, 600)
    axes[0].plot(k, compute_ctf(ctf, torch.stack([k, torch.zeros_like(k)], -1))[0], lw=1)
    axes[0].axhline(0, color='k', lw=0.5)
    axes[0].set_xlabel('1/Å')
    axes[0].set_title('CTF, 1.5 µm underfocus: begins positive', fontsize=9)
    image = project(volume, ctf=ctf)
    show(axes[1], project(volume), 'projection')
    show(axes[2], image, 'image: particle bright (taken as is)')
    show(axes[3], -image, 'particle dark: --invert-contrast')
    figure.savefig(path)


def draw_half_plane(path, plt):
    """The coefficients that an image travels as, and the Hartley image of the papers."""
    import torch

    from recon_nb.fourier import Lattice, fft_center, to_hartley

    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.1), layout='constrained')
    transform = fft_center(project(make_letter()).double())
    show(axes[0], transform.abs().log1p(), '|F| of an image (log)', 'viridis', ('$k_x$', '$k_y$'))
    show(axes[1], torch.sign(to_hartley(transform)) * to_hartley(transform).abs().log1p(), 'Hartley: Re F - Im F', 'coolwarm', ('$k_x$', '$k_y$'))
    lattice = Lattice(16)
    points = axes[2].scatter(*lattice.k.T, c=torch.arange(lattice.n_coefficients), s=22, cmap='viridis')
    axes[2].scatter(*-lattice.k[1:].T, s=8, c='#cccccc')
    axes[2].set_aspect('equal')
    axes[2].set_title('half-plane, in the order of storage', fontsize=9)
    axes[2].set_xlabel('$k_x$')
    axes[2].set_ylabel('$k_y$')
    figure.colorbar(points, ax=axes[2], shrink=0.8)
    figure.savefig(path)


def draw_pictures(folder):
    """Draw all pictures into a folder, unless they are there and up to date."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp, key = folder / '.key', hash_pictures()
    if stamp.exists() and stamp.read_text() == key:
        return
    import matplotlib

    matplotlib.use('agg')
    import matplotlib.pyplot as plt

    plt.rcParams.update({'figure.dpi': 130, 'savefig.dpi': 130, 'figure.facecolor': 'white'})
    for name, draw in {'rotations': draw_rotations, 'shifts': draw_shifts, 'contrast': draw_contrast, 'half_plane': draw_half_plane}.items():
        draw(folder / f'{name}.png', plt)
        plt.close('all')
    stamp.write_text(key)
