"""Augmentation: each kind alone does what it says, and a clip's draws come from its own seed."""

import numpy as np
import pytest
import scipy.stats
import torch

import fastsskd_kernels as kernels
from fastsskd.augment import _normal, augment, mix_fbank, mixup_partner, vary
from fastsskd.config import AugmentConfig

ALL = AugmentConfig(mixup=0.5, time_roll=True, noise=0.3, time_mask=20, freq_mask=24)
FRAMES = 94
MEAN, STD = -4.2677393, 4.5689974


def seeds(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(kernels.derive_seeds(seed, 0, np.arange(count)))


def test_nothing_switched_on_changes_nothing(make_batch):
    batch = make_batch()
    assert torch.equal(augment(batch.fbank, batch.seed, AugmentConfig(), FRAMES), batch.fbank)


def test_a_clip_s_augmentation_comes_from_its_own_seed(make_batch):
    batch, order = make_batch(), [3, 0, 4, 1, 2]
    before = batch.fbank.clone()
    torch.manual_seed(0)
    whole = augment(batch.fbank, batch.seed, ALL, FRAMES)
    permuted = make_batch(order)
    torch.manual_seed(1)
    assert torch.equal(whole[order], augment(permuted.fbank, permuted.seed, ALL, FRAMES))
    assert torch.equal(batch.fbank, before)  # the batch itself is left as it was
    other = make_batch(epoch=1)
    again = augment(other.fbank, other.seed, ALL, FRAMES)
    assert all(not torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_roll_rotates_the_frames_and_keeps_the_padding_at_the_end(make_batch):
    batch = make_batch(range(8))
    rolled = augment(batch.fbank, batch.seed, AugmentConfig(time_roll=True), FRAMES)
    assert torch.equal(rolled[:, FRAMES:], batch.fbank[:, FRAMES:])
    shifts = set()
    for before, after in zip(batch.fbank[:, :FRAMES], rolled[:, :FRAMES], strict=True):
        fitting = [shift for shift in range(FRAMES) if torch.equal(before.roll(shift, 0), after)]
        assert len(fitting) == 1
        shifts.add(fitting[0])
    assert len(shifts) > 5


def test_every_shift_is_equally_likely():
    fbank = torch.arange(10.0)[None, :, None].expand(2000, -1, 1).contiguous()
    rolled = augment(fbank, seeds(2000), AugmentConfig(time_roll=True), 10)
    counts = np.bincount(rolled[:, 0, 0].long().numpy(), minlength=10)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_noise_is_normal_of_a_level_up_to_the_given_one():
    silence = torch.zeros(400, 32, 33)  # an odd number of pixels
    noise = augment(silence, seeds(400), AugmentConfig(noise=0.3), 32)
    levels = noise.flatten(1).std(dim=1)
    assert scipy.stats.kstest(levels.numpy() / 0.3, "uniform").pvalue > 1e-3
    normal = (noise / levels[:, None, None]).flatten().numpy()[::7]
    assert scipy.stats.kstest(normal, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(noise[:, :-1].flatten(), noise[:, 1:].flatten())[0, 1]) < 0.01


def test_noise_as_a_gpu_makes_it_is_normal_and_each_clip_s_own(no_waiting):
    with no_waiting():
        noise = _normal(seeds(60), 999)
    assert scipy.stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(noise[:, :499].flatten(), noise[:, 500:].flatten())[0, 1]) < 0.02
    assert torch.equal(_normal(seeds(60)[7:9], 999), noise[7:9])


@pytest.mark.parametrize(("field", "axis", "size"), [("time_mask", 1, 40), ("freq_mask", 2, 32)])
def test_a_band_is_one_run_of_whole_frames_or_bins(field, axis, size):
    widest, count = 9, 3000
    masked = augment(torch.ones(count, 40, 32), seeds(count), AugmentConfig(**{field: widest}), 40) == 0
    other = 3 - axis
    assert torch.equal(masked.any(other), masked.all(other))  # whole frames, or whole bins
    line = masked.any(other).int()
    starts = torch.diff(line, dim=1, prepend=torch.zeros(count, 1, dtype=torch.int32)) == 1
    assert (starts.sum(1) <= 1).all()
    widths = np.bincount(line.sum(1).numpy(), minlength=widest + 1)
    assert len(widths) == widest + 1 and scipy.stats.chisquare(widths).pvalue > 1e-3
    assert line[:, 0].any() and line[:, size - 1].any()


def test_a_band_wider_than_the_spectrogram_still_fits():
    masked = augment(torch.ones(1000, 4, 8), seeds(1000), AugmentConfig(time_mask=100), 4) == 0
    widths = np.bincount(masked.any(2).sum(1).numpy(), minlength=5)
    assert len(widths) == 5 and scipy.stats.chisquare(widths).pvalue > 1e-3


# -------------------------------------------------------------------------------------------------------------- mixup


@pytest.mark.parametrize("alpha", [1, 2, 10])
def test_the_mixing_ratio_is_beta_distributed(alpha):
    _, ratio = mixup_partner(seeds(4000), AugmentConfig(mixup=1.0, mixup_alpha=alpha))
    assert scipy.stats.kstest(ratio.numpy(), scipy.stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_the_share_of_clips_that_are_mixed():
    _, ratio = mixup_partner(seeds(4000), AugmentConfig(mixup=0.3))
    assert (ratio < 1).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert (mixup_partner(seeds(50), AugmentConfig(mixup=0.0))[1] == 1).all()


def test_neighbours_are_partners_and_an_odd_one_stays_alone():
    for count in (1, 2, 5, 8):
        partner, _ = mixup_partner(seeds(count), AugmentConfig(mixup=1.0))
        expected = [n + 1 if n % 2 == 0 else n - 1 for n in range(count)]
        assert partner.tolist() == [min(other, count - 1) for other in expected]


def test_partners_and_ratios_do_not_depend_on_the_number_of_ranks():
    config, whole = AugmentConfig(mixup=0.6), seeds(8)
    partner, ratio = mixup_partner(whole, config)
    for share in (2, 4):
        for first in range(0, 8, share):
            own_partner, own_ratio = mixup_partner(whole[first : first + share], config)
            assert torch.equal(own_partner + first, partner[first : first + share])
            assert torch.equal(own_ratio, ratio[first : first + share])


def test_mixing_adds_powers(make_batch):
    fbank, partner, ratio = make_batch([0, 1, 2]).fbank, torch.tensor([2, 0, 1]), torch.tensor([0.25, 1.0, 0.5])
    mixed = mix_fbank(fbank, partner, ratio, STD)
    for b, other, share in ((0, 2, 0.25), (1, 0, 1.0), (2, 1, 0.5)):
        power = [np.exp(fbank[clip].double().numpy() * 2 * STD + MEAN) for clip in (b, other)]
        expected = (np.log(share * power[0] + (1 - share) * power[1]) - MEAN) / (2 * STD)
        np.testing.assert_allclose(mixed[b].numpy(), expected, atol=2e-6)
    torch.testing.assert_close(mixed[1], fbank[1], rtol=1e-5, atol=1e-6)


def test_augmentation_never_makes_the_host_wait(make_batch, no_waiting):
    batch = make_batch()
    with no_waiting():
        partner, ratio = mixup_partner(batch.seed, ALL)
        augment(mix_fbank(batch.fbank, partner, ratio, STD), batch.seed, ALL, FRAMES)


# ----------------------------------------------------------------------------------------------------------- Multi-SSL


def test_varied_clips_are_mixed_and_rolled_and_their_gradients_are_their_own(make_batch):
    batch, config = make_batch(), AugmentConfig(mixup=1.0, time_roll=True, noise=0.2, time_mask=30, freq_mask=30)
    varied = vary(batch, config, STD, FRAMES)
    mixed = mix_fbank(batch.fbank, *mixup_partner(batch.seed, config), STD)
    bands_off = AugmentConfig(mixup=1.0, time_roll=True, noise=0.2)
    assert torch.equal(varied.fbank, augment(mixed, batch.seed, bands_off, FRAMES))
    log_mel = varied.fbank[:, :FRAMES] * 2 * STD + MEAN  # as the loader has it before it normalises
    expected = kernels.hog_patch_mean(kernels.pad_frames(log_mel, 96, "repeat"))
    torch.testing.assert_close(varied.hog * 2 * STD, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kernels.patch_weight(varied.hog), kernels.patch_weight(expected), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(varied.hog * 2 * STD, batch.hog, rtol=0.1)
    assert torch.equal(varied.label, batch.label) and varied.key == batch.key


def test_a_clip_that_is_left_as_it_is_keeps_its_weights(make_batch):
    batch = make_batch()
    varied = vary(batch, AugmentConfig(), STD, FRAMES)
    assert torch.equal(varied.fbank, batch.fbank)
    torch.testing.assert_close(kernels.patch_weight(varied.hog), kernels.patch_weight(batch.hog), rtol=1e-3, atol=1e-4)


def test_varying_never_makes_the_host_wait(make_batch, no_waiting):
    batch = make_batch()
    with no_waiting():
        vary(batch, AugmentConfig(mixup=0.5, time_roll=True), STD, FRAMES)
