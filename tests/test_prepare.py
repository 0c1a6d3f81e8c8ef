"""prepare.py and align.py: alignment against exact times and a real recording, what does not fit
the sound, what transcripts may hold, cutting, resuming, what is dropped and why."""
import copy
import functools
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch

import align
import data
import prepare
from codec import MiniCodec, fingerprint, read_audio, save_minicodec, set_level, write_audio
from config import InputError
from listen import own_speech, strip_tags, voiced

SPEECH = Path(__file__).parent / "speech" / "dialogue"  # 13 s, with the synthesiser's word times
REAL = Path(os.environ.get("FACTOR_RECORDINGS", "none"))  # behavior_sd_7.mp3 and .json
RATE = prepare.RATE


@pytest.fixture(scope="session")
def codec(tmp_path_factory):
    """A codec file of a few random weights: how it sounds does not matter here."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("codec") / "codec.safetensors"
    save_minicodec(MiniCodec(step_channels=(8, 8), step_blocks=(1, 1), frame_channels=8,
                             frame_blocks=(1, 1)), path)
    return path


@pytest.fixture
def make(tmp_path, monkeypatch, codec):
    """make("key=value", ...): prepare.py in this process, with a stand-in for the speaker
    encoder."""
    encoder = (lambda audio: audio[:8]), 8
    monkeypatch.setattr(prepare, "speaker_encoder", lambda name, device: encoder)
    usual = [f"raw={tmp_path}/raw", f"out={tmp_path}/out", f"codec={codec}", "workers=1"]
    return lambda *words: prepare.main([*usual, *words])


@functools.cache
def sound():
    """The short dialogue, (2, samples) at 16 kHz."""
    pytest.importorskip("silero_vad")
    return read_audio(SPEECH.with_suffix(".ogg"), 2, RATE).numpy()


@functools.cache
def speech():
    return own_speech(sound())


def text():
    return json.loads(SPEECH.with_suffix(".json").read_text())


def parts(info):
    return [part for u in info["utterances"] for part in [u, *u["backchannels"]]]


def put(folder, name, change=lambda info: None, audio=None):
    """The short dialogue as folder/name, its JSON changed in place by `change`, its sound `audio`
    (2, samples) at 16 kHz if given."""
    folder.mkdir(parents=True, exist_ok=True)
    info = text() | {"file_name": name}
    change(info)
    (folder / f"{name}.json").write_text(json.dumps(info))
    if audio is None:
        shutil.copy(SPEECH.with_suffix(".ogg"), folder / f"{name}.ogg")
    else:
        write_audio(folder / f"{name}.wav", torch.from_numpy(audio), RATE)


def strip(info, times=True):
    """Takes the words and, if `times`, the segments' times out of a transcript."""
    for part in parts(info):
        for key in ("words", "start_time", "end_time") if times else ("words",):
            del part[key]


def move(info, seconds):
    for part in parts(info):
        part["start_time"] += seconds
        part["end_time"] += seconds
        for word in part["words"]:
            word["start"] += seconds


def leak(audio, decibel, room=False):
    """audio (2, samples) with each channel also in the other one; room: 5 ms late, with an echo."""
    other = audio[::-1]
    if room:
        noise = np.random.default_rng(0).standard_normal(RATE // 5)
        echo = noise * np.exp(-np.arange(RATE // 5) / RATE / 0.04)
        echo[0] = 4
        late = np.pad(echo / np.linalg.norm(echo), (80, 0))
        other = scipy.signal.fftconvolve(other, late[None], axes=1)[:, :audio.shape[1]]
    return (audio + 10 ** (decibel / 20) * other).astype(np.float32)


def read(path):
    return prepare.read_dialogue(path)[0]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(folder, split="train"):
    return list(data.load_dialogues(str(folder), split))


def seconds_of(mask_a, mask_b):
    return (mask_a & ~mask_b).sum() / 100


def frames(stretches, size=1500):
    return align.within(stretches, size, 100)


# ---- whose speech it is


@pytest.mark.parametrize("decibel", [-12, -25, -40])
@pytest.mark.parametrize("room", [False, True])
def test_what_leaks_of_the_other_speaker_is_not_own_speech(decibel, room):
    """Voice activity hears it; backchannels, which both channels speak at once in, stay."""
    clean, mixed = speech(), leak(sound(), decibel, room)
    foreign = [seconds_of(frames(voiced(mixed[k])), frames(clean[k])) for k in (0, 1)]
    assert sum(foreign) > 1 or decibel == -40
    for k, own in enumerate(own_speech(mixed)):
        assert seconds_of(frames(own), frames(clean[k])) < 0.3
        assert seconds_of(frames(clean[k]), frames(own)) < 0.15 * frames(clean[k]).sum() / 100
        for start, end in clean[k]:
            assert frames(own)[round(100 * start):round(100 * end)].any()


def test_own_speech_is_voice_activity_where_nothing_leaks():
    assert speech() == [voiced(channel) for channel in sound()]
    both = np.stack([sound()[0], np.roll(sound()[0], RATE)])  # both speak nearly all the time
    assert own_speech(both) == [voiced(channel) for channel in both]
    assert own_speech(np.stack([sound().sum(0)] * 2)) == [[], []]  # the same in both channels


# ---- alignment


@pytest.mark.parametrize("times", [True, False])
def test_alignment_finds_the_synthesisers_times(tmp_path, times):
    pytest.importorskip("pocketsphinx")
    put(tmp_path, "a", functools.partial(strip, times=times))
    true, row = read(SPEECH.with_suffix(".json")), read(tmp_path / "a.json")
    report = align.align(row, sound(), speech())
    assert report["words"] == report["found"] and not report["unfound"]
    assert align.misfit(row, speech(), report["by_order"]) == ("", 0)
    assert_near(row, true)


def test_given_words_stay_where_a_part_without_times_is_aligned(tmp_path):
    pytest.importorskip("pocketsphinx")
    def change(info):
        given = text()["utterances"][0]["words"]
        strip(info, times=False)
        info["utterances"][0]["words"] = [word | {"start": word["start"] + 0.01} for word in given]
    put(tmp_path, "a", change)
    row = read(tmp_path / "a.json")
    before = copy.deepcopy(row["utterances"][0]["words"])
    align.align(row, sound(), speech())
    assert row["utterances"][0]["words"] == before
    assert all(part["words"] for part in align.segments(row, 0))


def assert_near(row, true, median=0.1, most=0.4):
    for channel in (0, 1):
        off = []
        for part, known in zip(align.segments(row, channel), align.segments(true, channel)):
            assert [w["word"] for w in part["words"]] == [w["word"] for w in known["words"]]
            off += [abs(w["start"] - t["start"]) for w, t in zip(part["words"], known["words"])]
            assert part["start_time"] == part["words"][0]["start"]
            assert part["end_time"] >= part["words"][-1]["start"]
        assert np.median(off) < median and max(off) < most


@pytest.mark.parametrize("decibel", [-12, -20, -40])
def test_alignment_is_not_led_astray_by_leaks(tmp_path, decibel):
    pytest.importorskip("pocketsphinx")
    put(tmp_path, "a", strip)
    true, row = read(SPEECH.with_suffix(".json")), read(tmp_path / "a.json")
    mixed = leak(sound(), decibel)
    own = own_speech(mixed)
    report = align.align(row, mixed, own)
    assert align.misfit(row, own, report["by_order"])[0] == ""
    assert_near(row, true, most=0.5)


def drop_turn(info, k):
    strip(info)
    del info["utterances"][k]


@pytest.mark.parametrize("change, reason", [
    (lambda info: drop_turn(info, 0), "is a turn missing"),
    (lambda info: drop_turn(info, 2), "belong to no segment|too much"),
    (lambda info: (strip(info), info["speakers"].reverse()),
     "cannot be aligned|other's channel|belong to the recording|belong to no segment"),
])
def test_alignment_of_what_does_not_belong_is_refused(tmp_path, make, change, reason):
    pytest.importorskip("pocketsphinx")
    put(tmp_path / "raw", "a", change)
    with pytest.raises(InputError, match=reason):
        make()


@pytest.mark.parametrize("change", [strip, lambda info: None])
def test_channels_that_hold_the_same_are_refused(tmp_path, make, change):
    pytest.importorskip("pocketsphinx")
    put(tmp_path / "raw", "a", change, np.stack([sound().mean(0)] * 2))
    with pytest.raises(InputError, match="hold the same sound"):
        make()


def given(change):
    """The short dialogue with its true word times, changed by `change`, as (row, what misfit
    says)."""
    row = copy.deepcopy(prepare.read_dialogue(SPEECH.with_suffix(".json"))[0])
    change(row)
    return align.misfit(row, speech())[0]


def exchange(row):
    for u in row["utterances"]:
        u["speaker_idx"] = 1 - u["speaker_idx"]


def of_silence(row):
    """A turn at a time when nobody speaks in that channel."""
    for word in row["utterances"][1]["words"]:
        word["start"] -= 3.6


@pytest.mark.parametrize("change, wrong", [
    (lambda row: None, ""), (lambda row: move(row, 0.1), ""), (exchange, "the other's channel"),
    (lambda row: move(row, 0.6), "s earlier"),
    (lambda row: move(row, 1.5), "s earlier"), (of_silence, "Peter")])
def test_given_times_are_tested_against_the_sound(change, wrong):
    assert wrong in given(change) and bool(wrong) == bool(given(change))


def test_times_of_another_recording_are_refused():
    own = [[(b + 20 * k, b + 20 * k + 1.5) for b in (1, 4.3, 6.6, 9.1)] for k in (0, 1)]
    row = prepare.read_dialogue(SPEECH.with_suffix(".json"))[0]
    assert "belong to the recording" in align.misfit(row, own)[0]


@pytest.mark.skipif(not REAL.exists(), reason="FACTOR_RECORDINGS names no folder of Behavior-SD")
def test_real_recording(tmp_path, make, capsys):
    pytest.importorskip("pocketsphinx")
    (tmp_path / "raw").mkdir()
    for path in REAL.glob("*_7.*"):
        shutil.copy(path, tmp_path / "raw")
    make()
    info = json.loads((tmp_path / "out" / "info.json").read_text())
    assert info["words_found"] > 0.98 * info["words_aligned"] > 150
    assert info["starts_off_ms"][0] < 50 and info["ends_off_ms"][0] < 150
    assert "words found" in capsys.readouterr().out
    (row,) = rows_of(tmp_path / "out")
    u = row["utterances"]
    assert 3 < u[1]["start_time"] < 4 and u[3]["uttr_type"] == "interrupted"
    assert u[4]["start_time"] > 30
    for part in u[5]["backchannels"]:  # "Oh, really?" and "Hmm" are said inside the other's turn
        assert (u[5]["start_time"] < part["start_time"] < part["end_time"] < u[6]["start_time"])
    assert len(row["dsu_c1_path"][0]) / 12.5 == pytest.approx(u[-1]["end_time"])
    assert row["new_narrative_s1"].startswith("You were kind enough to invite Moishe")
    voices = json.loads((tmp_path / "out" / "voices.json").read_text())
    assert list(voices) == ["behavior_sd_7_c1", "behavior_sd_7_c2"]


# ---- transcripts


def test_words():
    assert align.to_words("Well—I’m 21, uh-huh... “Jerred's” 2nd!") == [
        ("Well", ["well"]), ("I'm", ["i'm"]), ("21", ["twenty", "one"]), ("uh-huh", ["uh", "huh"]),
        ("Jerred's", ["jerred's"]), ("2nd", ["second"])]
    assert align.to_words("Straße, Łódź naïve 你好。 Привет!") == [
        ("Straße", ["strasse"]), ("Łódź", ["lodz"]), ("naïve", ["naive"]), ("你好", []),
        ("Привет", [])]


def test_marks_of_noise_are_no_words():
    assert strip_tags("[laughter] Oh (sighs), ((unclear)) no <noise>. [inaudible 00:12]") == (
        "Oh, no.")
    assert strip_tags("*laughs* {breath} (clears throat) (both laughing softly)") == ""
    assert strip_tags("[laughter-yes]") == "yes"  # a word said laughing, in Switchboard
    for kept in ("I (really) mean it", "3 < 4 and 5 > 2", "(human) rights", "a (string) of pearls"):
        assert strip_tags(kept) == kept


def test_noise_is_left_out_of_text_and_counted(tmp_path, make, capsys):
    def add(info):
        turn = info["utterances"][1]
        turn["tts_text"] = f"[laughter] {turn['tts_text']} (sighs)"
        turn["words"].insert(0, {"word": "[laughter]", "start": 6.0, "dur": 0.1})
        noise = {"speaker": "Peter", "tts_text": "[laughter]", "start_time": 5.9, "end_time": 6.1}
        info["utterances"].insert(1, noise)

    put(tmp_path / "raw", "a", add)
    make()
    (row,) = rows_of(tmp_path / "out")
    for key in ("tts_text", "words"):
        assert [u[key] for u in row["utterances"]] == [u[key] for u in text()["utterances"]]
    assert "3 marks such as [laughter]" in capsys.readouterr().out


def test_words_of_other_scripts_count_as_not_found(tmp_path, make, capsys):
    pytest.importorskip("pocketsphinx")

    def add(info):
        strip(info, times=False)
        info["utterances"][1]["tts_text"] += " 你好。"

    put(tmp_path / "raw", "a", add)
    make()
    printed = capsys.readouterr().out
    assert "55 of 56 words found" in printed and "1 words cannot be spelt" in printed


def flatten(info):
    """Backchannels as utterances of their own, and nothing marked, as recognisers write it."""
    flat = []
    for u in info["utterances"]:
        other = info["speakers"][1 - u["speaker_idx"]]
        flat += [u] + [b | {"speaker": other} for b in u["backchannels"]]
    keys = ("speaker", "tts_text", "start_time", "end_time", "words")
    info["utterances"] = [{key: u[key] for key in keys} for u in flat]


@pytest.mark.parametrize("events, counts, line", [
    ("auto", (0, 3), "counted by turns.py in 1 of 1"), ("marked", (0, 0), "their prompts say 0")])
def test_events_that_are_not_marked_are_counted(tmp_path, make, capsys, events, counts, line):
    put(tmp_path / "raw", "flat", flatten)
    make(f"events={events}")
    (row,) = rows_of(tmp_path / "out")
    fmt = data.StreamFormat(codebook_size=625)
    assert tuple(data.event_counts(row, k, fmt)[0] for k in (0, 1)) == counts
    assert line in capsys.readouterr().out
    put(tmp_path / "raw", "flat")
    make(f"out={tmp_path}/marked")
    (marked,) = rows_of(tmp_path / "marked")
    if events == "auto":
        assert [u["words"] for u in row["utterances"]] == [u["words"] for u in marked["utterances"]]
        assert row["utterances"][0]["backchannels"] == marked["utterances"][0]["backchannels"]


def test_a_codec_computes_in_whole_float32(codec, monkeypatch):
    """On CUDA, convolutions would be in TF32 by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    prepare.codec_on.cache_clear()
    prepare.codec_on(codec, "cpu")
    assert not torch.backends.cudnn.allow_tf32


def test_interruptions_are_marked():
    def utterance(speaker, start, count):
        words = [{"word": "so", "start": start + 0.5 * k, "dur": 0.4} for k in range(count)]
        part = {"tts_text": "so " * count, "words": words, "start_time": start,
                "end_time": start + 0.5 * count}
        return prepare.as_utterance(part, speaker, ["Ann", "Bob"])

    said = [utterance(0, 0, 10), utterance(1, 4, 6), utterance(1, 1, 1), utterance(0, 8, 3)]
    row = {"speakers": ["Ann", "Bob"], "utterances": prepare.in_order(said)}
    prepare.mark_events(row)
    marks = [(u["speaker_idx"], u["uttr_type"], len(u["backchannels"])) for u in row["utterances"]]
    assert marks == [(0, None, 1), (1, "interrupt", 0), (0, None, 0)]


@pytest.mark.parametrize("begin", [1.15, 1.35])  # over the first part's end, and behind it
def test_a_backchannel_that_splits_the_others_turn_is_marked(begin):
    """The transcript ends Ann's utterance where Bob says "uh-huh", and she goes on 0.4 s later."""
    def utterance(speaker, start, text):
        words = [{"word": word, "start": start + 0.25 * k, "dur": 0.25}
                 for k, word in enumerate(text.split())]
        part = {"tts_text": text, "words": words, "start_time": start,
                "end_time": align.end_of(words[-1])}
        return prepare.as_utterance(part, speaker, ["Ann", "Bob"])
    said = [utterance(0, 0.0, "i went down the hill"), utterance(1, begin, "uh-huh"),
            utterance(0, 1.65, "and bought some bread"), utterance(1, 3.5, "oh nice one")]
    row = {"speakers": ["Ann", "Bob"], "utterances": prepare.in_order(said)}
    prepare.mark_events(row)
    marks = [(u["speaker_idx"], u["uttr_type"], [b["tts_text"] for b in u["backchannels"]])
             for u in row["utterances"]]
    assert marks == [(0, None, ["uh-huh"]), (0, None, []), (1, None, [])]


def test_utterances_are_sorted_by_time(tmp_path, make, capsys):
    put(tmp_path / "raw", "a", lambda info: info["utterances"].sort(key=lambda u: u["speaker"],
                                                                    reverse=True))
    make()
    (row,) = rows_of(tmp_path / "out")
    assert [u["speaker"] for u in row["utterances"]] == ["Dave", "Peter", "Dave"]
    assert [u["uttr_idx"] for u in row["utterances"]] == [0, 1, 2]
    assert "1 of 1 transcripts list their utterances in another order" in capsys.readouterr().out


def test_byte_order_mark_spaces_in_names_and_brackets_in_paths(tmp_path, make):
    def change(info):
        info["speakers"] = [" Dave", "Peter "]
        info["utterances"][0]["words"][0]["word"] = " Oh "

    put(tmp_path / "raw [v1]", "a*b", change)
    path = tmp_path / "raw [v1]" / "a*b.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    make(f"raw={tmp_path}/raw [v1]", f"out={tmp_path}/out [v1]")
    (row,) = rows_of(tmp_path / "out [v1]")
    assert row["speakers"] == ["Dave", "Peter"] and row["utterances"][0]["words"][0]["word"] == "Oh"


def silence_of(part, audio):
    a, b = (round(RATE * t) for t in (part["start_time"] - 0.05, part["end_time"] + 0.05))
    audio[1, a:b] = 0


def test_a_backchannel_that_is_not_found(tmp_path, make, capsys):
    pytest.importorskip("pocketsphinx")
    audio = sound().copy()
    silence_of(text()["utterances"][2]["backchannels"][0], audio)
    put(tmp_path / "raw", "a", functools.partial(strip, times=False), audio)
    with pytest.raises(InputError, match="'Uh huh.': none of its words was found"):
        make()
    printed = capsys.readouterr().out
    assert "13.5 s (1 dialogues) are dropped because a segment was not found" in printed
    make("lost_backchannel=leave_out", f"out={tmp_path}/more")
    (row,) = rows_of(tmp_path / "more")
    assert [len(u["backchannels"]) for u in row["utterances"]] == [2, 0, 0]
    assert "1 backchannels were not found and are left out" in capsys.readouterr().out


def test_narratives_that_still_name_the_speaker_are_told(tmp_path, make, capsys):
    def change(info):
        info["speakers"][1] = info["utterances"][1]["speaker"] = "Mark"
        info["narrative"] = "Dave was late. Mark Peter said."
        del info["new_narrative_s1"], info["new_narrative_s2"]

    put(tmp_path / "raw", "a", change)
    make()
    (row,) = rows_of(tmp_path / "out")
    assert row["new_narrative_s1"] == "You were late. Mark Peter said."
    printed = capsys.readouterr().out
    assert "1 narratives are not right" in printed and "a: still names Mark" in printed


# ---- files


@pytest.mark.parametrize("suffix", ["opus", "sph", "aiff", "flac"])
def test_what_libsndfile_reads_is_a_recording(tmp_path, make, suffix):
    put(tmp_path / "raw", "a")
    audio = read_audio(tmp_path / "raw" / "a.ogg", sample_rate=24000)
    (tmp_path / "raw" / "a.ogg").unlink()
    try:
        write_audio(tmp_path / "raw" / f"a.{suffix}", audio, 24000)
    except InputError:
        pytest.skip(f"this libsndfile writes no {suffix}")
    make()
    assert len(rows_of(tmp_path / "out")) == 1


def test_level_makes_quiet_and_loud_recordings_alike():
    time = torch.arange(3 * RATE) / RATE
    tone = torch.sin(2000 * time) * (time % 1 < 0.5)  # bursts
    quiet = set_level(torch.stack([0.01 * tone, 0.5 * tone, 0 * tone]), RATE, -20.0)
    assert torch.allclose(quiet[0], quiet[1], atol=1e-3) and quiet[2].abs().max() == 0
    assert quiet[0][tone != 0].square().mean().log10() * 10 == pytest.approx(-20, abs=0.5)
    assert torch.equal(set_level(0.01 * tone[None], RATE, 0), 0.01 * tone[None])
    click = 0.01 * tone.clone()
    click[100] = 0.9  # what is loud already is not made to clip
    assert set_level(click[None], RATE, -20.0).abs().max() <= 1


def test_level_gives_the_same_codes(tmp_path, make):
    put(tmp_path / "raw", "a", audio=sound())
    put(tmp_path / "raw", "b", audio=sound() / 10)

    def same(level):
        make(f"level={level}", f"out={tmp_path}/{level}")
        a, b = (np.array(row["dsu_c1_path"]) for row in rows_of(tmp_path / str(level)))
        return (a == b).mean()

    assert same(-20) > 0.8 > 0.5 > same(0)


# ---- the data set


def test_given_times_are_kept_in_every_split(tmp_path, make, codec):
    for split, name in (("train", "a"), ("train", "b"), ("validation", "c"), ("test", "d")):
        put(tmp_path / "raw" / split, name)
    own = {"situation": "lost_dog", "starter": 0, "biased_narrative": True}  # world/corpus.py's
    put(tmp_path / "raw" / "train", "a", lambda info: info.update(own))
    make("shard_size=1")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.parquet")) == [
        "test-00000-of-00001.parquet", "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet", "validation-00000-of-00001.parquet"]
    true, loaded = text(), data.load_dialogues(str(tmp_path / "out"), "train")
    assert loaded.column_names == prepare.COLUMNS.names and loaded["file_name"][:] == ["a", "b"]
    row = loaded[0]
    assert [u["words"] for u in row["utterances"]] == [u["words"] for u in true["utterances"]]
    for key in ("narrative", "new_narrative_s1", "speakers", "behaviors", "tts_speaker_ids",
                "soda_index"):
        assert row[key] == true[key]
    assert {key: loaded[key][:] for key in own} == {key: [own[key], None] for key in own}
    assert np.array(row["dsu_c1_path"]).shape == np.array(row["dsu_c2_path"]).shape
    assert len(row["spk_emb_c1"]) == 8 and row["spk_emb_c1"] != row["spk_emb_c2"]
    info = json.loads((tmp_path / "out" / "info.json").read_text())
    assert info["kept"] == {"train": 2, "validation": 1, "test": 1}
    assert info["codec_fingerprint"] == fingerprint(codec)


def long_row(turns, seconds=10.0, pause=1.0):
    """A row of alternate turns of `seconds`, four words each, `pause` apart."""
    utterances = []
    for k in range(turns):
        begin = k * (seconds + pause)
        words = [{"word": "word", "start": begin + i * seconds / 4, "dur": seconds / 4 - 0.2}
                 for i in range(4)]
        part = {"tts_text": "word word word word", "words": words, "start_time": begin,
                "end_time": begin + seconds}
        utterances.append(prepare.as_utterance(part, k % 2, ["Ann", "Bob"]))
    utterances = prepare.in_order(utterances)
    return {"file_name": "long", "speakers": ["Ann", "Bob"], "utterances": utterances}


@pytest.mark.parametrize("seconds, pause", [(10, 1), (10, 60), (100, 1)])
def test_long_recordings_are_cut_at_pauses(seconds, pause):
    """Between turns, if there is such a pause; turns that are longer than a piece, between
    words."""
    row = long_row(8, seconds, pause)
    pieces = prepare.cut(row, 48.0)
    assert all(0 < end - start <= 48 for start, end in pieces)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(pieces))
    cut = [prepare.piece_of(row, *piece, i) for i, piece in enumerate(pieces)]
    words = [w["start"] + start for part, (start, _) in zip(cut, pieces)
             for u in part["utterances"] for w in u["words"]]
    assert words == pytest.approx([w["start"] for u in row["utterances"] for w in u["words"]])
    assert len({part["file_name"] for part in cut}) == len(pieces) > 1
    if seconds == 10:
        assert sum(len(part["utterances"]) for part in cut) == 8
    assert prepare.cut(row, 0) == [(0.0, row["utterances"][-1]["end_time"] + prepare.TAIL)]


def test_nobody_pauses():
    row = long_row(2, 100, 1)
    row["utterances"][0]["words"] = [{"word": "aah", "start": 0.0, "dur": 100.0}]
    with pytest.raises(InputError, match="no pause between 0.0 and 48.0 s"):
        prepare.cut(row, 48.0)


def test_pieces_have_counts_starter_and_clock_of_their_own(tmp_path, make, capsys):
    """A recording of the short dialogue three times over."""
    def thrice(info):
        turns = []
        for k in range(3):
            again = copy.deepcopy(info)
            move(again, k * call.shape[1] / RATE)
            turns += again["utterances"]
        info["utterances"] = turns

    call = np.pad(sound(), ((0, 0), (0, RATE)))
    put(tmp_path / "raw", "call", thrice, np.tile(call, 3))
    make("max_frames=190")
    rows = rows_of(tmp_path / "out")
    assert [row["file_name"] for row in rows] == ["call_000", "call_001", "call_002"]
    fmt = data.StreamFormat(codebook_size=625)
    for row in rows:
        data.check_dialogue(row, fmt)
        assert [u["speaker"] for u in row["utterances"]] == ["Dave", "Peter", "Dave"]
        assert data.event_counts(row, 1, fmt) == (3, 0) and len(row["dsu_c1_path"][0]) <= 190
        assert data.frames_per_second(row) == pytest.approx(12.5)
        assert row["spk_emb_c1"] == rows[0]["spk_emb_c1"]
    assert "1 of 1 dialogues, 42.6 s of 43.3 s" in (out := capsys.readouterr().out)
    assert "cut at pauses into 3" in out
    assert json.loads((tmp_path / "out" / "info.json").read_text())["kept"] == {"train": 3}


def test_resumes_and_refuses_another_make(tmp_path, make, monkeypatch):
    for name in "abc":
        put(tmp_path / "raw", name)
    make("shard_size=1")
    shard, done = tmp_path / "out" / "train-00001-of-00003.parquet", []
    before, work = shard.read_bytes(), prepare.prepare_recording
    shard.unlink()
    monkeypatch.setattr(prepare, "prepare_recording",
                        lambda item, settings: done.append(item) or work(item, settings))
    make("shard_size=1")
    assert [item[0].stem for item in done] == ["b"] and shard.read_bytes() == before
    with pytest.raises(InputError, match="shard_size was 1 and is 2"):
        make("shard_size=2")
    with pytest.raises(InputError, match="level was -20.0 and is 0.0"):
        make("shard_size=1", "level=0")
    put(tmp_path / "raw", "d")
    with pytest.raises(InputError, match="dialogues was .* give another out="):
        make("shard_size=1")


def test_recordings_of_the_same_name_have_voices_of_their_own(tmp_path, make, capsys):
    for split in ("train", "test"):
        put(tmp_path / "raw" / split, "a", lambda info: info.pop("tts_speaker_ids", None))
    put(tmp_path / "raw", "b")
    make()
    assert f"{tmp_path}/raw/b.json is left out; a split is called" in capsys.readouterr().out
    voices = json.loads((tmp_path / "out" / "voices.json").read_text())
    assert sorted(voices) == ["test/a_c1", "test/a_c2", "train/a_c1", "train/a_c2"]


def test_a_corrected_transcript_or_recording_is_seen(tmp_path, make):
    """A copy of the same is no other one, wherever it lies and whatever the times of its files."""
    for name in "ab":
        put(tmp_path / "raw", name)
    make()
    shutil.copytree(tmp_path / "raw", tmp_path / "moved")
    make(f"raw={tmp_path}/moved")
    put(tmp_path / "raw", "a")
    os.utime(tmp_path / "raw" / "b.ogg", (0, 0))
    make()
    put(tmp_path / "raw", "a", lambda info: info.update(narrative="Another one."))
    with pytest.raises(InputError, match="raw_fingerprint was .* recording in raw= is another; gi"):
        make()
    put(tmp_path / "raw", "a")
    make()
    write_audio(tmp_path / "raw" / "b.ogg", torch.from_numpy(sound()[:, :-RATE]), RATE)
    with pytest.raises(InputError, match="recording in raw= is another"):
        make()


def test_two_ranks_make_what_one_makes(tmp_path, make, monkeypatch, capsys):
    for name in ("0001/a", "0001/b", "0002/a"):  # deeper folders, as Behavior-SD's tars unpack
        put((tmp_path / "raw" / "train" / name).parent, name[-1])
    (tmp_path / "raw" / "val").mkdir()
    make("shard_size=1", f"out={tmp_path}/alone")
    note = "raw/val is left out; a split is called train, validation, test"
    assert note in capsys.readouterr().out

    def as_rank(rank, *words):
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
        for key, value in place.items():
            monkeypatch.setenv(key, str(value))
        make("shard_size=1", *words)

    made = []

    def other_rank(seconds):  # what happens while rank 0 waits
        made.extend(path.name[:11] for path in sorted((tmp_path / "out").glob("*.parquet")))
        assert not (tmp_path / "out" / "dropped.jsonl").exists()
        as_rank(1)

    monkeypatch.setattr(prepare.time, "sleep", other_rank)
    as_rank(0)
    assert made == ["train-00000", "train-00002"]
    for name in ("dropped.jsonl", "info.json", "voices.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "alone" / name).read_text()
    both, alone = (rows_of(tmp_path / name) for name in ("out", "alone"))
    assert both == alone and [row["file_name"] for row in both] == ["a", "b", "a"]
    with pytest.raises(InputError, match="0 GPUs, too few for local rank 0"):
        as_rank(0, "device=cuda")


def set_in(*path, **values):
    """A change of a transcript: the values at info[path[0]][path[1]]..."""
    def change(info):
        for key in path:
            info = info[key]
        info.update(values)
    return change


TURN, WORD = ("utterances", 1), ("utterances", 0, "words", 2)
NUMBER = "must be a number of seconds"
BAD = {  # name: (how its transcript is changed, what the reason says)
    "no_text": (lambda info: info["utterances"][0].pop("tts_text"), "'tts_text'"),
    "stranger": (set_in(*TURN, speaker="Eve"), "'Eve'"),
    "no_words": (set_in(*TURN, words=[], tts_text="..."), "without words"),
    "outside": (set_in(*TURN, "words", 0, start=0.0), "outside"),
    "inner_word": (set_in(*TURN, "words", 3, start=0.2), "outside"),
    "too_long": (set_in("utterances", 2, end_time=99.0), "recording has"),
    "one_name": (set_in(speakers=["Dave"]), "two speakers"),
    "as_text": (set_in(*TURN, start_time="6.1899"), NUMBER),
    "clock": (set_in(*TURN, end_time="00:00:09.66"), NUMBER),
    "word_text": (set_in(*WORD, dur="0.3"), NUMBER),
    "not_finite": (set_in(*WORD, start=float("nan")), NUMBER),
    "negative": (set_in(*TURN, start_time=-1.0), "-1.0"),
    "backwards": (set_in(*TURN, start_time=9.9), "before it starts"),
    "a_number": (set_in(narrative=7), "narrative is 7"),
    "odd_type": (set_in(behaviors="many"), "odd_type"),
    "a_list": (set_in(utterances={"a": 1}), "not the JSON")}


def test_bad_transcripts_are_dropped_with_their_files_name(tmp_path, make, capsys):
    for name, (change, _) in BAD.items():
        put(tmp_path / "raw", name, change)
        path = tmp_path / "raw" / f"{name}.json"  # `file_name` inside may be any
        path.write_text(json.dumps(json.loads(path.read_text()) | {"file_name": "other"}))
    put(tmp_path / "raw", "good")
    make()
    dropped = {d["name"]: d["reason"] for d in lines(tmp_path / "out" / "dropped.jsonl")}
    assert dropped.keys() == BAD.keys()
    for name, (_, reason) in BAD.items():
        assert reason in dropped[name] and f"{name}.json" in dropped[name], dropped[name]
        assert "\n" not in dropped[name]
    printed = capsys.readouterr().out
    assert f"1 of {len(BAD) + 1} dialogues" in printed and dropped["stranger"] in printed
    assert len(rows_of(tmp_path / "out")) == 1


def test_bad_files_are_dropped_with_their_name(tmp_path, make):
    raw = tmp_path / "raw"
    reasons = {"mono": "stereo", "empty": "empty", "corrupt": "cannot be read",
               "no_json": "has no JSON", "no_recording": "has no recording",
               "not_json": "not the JSON", "not_text": "UTF-8",
               "other_kind": "other_kind.m4a lies there, but this kind cannot be read"}
    for name in ["good", *reasons]:
        put(raw, name)
    (raw / "not_json.json").write_text("[1, 2")
    (raw / "not_text.json").write_bytes(b"\xff\xfe{")
    (raw / "no_json.json").unlink()
    (raw / "no_recording.ogg").unlink()
    (raw / "other_kind.ogg").rename(raw / "other_kind.m4a")
    (raw / "corrupt.ogg").write_bytes(b"OggS" + bytes(50))
    for name, samples in (("mono", np.zeros(22050)), ("empty", np.zeros((0, 2)))):
        (raw / f"{name}.ogg").unlink()
        soundfile.write(raw / f"{name}.wav", samples, 22050)
    make()
    dropped = {d["name"]: d["reason"] for d in lines(tmp_path / "out" / "dropped.jsonl")}
    assert dropped.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in dropped[name] and name in dropped[name] and "\n" not in dropped[name]


def test_an_error_of_any_kind_is_one_recordings_own(tmp_path, make, monkeypatch):
    for name in "ab":
        put(tmp_path / "raw", name)
    work = prepare.settle

    def fails(row, *rest):
        if row["file_name"] == "a":
            raise ZeroDivisionError("by zero")
        work(row, *rest)

    monkeypatch.setattr(prepare, "settle", fails)
    make()
    (dropped,) = lines(tmp_path / "out" / "dropped.jsonl")
    assert "a.json: ZeroDivisionError: 'by zero'" in dropped["reason"]


def test_bad_settings_end_with_one_line(tmp_path, make, fails):
    fails("no such folder", "prepare.py", f"raw={tmp_path}/nowhere")
    (tmp_path / "raw").mkdir()
    with pytest.raises(InputError, match="no recordings"):
        make()
    put(tmp_path / "raw", "a")
    for word, message in (("codec=x.nemo", "no such codec file"), ("level=3", "from -60 to 0"),
                          ("level=nan", "from -60 to 0"), ("max_frames=-1", "max_frames=-1"),
                          ("max_frames=3", "ten seconds"), ("events=all", "must be one of auto"),
                          ("lost_backchannel=keep", "drop, leave_out"),
                          ("device=gpu", "device=gpu: cannot be used .* give cpu or cuda"),
                          (f"out={tmp_path}/raw/a.json", "a.json: no such folder can be made"),
                          ("shard_size=0", "at least 1"), ("split=dev", "must be one of train")):
        with pytest.raises(InputError, match=message):
            make(word)


def test_all_dropped_is_an_error(tmp_path, make):
    put(tmp_path / "raw", "a", lambda info: info.pop("speakers"))
    with pytest.raises(InputError, match="none of the 1 dialogues .* the key 'speakers'"):
        make()


@pytest.mark.resemblyzer
def test_processes_and_one_embedding_per_voice(tmp_path, run, codec):
    pytest.importorskip("resemblyzer")
    for split, name in (("train", "a"), ("train", "b"), ("test", "c")):
        put(tmp_path / "raw" / split, name,
            lambda info, n=name: info.update(tts_speaker_ids=["joe", f"joe_{n}"]))
    run("prepare.py", f"raw={tmp_path}/raw", f"out={tmp_path}/out", f"codec={codec}", "workers=2",
        "one_embedding_per_voice=true")
    voices = json.loads((tmp_path / "out" / "voices.json").read_text())
    assert list(voices) == ["joe", "joe_a", "joe_b", "joe_c"]
    assert np.linalg.norm(voices["joe"]) == pytest.approx(1, abs=1e-4)
    for row in rows_of(tmp_path / "out"):
        assert row["spk_emb_c1"] == pytest.approx(voices["joe"], abs=1e-6)
        assert len(row["spk_emb_c2"]) == 256
