"""The subspace encoder and the low-rank decoder in a run folder: written, read, shared, and trained together."""
import pytest
import torch

from recon_nb.core import ConfigError, Volume
from recon_nb.fourier import Lattice
from recon_nb.lowrank import volumes_to_basis
from recon_nb.models import build_model
from recon_nb.runs import Checkpoint, create_run, make_config, read_log
from recon_nb.simulate import make_phantom, simulate_stack
from recon_nb.training import build_run_model, list_parameter_groups, load_dataset, load_model, train_run

box, rank = 16, 2
subspace = {'model.encoder': 'subspace', 'model.decoder': 'lowrank', 'model.rank': rank}


def make_basis(seed=0):
    """Return a basis (V, 2K) of a mean and two directions, at the scale of standardised images."""
    states = torch.stack([v.data for v in make_phantom('ribosome', box, seed=seed)])
    mean = states.mean(0)
    return volumes_to_basis(torch.stack([mean, states[1] - mean, states[2] - mean])) / box


def fill(model, seed=0):
    """Give a model a basis, and numbers of no meaning to whatever its manifold holds."""
    basis = make_basis(seed)
    generator = torch.Generator().manual_seed(seed)
    model.encoder.load_bases(torch.stack([basis, 0.9 * basis]), torch.rand(model.encoder.n_coefficients, generator=generator))
    if hasattr(model.decoder, 'basis'):
        model.decoder.basis.data.copy_(basis)
    for parameter in model.encoder.manifold.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize('decoder', ['lowrank', 'positional'])
@pytest.mark.parametrize(('manifold', 'zdim'), [('linear', 2), ('network', 2), ('curve', 1)])
def test_round_trip_through_a_run(tmp_path, manifold, zdim, decoder):
    """What the model says is what it says after safetensors; what encoder and decoder share is shared again."""
    changes = {**subspace, 'model.manifold': manifold, 'model.zdim': zdim, 'model.decoder': decoder, 'model.decoder_dim': 16}
    run = create_run(tmp_path / 'run', make_config(changes=changes), inputs={'data': {'box': box, 'pixel_size': 16.0}})
    model = fill(build_run_model(run.config, Lattice(box, 16.0)))
    run.save_checkpoint(Checkpoint(1, 0, model.state_dict(), {}, {}))
    again = load_model(run, device='cpu')
    if decoder == 'lowrank':
        assert again.encoder.manifold is again.decoder.manifold
    stack = simulate_stack(make_phantom('ribosome', box, seed=0), 10, snr=1.0, seed=0).stack
    batch = load_dataset(run.config, stack=stack).get_batch(torch.arange(10))
    for ours, theirs in zip(model.encode(batch), again.encode(batch), strict=True):
        assert torch.equal(ours, theirs)
    z = model.encode(batch)[0]
    assert z.shape == (10, zdim)
    assert torch.equal(model.decode_volumes(z[:2]), again.decode_volumes(z[:2]))
    assert not any(p.requires_grad for p in again.encoder.parameters())


def test_an_encoder_without_basis_is_refused():
    """Nothing is encoded with zeros in silence."""
    model = build_model(Lattice(box, 16.0), zdim=2, encoder='subspace', rank=rank)
    stack = simulate_stack(make_phantom('ribosome', box, seed=0), 4, snr=1.0, seed=0).stack
    with pytest.raises(ConfigError, match='--start subspace'):
        model.encode(load_dataset(make_config(), stack=stack).get_batch(torch.arange(4)))


def test_shared_parameters_are_named_once():
    """The optimiser gets every trainable parameter once, also when the manifold learns."""
    model = build_model(Lattice(box, 16.0), zdim=2, encoder='subspace', decoder='lowrank', rank=rank)
    assert [group['name'] for group in list_parameter_groups(model)] == ['decoder']
    assert list_parameter_groups(model)[0]['params'][0] is model.decoder.basis
    model.encoder.train_network()
    found = [p for group in list_parameter_groups(model) for p in group['params']]
    assert len(found) == len({id(p) for p in found}) == len(list(model.parameters()))


@pytest.mark.parametrize('manifold', ['linear', 'network', 'curve'])
@pytest.mark.parametrize(('encoder', 'decoder', 'trained'), [
    ('image', 'lowrank', False), ('subspace', 'lowrank', False), ('subspace', 'positional', False), ('subspace', 'lowrank', True), ('subspace', 'positional', True)])
def test_every_trainable_parameter_gets_a_gradient(encoder, decoder, trained, manifold):
    """Several processes wait for the gradient of every parameter that may learn; and what is frozen gets none."""
    zdim = 1 if manifold == 'curve' else 2
    model = build_model(Lattice(box, 16.0), zdim=zdim, encoder=encoder, decoder=decoder, rank=rank, manifold=manifold, encoder_dim=8, decoder_dim=8, bf16=False)
    if encoder == 'subspace':
        fill(model)
    if trained:
        model.encoder.train_network()
    stack = simulate_stack(make_phantom('ribosome', box, seed=0), 6, snr=1.0, seed=0).stack
    batch = load_dataset(make_config(), stack=stack).get_batch(torch.arange(6))
    model(batch, beta=1.0, noise=torch.randn(6, zdim, generator=torch.Generator().manual_seed(0))).total.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_image_encoder_trains_a_lowrank_decoder(tmp_path):
    """The low-rank decoder is a decoder like others: trained by gradient from settings alone."""
    simulated = simulate_stack(make_phantom('ribosome', box, seed=0), 300, snr=1.0, seed=0)
    changes = {'model.decoder': 'lowrank', 'model.rank': rank, 'model.zdim': 2, 'model.encoder_dim': 32, 'train.epochs': 3, 'train.learning_rate': 1e-2,
               'train.batch_size': 16, 'train.bf16': False}
    run = train_run(tmp_path / 'run', make_config(changes=changes), stack=simulated.stack, device='cpu')
    log = read_log(run)
    assert log['recon'][-1] < log['recon'][0]
    volume = load_model(run, device='cpu').decode_volume(run.load_latents().mu[0])
    truth = torch.stack([v.data for v in simulated.volumes]).mean(0)
    assert torch.corrcoef(torch.stack([volume.flatten(), truth.flatten()]))[0, 1] > 0.7


def test_the_kernels_do_not_depend_on_threads_or_batches():
    """An image has the same latent alone as in a batch."""
    model = fill(build_model(Lattice(box, 16.0), zdim=2, encoder='subspace', rank=rank, manifold='linear'))
    stack = simulate_stack(make_phantom('ribosome', box, seed=0), 9, snr=1.0, seed=0).stack
    batch = load_dataset(make_config(), stack=stack).get_batch(torch.arange(9))
    mu = model.encode(batch)[0]
    for i in range(9):
        torch.testing.assert_close(model.encode(batch[i : i + 1])[0][0], mu[i], rtol=1e-4, atol=1e-5)


def test_start_from_a_map():
    """`init_from` of the decoder in a model: the mean is the map."""
    model = build_model(Lattice(box, 16.0), zdim=2, decoder='lowrank', rank=rank, manifold='linear')
    density = make_phantom('ribosome', box, seed=0)[0].data
    model.decoder.init_from(Volume(density, 16.0))
    half = Lattice(box, n_dims=3)
    expected = half.scatter(half.gather(density))
    made = model.decode_volume(torch.zeros(2))
    assert (made - expected).norm() < 0.02 * expected.norm()
