"""Generation end to end on a tiny random model: two instances, own prompts, a recording as the
user, bad input; the running batch against the model's forward pass."""
import json
import os
import re
from dataclasses import replace

import datasets
import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from conftest import GOLDEN, ROOT, write_split
from transformers import LlamaConfig, LlamaForCausalLM

import generate
from codec import fingerprint, load_codec
from config import InputError
from data import (
    EXTRA_TOKENS,
    SILENCE_PAD,
    UTTERANCE_PAD,
    WORD_PAD,
    StreamFormat,
    made_with,
    new_tokenizer,
)
from generate import Conversation, Draws, Sampler, read_prefix, sampling_of, stream_words, talk
from model import FActor, load_checkpoint, save_checkpoint

PAIR = [{"name": "Ann", "narrative": "You lost your keys.", "backchannels": 2, "interruptions": 0,
         "starts": True, "voice": "a"},
        {"name": "Bob", "narrative": "Ann lost her keys.", "backchannels": 0, "interruptions": 1,
         "starts": False, "voice": "b"}]


@pytest.fixture(scope="module")
def golden_codec_model(tmp_path_factory):
    """The golden backbone with codes of the golden codec, random: it fits golden/codec.nemo."""
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
    voices = {"a": [0.1] * 192, "b": [-0.1] * 192, "short": [0.0] * 7}
    (tmp_path / "voices.json").write_text(json.dumps(voices))
    return [f"model={golden_codec_model}", f"codec={GOLDEN}/codec.nemo", f"out={tmp_path}/out",
            f"data={tiny_data}", f"voices={tmp_path}/voices.json", "max_frames=30"]


def test_two_instances(words, tmp_path, capsys):
    generate.main([*words, "n=2", "batch=2"])
    assert "x real time" in capsys.readouterr().out
    for i in range(2):
        audio, rate = soundfile.read(tmp_path / "out" / f"dialogue_{i:04d}.wav")
        record = json.loads((tmp_path / "out" / f"dialogue_{i:04d}.json").read_text())
        assert rate == 22050 and audio.shape == (28 * 1764, 2) and abs(audio).max() > 0
        assert [len(codes[0]) for codes in record["codes"]] == [28, 28]
        assert record["speakers"][0]["prompt"].endswith("<|SOS|>")
        assert record["settings"]["seed"] == 1
        assert (tmp_path / "out" / f"dialogue_{i:04d}.png").stat().st_size > 5000
    both = json.loads((tmp_path / "out" / "dialogue_0001.json").read_text())["codes"]
    # seeds belong to dialogues, not to batches
    generate.main([*words, "first=1", f"out={tmp_path}/alone"])
    assert json.loads((tmp_path / "alone" / "dialogue_0001.json").read_text())["codes"] == both


def test_own_prompts_and_a_recording(words, tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps([PAIR]))
    (tmp_path / "info.json").write_text(json.dumps({"speaker_encoder": "theirs"}))
    soundfile.write(tmp_path / "user.wav", torch.randn(2 * 16000 + 77).mul(0.1).numpy(), 16000)
    generate.main([*words, "--prompts", str(tmp_path / "prompts.json"),
                   "--user", str(tmp_path / "user.wav"), "listen=0.5"])
    record = json.loads((tmp_path / "out" / "dialogue_0000.json").read_text())
    assert record["speaker_encoder"] == "theirs"  # of the info.json beside the voices
    assert "between you (Ann)" in record["speakers"][0]["prompt"]
    user = record["speakers"][1]
    assert (user["name"], user["words"], user["text"]) == ("user", [], None)
    info = soundfile.info(tmp_path / "out" / "dialogue_0000.wav")
    assert info.channels == 2
    assert info.frames == 32 * 1764  # to its end and 0.5 s on, in whole frames


def test_a_model_without_text_has_none(words, tmp_path, golden_codec_model):
    """What such a model draws into its text stream is no text that its speech could be held to."""
    model, tokenizer, fmt, _ = load_checkpoint(golden_codec_model)
    fmt.alignment = "none"
    save_checkpoint(tmp_path / "silent", model, tokenizer, fmt, {})
    generate.main([*words, f"model={tmp_path}/silent", "may_end=false"])
    record = json.loads((tmp_path / "out" / "dialogue_0000.json").read_text())
    assert [(s["words"], s["text"]) for s in record["speakers"]] == 2 * [([], None)]


def test_processes_share_the_dialogues(words, tmp_path, monkeypatch):
    """Two processes (RANK and WORLD_SIZE are torchrun's) write what one writes, file for file."""
    monkeypatch.setattr(generate, "draw_timeline", lambda *_: None)
    words += ["n=3", "max_frames=12"]
    generate.main([*words, "resume=true"])  # nothing there yet
    one = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        generate.main([*words, "resume=true"])
    assert one == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(one) == 6


def test_what_was_made_by_other_weights_or_prompts_is_made_anew(words, golden_codec_model, tmp_path,
                                                                monkeypatch):
    """resume=true looks behind the paths: new weights or prompts under the same name are others."""
    model, tokenizer, fmt, _ = load_checkpoint(golden_codec_model)
    prompts, path = tmp_path / "prompts.json", tmp_path / "out" / "dialogue_0000.json"

    made = []

    def make(cfg, model, tokenizer, fmt, codec, jobs, sampling, user, record):
        made.append(jobs)
        path.write_text(json.dumps(record))
    monkeypatch.setattr(generate, "make_batch", make)

    def keeps(*more):
        before = len(made)
        generate.main([*words, f"model={tmp_path}/model", f"prompts={prompts}", "resume=true",
                       *more])
        return len(made) == before
    prompts.write_text(json.dumps([PAIR]))
    save_checkpoint(tmp_path / "model", model, tokenizer, fmt, {})
    assert not keeps() and keeps()
    prompts.write_text(json.dumps([[PAIR[0] | {"narrative": "You lost your bag."}, PAIR[1]]]))
    assert not keeps()
    for length in (16000, 17000):  # another recording of the same name
        soundfile.write(tmp_path / "user.wav", torch.zeros(length).numpy(), 16000)
        assert not keeps(f"user={tmp_path}/user.wav") and keeps(f"user={tmp_path}/user.wav")
    with torch.no_grad():
        model.dsu_head.bias += 1
    save_checkpoint(tmp_path / "model", model, tokenizer, fmt, {})
    assert not keeps()
    save_checkpoint(tmp_path / "model", model, tokenizer, fmt, {"sampling": {"temperature": 0.5}})
    assert not keeps()
    record = json.loads(path.read_text())
    assert record.pop("fingerprints").keys() == {"model", "codec", "prompts", "voices"}
    path.write_text(json.dumps(record))  # as written before there were fingerprints
    assert not keeps()


def test_n_and_first_choose_among_own_prompts(words, tmp_path, monkeypatch):
    """A dialogue's number is that of its prompt, whatever part of the file a run takes."""
    pairs = [[PAIR[0] | {"name": name}, PAIR[1]] for name in ("Ann", "Cleo", "Dora")]
    (tmp_path / "prompts.json").write_text(json.dumps(pairs))
    made, words = [], [*words, f"prompts={tmp_path}/prompts.json"]

    def make(cfg, model, tokenizer, fmt, codec, jobs, *_):
        made.append([(number, pair[0]["name"], stem.name) for number, pair, stem in jobs])
    monkeypatch.setattr(generate, "make_batch", make)
    for part in ([], ["first=1"], ["first=1", "n=1"]):
        generate.main([*words, *part])
    every = [(k, pair[0]["name"], f"dialogue_{k:04d}") for k, pair in enumerate(pairs)]
    assert made == [every, every[1:], every[1:2]]
    refuses("first=3, n=0: ", *words, "first=3")
    refuses("prompts.json has 3 dialogues", *words, "first=2", "n=2")


def test_another_data_set_of_the_same_name_is_another(words, dialogues, tmp_path):
    """By its info.json, or by the sizes of its shards: those of the other splits do not count."""
    def files():
        cfg = generate.load_settings(generate.Config, [*words, f"data={tmp_path}/data"])
        return generate.made_from(cfg, {})["fingerprints"]
    (tmp_path / "data").mkdir()
    write_split(tmp_path / "data", dialogues[:2], "test")
    before = files()
    write_split(tmp_path / "data", dialogues[:3], "train")
    assert files() == before
    write_split(tmp_path / "data", dialogues[:3], "test")
    after = files()
    assert after != before
    (tmp_path / "data" / "info.json").write_text("{}")
    assert files() != after


def test_a_data_set_without_narratives_is_refused(words, dialogues, tmp_path):
    (tmp_path / "data").mkdir()
    for change, message in (({"new_narrative_s1": None}, "a name or a narrative is missing"),
                            ({"utterances": []}, "it has 2 speakers and 0 utterances"),
                            ({"speakers": ["Ann"]}, "it has 1 speakers")):
        write_split(tmp_path / "data", [dialogues[0] | change], "test")
        refuses(message, *words, f"data={tmp_path}/data")


def test_an_earlier_dialogue_does_not_pass_for_this_one(words, tmp_path, monkeypatch):
    """What ends before its dialogue is written leaves none of the run before."""
    monkeypatch.setattr(generate, "make_batch", lambda *_: None)
    (tmp_path / "out").mkdir()
    for name in ("dialogue_0000.json", "dialogue_0000.wav", "dialogue_0001.json"):
        (tmp_path / "out" / name).write_text("{}")
    generate.main(words)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dialogue_0001.json"]


def test_the_narrative_of_the_prompt_is_stored(dialogues):
    for rewritten in (True, False):
        fmt = StreamFormat(rewritten_narrative=rewritten)
        for side in (0, 1):
            speaker = generate.data_prompt(dialogues[0], side, fmt)
            assert f"Narrative:\n- {speaker['narrative']}\n" in speaker["prompt"]


def test_a_long_recording_is_noted(words, tmp_path, golden_codec_model, capsys):
    """Longer than what the model was trained on: a note, and it is answered to its end."""
    model, tokenizer, fmt, _ = load_checkpoint(golden_codec_model)
    fmt.max_frames = 10
    save_checkpoint(tmp_path / "short", model, tokenizer, fmt, {})
    soundfile.write(tmp_path / "user.wav", torch.randn(2 * 16000).mul(0.1).numpy(), 16000)
    generate.main([*words, f"model={tmp_path}/short", "--user", str(tmp_path / "user.wav"),
                   "listen=0"])
    assert "has 25 frames, more than the 10 that" in capsys.readouterr().err
    assert soundfile.info(tmp_path / "out" / "dialogue_0000.wav").frames == 25 * 1764


def test_a_folder_of_recordings_is_answered(words, tmp_path):
    """Each input has an answer as long as it is, which does not depend on the batch; silence comes
    first, for as long as the codec looks ahead."""
    torch.manual_seed(0)
    (tmp_path / "set" / "1").mkdir(parents=True)
    for name, samples in (("input", 24077), ("clean_input", 20000)):
        audio = torch.randn(samples).mul(0.1).numpy()
        soundfile.write(tmp_path / "set" / "1" / f"{name}.wav", audio, 16000)
    (tmp_path / "set" / "1" / "prompt.json").write_text(json.dumps([PAIR]))
    made = []
    for batch in (2, 1):
        generate.main([*words, "--user", str(tmp_path / "set"), f"batch={batch}"])
        made.append([soundfile.read(tmp_path / "set" / "1" / name, dtype="int16")
                     for name in ("output.wav", "clean_output.wav")])
    assert [len(audio) for audio, _ in made[0]] == [24077, 20000]
    late = load_codec(GOLDEN / "codec.nemo").lookahead * 1280
    for (audio, rate), (alone, _) in zip(*made):
        assert rate == 16000 and (audio == alone).all()
        assert not audio[:late - 100].any() and audio[late + 100:].any()
    (tmp_path / "set" / "1" / "output.wav").write_bytes(b"kept")
    generate.main([*words, "--user", str(tmp_path / "set"), "resume=true"])  # the batch may differ
    assert (tmp_path / "set" / "1" / "output.wav").read_bytes() == b"kept"
    soundfile.write(tmp_path / "set" / "1" / "input.wav", np.zeros(24077), 16000)
    os.utime(tmp_path / "set" / "1" / "input.wav", (0, 0))  # another recording, of an older time
    generate.main([*words, "--user", str(tmp_path / "set"), "resume=true"])
    assert (tmp_path / "set" / "1" / "output.wav").read_bytes() != b"kept"
    for change in ("first=1", "first=0"):  # another one of the data set answers
        (tmp_path / "set" / "1" / "output.wav").write_bytes(b"not kept")
        generate.main([*words, "--user", str(tmp_path / "set"), "resume=true", change])
        assert (tmp_path / "set" / "1" / "output.wav").read_bytes() != b"not kept"
    (tmp_path / "set" / "1" / "output.wav").write_bytes(b"not kept")
    voices = {"a": [0.2] * 192, "b": [-0.1] * 192, "short": [0.0] * 7}  # another voice a
    (tmp_path / "voices.json").write_text(json.dumps(voices))
    generate.main([*words, "--user", str(tmp_path / "set"), "resume=true"])
    assert (tmp_path / "set" / "1" / "output.wav").read_bytes() != b"not kept"
    short = [[PAIR[0] | {"voice": "short"}, PAIR[1]]]
    (tmp_path / "set" / "1" / "prompt.json").write_text(json.dumps(short))
    refuses("voice 'short' has 7 numbers", *words, "--user", tmp_path / "set")
    (tmp_path / "empty").mkdir()
    refuses("no input.wav below it", *words, "--user", tmp_path / "empty")


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
    for part in ("first=-1", "n=-1"):
        refuses("first, n, max_frames and listen are 0 or more", *words, part)
    refuses("text leads by 2, so give 3 or more", *words, "max_frames=2")
    refuses("'name' is empty", *words, *prompts(name=" "))
    refuses("positions for prompt and dialogue; shorten it", *words,
            *prompts(narrative="You talk. " * 20000))
    voices = {"a": [0.1] * 191 + [float("nan")], "b": [0.1] * 192}
    (tmp_path / "voices.json").write_text(json.dumps(voices))
    refuses("voice 'a' is no list of finite numbers", *words, *prompts())
    (tmp_path / "list.json").write_text('["a", "b"]')
    refuses("must hold {voice: list of numbers}", *words, *prompts(),
            f"voices={tmp_path / 'list.json'}")
    refuses("must be of at most 18 digits", *words, "seed=9999999999999999999")
    mono = ["--user", tmp_path / "mono.wav"]
    soundfile.write(mono[1], torch.zeros(4000).numpy(), 16000)
    refuses("has one channel, not user_channel=1; leave it out", *words, *mono, "user_channel=1")
    refuses("has one channel, not user_channel=-2", *words, *mono, "user_channel=-2")
    soundfile.write(tmp_path / "stereo.wav", torch.zeros(4000, 2).numpy(), 16000)
    refuses("choose the user's with user_channel", *words, "--user", tmp_path / "stereo.wav")
    refuses("level=3.0: must be from -60 to 0 dB", *words, "level=3")
    (tmp_path / "broken.wav").write_bytes(b"RIFF cut off")
    refuses("cannot be read as audio", *words, "--user", tmp_path / "broken.wav")
    refuses("give the codec of its data", *words, f"model={GOLDEN}/checkpoint")


def test_the_shipped_parts_belong_together():
    made = made_with(ROOT / "default" / "data")
    assert made["codec_fingerprint"] == fingerprint(ROOT / "default" / "codec.safetensors")
    config = json.loads((ROOT / "default" / "model" / "config.json").read_text())
    assert all(config.get(key, value) == value for key, value in made.items())


def test_a_name_is_no_formula(tmp_path):
    generate.draw_timeline(tmp_path / "a.png", torch.zeros(2, 22050), 22050, [
        {"name": "A$\\x$", "words": []}, {"name": "$", "words": []}])
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_stream_words():
    tokenizer = load_checkpoint(GOLDEN / "checkpoint")[1]
    silence, utterance, word, mark, count = tokenizer.convert_tokens_to_ids(
        [SILENCE_PAD, UTTERANCE_PAD, WORD_PAD, "[BC]", "[INTERRUPT2]"])
    hello = tokenizer.encode("hello", add_special_tokens=False)
    there = tokenizer.encode(" there", add_special_tokens=False)
    beyond = len(tokenizer) + 3  # of a padded vocabulary
    row = [beyond, mark, *hello, word, *there, utterance, count, *there, word, word]
    found = stream_words(row, tokenizer)
    assert [(w["word"], w["kind"]) for w in found] == [
        ("hello", "[BC]"), ("there", ""), ("there", "[INTERRUPT2]")]
    assert found[0]["start"] == 2 / 12.5 and found[0]["end"] == (3 + len(hello)) / 12.5
    assert found[2]["end"] == (7 + len(hello) + 2 * len(there)) / 12.5
    assert stream_words([word, silence, mark, word, tokenizer.eos_token_id], tokenizer) == []


def test_a_growing_word_is_printed_whole(capsys):
    """At every age of the dialogue: 7 / 12.5 * 12.5 is not 7."""
    tokenizer = load_checkpoint(GOLDEN / "checkpoint")[1]
    pad = tokenizer.convert_tokens_to_ids(UTTERANCE_PAD)
    pieces = [tokenizer.encode(text, add_special_tokens=False)[0] for text in ("z", "o", "l")]
    for start in range(60):
        transcript = generate.Transcript(tokenizer, ["Ann"])
        for t, token in enumerate([pad] * start + pieces + [pad]):
            transcript(t, [token])
        assert capsys.readouterr().out.endswith("Ann: zol")
    transcript = generate.Transcript(tokenizer, ["Ann"])
    for t, token in enumerate(pieces):  # the dialogue's last frame is the word's
        transcript(t, [token])
    transcript.finish()
    assert capsys.readouterr().out.endswith("Ann: zol")


def test_stream_words_of_whole_word_tokens(dialogues):
    """Every word begins with a space, also a segment's first; a letter may be two tokens."""
    tokenizer = new_tokenizer(datasets.Dataset.from_list(dialogues), 500, FMT)
    tokenizer.add_special_tokens({"additional_special_tokens": EXTRA_TOKENS})
    silence, utterance, word = tokenizer.convert_tokens_to_ids(
        [SILENCE_PAD, UTTERANCE_PAD, WORD_PAD])
    said = [tokenizer.encode(text, add_special_tokens=False)
            for text in ("yes", "é", "yes", "o'clock.")]
    row = [silence, *said[0], *said[1], word, *said[2], utterance, *said[3], silence]
    assert [w["word"] for w in stream_words(row, tokenizer)] == ["yes", "é", "yes", "o'clock."]


def draws(sampler, rows, decisions=()):
    made = Draws(torch.tensor([v in decisions for v in range(4)]), 3, rows)
    made.join(sampler, rows)
    return made


def shares(draw, times=400):
    """How often each of four ids is drawn."""
    made = torch.stack([draw(t) for t in range(times)]).flatten()
    return torch.bincount(made, minlength=4) / len(made)


def test_draws_follow_the_softmax_within_their_limits():
    logits = torch.tensor([0.0, 1.0, 2.0, -50.0]).expand(2, 3, 4)
    cases = ({"top_k": 2}, 2), ({"top_k": 0}, 3), ({"top_k": 0, "top_p": 0.7}, 2)
    for settings, top in cases:
        made = draws(Sampler([1], temperature=1.0, **settings), 2)

        def draw(t, made=made):
            age = torch.full((2,), t)
            return made.audio(logits, made.uniform(slice(0, 2), [t, t], age), slice(0, 2))
        expected = torch.tensor([0.0, 1.0, 2.0, -50.0])
        expected[:3 - top] = -torch.inf
        assert (shares(draw) - expected.softmax(0)).abs().max() < 0.03
    made = draws(Sampler([1], 0), 2)
    u = made.uniform(slice(0, 2), [0, 0], torch.zeros(2).long())
    assert (made.audio(logits, u, slice(0, 2)) == 2).all()


def test_a_decision_and_a_word_have_their_own_temperatures():
    """Ids 0 and 1 are decisions, 2 and 3 words; decisions at 1, words at 1 and at 0."""
    logits = torch.tensor([1.0, 0.0, 0.5, -0.5])[None]
    chance = logits[0].softmax(0)
    greedy = torch.tensor([*chance[:2], chance[2:].sum(), 0])
    for word, expected in ((1.0, chance), (0.0, greedy)):
        made = draws(Sampler([3], 1.0, 0, word_temperature=word), 1, decisions=(0, 1))

        def draw(t, made=made):
            u = made.uniform(slice(0, 1), [t], torch.tensor([t]))
            return made.text(logits, u, slice(0, 1))
        assert (shares(draw, 3000) - expected).abs().max() < 0.03


def test_which_sampling_counts(words):
    stored = {"sampling": {"decision_temperature": 1.0, "audio_temperature": 0.3,
                           "audio_top_k": 0}}
    assert sampling_of(generate.Config(), {}) == {}  # the paper's, which are Sampler's own
    assert sampling_of(generate.Config(), stored) == stored["sampling"]
    asked = generate.Config(temperature=0.0, audio_top_k=7)
    assert sampling_of(asked, stored) == {"temperature": 0.0, "audio_top_k": 7}
    with pytest.raises(InputError, match="known are"):
        sampling_of(generate.Config(), {"sampling": {"heat": 1}})
    with pytest.raises(InputError, match="temperature='0.9', must be a number"):
        sampling_of(generate.Config(), {"sampling": {"temperature": "0.9"}})
    refuses("temperature=-0.5, top_k=40", *words, "temperature=-0.5")


class Words:
    """Stands for a tokenizer: a prompt of n letters is n tokens."""
    eos_token, eos_token_id = "<end>", 1

    def __len__(self):
        return 200

    def encode(self, prompt, add_special_tokens):
        return [10 + ord(letter) % 50 for letter in prompt]

    def convert_tokens_to_ids(self, tokens):
        return [100 + i for i in range(len(tokens))]


def tiny_model(layers=2, positions=4096, stored=torch.float16):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=200, hidden_size=32, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
                         max_position_embeddings=positions, initializer_range=0.3)
    model = FActor(LlamaForCausalLM(config), 2, 20, 8).eval()
    for weight in model.parameters():
        weight.data = weight.data.to(stored).float()
    return model


@pytest.fixture
def hidden(monkeypatch):
    """The hidden states of every frame, as decode_frame returns them."""
    seen, decode = [], generate.decode_frame

    def watched(*given):
        seen.append(decode(*given))
        return seen[-1]
    monkeypatch.setattr(generate, "decode_frame", watched)
    return seen


FMT = StreamFormat(codebook_size=20, max_frames=100)
SPEAKERS = torch.linspace(-1, 1, 32).view(4, 8)


def start(model, prompts, frames=0, size=4, seeds=(0,)):
    batch = Conversation(model, Words(), FMT, size, 12, frames, may_end=False)
    prefix = read_prefix(model, Words(), prompts, SPEAKERS[:len(prompts)])
    return batch, batch.join(prefix, Sampler(list(seeds)))[1]


@torch.no_grad()
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_a_frame_is_the_models_forward_pass(hidden, stored):
    """Grouped heads, prompts of two lengths: transformers' hidden states to 1e-4, whichever way the
    products of these weights are computed."""
    model, prompts, made = tiny_model(stored=stored), ["hello", "you there"], []
    batch, begin = start(model, prompts)
    for _ in range(12):
        user = batch.said[:2].flip(0)
        made.append((torch.cat([batch.said[:2], user], 1), batch.text[:2].clone()))
        batch.step(user)
    audio = F.pad(torch.stack([codes for codes, _ in made], -1), (FMT.delay, 0), value=20)
    text = torch.cat([begin[:, :-1], torch.stack([ids for _, ids in made], -1)], 1)
    for b, prompt in enumerate(prompts):
        tokens = torch.tensor([Words().encode(prompt, False)])
        whole = model(audio[b:b + 1], text[b:b + 1], tokens, SPEAKERS[b:b + 1])[0]
        for t, state in enumerate(hidden):
            assert (state[b] - whole[tokens.shape[1] + 1 + t]).abs().max() < 1e-4


def test_rows_join_and_leave_without_touching_the_others(hidden):
    """Others of other prompts, ages and settings come and go: the same ids, numbers to 1e-4."""
    model, users = tiny_model(), torch.randint(20, (12, 1, 2))
    alone, _ = start(model, ["hello"], seeds=[5])
    for user in users:
        alone.step(user)
    expected, said = [state[0] for state in hidden], alone.said[0].tolist()
    batch, _ = start(model, ["ab", "something"], seeds=[9])
    batch.join(read_prefix(model, Words(), ["hello"], SPEAKERS[:1]), Sampler([5]))
    mine = 2
    for t, user in enumerate(users):
        if t == 4:
            batch.leave(0)  # ours, the last, takes its place
            mine = 0
        if t == 8:
            batch.join(read_prefix(model, Words(), ["late"], SPEAKERS[3:]), Sampler([7], 0.3, 0))
        heard = torch.randint(20, (len(batch), 2))
        heard[mine] = user
        batch.step(heard)
        assert (hidden[-1][mine] - expected[FMT.delay + t]).abs().max() < 1e-4
    assert batch.said[mine].tolist() == said and batch.memory.ages == [14, 14, 6]


@torch.no_grad()
def test_the_oldest_frames_leave_and_the_prefix_stays(hidden):
    """With one layer, the frames in the ring are all that there is: what 30 frames make of a ring
    of 8 is what the model makes of the prompt and the last 8."""
    model, made = tiny_model(layers=1), []
    batch, _ = start(model, ["hello"], frames=8, size=1)
    for _ in range(30):
        user = torch.randint(20, (1, 2))
        made.append((torch.cat([batch.said, user], 1), batch.text.clone()))
        batch.step(user)
    audio = torch.stack([codes for codes, _ in made[-8:]], -1)
    text = torch.stack([ids for _, ids in made[-8:]], -1)
    whole = model(audio, text, torch.tensor([Words().encode("hello", False)]), SPEAKERS[:1])
    assert (hidden[-1] - whole[:, -1]).abs().max() < 1e-4


def test_ids_beyond_the_tokenizer_are_not_drawn(monkeypatch):
    """A backbone's table may be padded; here nothing else is as likely."""
    monkeypatch.setattr(Words, "__len__", lambda words: 150)
    model = tiny_model()
    model.backbone.lm_head.weight.data[150:] *= 1000
    made = talk(model, Words(), FMT, ["a", "b"], SPEAKERS[:2], Sampler([3]), 40)
    assert max(int(text.max()) for _, text in made) < 150


def test_a_frame_costs_the_same_for_ever():
    """No tensor of a conversation grows, and frame 5,000 computes what frame 500 computes."""
    model = tiny_model()
    batch, _ = start(model, ["hello"], frames=40, size=1)
    sizes = []
    for begin in (500, 5000):
        batch.memory.ages[0] = begin
        batch.memory.age[0] = begin
        with torch.profiler.profile() as profile:
            batch.step(torch.tensor([[1, 2]]))
        kept = [*batch.memory.keys, *batch.memory.values, batch.memory.bias, batch.draws.noise]
        work = sorted((event.key, event.count) for event in profile.key_averages())
        sizes.append(([(tensor.data_ptr(), tensor.shape) for tensor in kept], work))
    assert sizes[0] == sizes[1]


def test_positions_stay_exact_in_16_bits():
    model, tokenizer, fmt, _ = load_checkpoint(GOLDEN / "checkpoint", dtype=torch.bfloat16)
    assert model.dsu_head.weight.dtype == torch.bfloat16
    assert model.backbone.model.rotary_emb.inv_freq.dtype == torch.float32
    batch = Conversation(model, tokenizer, fmt, 1, 12, may_end=False)
    prefix = read_prefix(model, tokenizer, ["hello"], torch.zeros(1, model.speaker_size).bfloat16())
    batch.join(prefix, Sampler([0]))
    batch.step(batch.said)


def test_prompts_beyond_the_positions_are_refused():
    with pytest.raises(InputError, match="a prompt of 30 tokens: the model has 20 positions"):
        read_prefix(tiny_model(positions=20), Words(), ["x" * 30], SPEAKERS[:1])


def test_no_end_while_a_mark_announces_events(monkeypatch):
    """Which would be at once here: neither side ends before the last event, in their dialogue
    only."""
    class Counting(Words):
        def convert_tokens_to_ids(self, tokens):
            return [100 + EXTRA_TOKENS.index(token) for token in tokens]

    model, tokenizer, frames = tiny_model(), Counting(), iter(range(100))
    model.dsu_head.bias.data[[21, 43]] = 100.0  # the end id of both system codebooks
    marks = {0: ["[INTERRUPT2]"], 1: ["[BC2]"], 4: ["[INTERRUPT1]"], 9: ["[BC1]"]}

    def text(draws, logits, u, rows):
        drawn = torch.full((len(logits),), 5)
        for mark in marks.get(next(frames), []):
            drawn[1] = tokenizer.convert_tokens_to_ids([mark])[0]
        return drawn
    monkeypatch.setattr(generate.Draws, "text", text)
    fmt = StreamFormat(codebook_size=20, max_frames=100, delay=2, behaviour_tokens="count_down")
    made = talk(model, tokenizer, fmt, ["a", "b", "c", "d"], SPEAKERS, Sampler([3, 4]), 60,
                on_frame=lambda t, ids: None)
    assert [codes.shape[1] for codes, _ in made] == [9 - 2, 9 - 2, 0, 0]


def test_dialogues_end_at_their_end_id():
    """Each is cut at the first end id of either side, and is the same alone and among others."""
    model = tiny_model()
    model.dsu_head.bias.data[[21, 43]] -= 2.0  # the end id of both system codebooks
    prompts = ["hello", "you", "what", "some more"]
    together = talk(model, Words(), FMT, prompts, SPEAKERS, Sampler([3, 4]), 60)
    lengths = [codes.shape[1] for codes, _ in together]
    assert lengths[0] == lengths[1] != lengths[2] == lengths[3] and 0 < min(lengths)
    assert max(lengths) < 58
    seen = []
    alone = talk(model, Words(), FMT, prompts[2:], SPEAKERS[2:], Sampler([4]), 60,
                 on_frame=lambda t, ids: seen.append(ids))
    for (codes, text), (same_codes, same_text) in zip(together[2:], alone):
        assert codes.tolist() == same_codes.tolist() and text.tolist() == same_text.tolist()
    assert len(seen) == lengths[2] + FMT.delay


def test_another_codec_or_speaker_encoder_is_refused(golden_codec_model, words, tmp_path):
    """A model that knows what its data were made with takes nothing else; one that does not (in all
    tests above) takes it."""
    model, tokenizer, fmt, _ = load_checkpoint(golden_codec_model)
    made = {"codec_fingerprint": fingerprint(GOLDEN / "codec.nemo"), "speaker_encoder": "ecapa",
            "speaker_size": 192}
    save_checkpoint(tmp_path / "knows", model, tokenizer, fmt, made)
    words += [f"model={tmp_path}/knows"]
    (tmp_path / "prompts.json").write_text(json.dumps([PAIR]))
    generate.main([*words, "--prompts", str(tmp_path / "prompts.json"), "max_frames=3"])
    assert (tmp_path / "out" / "dialogue_0000.wav").exists()
    own = ["--prompts", str(tmp_path / "prompts.json")]
    (tmp_path / "info.json").write_text(json.dumps(made | {"speaker_encoder": "resemblyzer"}))
    refuses("embeddings by resemblyzer (192 numbers)", *words, *own)  # beside voices.json
    (tmp_path / "info.json").write_text(json.dumps(made | {"speaker_size": 256}))
    refuses("embeddings by ecapa (256 numbers)", *words, f"data={tmp_path}")
    (tmp_path / "info.json").unlink()
    # padding: still a whole tar
    (tmp_path / "other.nemo").write_bytes((GOLDEN / "codec.nemo").read_bytes() + bytes(512))
    refuses("other.nemo is not the codec that", *words, f"codec={tmp_path}/other.nemo")


def test_the_limit_is_the_trainings(words, tmp_path):
    """Where max_frames is not given."""
    model, tokenizer, fmt, _ = load_checkpoint(words[0].removeprefix("model="))
    save_checkpoint(tmp_path / "model", model, tokenizer, replace(fmt, max_frames=7), {})
    generate.main([*words, f"model={tmp_path}/model", "max_frames=0", "may_end=false"])
    record = json.loads((tmp_path / "out" / "dialogue_0000.json").read_text())
    assert len(record["codes"][0][0]) == 7 - fmt.delay


def test_a_long_prompt_is_noted(words, tmp_path, capsys):
    """Longer than the longest of the training, which a checkpoint of train.py says."""
    model, tokenizer, fmt, _ = load_checkpoint(words[0].removeprefix("model="))
    save_checkpoint(tmp_path / "model", model, tokenizer, fmt, {"longest_prompt": 20})
    generate.main([*words, f"model={tmp_path}/model", "max_frames=3", "may_end=false"])
    assert "note: 2 prompts have more tokens than the 20 that" in capsys.readouterr().err
