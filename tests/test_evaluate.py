"""evaluate.py: its arithmetic, its reading, its messages, and one real piece of speech from end to end."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

import evaluate
from config import InputError
from evaluate import Settings, find_dialogues, fit_thresholds, from_raw, load_channels, normalise, pearson, turn_taking

SPEECH = Path(__file__).parent / "speech"  # 13 s of the corpus: three utterances, three backchannels


def words(*times):
    return [{"word": f"w{i}", "start": start, "end": end} for i, (start, end) in enumerate(times)]


def counts(first, second):
    return evaluate.count_events(evaluate.label_segments(evaluate.merge_words([first, second])))


def test_backchannel_lies_inside_and_interruption_outlasts():
    assert counts(words((0, 3), (3.2, 5)), words((1, 1.5), (4.5, 8))) == [[0, 0], [1, 1]]
    assert counts(words((0, 5)), words((4.7, 8))) == [[0, 0], [0, 0]]  # 0.3 s of overlap is a turn that starts early


def test_words_merge_below_the_split():
    segments = evaluate.merge_words([words((0, 1), (1.5, 2), (2.6, 3)), []])
    assert [(s["start"], s["end"], s["text"]) for s in segments] == [(0, 2, "w0 w1"), (2.6, 3, "w2")]


def test_turn_taking_of_a_minute():
    found = turn_taking([[[0, 10], [10.1, 20], [25, 30]], [[29, 40], [42, 45]]], 60)
    assert found == pytest.approx({"ipu": 20 + 5 + 11 + 3, "pause": 5 + 2, "gap": 0, "overlap": 1})


def test_text_for_wer():
    assert normalise("[BC] [WORD_PAD]Uh-huh, I don’t  KNOW! <|SOS|>[INTER]") == "uh huh i dont know"
    pytest.importorskip("jiwer")
    assert evaluate.word_errors("one two three four", "one too three for you") == (3, 4)


def test_correlation():
    r, p = pearson(np.array([[[0, 0], [1, 2]], [[2, 4], [3, 6]]], float))
    assert r == pytest.approx(1) and p < 1e-6
    assert np.isnan(pearson(np.array([[[1, 0], [1, 2]], [[1, 4], [1, 6]]], float))[0])
    entry = evaluate.interval(np.mean, np.arange(100.0))
    assert entry["value"] == 49.5 and 40 < entry["low"] < 49.5 < entry["high"] < 59


def test_threshold_search_finds_what_separates():
    pair = [words((0, 3), (3.3, 5)), words((4.8, 8))]  # 0.2 s of overlap, annotated as an interruption
    wrong, (split, interruption, overlap) = fit_thresholds([pair], [[[0, 0], [0, 1]]])
    assert wrong == 0 and interruption <= 0.2 and split == 0.565 and overlap == 0.435


def test_raw_dialogues_are_read_as_generated_ones():
    first, second = from_raw(json.loads((SPEECH / "dialogue.json").read_text()))
    assert (first["backchannels"], second["backchannels"], first["starts"], second["starts"]) == (0, 3, True, False)
    assert first["text"].endswith("and then it was gone.") and "Yeah" in second["text"]
    assert [word["start"] for word in second["words"]] == sorted(word["start"] for word in second["words"])


def speaker(**more):
    return {"name": "A", "prompt": "", "narrative": "N", "backchannels": 1, "interruptions": 0, "starts": True, "words": [],
            "text": "a b", **more}


def write(folder, name, audio, rate=22050, **info):
    soundfile.write(folder / f"{name}.wav", audio, rate)
    (folder / f"{name}.json").write_text(json.dumps({"speakers": [speaker(), speaker(starts=False)], **info}))


def test_folders_that_cannot_be_scored(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        find_dialogues(tmp_path / "none", Settings())
    with pytest.raises(InputError, match="holds no dialogue"):
        find_dialogues(tmp_path, Settings())
    soundfile.write(tmp_path / "alone.wav", np.zeros((22050, 2)), 22050)
    with pytest.raises(InputError, match=r"alone has no alone\.json"):
        find_dialogues(tmp_path, Settings())
    with pytest.raises(InputError, match="no folder of dialogues"):
        evaluate.main([f"out={tmp_path}"])
    with pytest.raises(InputError, match="no such folder"):
        evaluate.main([str(tmp_path / "none"), f"out={tmp_path}"])


def test_recordings_that_do_not_fit(tmp_path):
    write(tmp_path, "a_whole", np.zeros((22050, 2)))
    write(tmp_path, "b_mono", np.zeros(22050))
    write(tmp_path, "c_longer", np.zeros((22050, 2)), codes=[[[0] * 100] * 4] * 2)
    write(tmp_path, "d_late", np.zeros((22050, 2)))
    late = {"speakers": [speaker(words=words((3, 4))), speaker()]}
    (tmp_path / "d_late.json").write_text(json.dumps(late))
    write(tmp_path, "e_rate", np.zeros((16000, 2)), rate=16000)
    (tmp_path / "f_broken.json").write_text("{")
    (tmp_path / "g_other.json").write_text("[1]")
    found, failed = find_dialogues(tmp_path, Settings())
    assert [dialogue["name"][0] for dialogue in found] == list("abcde") and list(failed) == ["f_broken"]
    assert load_channels(found[0])[0].shape == (2, 22050) == load_channels(found[4])[0].shape
    for dialogue, message in zip(found[1:4], ("mono", "do not belong together", "do not belong together")):
        with pytest.raises(InputError, match=message):
            load_channels(dialogue)


def heard(late, text):
    """What listening to a dialogue may give, the first speaker starting `late` seconds after the second."""
    channels = []
    for k, start in enumerate((1 + late, 1)):
        vector = [float(k == 0), float(k == 1)]
        channels.append({"speech": [[start, start + 1]], "mos": [3.0], "snippet": vector, "first": vector, "last": vector,
                         "words": [{"word": w, "start": start + i, "end": start + i + 0.4} for i, w in enumerate(text)]})
    return {"duration": 60, "channels": channels}


def test_scores_can_fail():
    """A swapped speaker, a wrong starter and wrong words show."""
    pytest.importorskip("jiwer")
    speakers = [speaker(embedding=[1, 0]), speaker(embedding=[0, 1], starts=False)]
    dialogue = {"speakers": speakers, "annotated": False}
    rng = np.random.default_rng(0)
    good, transcript = evaluate.score(dialogue, heard(-0.5, "ab"), rng)
    assert (good["wer"], good["correct_start"], good["similarity"], good["bottom_similarity"]) == (0, 100, 1, 0)
    assert good["drift"] == 0 and good["bottom_drift"] == 1 and "A: a" in transcript
    bad, _ = evaluate.score(dialogue | {"speakers": speakers[::-1]}, heard(-0.5, "xy"), rng)
    assert (bad["wer"], bad["correct_start"], bad["similarity"]) == (100, 0, 0)
    blank, _ = evaluate.score(dialogue | {"speakers": [{}, {}]}, heard(0, "ab"), rng)
    assert blank["wer"] is None and "correct_start" not in blank and "similarity" not in blank and blank["quality"] == 3


def test_whole_run_on_speech(tmp_path, capsys, monkeypatch):
    """The tables of a folder with one good and one silent dialogue; the second run takes all from the cache."""
    for package in ("pocketsphinx", "silero_vad", "speechmos", "jiwer"):
        pytest.importorskip(package)
    folder = tmp_path / "dialogues"
    shutil.copytree(SPEECH, folder)
    write(folder, "silent", np.zeros((22050, 2)))
    evaluate.main([str(folder), f"out={tmp_path / 'out'}", "jobs=1"])
    said = capsys.readouterr().out
    assert "1 of 2 dialogues failed" in said and "silent: channel 1 is silent" in said and "paper: reference" in said
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    figures = results["dialogues"][str(folder)]["dialogue"]
    assert figures["wer"] < 40 and figures["correct_start"] == 100 and 2 < figures["quality"] < 4
    assert (figures["counted_backchannels_1"], figures["counted_backchannels_2"]) == (0, 3)
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
    monkeypatch.setattr(evaluate, "hear", None)  # would fail if anything were heard again
    evaluate.main([f"reference={folder}", f"out={tmp_path / 'out'}", "jobs=1"])
    assert json.loads((tmp_path / "out" / "results.json").read_text())["dialogues"][str(folder)]["dialogue"] == figures
