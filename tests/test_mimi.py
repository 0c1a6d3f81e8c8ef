"""Mimi (transformers) behind the codec's interface, and from recordings to generated speech."""
import json

import huggingface_hub
import numpy as np
import pytest
import soundfile
import torch
from transformers import LlamaConfig, MimiConfig, MimiModel

import evaluate
import generate
import prepare
import train
from codec import load_codec
from config import InputError

# the released rates and codebooks, all else narrow; the released config is what MimiConfig() gives
NARROW = {"num_filters": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
          "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 32, "codebook_dim": 16,
          "vector_quantization_hidden_dimension": 16, "upsample_groups": 32, "num_quantizers": 9}


def save_mimi(folder, changes):
    torch.manual_seed(0)
    model = MimiModel(MimiConfig(**changes))
    for name, buffer in model.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_()  # the codebooks, which transformers leaves at zero
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_mimi(tmp_path_factory.mktemp("mimi"), NARROW)


def test_a_batch_gives_what_each_item_gives_alone(folder):
    codec = load_codec(folder)
    assert (codec.sample_rate, codec.samples_per_frame) == (24000, 1920)
    assert (codec.num_codebooks, codec.codebook_size) == (8, 2048)
    # what stands behind a length is noise: must not matter
    audio, lengths = torch.randn(3, 9000), [9000, 1, 4000]
    codes, frames = codec.encode(audio, torch.tensor(lengths))
    assert codes.shape == (3, 8, 5) and codes.dtype == torch.int64 and frames.tolist() == [5, 1, 3]
    assert codes.unique().numel() > 20  # the comparison would be empty if all were one code
    sound, samples = codec.decode(codes, frames)
    assert sound.shape == (3, 9600) and samples.tolist() == [9600, 1920, 5760]
    assert sound.abs().max() <= 1
    for i, n in enumerate(lengths):
        alone, t = codec.encode(audio[i:i + 1, :n])
        assert torch.equal(codes[i, :, :t[0]], alone[0]) and (codes[i, :, t[0]:] == 0).all()
        alone, n = codec.decode(alone)
        assert torch.allclose(sound[i, :n[0]], alone[0], atol=1e-5) and (sound[i, n[0]:] == 0).all()
    with pytest.raises(InputError, match="8, frames"):
        codec.decode(torch.zeros(1, 9, 2, dtype=torch.long))


def test_the_first_codebooks_are_those_of_transformers(folder):
    audio = torch.randn(1, 1920 * 3)
    with torch.no_grad():
        every = MimiModel.from_pretrained(folder).encode(audio[:, None]).audio_codes
    assert every.shape[1] == 9 and torch.equal(load_codec(folder).encode(audio)[0], every[:, :8])


def test_what_is_no_mimi(folder, tmp_path, monkeypatch):
    def refuses(path, *parts):
        with pytest.raises(InputError) as error:
            load_codec(path)
        text = str(error.value)
        assert "\n" not in text and all(part in text for part in (str(path), *parts)), text

    refuses(tmp_path, "cannot be loaded as a Mimi codec")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refuses("kyutai/mimi", "without a network a folder")
    LlamaConfig().save_pretrained(tmp_path / "llama")
    refuses(tmp_path / "llama", "a model of the kind llama")
    content = (folder / "model.safetensors").read_bytes()
    for name, weights in (("cut", content[:len(content) // 2]),
                          ("lacks", content.replace(b"downsample.conv", b"downsample.cone"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((folder / "config.json").read_text())
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    refuses(tmp_path / "cut", "cannot be loaded")
    refuses(tmp_path / "lacks", "1 of Mimi's weights are missing", "downsample.conv.weight")


def put_dialogue(raw):
    """A dialogue of 1.4 s, two words and a backchannel, at 22,050 Hz, in every split."""
    word = {"word": "yes", "start": 0.1, "dur": 0.4}
    info = {"speakers": ["Ann", "Bob"], "narrative": "Ann met Bob.", "utterances": [
        {"speaker": "Ann", "speaker_idx": 0, "tts_text": "yes no", "start_time": 0.1,
         "end_time": 1.2, "words": [word, {"word": "no", "start": 0.6, "dur": 0.5}],
         "backchannels": [{"tts_text": "yes", "start_time": 0.1, "end_time": 0.5,
                           "words": [word]}]}]}
    for split in ("train", "validation", "test"):
        (raw / split).mkdir(parents=True)
        (raw / split / "a.json").write_text(json.dumps(info))
        noise = 0.1 * np.random.default_rng(0).standard_normal((30870, 2))
        soundfile.write(raw / split / "a.wav", noise, 22050)


@pytest.mark.parametrize("changes", [NARROW, pytest.param({}, marks=pytest.mark.nemo)],
                         ids=["narrow", "released"])
def test_from_recordings_to_speech(tmp_path, tiny, monkeypatch, changes):
    if not changes:
        pytest.importorskip("nemo")  # only since it takes half a minute
    mimi = save_mimi(tmp_path / "mimi", changes)
    monkeypatch.setattr(prepare, "embed", lambda *_: [0.1, 0.2])
    monkeypatch.setattr(prepare, "speaker_encoder", lambda *_: (None, 2))
    monkeypatch.setattr(prepare, "misfit", lambda *_: ("", 0))  # the sound is noise, not speech
    put_dialogue(tmp_path / "raw")
    prepare.main([f"raw={tmp_path}/raw", f"out={tmp_path}/data", f"codec={mimi}", "workers=1",
                  "speaker_encoder=x/ecapa_tdnn.nemo"])
    info = json.loads((tmp_path / "data" / "info.json").read_text())
    assert (info["sample_rate"], info["frame_rate"]) == (24000, 12.5)
    assert (info["num_codebooks"], info["codebook_size"]) == (8, 2048)
    # a file is the model that it holds
    assert (info["speaker_encoder"], info["speaker_size"]) == ("ecapa_tdnn", 2)
    train.main([f"data={tmp_path}/data", f"out={tmp_path}/run", *tiny, "codebook_size=2048",
                "steps=1", "eval_every=1", "batch_size=1", "accumulation=1"])
    generate.main([f"model={tmp_path}/run/best", f"codec={mimi}", f"data={tmp_path}/data",
                   f"out={tmp_path}/out", "max_frames=8"])
    record = json.loads((tmp_path / "out" / "dialogue_0000.json").read_text())
    assert np.array(record["codes"]).shape == (2, 8, 6)  # without the two frames of the delay
    audio, rate = soundfile.read(tmp_path / "out" / "dialogue_0000.wav")
    assert rate == 24000 and audio.shape == (6 * 1920, 2) and abs(audio).max() > 0
    # codes decoded, and a recording through the codec, as evaluate.py hears them: 16 kHz from the
    # codec's own rate
    settings = {"codec": str(mimi)}
    found, _ = evaluate.find_dialogues(tmp_path / "data", evaluate.Settings(**settings))
    # 1.2 s of words and 0.25 s, the recording's end: 1.4 s
    assert evaluate.load_channels(found[0]).shape == (2, 18 * 1280)
    found, _ = evaluate.find_dialogues(tmp_path / "raw", evaluate.Settings())
    assert evaluate.load_channels(found[0] | settings).shape == (2, 22400)
