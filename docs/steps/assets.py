"""Scripts that the pages need, kept in the site itself: plotly from its wheel, MathJax from npm, its version pinned.

Without npm the site still builds: formulas are then shown as their TeX source.
"""
import base64
import hashlib
import shutil
import subprocess
import tarfile
from importlib.util import find_spec
from pathlib import Path

cache = Path(__file__).resolve().parents[1] / '_cache' / 'npm'
# name, version, sha512 of the archive as the registry states it, {folder or file in it: where it goes below _static}
packages = [
    ('mathjax', '3.2.2', 'Bt+SSVU8eBG27zChVewOicYs7Xsdt40qm4+UpHyX7k0/O9NliPc+x77k1/FEsPsjKPZGJvtRZM1vO+geW0OhGw==',
     {'es5/tex-chtml.js': 'mathjax/tex-chtml.js', 'es5/output/chtml/fonts/woff-v2': 'mathjax/output/chtml/fonts/woff-v2', 'LICENSE': 'mathjax/LICENSE'}),
]


def fetch_package(name, version, integrity):
    """Return the archive of an npm package, checked; None, with a line saying why, where it cannot be had."""
    archive = cache / f'{name.lstrip("@").replace("/", "-")}-{version}.tgz'
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        if shutil.which('npm') is None:
            print(f'   npm is not installed: the site goes without {name}')
            return None
        done = subprocess.run(['npm', 'pack', '--silent', f'{name}@{version}'], cwd=cache, capture_output=True, text=True)
        if done.returncode:
            print(f'   npm could not fetch {name} {version}: the site goes without it ({done.stderr.strip().splitlines()[-1:]})')
            return None
    if base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode() != integrity:
        archive.unlink()
        raise SystemExit(f'{archive.name} is not the archive whose hash stands in docs/steps/assets.py; it was deleted, run again')
    return archive


def unpack(archive, wanted, target):
    """Copy the wanted files of an npm archive below `target`."""
    with tarfile.open(archive) as bundle:
        for member in bundle.getmembers():
            inner = member.name.partition('/')[2]
            for source, place in wanted.items():
                if member.isfile() and (inner == source or inner.startswith(source + '/')):
                    file = target / place / inner[len(source) + 1:] if inner != source else target / place
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(bundle.extractfile(member).read())


def vendor_assets(target):
    """Put all scripts below `target` (the site's _static); return the names of packages that could not be had."""
    plotly = Path(find_spec('plotly').origin).parent / 'package_data' / 'plotly.min.js'
    file = target / 'plotly.min.js'
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists() or file.stat().st_size != plotly.stat().st_size:
        shutil.copy(plotly, file)
    missing = []
    for name, version, integrity, wanted in packages:
        archive = fetch_package(name, version, integrity)
        if archive is None:
            missing.append(name)
        else:
            unpack(archive, wanted, target)
    return missing
