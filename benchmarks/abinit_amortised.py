"""Poses from a network alone: what each part of the method gives, and how far it comes, on simulated sets with known truth.

    python benchmarks/abinit_amortised.py [--cases bar ablation published] [--variants NAME ...] [--seeds 0 1 2] [-o benchmarks/results/abinit_amortised.csv]

RECON_NB_DATA names the folder of test data. Images as in abinit_search.py, case snr1: 5,000 images of the 50S at D=32, SNR 1 after the CTF; a seed fixes poses, noise and start.

| case | what |
|---|---|
| bar | the closed-form map at the length that pays, five seeds; wanted: median over seeds <= 45 degrees in 300 CPU s |
| published | a network of coordinates trained by gradient, a residual encoder with sine layers, junk filter, disturbance, mask: the parts of the paper, fewer images shown |
| ablation | one part changed at a time around a base of 12 epochs, three seeds |
| more | the same, one seed |

Errors are what is left after the best rotation and hand, in degrees: of the best of all turns of an image (`median`, `within_20`), of the image as it is (`direct`). `other_hand` is the share within 20 degrees of the truth in the other hand. Rows with
junk replace a fifth of the images by noise and count the others. Seconds are CPU seconds of one thread, on a shared machine. Lines are appended as they come; what the file has already is not measured again.
"""

import argparse
import dataclasses
import os
import time
from pathlib import Path

import torch
from abinit_search import CASES as SETS
from abinit_search import append_row, list_done, simulate_case

from recon_nb.amortised import AmortisedConfig, make_amortised_config, solve_amortised
from recon_nb.core import keep_freed_memory, make_generator
from recon_nb.so3 import align_poses, mirror_rotations

BASE = {"epochs": 12.0, "disturbance": 0.0}
VARIANTS = {
    "base": {},
    "no curriculum": {"curriculum": 0.0},
    "images not turned": {"turns": "none", "mirror": False},
    "voxels by gradient": {"decoder": "voxels"},
    "FourierNet by gradient": {"decoder": "fouriernet"},
    "20 % junk, all kept": {"junk": True},
    "20 % junk, 0.8 kept by gain": {"junk": True, "keep": 0.8, "rank_by": "gain"},
    "poses disturbed": {"disturbance": 5.0},
    "sine layers": {"activation": "siren"},
}
MORE = {"not mirrored": {"mirror": False}, "turned by 90 degrees": {"turns": "four"}, "residual encoder": {"trunk": "resnet"}, "20 % junk, 0.8 kept by error": {"junk": True, "keep": 0.8}, "two guesses": {"n_heads": 2}, "rate 3e-3": {"learning_rate": 3e-3}}
CASES = {"bar": (["bar", "bar, poses disturbed"], range(5)), "ablation": (list(VARIANTS), range(3)), "more": (list(MORE), range(1)), "published": (["as-published"], range(1))}
KEYS = ("case", "variant", "map", "seed")
BAR = {"bar": {"epochs": 30.0, "n_starts": 2, "disturbance": 0.0}, "bar, poses disturbed": {"epochs": 30.0, "n_starts": 2, "disturbance": 5.0}}


def choose_config(case: str, variant: str) -> tuple[AmortisedConfig, bool]:
    "Return the settings of a row, and whether it has junk."
    if case == "published":
        return make_amortised_config("as-published", {"epochs": 6.0}), False
    changes = dict(BAR[variant] if case == "bar" else {**BASE, **{**VARIANTS, **MORE}[variant]})
    junk = changes.pop("junk", False)
    return AmortisedConfig(**changes), junk


def measure(case: str, variant: str, molecule: str, seed: int) -> dict:
    "Simulate a set, let a network learn it and score the poses."
    data = Path(os.environ["RECON_NB_DATA"])
    config, has_junk = choose_config(case, variant)
    simulated = simulate_case({**SETS["snr1"], "map": molecule, "seed": seed}, data, data / "simulated" / "small_64" / "streptavidin_1mk5x1stp_tetramer.mrc")
    stack, good = simulated.stack, torch.ones(5000, dtype=torch.bool)
    if has_junk:  # noise as strong as that of the others
        good = torch.rand(5000, generator=make_generator(seed, "junk")) >= 0.2
        pixels = stack.read_images(torch.arange(5000)).clone()
        pixels[~good] = simulated.noise_sigma * torch.randn(int((~good).sum()), 32, 32, generator=make_generator(seed, "junk noise"))
        stack = dataclasses.replace(stack, images=pixels)
    began = time.process_time()
    solution = solve_amortised(stack, config, seed=seed)
    seconds = time.process_time() - began
    rot, direct, truth = solution.poses.rot[good], solution.direct.rot[good], simulated.poses.rot[good]
    aligned = align_poses(rot, truth)
    other = align_poses(rot if aligned.mirrored else mirror_rotations(rot), truth, allow_mirror=False)
    near = lambda errors: float((errors < 20).float().mean())
    worst = solution.loss.argsort(descending=True)[: int((~good).sum())]
    return {
        "median": aligned.median, "within_20": near(aligned.errors), "other_hand": near(other.errors), "direct": align_poses(direct, truth).median, "share": max(solution.shares),
        "cpu_s": seconds, "steps": len(solution.history), "starts": config.n_starts, "junk_last": float((~good)[worst].float().mean()) if has_junk else "",
        "settings": " ".join(f"{f.name}={getattr(config, f.name)}" for f in dataclasses.fields(config) if getattr(config, f.name) != f.default),
    }


def main() -> None:
    "Measure what the file does not have yet."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--variants", nargs="+", help="only these")
    parser.add_argument("--map", default="50S", help="50S, 70S or streptavidin")
    parser.add_argument("--seeds", type=int, nargs="+", help="which seeds; otherwise as many as the case has")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results" / "abinit_amortised.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    done = list_done(options.output, KEYS)
    for case in options.cases:
        variants, seeds = CASES[case]
        for seed in options.seeds or seeds:
            for variant in variants:
                key = (case, variant, options.map, str(seed))
                if key in done or (options.variants and variant not in options.variants):
                    continue
                append_row(options.output, dict(zip(KEYS, key, strict=True)), measure(case, variant, options.map, seed))


if __name__ == "__main__":
    main()
