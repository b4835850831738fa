"""How long the explorer takes to answer in a browser, at 400,000 particles.

    python benchmarks/explore_scale.py [--repeats 5] [-o benchmarks/results/explore_scale.csv]

400,000 synthetic particles (two large groups, one of 400) are served by `recon explore` to a chromium without a screen, and a mouse draws on them. Each line is
the time from the release of the mouse until the page says what the answer is: drawing in Python, the way through Voila and painting in the browser are all
in it. `opening` is the time from the address to a page that can be used, with a kernel that starts from nothing. The load of the machine stands beside the times,
since others may use it. Needs chromium and the packages voila and playwright.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from recon_nb.clouds import select_inside
from recon_nb.explore import load_exploration

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from explorer_page import ExplorerPage, list_missing, make_large_run, open_browser, serve_explorer  # noqa: E402


def measure(page: ExplorerPage, plane: np.ndarray, repeats: int) -> dict[str, list[float]]:
    """Return seconds by question."""
    angle = np.linspace(0, 2 * np.pi, 60)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    times: dict[str, list[float]] = {}

    def ask(name: str, act: object, answered: object) -> None:
        act()
        times.setdefault(name, []).append(page.wait_for(answered, name))

    for number in range(repeats):
        for name, centre, radius in (("lasso around a half", np.median(plane, axis=0), 2.0 + 0.1 * number), ("lasso around a thousandth", plane[-400:].mean(axis=0), 0.6 + 0.05 * number)):
            outline, before = centre + radius * circle, page.count_marked()
            ask(name, lambda outline=outline: page.draw(outline), lambda before=before: page.count_marked() not in (0, before))
            expected = int(select_inside(plane, [outline]).sum())
            assert abs(page.count_marked() - expected) <= 0.02 * expected + 4, (page.count_marked(), expected)
        before = page.get_support()
        ask("volume of a clicked particle", lambda number=number: page.click(plane[1000 * number]), lambda before=before: page.get_support() != before)
        title = "norm (latent units)" if number % 2 else "z2"
        ask("another colour", lambda number=number: page.choose("colour", "norm" if number % 2 else "z2"), lambda title=title: title in page.page.locator(".js-plotly-plot").first.inner_text())
    return times


def main() -> None:
    """Serve, draw, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).parent / "results" / "explore_scale.csv")
    given = parser.parse_args()
    if list_missing("voila"):
        parser.error(list_missing("voila"))
    with tempfile.TemporaryDirectory() as folder:
        run = make_large_run(Path(folder) / "run")
        plane = load_exploration(run).table[["pc1", "pc2"]].to_numpy()
        with serve_explorer(run.path, folder) as address, open_browser() as browser:
            start = time.perf_counter()
            page = ExplorerPage(browser, address)
            times = {"opening": [time.perf_counter() - start]} | measure(page, plane, given.repeats)
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    rows = [{"question": name, "particles": len(plane), "repeats": len(t), "median (s)": statistics.median(t), "longest (s)": max(t), "load per core": load} for name, t in times.items()]
    table = pd.DataFrame(rows).round(2)
    print(table.to_string(index=False))
    table.to_csv(given.out, index=False)


if __name__ == "__main__":
    main()
