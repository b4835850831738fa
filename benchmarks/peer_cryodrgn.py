"""What the benchmarks ask of cryoDRGN, run by the Python of an environment that has it (`pip install cryodrgn==4.3.1`).

    PEER_PYTHON benchmarks/peer_cryodrgn.py throughput --box 64 --dim 256 --batch 8 --steps 10
    PEER_PYTHON benchmarks/peer_cryodrgn.py volumes RUN --epoch 20 --particles rows.txt -o OUT.npz
    PEER_PYTHON benchmarks/peer_cryodrgn.py homogeneous WEIGHTS CONFIG -o OUT.npz

It calls cryoDRGN's public functions and its own training step, and imports nothing of recon_nb.
"""

import argparse
import time

import numpy as np
import torch
from cryodrgn.commands.train_vae import train_batch
from cryodrgn.lattice import Lattice
from cryodrgn.models import HetOnlyVAE, load_decoder
from cryodrgn.utils import load_pkl, load_yaml


def measure_throughput(box: int, dim: int, batch: int, steps: int, *, device: str = "cpu") -> tuple[float, float]:
    """Return images per second, and per CPU second, of cryoDRGN's own training step on random images; on a GPU in mixed precision, as its command line does."""
    torch.manual_seed(0)
    lattice = Lattice(box + 1, extent=0.5, device=torch.device(device))
    mask = lattice.get_circular_mask(box // 2)
    model = HetOnlyVAE(lattice, 3, dim, 3, dim, int(mask.sum()), 8, encode_mode="resid", enc_mask=mask, enc_type="gaussian",
                       enc_dim=None, domain="fourier", activation=torch.nn.ReLU, feat_sigma=0.5).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    on_gpu = torch.device(device).type == "cuda"
    mixed = {"use_amp": True, "scaler": torch.cuda.amp.GradScaler()} if on_gpu else {}
    ctf = torch.tensor([3.0, 15000.0, 15000.0, 0.0, 300.0, 2.7, 0.1, 0.0]).repeat(batch, 1).to(device)
    rot = torch.linalg.qr(torch.randn(batch, 3, 3))[0].to(device)

    def step() -> None:
        images = torch.randn(batch, box + 1, box + 1, device=device)
        train_batch(model, lattice, images, None, rot, torch.randn(batch, 2, device=device), optimizer, 0.125, ctf_params=ctf, **mixed)

    for _ in range(3 if on_gpu else 1):
        step()
    start, cpu = time.perf_counter(), time.process_time()  # each step waits for the device: it reads the loss
    for _ in range(steps):
        step()
    return batch * steps / (time.perf_counter() - start), batch * steps / (time.process_time() - cpu)


def decode_volumes(run: str, epoch: int, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return latents of all particles and the volumes of some."""
    config = load_yaml(f"{run}/config.yaml")
    model, lattice = HetOnlyVAE.load(config, f"{run}/weights.{epoch}.pkl", device="cpu")
    model.eval()
    z = load_pkl(f"{run}/z.{epoch}.pkl")
    norm = config["dataset_args"]["norm"]
    with torch.no_grad():
        volumes = [model.decoder.eval_volume(lattice.coords, lattice.D, lattice.extent, norm, z[r]).numpy() for r in rows]
    return {"z": z, "volumes": np.stack(volumes).astype(np.float32), "norm": np.array(norm)}


def decode_homogeneous(weights: str, config: str) -> dict[str, np.ndarray]:
    """Return the volume of a homogeneous run."""
    content = load_yaml(config)
    decoder, lattice = load_decoder(config, weights, device="cpu")
    decoder.eval()
    with torch.no_grad():
        volume = decoder.eval_volume(lattice.coords, lattice.D, lattice.extent, content["dataset_args"]["norm"])
    return {"volume": volume.numpy().astype(np.float32)}


def main() -> None:
    """Parse the command line and answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    speed = verbs.add_parser("throughput")
    for name, default in (("box", 64), ("dim", 256), ("batch", 8), ("steps", 10), ("threads", 2)):
        speed.add_argument(f"--{name}", type=int, default=default)
    speed.add_argument("--device", default="cpu")
    volumes = verbs.add_parser("volumes")
    volumes.add_argument("run")
    volumes.add_argument("--epoch", type=int, required=True)
    volumes.add_argument("--particles", required=True)
    volumes.add_argument("-o", "--output", required=True)
    single = verbs.add_parser("homogeneous")
    single.add_argument("weights")
    single.add_argument("config")
    single.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    if args.verb == "throughput":
        torch.set_num_threads(args.threads)
        print(*measure_throughput(args.box, args.dim, args.batch, args.steps, device=args.device))
    elif args.verb == "volumes":
        np.savez(args.output, **decode_volumes(args.run, args.epoch, np.loadtxt(args.particles, dtype=int, ndmin=1)))
    else:
        np.savez(args.output, **decode_homogeneous(args.weights, args.config))


if __name__ == "__main__":
    main()
