"""codec.py on tiny random codecs and made-up audio: loading, batches, mistakes, audio files."""
import gzip
import io
import os
import tarfile

import huggingface_hub
import numpy as np
import pytest
import soundfile
import torch
import yaml

from codec import (
    FSQ,
    NanoCodec,
    fingerprint,
    fold_weight_norm,
    load_codec,
    read_audio,
    write_audio,
)
from config import InputError

TTS = "nemo.collections.tts.modules.audio_codec_modules."
CONFIG = {
    "sample_rate": 22050, "samples_per_frame": 12,
    "audio_encoder": {"_target_": TTS + "HiFiGANEncoder", "down_sample_rates": [2, 2, 3],
                      "encoded_dim": 6, "base_channels": 2, "activation": "lrelu",
                      "pad_mode": "replicate"},
    "audio_decoder": {"_target_": TTS + "CausalHiFiGANDecoder", "up_sample_rates": [3, 2, 2],
                      "input_dim": 6, "base_channels": 16, "activation": "half_snake",
                      "output_activation": "clamp", "pad_mode": "zeros",
                      "n_groups_equal_to_out_channels": True},
    "vector_quantizer": {"_target_": TTS + "GroupFiniteScalarQuantizer", "num_groups": 2,
                         "num_levels_per_group": [5, 4, 3]}}


def nemo_weights(new_naming):
    """A random NanoCodec -> its state dict as NeMo would write it, weight norm in either naming."""
    torch.manual_seed(0)
    weights = {"vector_quantizer.fsqs.0.num_levels": torch.tensor([5, 4, 3]),
               "discriminator.x": torch.zeros(1)}
    for name, value in NanoCodec(CONFIG).state_dict().items():
        part, *path, leaf = name.split(".")
        # loud enough for many different codes, no louder
        value = value * {"encoder": 2, "decoder": 1.2}[part]
        if path[0] == "res_layers":
            path[1:3] = [f"{step}.res_blocks" for step in path[1:3]]
        stem = ".".join(["audio_" + part, *path])
        if leaf == "weight":
            norm = value.flatten(1).norm(dim=1)[:, None, None]
            g, v = "weight_g", "weight_v"
            if new_naming:
                g, v = (f"parametrizations.weight.original{i}" for i in (0, 1))
            # the length of v must not matter
            weights |= {f"{stem}.conv.{g}": norm, f"{stem}.conv.{v}": value * 7}
        else:
            kind = "conv.bias" if leaf == "bias" else "activation.snake_act.alpha"
            weights[f"{stem}.{kind}"] = value
    return weights


def write_nemo(path, config=CONFIG, weights=None, skip=(), mode="w"):
    """Writes a .nemo archive; `weights` may also be raw bytes."""
    buffer = io.BytesIO()
    torch.save(nemo_weights(False) if weights is None else weights, buffer)
    files = {"./model_config.yaml": yaml.safe_dump(config).encode(),
             "./model_weights.ckpt": weights if isinstance(weights, bytes) else buffer.getvalue()}
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            if name[2:] not in skip:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return load_codec(write_nemo(tmp_path_factory.mktemp("codec") / "tiny.nemo"))


def one_line(error, *parts):
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in parts), text


# ---- quantiser


def test_fsq_digits_first_level_lowest():
    fsq = FSQ([5, 4, 3], 2)
    every = torch.arange(60).expand(1, 2, 60)
    grid = fsq.decode(every)  # (1, 6, 60)
    assert grid.shape == (1, 6, 60) and grid.min() == -1 and grid.max() == 1
    assert torch.equal(grid[0, 0, :5], torch.tensor([-1, -.5, 0, .5, 1]))
    assert grid[0, 1, 4] == -1 < grid[0, 1, 5]
    half = torch.tensor([2, 1.5, 1]).repeat(2)[None, :, None] * 0.999  # the squashing, undone
    offset = torch.tensor([0, .5, 0]).repeat(2)[None, :, None]
    numbers = grid * torch.tensor([2, 2, 1]).repeat(2)[None, :, None]
    z = torch.atanh(((numbers + offset) / half).clamp(-.9999, .9999)) - torch.tan(offset / half)
    quantised, codes = fsq(z)
    assert torch.equal(codes, every) and torch.allclose(quantised, grid)


def test_fsq_gradient_passes_straight_through():
    z = torch.zeros(1, 6, 1, requires_grad=True)
    FSQ([5, 4, 3], 2)(z)[0].sum().backward()
    assert (z.grad > 0.5).all()


# ---- loading


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_both_weight_norm_namings_and_gzip(codec, tmp_path, mode):
    other = load_codec(write_nemo(tmp_path / "new.nemo", weights=nemo_weights(True), mode=mode))
    pairs = zip(codec.state_dict().values(), other.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs) and not other.training
    assert (other.num_codebooks, other.codebook_size, other.samples_per_frame) == (2, 60, 12)


def test_weight_norm_folds_as_torch_applies_it():
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.ConvTranspose1d(6, 3, 4, groups=3))
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)
    folded = fold_weight_norm(layer.state_dict())
    assert set(folded) == {"bias", "weight"} and torch.allclose(folded["weight"], layer.weight)


def test_archive_cut_off(tmp_path):
    for mode in ("w", "w:gz"):
        path = write_nemo(tmp_path / "cut.nemo", mode=mode)
        content = path.read_bytes()
        for share in (0.5, 0.9, 0.05, 0):
            path.write_bytes(content[:int(len(content) * share)])
            with pytest.raises(InputError) as error:
                load_codec(path)
            one_line(error, "cut.nemo", "download it again")


def test_archive_without_its_files(tmp_path):
    for name in ("model_config.yaml", "model_weights.ckpt"):
        with pytest.raises(InputError) as error:
            load_codec(write_nemo(tmp_path / "x.nemo", skip=[name]))
        one_line(error, f"no {name}")


def test_archive_of_something_else(tmp_path):
    wav2vec = CONFIG | {"audio_encoder": CONFIG["audio_encoder"] | {"_target_": "x.OtherEncoder"}}
    for config, part in (({"encoder": {}}, "no 'audio_encoder'"), (wav2vec, "OtherEncoder"),
                         (None, "NanoCodec"), (CONFIG | {"samples_per_frame": 99}, "99")):
        with pytest.raises(InputError) as error:
            load_codec(write_nemo(tmp_path / "x.nemo", config))
        one_line(error, "model_config.yaml", part)
    with pytest.raises(InputError) as error:
        load_codec(write_nemo(tmp_path / "x.nemo", weights=b"not a checkpoint"))
    one_line(error, "model_weights.ckpt")
    plain = tmp_path / "plain.nemo"
    plain.write_bytes(gzip.compress(b"hello"))
    with pytest.raises(InputError) as error:
        load_codec(plain)
    one_line(error, "not a whole .nemo archive")


def test_weights_missing_or_of_wrong_shape(tmp_path):
    weights = nemo_weights(False)
    del weights["audio_decoder.post_conv.conv.bias"]
    with pytest.raises(InputError) as error:
        load_codec(write_nemo(tmp_path / "x.nemo", weights=weights))
    one_line(error, "decoder.post_conv.bias is missing")
    weights["audio_decoder.post_conv.conv.bias"] = torch.zeros(2)
    with pytest.raises(InputError) as error:
        load_codec(write_nemo(tmp_path / "x.nemo", weights=weights))
    one_line(error, "decoder.post_conv.bias is [2], needs [1]")


def offline(*_):
    raise ConnectionError("no\nroute")


def test_missing_file_and_hub_name_without_network(tmp_path, monkeypatch):
    with pytest.raises(InputError) as error:
        load_codec(tmp_path / "none.nemo")
    one_line(error, "none.nemo", "no such codec file")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(InputError) as error:
        load_codec("nvidia/nemo-nano-codec-22khz-0.6kbps-12.5fps")
    one_line(error, "nvidia/nemo-nano-codec", "the hub cannot be reached")


def test_hub_name_fetches_the_archive(tmp_path, monkeypatch):
    asked = []
    path = write_nemo(tmp_path / "tiny.nemo")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download",
                        lambda *names: asked.append(names) or str(path))
    assert load_codec("nvidia/tiny-12.5fps").num_codebooks == 2
    assert asked == [("nvidia/tiny-12.5fps", "tiny-12.5fps.nemo")]


def test_a_hub_name_has_the_fingerprint_of_its_copy(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names:
                        asked.append(names) or str(tmp_path / "model.safetensors"))
    assert fingerprint("kyutai/mimi") == fingerprint(tmp_path)
    assert asked == [("kyutai/mimi", "model.safetensors")]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(InputError) as error:
        fingerprint("kyutai/mimi")
    one_line(error, "kyutai/mimi", "the hub cannot be reached")


# ---- batches


def test_a_batch_gives_what_each_item_gives_alone(codec):
    torch.manual_seed(1)
    # what stands behind a length is noise: must not matter
    audio, lengths = torch.randn(4, 500), [500, 12, 301, 95]
    codes, frames = codec.encode(audio, torch.tensor(lengths))
    assert codes.shape == (4, 2, 42) and codes.dtype == torch.int64
    assert frames.tolist() == [42, 1, 26, 8]
    assert codes.unique().numel() > 20  # the comparison would be empty if all were one code
    sound, samples = codec.decode(codes, frames)
    assert sound.shape == (4, 42 * 12) and samples.tolist() == [504, 12, 312, 96]
    for i, n in enumerate(lengths):
        alone, t = codec.encode(audio[i:i + 1, :n])
        assert torch.equal(codes[i, :, :t[0]], alone[0]) and (codes[i, :, t[0]:] == 0).all()
        alone, n = codec.decode(alone)
        assert torch.allclose(sound[i, :n[0]], alone[0], atol=1e-5) and (sound[i, n[0]:] == 0).all()


def test_codes_and_audio_that_do_not_fit(codec):
    for codes in (torch.full((1, 2, 3), 60), torch.full((1, 2, 3), -1), torch.zeros(1, 3, 3),
                  torch.zeros(2, 3), torch.zeros(1, 2, 0)):
        with pytest.raises(InputError):
            codec.decode(codes.long())
    for audio, lengths in ((torch.zeros(1, 0), None), (torch.zeros(9), None),
                           (torch.zeros(2, 9), [9, 10]), (torch.zeros(2, 9), [9, 0])):
        with pytest.raises(InputError):
            codec.encode(audio, lengths)


# ---- audio files


@pytest.mark.parametrize("suffix, tolerance", [("wav", 1e-4), ("flac", 1e-4), ("mp3", 0.1)])
def test_audio_there_and_back(tmp_path, suffix, tolerance):
    time = torch.arange(22050) / 22050
    audio = torch.stack([torch.sin(440 * 6.2832 * time), torch.sin(330 * 6.2832 * time)]) / 2
    write_audio(tmp_path / "new" / f"a.{suffix}", audio, 22050)
    again = read_audio(tmp_path / "new" / f"a.{suffix}", channels=2)
    assert again.dtype == torch.float32 and again.shape[0] == 2
    assert (again[:, 2000:20000] - audio[:, 2000:20000]).abs().max() < tolerance
    assert [p.name for p in (tmp_path / "new").iterdir()] == [f"a.{suffix}"]


def test_other_rates_are_resampled(tmp_path):
    time = np.arange(48000) / 48000
    soundfile.write(tmp_path / "a.wav", np.sin(440 * 2 * np.pi * time) / 2, 48000)
    audio = read_audio(tmp_path / "a.wav")
    assert audio.shape == (1, 22050)
    expected = torch.sin(440 * 2 * torch.pi * torch.arange(22050) / 22050) / 2
    assert (audio[0] - expected)[500:-500].abs().max() < 1e-2


def test_loud_audio_is_clipped_not_wrapped(tmp_path):
    write_audio(tmp_path / "a.wav", torch.tensor([[2.0, -2.0, 0.5]]), 22050)
    assert torch.allclose(read_audio(tmp_path / "a.wav"), torch.tensor([[1, -1, 0.5]]), atol=1e-3)


def test_bad_audio_files(tmp_path):
    def problem(name, *parts, **settings):
        with pytest.raises(InputError) as error:
            read_audio(tmp_path / name, **settings)
        one_line(error, name, *parts)

    problem("none.wav", "no such audio file")
    soundfile.write(tmp_path / "mono.wav", np.zeros(100), 22050)
    problem("mono.wav", "is mono, must be stereo", "each speaker", channels=2)
    soundfile.write(tmp_path / "stereo.wav", np.zeros((100, 2)), 22050)
    problem("stereo.wav", "is stereo, must be mono", channels=1)
    soundfile.write(tmp_path / "empty.wav", np.zeros((0, 2)), 22050)
    problem("empty.wav", "empty", channels=2)
    (tmp_path / "zero.wav").touch()
    problem("zero.wav", "cannot be read as audio")
    for name in ("noise.wav", "noise.flac", "noise.mp3"):
        (tmp_path / name).write_bytes(b"this is not audio at all " * 40)
        problem(name, "cannot be read as audio")
    soundfile.write(tmp_path / "slow.wav", np.zeros(100), 4000)
    problem("slow.wav", "4000 Hz")
    (tmp_path / "old.raw").write_bytes(bytes(1000))
    problem("old.raw", "convert it to wav")
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), 22050, subtype="FLOAT")
    problem("nan.wav", "not numbers")


def test_two_processes_may_write_the_same_audio(tmp_path, monkeypatch):
    """So the file that is written first has the process's number in its name."""
    used, write = [], soundfile.write
    monkeypatch.setattr(soundfile, "write", lambda path, *a, **b: used.append(path.name)
                        or write(path, *a, **b))
    write_audio(tmp_path / "a.wav", torch.zeros(1, 10), 22050)
    assert str(os.getpid()) in used[0] and [p.name for p in tmp_path.iterdir()] == ["a.wav"]


def test_bad_places_to_write(tmp_path):
    for path in (tmp_path / "a.txt", tmp_path / "file" / "a.wav"):
        (tmp_path / "file").touch()
        with pytest.raises(InputError) as error:
            write_audio(path, torch.zeros(1, 10), 22050)
        one_line(error, str(path))
