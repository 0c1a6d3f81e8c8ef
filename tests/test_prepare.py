"""prepare.py: alignment against exact times and on a real recording, columns, resuming, what is dropped and why."""
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT

import data
import prepare
from codec import fingerprint, read_audio
from config import InputError

SPEECH = Path(__file__).parent / "speech" / "dialogue"  # 13 s from corpus.py, with the synthesiser's word times
CODEC = ROOT / "default" / "codec.safetensors"
REAL = ROOT.parent / "shared" / "real"


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make("key=value", ...): prepare.py in this process, with the small codec and a stand-in speaker encoder."""
    monkeypatch.setattr(prepare, "speaker_encoder", lambda name, device: (lambda audio: audio[:8], 8))
    return lambda *words: prepare.main([f"raw={tmp_path}/raw", f"out={tmp_path}/out", f"codec={CODEC}", "workers=1", *words])


def put(folder, name, change=lambda info: None):
    """A copy of the short dialogue as folder/name, its JSON changed in place by `change`."""
    folder.mkdir(parents=True, exist_ok=True)
    info = json.loads(SPEECH.with_suffix(".json").read_text()) | {"file_name": name}
    change(info)
    (folder / f"{name}.json").write_text(json.dumps(info))
    shutil.copy(SPEECH.with_suffix(".ogg"), folder / f"{name}.ogg")


def strip(info, times=True):
    """Takes the words and, if `times`, the segments' times out of a transcript."""
    for part in [p for u in info["utterances"] for p in [u, *u["backchannels"]]]:
        for key in ("words", "start_time", "end_time") if times else ("words",):
            del part[key]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("times", [True, False])
def test_alignment_finds_the_synthesisers_times(tmp_path, times):
    pytest.importorskip("pocketsphinx")
    put(tmp_path, "a", functools.partial(strip, times=times))
    truth, row = (prepare.read_dialogue(p) for p in (SPEECH.with_suffix(".json"), tmp_path / "a.json"))
    report = prepare.align(row, read_audio(tmp_path / "a.ogg", 2, prepare.RATE).numpy())
    assert report["words"] == report["found"] and not report["unfound"]
    for channel in (0, 1):
        off = []
        for part, true in zip(prepare.segments(row, channel), prepare.segments(truth, channel)):
            assert [w["word"] for w in part["words"]] == [w["word"] for w in true["words"]]
            off += [abs(w["start"] - t["start"]) for w, t in zip(part["words"], true["words"])]
            assert part["start_time"] == part["words"][0]["start"] and part["end_time"] >= part["words"][-1]["start"]
        assert np.median(off) < 0.1 and max(off) < 0.4


@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/real")
def test_real_recording(tmp_path, make, capsys):
    pytest.importorskip("pocketsphinx")
    (tmp_path / "raw").mkdir()
    for path in REAL.glob("*_7.*"):
        shutil.copy(path, tmp_path / "raw")
    make()
    info = json.loads((tmp_path / "out" / "info.json").read_text())
    assert info["words_found"] > 0.98 * info["words_aligned"] > 150
    assert info["starts_off_ms"][0] < 50 and info["ends_off_ms"][0] < 150 and "words found" in capsys.readouterr().out
    (row,) = data.load_dialogues(str(tmp_path / "out"), "train")
    data.check_dialogue(row, data.StreamFormat(codebook_size=info["codebook_size"]))
    u = row["utterances"]
    assert 3 < u[1]["start_time"] < 4 and u[3]["uttr_type"] == "interrupted" and u[4]["start_time"] > 30
    for part in u[5]["backchannels"]:  # "Oh, really?" and "Hmm" are said inside the other's turn
        assert u[5]["start_time"] < part["start_time"] < part["end_time"] < u[6]["start_time"]
    assert len(row["dsu_c1_path"][0]) / 12.5 == pytest.approx(u[-1]["end_time"])
    assert row["new_narrative_s1"].startswith("You were kind enough to invite Moishe")
    assert list(json.loads((tmp_path / "out" / "voices.json").read_text())) == ["behavior_sd_7_c1", "behavior_sd_7_c2"]


def test_given_times_are_kept_in_every_split(tmp_path, make):
    for split, name in (("train", "a"), ("train", "b"), ("validation", "c"), ("test", "d")):
        put(tmp_path / "raw" / split, name)
    own = {"situation": "lost_dog", "starter": 0, "biased_narrative": True}  # corpus.py's
    put(tmp_path / "raw" / "train", "a", lambda info: info.update(own))
    make("shard_size=1")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.parquet")) == [
        "test-00000-of-00001.parquet", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet",
        "validation-00000-of-00001.parquet"]
    truth = json.loads(SPEECH.with_suffix(".json").read_text())
    loaded = data.load_dialogues(str(tmp_path / "out"), "train")
    assert loaded.column_names == prepare.COLUMNS.names and loaded["file_name"][:] == ["a", "b"]
    row = loaded[0]
    assert [u["words"] for u in row["utterances"]] == [u["words"] for u in truth["utterances"]]
    for key in ("narrative", "new_narrative_s1", "speakers", "behaviors", "tts_speaker_ids", "soda_index"):
        assert row[key] == truth[key]
    assert {key: loaded[key][:] for key in own} == {key: [value, None] for key, value in own.items()}
    assert np.array(row["dsu_c1_path"]).shape == np.array(row["dsu_c2_path"]).shape
    assert len(row["spk_emb_c1"]) == 8 and row["spk_emb_c1"] != row["spk_emb_c2"]
    info = json.loads((tmp_path / "out" / "info.json").read_text())
    assert info["kept"] == {"train": 2, "validation": 1, "test": 1} and info["codec_fingerprint"] == fingerprint(CODEC)


def test_resumes_and_refuses_another_make(tmp_path, make, monkeypatch):
    for name in "abc":
        put(tmp_path / "raw", name)
    make("shard_size=1")
    shard, done = tmp_path / "out" / "train-00001-of-00003.parquet", []
    before, work = shard.read_bytes(), prepare.prepare_dialogue
    shard.unlink()
    monkeypatch.setattr(prepare, "prepare_dialogue", lambda item, settings: done.append(item) or work(item, settings))
    make("shard_size=1")
    assert [item[0].stem for item in done] == ["b"] and shard.read_bytes() == before
    with pytest.raises(InputError, match="shard_size was 1 and is 2"):
        make("shard_size=2")
    put(tmp_path / "raw", "d")
    with pytest.raises(InputError, match="dialogues was .* give another out="):
        make("shard_size=1")


def test_two_ranks_make_what_one_makes(tmp_path, make, monkeypatch, capsys):
    for name in ("0001/a", "0001/b", "0002/a"):  # deeper folders, as Behavior-SD's tars unpack
        put((tmp_path / "raw" / "train" / name).parent, name[-1])
    (tmp_path / "raw" / "val").mkdir()
    make("shard_size=1", f"out={tmp_path}/alone")
    assert "raw/val is left out; a split is called train, validation, test" in capsys.readouterr().out

    def as_rank(rank, *words):
        for key, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}.items():
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
    both, alone = (data.load_dialogues(str(tmp_path / name), "train")[:] for name in ("out", "alone"))
    assert both == alone and both["file_name"] == ["a", "b", "a"]
    with pytest.raises(InputError, match="0 GPUs, too few for local rank 0"):
        as_rank(0, "device=cuda")


def test_what_cannot_be_used_is_dropped_with_its_reason(tmp_path, make, capsys):
    raw = tmp_path / "raw"
    reasons = {
        "mono": "stereo", "empty": "empty", "corrupt": "cannot be read", "no_json": "has no JSON", "outside": "outside",
        "no_recording": "has no recording", "no_text": "'tts_text'", "stranger": "'Eve'", "no_words": "without words",
        "too_long": "recording has", "not_json": "not the JSON", "one_name": "two speakers"}
    for name in ["good", *reasons]:
        put(raw, name)
    put(raw, "no_text", lambda info: info["utterances"][0].pop("tts_text"))
    put(raw, "stranger", lambda info: info["utterances"][1].update(speaker="Eve"))
    put(raw, "no_words", lambda info: info["utterances"][1].update(words=[], tts_text="..."))
    put(raw, "outside", lambda info: info["utterances"][1]["words"][0].update(start=0.0))
    put(raw, "too_long", lambda info: info["utterances"][-1].update(end_time=99.0))
    put(raw, "one_name", lambda info: info.update(speakers=["Dave"], utterances=info["utterances"][:1]))
    (raw / "not_json.json").write_text("[1, 2")
    (raw / "no_json.json").unlink()
    (raw / "no_recording.ogg").unlink()
    (raw / "corrupt.ogg").write_bytes(b"OggS" + bytes(50))
    for name, samples in (("mono", np.zeros(22050)), ("empty", np.zeros((0, 2)))):
        (raw / f"{name}.ogg").unlink()
        soundfile.write(raw / f"{name}.wav", samples, 22050)
    make()
    dropped = {d["name"]: d["reason"] for d in lines(tmp_path / "out" / "dropped.jsonl")}
    assert dropped.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in dropped[name] and name in dropped[name] and "\n" not in dropped[name]
    printed = capsys.readouterr().out
    assert "1 of 13 dialogues" in printed and dropped["stranger"] in printed
    assert len(data.load_dialogues(str(tmp_path / "out"), "train")) == 1


def test_bad_settings_end_with_one_line(tmp_path, fails):
    fails("no such folder", "prepare.py", f"raw={tmp_path}/nowhere")
    for message, codec in (("no recordings", CODEC), ("no such codec file", tmp_path / "x.nemo")):
        with pytest.raises(InputError, match=message):
            prepare.main([f"raw={tmp_path}", f"codec={codec}", f"out={tmp_path}/out"])
        put(tmp_path, "a")


def test_all_dropped_is_an_error(tmp_path, make):
    put(tmp_path / "raw", "a", lambda info: info.pop("speakers"))
    with pytest.raises(InputError, match="none of the 1 dialogues could be used; .*lacks the key 'speakers'"):
        make()


@pytest.mark.resemblyzer
def test_processes_and_one_embedding_per_voice(tmp_path, run):
    pytest.importorskip("resemblyzer")
    for split, name in (("train", "a"), ("train", "b"), ("test", "c")):
        put(tmp_path / "raw" / split, name, lambda info, n=name: info.update(tts_speaker_ids=["joe", f"joe_{n}"]))
    run("prepare.py", f"raw={tmp_path}/raw", f"out={tmp_path}/out", f"codec={CODEC}", "workers=2",
        "one_embedding_per_voice=true")
    voices = json.loads((tmp_path / "out" / "voices.json").read_text())
    assert list(voices) == ["joe", "joe_a", "joe_b", "joe_c"]
    assert np.linalg.norm(voices["joe"]) == pytest.approx(1, abs=1e-4)
    for row in data.load_dialogues(str(tmp_path / "out"), "train"):
        assert row["spk_emb_c1"] == pytest.approx(voices["joe"], abs=1e-6) and len(row["spk_emb_c2"]) == 256


def test_words_and_narratives():
    assert prepare.to_words("Well—I’m 21, uh-huh... “Jerred's” 2nd!") == [
        ("Well", ["well"]), ("I'm", ["i'm"]), ("21", ["twenty", "one"]), ("uh-huh", ["uh", "huh"]),
        ("Jerred's", ["jerred's"]), ("2nd", ["second"])]
    assert prepare.from_the_side_of("Jerred", "Jerred was mad. Ann took Jerred's car; Jerred isn't glad.") == (
        "You were mad. Ann took your car; you aren't glad.")
