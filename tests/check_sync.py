"""Check that the notebooks are clean and that recon_nb/ is exactly what they export.

The work is done on a copy, so a tree with unsaved changes is checked as it stands and left as it was. With
`--committed` (used by .ci/run) the tree must also equal its last commit.
"""
import difflib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def run(program, *arguments, cwd):
    """Run a program, this environment's if it has one of that name, and return its output; stop with that output if it fails."""
    own = Path(sys.executable).parent / program
    command = [str(own) if own.exists() else program, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(cwd)})
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def copy_tree(target):
    """Copy what nbdev reads and writes."""
    for name in ('settings.ini', 'pyproject.toml'):
        if (root / name).exists():
            shutil.copy(root / name, target / name)
    skip = shutil.ignore_patterns('.*', '__pycache__', '_proc', '_docs')
    for name in ('nbs', 'recon_nb'):
        shutil.copytree(root / name, target / name, ignore=skip)


def read_tree(folder):
    """Return {relative path: text} of the notebooks, the modules and pyproject.toml."""
    paths = [*folder.glob('nbs/**/*.ipynb'), *folder.glob('recon_nb/**/*.py'), folder / 'pyproject.toml']
    paths = [path for path in paths if path.exists() and not any(part.startswith('.') for part in path.relative_to(folder).parts)]
    return {str(path.relative_to(folder)): path.read_text(encoding='utf-8') for path in paths}


def show_difference(before, after, name):
    """Return the first lines of a unified diff."""
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), name, f'{name}, regenerated', lineterm='', n=1))
    return '\n'.join('    ' + line for line in lines[:20])


def compare(before, after, remedy):
    """Return one message for each file that is missing, left over or different."""
    problems = []
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            problems.append(f'{name}: no notebook exports it; delete it, or write its notebook')
        elif name not in before:
            problems.append(f'{name}: missing; {remedy}')
        elif before[name] != after[name]:
            problems.append(f'{name}: differs; {remedy}\n{show_difference(before[name], after[name], name)}')
    return problems


def check_clean_and_export(folder):
    """Return the problems found by cleaning and exporting anew inside `folder`."""
    before = read_tree(folder)
    run('nbdev_clean', cwd=folder)
    cleaned = read_tree(folder)
    problems = compare(before, cleaned, 'run nbdev_clean')
    for path in (folder / 'recon_nb').rglob('*.py'):
        if path.name != '__init__.py':
            path.unlink()
    run('nbdev_export', cwd=folder)
    remedy = 'run nbdev_export (or nbdev_update, to take an edit of the module back into its notebook)'
    return problems + compare(cleaned, read_tree(folder), remedy)


def check_committed():
    """Return what git calls changed or unknown."""
    if not (root / '.git').exists():
        return []
    changed = run('git', 'status', '--porcelain', cwd=root)
    return [f'not committed: {line}' for line in changed.splitlines()]


def main():
    """Print every problem; exit 1 if there is one."""
    problems = check_committed() if '--committed' in sys.argv[1:] else []
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        problems += check_clean_and_export(Path(folder))
    print('\n'.join(problems) or 'clean, exported, in step')
    sys.exit(bool(problems))


if __name__ == '__main__':
    main()
