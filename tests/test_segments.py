"""world/segments.py: the four situations, on dialogues whose times are written by hand."""
import json

import pytest
from conftest import write_split

from config import InputError
from world.segments import FIND, Settings, cut_dialogue, main


def said(start, end, pause=None):
    """An utterance of two words; pause: [start, end] of the silence between them."""
    middle = (start + end) / 2
    first, second = pause or (middle, middle)
    return start, [{"word": "one", "start": start, "dur": first - start},
                   {"word": "two", "start": second, "dur": end - second}]


def dialogue(user, other):
    """A data set's row: what speaker 0 and what speaker 1 says, as of `said`; 20 s."""
    utterances = [{"speaker_idx": k, "uttr_type": None, "start_time": start, "words": words,
                   "end_time": words[-1]["start"] + words[-1]["dur"], "backchannels": []}
                  for k, own in enumerate((user, other)) for start, words in own]
    utterances.sort(key=lambda u: u["start_time"])
    codes = [[0] * 250] * 2
    end = {"word": "end", "start": 19.9, "dur": 0.1}
    utterances.append({"speaker_idx": 1, "uttr_type": None, "start_time": 19.9, "end_time": 20.0,
                       "words": [end], "backchannels": []})
    return {"utterances": utterances, "dsu_c1_path": codes, "dsu_c2_path": codes,
            "speakers": ["Anna", "Bob"], "narrative": "A talk.", "new_narrative_s1": "A talk.",
            "new_narrative_s2": "A talk.", "spk_emb_c1": [1.0], "spk_emb_c2": [1.0]}


def cut(user, other, **settings):
    """{axis: (begin, end, events) in frames} of speaker 0's segments, and the reasons."""
    found, reasons = cut_dialogue(dialogue(user, other), 7, Settings(**settings))
    own = [segment for segment in found if segment["user"] == 0]
    assert all(segment["dialogue"] == 7 for segment in own)
    return {s["axis"]: (s["begin"], s["end"], s["events"]) for s in own}, reasons


def test_a_pause_is_inside_a_telling_that_nobody_disturbs():
    telling = [said(1.6, 6.4, pause=(3.2, 3.6))]
    assert cut(telling, [])[0] == {"pause": (20, 80, [[40, 45]])}
    assert "pause" not in cut(telling, [said(4.0, 4.4)])[0]
    assert cut([said(1.6, 6.4)], [])[1]["pause", "has no pause inside"] == 1
    assert cut(telling, [], pause_in=5.0)[1]["pause", "is too short"] > 0
    # a silence of `join` or more parts two utterances
    assert not cut(telling, [], join=0.3)[0]


def test_a_turn_ends_where_the_other_answers_soon():
    assert cut([said(1.6, 4.8)], [said(4.96, 8.0)])[0] == {"turn": (20, 100, [[20, 60]])}
    assert not cut([said(1.6, 4.8)], [said(5.6, 8.0)])[0]  # too late
    assert not cut([said(1.6, 4.8)], [said(4.96, 6.0)])[0]  # too short an answer
    assert not cut([said(1.6, 4.8)], [said(4.6, 8.0)])[0]  # too early
    assert not cut([said(1.6, 4.8), said(6.0, 9.0)], [said(4.96, 8.0)])[0].get("turn")


def test_backchannels_are_all_that_the_listener_says():
    found, _ = cut([said(1.6, 6.4)], [said(3.2, 3.6), said(4.8, 5.2)])
    assert found == {"backchannel": (20, 80, [[40, 45], [60, 65]])}
    assert not cut([said(1.6, 6.4)], [said(3.2, 3.6), said(4.8, 7.0)])[0]


def test_an_interruption_cuts_into_an_answer_and_is_answered():
    user, other = [said(0.8, 3.2), said(6.4, 9.6)], [said(3.36, 7.2), said(9.76, 12.8)]
    found, _ = cut(user, other)
    assert found["interruption"] == (10, 160, [[80, 120]])
    assert "interruption" not in cut(user[1:], other)[0]
    assert "interruption" not in cut(user, other[:1])[0]
    assert "interruption" not in cut(user, other, part=3.0)[0]


def test_command(tmp_path, capsys):
    """The file holds what was found, at most `most` of a kind; a bad row is named, not fatal."""
    row = dialogue([said(1.6, 6.4, pause=(3.2, 3.6))], [])
    bad = row | {"new_narrative_s1": ""}
    write_split(tmp_path, [row, bad, row], "train")
    main([f"data={tmp_path}", f"out={tmp_path}/s.json", "most=1"])
    printed = capsys.readouterr()
    assert "pause: 2 found, 1 kept, 4.8 s each" in printed.out
    assert "left out dialogue 1: " in printed.err
    result = json.loads((tmp_path / "s.json").read_text())
    assert result["dialogues"] == 3 and {s["frames"] for s in result["segments"]} == {250}
    assert result["split"] == "train" and set(FIND) >= {s["axis"] for s in result["segments"]}
    with pytest.raises(InputError, match="no segment of any kind"):
        main([f"data={tmp_path}", f"out={tmp_path}/s.json", "pause_in=9"])
    with pytest.raises(InputError, match="s.json: no such folder can be made .* another place"):
        main([f"data={tmp_path}", f"out={tmp_path}/s.json/t.json"])
    with pytest.raises(InputError, match="shorter than what separates"):
        main([f"data={tmp_path}", "pause=1"])
