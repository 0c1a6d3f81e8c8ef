"""fdb.py on intervals written by hand; world/fdb.py's layout; both from end to end, with a stub for
the recogniser."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT, write_split

import evaluate
import fdb
from config import InputError
from data import StreamFormat, event_counts, load_dialogues
from fdb import divergence, find_intervals, score_backchannel, takeover
from world import fdb as world_fdb


def words(*times):
    return [{"word": "yes", "start": start, "end": end} for start, end in times]


def test_a_takeover_is_a_second_or_more_than_three_words():
    assert takeover([]) == 0
    assert takeover(words((1.0, 1.4), (1.6, 1.99))) == 0
    assert takeover(words((1.0, 1.4), (1.6, 2.0))) == 1  # one second
    assert takeover(words(*[(t / 10, t / 10 + 0.1) for t in range(3)])) == 0
    assert takeover(words(*[(t / 10, t / 10 + 0.1) for t in range(4)])) == 1
    assert takeover(words((0.0, 0.2), (9.0, 9.2))) == 1  # wherever the words are


def test_latency_is_from_the_users_end_and_never_negative():
    turn = {"times": [2.0, 2.5]}
    said = words((2.3, 3.0), (3.0, 4.0))
    assert fdb.score_turn(said, turn) == {"takeover": 1, "latency": pytest.approx(0.3)}
    assert fdb.score_turn(words((0.0, 3.0)), turn) == {"takeover": 1, "latency": 0.0}
    assert fdb.score_turn(words((2.3, 2.5)), turn) == {"takeover": 0}
    assert fdb.score_interruption(words((2.9, 4.0)), turn)["latency"] == pytest.approx(0.4)


def test_backchannels_are_short_and_few_words():
    def score(segments, said):
        found = score_backchannel(said, segments, 10.0, [0.5, 0.5])
        return found["takeover"], found["frequency"]
    one, other = (1.0, 1.5), (4.0, 4.5)
    assert score([], []) == (0, 0.0)
    assert score([one, other], words(one, other)) == (0, 0.2)
    assert score([(1.0, 2.0)], words(one)) == (1, 0.1)  # a second
    assert score([one], words((0.9, 1.1), (1.1, 1.3), (1.4, 1.6))) == (1, 0.1)  # three words
    assert score([one, (4.0, 7.1)], []) == (1, 0.1)  # a turn: what came before counts
    assert score([(4.0, 7.1), one], []) == (1, 0.0)
    assert score([(1.0, 2.0), other], []) == (0, 0.2)  # the last one decides


def test_divergence_of_times():
    assert divergence([], 2.0, [1.0]) == 1
    truth = np.zeros(11)
    truth[5:8] = 1 / 3
    assert divergence([(1.0, 1.5)], 2.0, truth) < 1e-3
    assert divergence([(0.0, 0.1)], 2.0, truth) == pytest.approx(np.log(2) ** 0.5, abs=1e-3)
    # bins of another number are stretched over the file
    assert divergence([(0.0, 1.95)], 2.0, [0.25] * 4) < 0.2


def test_intervals_of_stopping_and_answering():
    user, model = [(0.0, 1.0), (1.5, 3.0), (6.0, 7.0)], [(2.0, 3.2), (3.6, 4.0), (6.5, 8.0)]
    stop, response = find_intervals(user, model)  # joined: user 0-3, 6-7; model 2-4, 6.5-8
    assert stop == [[2.0, 3.0], [6.5, 7.0]]
    assert response == [[3.0, 6.5]]
    assert find_intervals([(0.0, 1.0), (2.0, 3.0)], [(4.0, 5.0)]) == [[], [[3.0, 4.0]]]
    assert find_intervals([(0.0, 1.0)], []) == [[], []]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One sample of each axis, of the first test dialogues, with an answer that never stops."""
    folder = tmp_path_factory.mktemp("fdb")
    few = load_dialogues(ROOT / "default/data", "test").select(range(25))
    few.to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    (folder / "data" / "info.json").write_text((ROOT / "default/data/info.json").read_text())
    world_fdb.main([f"out={folder}/set", f"data={folder}/data", "n=1", "output=talking"])
    return folder / "set"


def test_layout(made):
    files = {str(path.relative_to(made)) for path in made.rglob("*.*")}
    v1, pair = "v1_0/synthetic_", {"input.wav", "output.wav", "prompt.json"}
    expected = {"pause_handling": {"pause.json", "transcription.json"},
                "turn_taking": {"turn_taking.json", "transcription.json"},
                "backchannel": {"transcription.json"},
                "user_interruption": {"interrupt.json", "context.wav", "interrupt.wav"}}
    for task, own in expected.items():
        assert files >= {f"{v1}{task}/0/{name}" for name in own | pair}
    assert files >= {f"v1_5/user_interruption/0/{name}"
                     for name in pair | {"clean_input.wav", "metadata.json"}}
    for path in made.rglob("*.wav"):
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
    for path in made.rglob("output.wav"):
        assert soundfile.info(path).frames == soundfile.info(path.with_name("input.wav")).frames


def test_a_set_without_backchannels_and_one_without_anything(made, tmp_path):
    rows = load_dialogues(made.parent / "data", "test")
    def make(name, change):
        changed = [change(dict(row)) for row in rows.select(range(8))]
        write_split(tmp_path / name, changed, "test")
        info = (made.parent / "data" / "info.json").read_text()
        (tmp_path / name / "info.json").write_text(info)
        world_fdb.main([f"out={tmp_path / name}_set", f"data={tmp_path / name}", "n=1"])
    def quiet(row):
        return row | {"utterances": [u | {"backchannels": []} for u in row["utterances"]]}
    make("quiet", quiet)
    assert (tmp_path / "quiet_set/v1_0/synthetic_turn_taking/0/input.wav").exists()
    assert not (tmp_path / "quiet_set/v1_0/synthetic_backchannel").exists()
    with pytest.raises(InputError, match="nothing to make a sample of; dialogue 0: "):
        make("untold", lambda row: row | {"dsu_c1_path": [[]] * 4})


def test_what_the_json_says_is_heard(made):
    """Speech inside the times, digital silence outside of them; a telling ends with its file."""
    def level(path, begin, end):
        audio, rate = soundfile.read(path)
        return abs(audio[int(begin * rate):int(end * rate)]).max()
    def of(task, name):
        folder = made / task / "0"
        return folder, json.loads((folder / name).read_text())
    folder, (turn,) = of("v1_0/synthetic_turn_taking", "turn_taking.json")
    end, answer = turn["timestamp"]
    assert answer - end <= 0.7 and level(folder / "input.wav", end - 1, end) > 0.01
    assert level(folder / "input.wav", end + 0.06, end + 3.9) == 0
    folder, (cut,) = of("v1_0/synthetic_user_interruption", "interrupt.json")
    start, end = cut["timestamp"]
    assert level(folder / "input.wav", start, end) > 0.01
    assert level(folder / "input.wav", start - 0.5, start - 0.06) == 0
    folder, heard = of("v1_5/user_interruption", "metadata.json")
    assert heard["timestamps"] == cut["timestamp"] and heard["context_text"] == cut["context"]
    assert level(folder / "clean_input.wav", start - 0.06, end) == 0
    folder, pauses = of("v1_0/synthetic_pause_handling", "pause.json")
    assert all(0.2 <= b - a < 0.565 for a, b in (pause["timestamp"] for pause in pauses))
    told = json.loads((folder / "transcription.json").read_text())[0]["item"]
    seconds = soundfile.info(folder / "input.wav").duration
    assert told[-1]["timestamp"][1] == pytest.approx(seconds - 0.05, abs=0.01)
    truth = json.loads((made / "v1_0/synthetic_backchannel/icc_gt_distribution.json").read_text())
    assert sum(truth["0"]) == pytest.approx(1)


def test_prompts_ask_for_the_same_or_for_what_the_dialogue_holds(made):
    dialogue = load_dialogues(made.parent / "data", "test")[0]
    for user in (0, 1):
        own = event_counts(dialogue, 1 - user, StreamFormat())
        for chosen, expected in ((False, (2, 0)), (True, own)):
            settings = world_fdb.Settings(own_counts=chosen)
            (system, _), = world_fdb.prompt_of(dialogue, user, settings)
            assert (system["backchannels"], system["interruptions"]) == expected


def test_end_to_end(made, tmp_path, monkeypatch, capsys):
    """The talking one, with ears that hear a word where there is sound: it takes every turn."""
    def loud(audio, shortest=0.1, warm=True):
        return [(0.0, len(audio) / 16000)] if abs(audio).max() > 0.001 else []
    heard = []

    def recognise(audio, phrases, asr):
        heard.append(len(audio))
        return words(*phrases)
    monkeypatch.setattr(fdb, "voiced", loud)
    monkeypatch.setattr(fdb, "recognise", recognise)
    command = ["fdb", str(made), "jobs=1", f"out={tmp_path}"]
    evaluate.main(command)
    assert len(heard) == 4 and "takeover rate ↑ (n=1) | 1.000" in capsys.readouterr().out
    evaluate.main(command)
    assert len(heard) == 4  # kept
    turn = made / "v1_0/synthetic_turn_taking/0"
    shutil.copy2(turn / "input.wav", turn / "output.wav")  # another answer, of an older time
    evaluate.main(command)
    assert len(heard) == 5
    rows = json.loads((tmp_path / "fdb.json").read_text())["rows"]
    found = {name: own[str(made)]["value"] for name, own in rows.items()}
    assert found["synthetic pause handling: takeover rate ↓ (n=1)"] == 1
    assert found["synthetic turn taking: latency, s ↓"] == 0
    assert found["synthetic backchannel: JSD ↓"] == 1  # a turn from the beginning on
    assert found["user interruption: stops after, s ↓"] > 3
    chunks = json.loads((made / "v1_0/synthetic_turn_taking/0/output.json").read_text())["chunks"]
    assert chunks[0]["text"] == "yes" and chunks[0]["timestamp"][0] == 0


def test_a_clean_answer_is_timed_against_the_clean_input(made, tmp_path, monkeypatch):
    folder, heard = made / "v1_5/user_interruption/0", []
    shutil.copy(folder / "output.wav", folder / "clean_output.wav")
    monkeypatch.setattr(fdb, "speech", lambda path: (heard.append(path.name) or [(0, 1)], 1))
    sample = {"folder": str(folder), "axis": "timing"}
    fdb.score_sample(sample, fdb.Settings(output="clean_output.wav"))
    assert heard == ["clean_input.wav", "clean_output.wav"]
    assert (folder / "clean_latency_intervals.json").exists()


def test_what_another_program_heard_is_not_lost(made, tmp_path):
    folder = shutil.copytree(made / "v1_0/synthetic_turn_taking/0", tmp_path / "0")
    (folder / "output.json").write_text('{"text": "yes", "chunks": []}')
    with pytest.raises(InputError, match="output.json: is of another program, and would be lost"):
        fdb.hear({"folder": str(folder), "axis": "turn"}, fdb.Settings())


def test_what_is_wrong_is_said(made, tmp_path):
    with pytest.raises(InputError, match="no folder given"):
        evaluate.main(["fdb"])
    with pytest.raises(InputError, match="no input.wav below it"):
        evaluate.main(["fdb", str(tmp_path)])
    with pytest.raises(InputError, match="answers.wav: is missing"):
        evaluate.main(["fdb", str(made), "output=answers.wav"])
    with pytest.raises(InputError, match="n was 1 and is 2"):
        world_fdb.main([f"out={made}", f"data={made.parent}/data", "n=2", "output=talking"])
    with pytest.raises(InputError, match="must be silent, talking or recorded"):
        world_fdb.main(["output=loud"])
    sample = Path(tmp_path, "0")
    sample.mkdir()
    (sample / "input.wav").touch()
    with pytest.raises(InputError, match="which axis is it of"):
        evaluate.main(["fdb", str(tmp_path)])
    (sample / "turn_taking.json").write_text("[]")
    with pytest.raises(InputError, match=r"holds no \[start, end\]"):
        evaluate.main(["fdb", str(tmp_path)])
