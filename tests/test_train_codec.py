"""train_codec.py end to end on noise: trains, is killed, goes on to the same codec, which loads and
works."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from codec import load_codec
from config import InputError
from world import train_codec

TINY = ["batch=2", "crop_frames=4", "step_width=24", "frame_width=32", "steps=4",
        "adversarial_from=0.5", "warmup=2", "save_minutes=0"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A raw folder: three stereo recordings of 3 s whose channels are noise by turns, and their
    phones."""
    folder, rng = tmp_path_factory.mktemp("raw"), np.random.default_rng(0)
    for name in ("train/a", "train/b", "validation/c"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        audio = rng.normal(0, 0.1, (3 * 22050, 2))
        audio[:33075, 1] = audio[33075:, 0] = 0
        soundfile.write(path.with_suffix(".flac"), audio, 22050)
        phones = [[["a", 0.0, 0.8], ["b", 0.8, 0.7]], [["b", 1.5, 1.5]]]
        path.with_suffix(".json").write_text(json.dumps({"phones": phones}))
    return folder


def test_trains_resumes_and_loads(raw, tmp_path, monkeypatch):
    train_codec.main([f"data={raw}", f"out={tmp_path}/whole", *TINY])
    real_crops, calls = train_codec.crops, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 5:  # the first two calls are for the held crops
            raise KeyboardInterrupt
        return real_crops(*args)

    monkeypatch.setattr(train_codec, "crops", dies)
    with pytest.raises(KeyboardInterrupt):
        train_codec.main([f"data={raw}", f"out={tmp_path}/killed", *TINY])
    monkeypatch.setattr(train_codec, "crops", real_crops)
    train_codec.main([f"data={raw}", f"out={tmp_path}/killed", "resume=true", *TINY])

    log = tmp_path / "log.csv"
    log.write_text("step\n50,1\n100,2\n15")
    train_codec.begin_log(log, 50)  # 100 was behind the checkpoint, the last line is cut off
    assert log.read_text().splitlines() == [",".join(train_codec.COLUMNS), "50,1", "15"]

    codec = load_codec(tmp_path / "whole/codec.safetensors")
    again = load_codec(tmp_path / "killed/codec.safetensors")
    for name, value in codec.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert (tmp_path / "whole/log.csv").read_text().splitlines()[1].startswith("4,")
    with pytest.raises(InputError, match="resume=true"):
        train_codec.main([f"data={raw}", f"out={tmp_path}/whole", *TINY])
    with pytest.raises(InputError, match="doesn't fit"):
        train_codec.main([f"data={raw}", f"out={tmp_path}/whole", "resume=true", *TINY,
                          "frame_width=16"])
    with pytest.raises(InputError, match="steps and seed must not be negative"):
        train_codec.main([*TINY, "seed=-1"])
    (tmp_path / "none").mkdir()
    (tmp_path / "none/info.json").write_text("{}")
    with pytest.raises(InputError, match="info.json: is no clip of a speech bank"):
        train_codec.main([f"data={tmp_path}", *TINY])

    # a padded batch: each item gives what it gives alone, in whole frames
    audio = torch.from_numpy(np.random.default_rng(1).normal(0, 0.1, (3, 8000)).astype("float32"))
    lengths = [8000, 1, 3528]
    codes, frames = codec.encode(audio, torch.tensor(lengths))
    decoded, samples = codec.decode(codes, frames)
    assert codes.shape == (3, 4, 5) and frames.tolist() == [5, 1, 2]
    assert codes.max() < codec.codebook_size == 625
    assert decoded.shape == (3, 5 * 1764) and samples.tolist() == [5 * 1764, 1764, 2 * 1764]
    for i, n in enumerate(lengths):
        alone, t = codec.encode(audio[i:i + 1, :n])
        assert torch.equal(alone[0], codes[i, :, :t[0]]) and not codes[i, :, t[0]:].any()
        sound = codec.decode(alone)[0][0]
        assert torch.allclose(sound, decoded[i, :len(sound)], atol=1e-5)
        assert not decoded[i, len(sound):].any()
    with pytest.raises(InputError, match="0..624"):
        codec.decode(codes + 625)


def test_decoder_only_keeps_codes_valid(raw, tmp_path):
    def encoder(path):
        weights = load_codec(path).state_dict()
        return {name: value for name, value in weights.items() if name.startswith("enc_")}

    words = [f"data={raw}", f"out={tmp_path}", *TINY]
    train_codec.main(words)
    before = encoder(tmp_path / "codec.safetensors")
    train_codec.main([*words, "resume=true", "decoder_only=true", "steps=8"])
    after = encoder(tmp_path / "codec.safetensors")
    assert before and all(torch.equal(before[name], after[name]) for name in before)
    assert load_codec(tmp_path / "codec.safetensors").state_dict().keys() > before.keys()
    with pytest.raises(InputError, match="add resume=true"):
        train_codec.main([f"data={raw}", f"out={tmp_path}/new", *TINY, "decoder_only=true"])


def test_recordings_become_clips(raw):
    clips, held = train_codec.load_clips(raw)
    assert len(clips) == 4 and len(held) == 2  # a stretch of noise in each channel
    phones = train_codec.name_phones([*clips, *held])
    train_codec.label(clips, phones)
    assert phones == ["silence", "a", "b"] and len(clips[0]["audio"]) == 19 * 1764
    steps = clips[0]["labels"]  # 87.5 a second; channel 0 of the first recording
    assert len(steps) == 19 * 7 and (steps[:70] == 1).all() and (steps[70:131] == 2).all()
    train_codec.label(clips, ["silence", "a"])  # a checkpoint's phones, which lack one
    assert set(clips[0]["labels"]) == {0, 1, train_codec.UNKNOWN}


def test_crops_string_clips_together(raw):
    clips, _ = train_codec.load_clips(raw)
    train_codec.label(clips, train_codec.name_phones(clips))
    x, y = train_codec.crops(clips, 5, 60, np.random.default_rng(0), torch.device("cpu"))
    assert x.shape == (5, 60 * 1764) and x.dtype == torch.float32 and y.shape == (5, 7, 60)
    loud = x.unflatten(1, (-1, 252)).abs().amax(2) > 0  # (5, 420)
    labels = y.transpose(1, 2).flatten(1)
    assert loud.any() and not loud.all() and not (labels[~loud] > 0).any()
    edges = (loud[:, 1:] != loud[:, :-1]).sum(1)
    assert (edges >= 2).all()  # there is a silence in every crop


def test_a_bank(tmp_path):
    """One clip in HELD is held out, by its text and voice: the same ones when the bank has grown.
    """
    from world.bank import _paths
    rng = np.random.default_rng(0)
    for i in range(60):
        flac, marks = _paths(tmp_path, f"Text {i}.", "joe")
        flac.parent.mkdir(exist_ok=True)
        soundfile.write(flac, rng.normal(0, 0.1, 2 * 1764), 22050)
        marks.write_text(json.dumps({"text": f"Text {i}.", "voice": "joe", "words": [],
                                     "phones": [["a", 0, 0.1]]}))
    clips, held = train_codec.load_clips(tmp_path)
    assert len(clips) + len(held) == 60 and 0 < len(held) < 10
    train_codec.main([f"data={tmp_path}", f"out={tmp_path}/out", *TINY, "steps=1"])
    assert load_codec(tmp_path / "out/codec.safetensors").codebook_size == 625


def test_trains_without_phones(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        noise = np.random.default_rng(0).normal(0, 0.1, 22050)
        soundfile.write(tmp_path / split / "a.wav", noise, 22050)
    train_codec.main([f"data={tmp_path}", f"out={tmp_path}/out", *TINY, "steps=1"])
    assert load_codec(tmp_path / "out/codec.safetensors").codebook_size == 625


@pytest.mark.parametrize("words, message", [
    (["data=/nowhere"], "no speech bank"),
    (["bach=4"], "did you mean 'batch'"),
    (["batch=0"], "batch, minutes and warmup must be above 0"),
    (["resume=true"], "no checkpoint"),
])
def test_bad_settings(raw, tmp_path, words, message):
    with pytest.raises(InputError, match=message) as e:
        train_codec.main([f"data={raw}", f"out={tmp_path}/out", *TINY, *words])
    assert "\n" not in str(e.value)


def test_bad_files(raw, tmp_path):
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        soundfile.write(tmp_path / split / "a.wav", np.zeros(44100), 22050)
    with pytest.raises(InputError, match="holds no speech"):
        train_codec.main([f"data={tmp_path}", f"out={tmp_path}/out", *TINY])
    (tmp_path / "train/a.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        train_codec.main([f"data={tmp_path}", f"out={tmp_path}/out", *TINY])
    (tmp_path / "x.safetensors").write_bytes(b"cut off")
    with pytest.raises(InputError, match="not a whole"):
        load_codec(tmp_path / "x.safetensors")
    old = {"levels": [5] * 4}  # what the settings of a MiniCodec were like before it was causal
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors",
              {"architecture": "MiniCodec", "config": json.dumps(old)})
    with pytest.raises(InputError, match="before it was causal"):
        load_codec(tmp_path / "x.safetensors")
