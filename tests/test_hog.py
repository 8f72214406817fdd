"""HOG is scikit-image's, and the fused features are their parts put together."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.feature import _hoghistogram
from skimage.feature import hog as skimage_hog

import fastsskd_kernels as kernels

BACKENDS = ("torch", "numba")
ESC10 = Path(__file__).parents[2] / "shared/data/esc10"
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def cell_histograms(image, orientations, cell):
    """scikit-image's histograms before block normalisation: (rows / cell, columns / cell, orientations)."""
    along_rows, along_columns = np.zeros_like(image), np.zeros_like(image)
    along_rows[1:-1] = image[2:] - image[:-2]
    along_columns[:, 1:-1] = image[:, 2:] - image[:, :-2]
    rows, columns = image.shape
    histogram = np.zeros((rows // cell, columns // cell, orientations))
    _hoghistogram.hog_histograms(
        along_columns.astype(float),
        along_rows.astype(float),
        cell,
        cell,
        columns,
        rows,
        columns // cell,
        rows // cell,
        orientations,
        histogram,
    )
    return histogram


def images():
    """Name and one (T, F) float32 spectrogram-like image, T and F multiples of 16."""
    random = np.random.default_rng(0)
    seconds = np.arange(16000 * 3) / 16000
    yield "noise", random.standard_normal((64, 128)).astype(np.float32)
    tone = torch.tensor(0.5 * np.sin(2 * np.pi * 1000 * seconds), dtype=torch.float32)
    yield "fbank of a tone", kernels.fbank(tone[None])[0, :288].numpy()
    sound = torch.tensor(random.standard_normal(seconds.size) * np.exp(-seconds), dtype=torch.float32)
    yield "fbank of fading noise", kernels.fbank(sound[None])[0, :288].numpy()
    # Whole numbers put many directions on the axes and diagonals, that is on bin edges for 4 or 8 orientations.
    yield "steps", random.integers(0, 3, (48, 64)).astype(np.float32)
    yield "flat", np.full((32, 32), -15.9, np.float32)
    yield "ramp along time", np.repeat(np.arange(64, dtype=np.float32)[:, None], 32, axis=1)
    yield "ramp along frequency, falling", np.repeat(-np.arange(32, dtype=np.float32)[None], 64, axis=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("orientations", "cell"), [(9, 16), (9, 8), (4, 16), (1, 16), (12, 32)])
def test_histograms_are_scikit_images(orientations, cell, backend):
    for name, image in images():
        if image.shape[0] % cell or image.shape[1] % cell:
            continue
        expected = cell_histograms(image, orientations, cell).reshape(-1, orientations)
        result = kernels.hog(torch.from_numpy(image)[None], orientations=orientations, cell=cell, backend=backend)
        np.testing.assert_allclose(result[0].numpy(), expected, rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_normalised_blocks_are_scikit_images(backend):
    """The public output of ``skimage.feature.hog``, rebuilt from our cells: 3 x 3 blocks, L2-Hys."""
    for name, image in images():
        if min(image.shape) < 48:
            continue
        public = skimage_hog(image, 9, (16, 16), (3, 3), block_norm="L2-Hys", feature_vector=False)
        cells = kernels.hog(torch.from_numpy(image)[None], backend=backend)[0].double().numpy()
        cells = cells.reshape(image.shape[0] // 16, image.shape[1] // 16, 9)
        for row, column in np.ndindex(public.shape[:2]):
            block = cells[row : row + 3, column : column + 3]
            block = np.minimum(block / np.sqrt((block**2).sum() + 1e-10), 0.2)
            block = block / np.sqrt((block**2).sum() + 1e-10)
            np.testing.assert_allclose(block, public[row, column], atol=2e-5, err_msg=name)


@pytest.mark.skipif(not ESC10.is_dir(), reason="the ESC-10 clips are not beside this checkout")
@pytest.mark.parametrize("backend", BACKENDS)
def test_histograms_of_real_clips(backend):
    soundfile = pytest.importorskip("soundfile")
    for path in sorted((ESC10 / "audio").iterdir())[::64]:
        audio, rate = soundfile.read(path, dtype="float32")
        fbank = kernels.fbank(torch.from_numpy(audio)[None], sample_rate=rate)[:, :496]
        expected = cell_histograms(fbank[0].numpy(), 9, 16).reshape(-1, 9)
        np.testing.assert_allclose(kernels.hog(fbank, backend=backend)[0].numpy(), expected, rtol=2e-5, atol=2e-6)


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    frames=st.integers(1, 70),
    columns=st.integers(1, 5),
    cell=st.sampled_from([1, 2, 5, 8, 16]),
    orientations=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)
def test_any_shape(batch, frames, columns, cell, orientations, seed):
    """numba equals torch; patch means are the sum over orientations; missing frames repeat the last one."""
    fbank = torch.randn(batch, frames, columns * cell, generator=torch.Generator().manual_seed(seed))
    histograms = [kernels.hog(fbank, orientations=orientations, cell=cell, backend=b) for b in BACKENDS]
    means = [kernels.hog_patch_mean(fbank, patch=cell, backend=b) for b in BACKENDS]
    assert histograms[0].shape == (batch, -(-frames // cell) * columns, orientations)
    torch.testing.assert_close(*histograms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*means, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(means[0], histograms[0].sum(-1), rtol=1e-5, atol=1e-6)
    whole = kernels.pad_frames(fbank, -(-frames // cell) * cell, "repeat")
    for backend, histogram, mean in zip(BACKENDS, histograms, means, strict=True):
        assert torch.equal(kernels.hog_patch_mean(whole, patch=cell, backend=backend), mean)
        assert torch.equal(kernels.hog(whole, orientations=orientations, cell=cell, backend=backend), histogram)


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_patches_is_time_major(backend):
    """One bright pixel in the patch at frame 32, bin 16 of a 64 x 48 image: patch 2 * 3 + 1."""
    fbank = torch.zeros(1, 64, 48)
    fbank[0, 40, 24] = 256.0
    mean = kernels.hog_patch_mean(fbank, backend=backend)
    assert mean.nonzero().tolist() == [[0, 7]] and mean[0, 7] == 4.0
    assert kernels.hog(fbank, backend=backend)[0, 7].tolist() == [2.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_pixel_spoils_the_cells_that_see_it(bad, backend):
    clean = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    spoiled = clean.clone()
    spoiled[1, 16, 20] = bad  # the first row of cell 5; cell 1 above reads it as a neighbour
    hit = torch.zeros(2, 16, dtype=torch.bool)
    hit[1, [1, 5]] = True
    for operation in (kernels.hog_patch_mean, kernels.hog):
        expected = operation(clean, backend=backend)
        expected[hit] = torch.nan
        torch.testing.assert_close(operation(spoiled, backend=backend), expected, equal_nan=True)


@pytest.mark.parametrize(
    ("fbank", "options", "message"),
    [
        (torch.zeros(1, 64, 64, dtype=torch.float64), {}, r"float32 \(B, T, F\)"),
        (torch.zeros(64, 64), {}, r"float32 \(B, T, F\)"),
        (torch.zeros(1, 0, 64), {}, "at least one frame"),
        (torch.zeros(1, 64, 60), {}, "60 mel bins are not a multiple of the 16-pixel"),
        (torch.zeros(1, 64, 64).requires_grad_(), {}, "no gradient passes"),
        (torch.zeros(1, 64, 64), {"backend": "gpu"}, "backend='gpu'"),
        (torch.zeros(1, 64, 64, device="meta"), {"backend": "numba"}, "backend='numba' takes CPU tensors"),
    ],
)
def test_wrong_arguments_are_one_line(fbank, options, message):
    for operation in (kernels.hog, kernels.hog_patch_mean):
        with pytest.raises(ValueError, match=message) as error:
            operation(fbank, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="orientations=0"):
        kernels.hog(torch.zeros(1, 64, 64), orientations=0)


# ------------------------------------------------------------------------------------------------------ fused features


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("seconds", "frames"), [(10, 1024), (5, 512), (0.03, 32)])
def test_features_are_their_parts(seconds, frames, backend):
    clips = torch.randn(2, int(seconds * 16000), generator=torch.Generator().manual_seed(0)) * 0.1
    fbank = kernels.fbank(clips, backend="torch")
    hog = kernels.hog_patch_mean(kernels.pad_frames(fbank, frames, "repeat"), backend="torch")
    normalised = (kernels.pad_frames(fbank, frames, "zero") - -4.2677393) / (2 * 4.5689974)
    result = kernels.features(clips, backend=backend)
    torch.testing.assert_close(result[0], normalised, atol=2e-4, rtol=0)
    torch.testing.assert_close(result[1], hog, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_features_take_every_option(backend):
    clips = torch.randint(-9000, 9000, (2, 22050), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    options = {"sample_rate": 22050, "num_mel_bins": 64, "window": "povey"}
    fbank = kernels.fbank(clips, **options, backend="torch")
    expected = (kernels.pad_frames(fbank, 160) + 6.0) / 8.0
    hog = kernels.hog_patch_mean(kernels.pad_frames(fbank, 160, "repeat"), patch=32, backend="torch")
    out = torch.empty(2, 160, 64), torch.empty(2, 10)
    result = kernels.features(clips, **options, num_frames=160, mean=-6.0, std=4.0, patch=32, backend=backend, out=out)
    assert result[0] is out[0] and result[1] is out[1]
    torch.testing.assert_close(out[0], expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(out[1], hog, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize(("patch", "bins"), [(1, 16), (2, 32), (5, 40), (8, 48), (16, 16), (64, 64)])
def test_fused_at_any_patch(patch, bins):
    """The compiled features keep only the latest rows: all the same bands as with the whole spectrogram."""
    clips = torch.randn(2, 48000, generator=torch.Generator().manual_seed(0)) * 0.1
    options = {"num_mel_bins": bins, "patch": patch, "num_frames": 320}
    expected = kernels.features(clips, **options, backend="torch")
    result = kernels.features(clips, **options, backend="numba")
    torch.testing.assert_close(result[0], expected[0], atol=2e-4, rtol=0)
    torch.testing.assert_close(result[1], expected[1], atol=2e-3, rtol=1e-5)


def test_features_of_a_clip_do_not_depend_on_its_batch():
    clips = torch.randn(3, 16000, generator=torch.Generator().manual_seed(0))
    together = kernels.features(clips)
    for i in range(3):
        alone = kernels.features(clips[i : i + 1])
        assert torch.equal(alone[0][0], together[0][i]) and torch.equal(alone[1][0], together[1][i])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 96}, "num_frames=96: the clip has 98 frames"),
        ({"num_frames": 100}, "multiples of patch=16"),
        ({"num_mel_bins": 100}, "multiples of patch=16"),
        ({"std": 0.0}, "std=0.0"),
        ({"out": (torch.empty(1, 128, 127), torch.empty(1, 64))}, r"out: expected contiguous float32 \(1, 128, 128\)"),
        (
            {"out": (torch.empty(1, 128, 128), torch.empty(1, 64).double())},
            r"out: .* \(1, 64\) on cpu, got torch.float64",
        ),
    ],
)
def test_features_refuse_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        kernels.features(torch.zeros(1, 16000), **options)


@pytest.mark.gpu
@gpu
def test_gpu_equals_cpu():
    fbank = torch.randn(4, 998, 128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        kernels.hog(fbank.cuda()).cpu(), kernels.hog(fbank, backend="torch"), rtol=1e-5, atol=1e-6
    )
    mean = kernels.hog_patch_mean(fbank, backend="torch")
    torch.testing.assert_close(kernels.hog_patch_mean(fbank.cuda()).cpu(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offset", [0, 1, 3, 8])
@pytest.mark.parametrize("bins", [128, 24])
def test_features_are_the_same_wherever_they_are_written(offset, bins):
    clips = torch.randn(3, 16000, generator=torch.Generator().manual_seed(5)) * 0.1
    options = {"num_mel_bins": bins, "patch": 8, "num_frames": 112, "backend": "numba"}
    expected = kernels.features(clips, **options)
    memory = torch.empty(3 * 112 * bins + 64)
    memory = memory[-memory.data_ptr() % 64 // 4 + offset :][: 3 * 112 * bins].view(3, 112, bins)
    hog = torch.empty_like(expected[1])
    kernels.features(clips, **options, out=(memory, hog))
    assert torch.equal(memory, expected[0]) and torch.equal(hog, expected[1])
