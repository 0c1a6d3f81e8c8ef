"""Generation end to end on a tiny random model: two instances, own prompts, a recording as the user, bad input."""
import json
import re

import pytest
import soundfile
import torch
from conftest import GOLDEN, ROOT

import generate
from codec import fingerprint
from config import InputError
from data import SILENCE_PAD, UTTERANCE_PAD, WORD_PAD, made_with
from generate import Sampler, stream_words
from model import FActor, load_checkpoint, save_checkpoint

PAIR = [{"name": "Ann", "narrative": "You lost your keys.", "backchannels": 2, "interruptions": 0, "starts": True,
         "voice": "a"},
        {"name": "Bob", "narrative": "Ann lost her keys.", "backchannels": 0, "interruptions": 1, "starts": False,
         "voice": "b"}]


@pytest.fixture(scope="module")
def golden_codec_model(tmp_path_factory):
    """The golden backbone with codes of the golden codec, random: a checkpoint that fits golden/codec.nemo."""
    from codec import load_codec
    codec = load_codec(GOLDEN / "codec.nemo")
    small, tokenizer, fmt, _ = load_checkpoint(GOLDEN / "checkpoint")
    torch.manual_seed(0)
    model = FActor(small.backbone, codec.num_codebooks, codec.codebook_size, 192)
    fmt.codebook_size = codec.codebook_size
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(folder, model, tokenizer, fmt, {})
    return folder


@pytest.fixture
def words(golden_codec_model, tmp_path, tiny_data):
    (tmp_path / "voices.json").write_text(json.dumps({"a": [0.1] * 192, "b": [-0.1] * 192, "short": [0.0] * 7}))
    return [f"model={golden_codec_model}", f"codec={GOLDEN}/codec.nemo", f"out={tmp_path}/out", f"data={tiny_data}",
            f"voices={tmp_path}/voices.json", "max_frames=30"]


def test_two_instances(run, words, tmp_path):
    done = run("generate.py", *words, "n=2", "batch=2")
    assert "x real time" in done.stdout
    for i in range(2):
        audio, rate = soundfile.read(tmp_path / "out" / f"dialogue_{i:04d}.wav")
        record = json.loads((tmp_path / "out" / f"dialogue_{i:04d}.json").read_text())
        assert rate == 22050 and audio.shape == (28 * 1764, 2) and abs(audio).max() > 0
        assert [len(codes[0]) for codes in record["codes"]] == [28, 28]
        assert record["speakers"][0]["prompt"].endswith("<|SOS|>") and record["settings"]["seed"] == 0
        assert (tmp_path / "out" / f"dialogue_{i:04d}.png").stat().st_size > 5000
    both = json.loads((tmp_path / "out" / "dialogue_0001.json").read_text())["codes"]
    run("generate.py", *words, "first=1", "seed=0", f"out={tmp_path}/alone")  # seeds belong to dialogues, not to batches
    assert json.loads((tmp_path / "alone" / "dialogue_0001.json").read_text())["codes"] == both


def test_own_prompts_and_a_recording(run, words, tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps([PAIR]))
    (tmp_path / "info.json").write_text(json.dumps({"speaker_encoder": "theirs"}))
    soundfile.write(tmp_path / "user.wav", torch.randn(2 * 16000 + 77).mul(0.1).numpy(), 16000)
    run("generate.py", *words, "--prompts", tmp_path / "prompts.json", "--user", tmp_path / "user.wav", "listen=0.5")
    record = json.loads((tmp_path / "out" / "dialogue_0000.json").read_text())
    assert record["speaker_encoder"] == "theirs"  # of the info.json beside the voices
    assert "between you (Ann)" in record["speakers"][0]["prompt"] and record["speakers"][1]["name"] == "user"
    info = soundfile.info(tmp_path / "out" / "dialogue_0000.wav")
    assert info.channels == 2 and info.frames == 32 * 1764  # to its end and 0.5 s on, in whole frames


def refuses(message, *words):
    with pytest.raises(InputError, match=re.escape(message)):
        generate.main([str(word) for word in words])


def test_bad_input(fails, words, tmp_path):
    def prompts(**change):
        path = tmp_path / "prompts.json"
        path.write_text(json.dumps([[PAIR[0] | change, PAIR[1]]]))
        return ["--prompts", path]
    fails("unknown voice 'zoe'; ", "generate.py", *words, *prompts(voice="zoe"))
    refuses("'backchannels' is -1", *words, *prompts(backchannels=-1))
    refuses("'starts' must be bool", *words, *prompts(starts="yes"))
    refuses("has 7 numbers, the model takes 192", *words, *prompts(voice="short"))
    refuses("has 3 dialogues in split 'test'", *words, "first=3")
    soundfile.write(tmp_path / "stereo.wav", torch.zeros(4000, 2).numpy(), 16000)
    refuses("choose the user's with user_channel", *words, "--user", tmp_path / "stereo.wav")
    (tmp_path / "broken.wav").write_bytes(b"RIFF cut off")
    refuses("cannot be read as audio", *words, "--user", tmp_path / "broken.wav")
    refuses("give the codec of its data", *words, f"model={GOLDEN}/checkpoint")


def test_the_shipped_parts_belong_together():
    made = made_with(ROOT / "default" / "data")
    assert made["codec_fingerprint"] == fingerprint(ROOT / "default" / "codec.safetensors")
    config = json.loads((ROOT / "default" / "model" / "config.json").read_text())
    assert all(config.get(key, value) == value for key, value in made.items())


def test_stream_words():
    tokenizer = load_checkpoint(GOLDEN / "checkpoint")[1]
    silence, utterance, word, mark = tokenizer.convert_tokens_to_ids([SILENCE_PAD, UTTERANCE_PAD, WORD_PAD, "[BC]"])
    hello = tokenizer.encode("hello", add_special_tokens=False)
    there = tokenizer.encode(" there", add_special_tokens=False)
    found = stream_words([silence, mark, *hello, word, *there, utterance, *there], tokenizer)
    assert [(w["word"], w["kind"]) for w in found] == [("hello", "[BC]"), ("there", ""), ("there", "")]
    assert found[0]["start"] == 2 / 12.5 and found[0]["end"] == (3 + len(hello)) / 12.5


def test_sampler_draws_what_it_should():
    logits = torch.tensor([0.0, 1.0, 2.0, -50.0]).expand(2, 3, 4)
    sampler = Sampler([1], temperature=1.0, top_k=2, top_p=1.0)
    counts = torch.zeros(4)
    for _ in range(400):
        counts += torch.bincount(sampler(logits).flatten(), minlength=4)
    assert counts[0] == counts[3] == 0  # below the top two
    assert abs(counts[2] / counts.sum() - 1 / (1 + torch.e ** -1)) < 0.03
    assert (Sampler([1], 0, 0, 1.0)(logits) == 2).all()


def test_another_codec_or_speaker_encoder_is_refused(golden_codec_model, words, tmp_path):
    """A model that knows what its data were made with takes nothing else; one that doesn't (all tests above) takes it."""
    model, tokenizer, fmt, _ = load_checkpoint(golden_codec_model)
    made = {"codec_fingerprint": fingerprint(GOLDEN / "codec.nemo"), "speaker_encoder": "ecapa", "speaker_size": 192}
    save_checkpoint(tmp_path / "knows", model, tokenizer, fmt, made)
    words += [f"model={tmp_path}/knows"]
    (tmp_path / "prompts.json").write_text(json.dumps([PAIR]))
    generate.main([*words, "--prompts", str(tmp_path / "prompts.json"), "max_frames=3"])
    assert (tmp_path / "out" / "dialogue_0000.wav").exists()
    (tmp_path / "info.json").write_text(json.dumps(made | {"speaker_encoder": "resemblyzer"}))  # beside voices.json
    refuses("embeddings by resemblyzer (192 numbers)", *words, "--prompts", tmp_path / "prompts.json")
    (tmp_path / "info.json").write_text(json.dumps(made | {"speaker_size": 256}))
    refuses("embeddings by ecapa (256 numbers)", *words, f"data={tmp_path}")
    (tmp_path / "info.json").unlink()
    (tmp_path / "other.nemo").write_bytes((GOLDEN / "codec.nemo").read_bytes() + bytes(512))  # padding: still a whole tar
    refuses("other.nemo is not the codec that", *words, f"codec={tmp_path}/other.nemo")
