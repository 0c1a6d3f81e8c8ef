"""Streams, batches and the messages for data that cannot be used."""
import copy
import math

import pytest
import torch
from conftest import GOLDEN, write_split
from transformers import AutoTokenizer

from config import InputError
from data import (
    EXTRA_TOKENS,
    Dialogues,
    StreamFormat,
    check_dialogue,
    collate,
    decision_ids,
    epoch_batches,
    event_counts,
    load_dialogues,
    mark_kind,
    marks,
    new_tokenizer,
    pad_left,
    rare_words,
    segments,
    spoil,
    stream_items,
    streams,
    taken_up,
    text_stream,
)
from generate import stream_words

FORMAT = StreamFormat(codebook_size=64)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(GOLDEN / "checkpoint")


def test_roles_alternate_and_every_dialogue_is_seen():
    lengths = [200 + 7 * (i % 10) for i in range(20)]
    epochs = [epoch_batches(lengths, 4, epoch, seed=1) for epoch in (0, 1)]
    seen = [dict(key for batch in batches for key in batch) for batches in epochs]
    assert set(seen[0]) == set(seen[1]) == set(range(20))
    assert all(seen[0][i] == 1 - seen[1][i] for i in range(20))
    assert epochs[0] == epoch_batches(lengths, 4, 0, seed=1) != epoch_batches(lengths, 4, 0, seed=2)
    for batch in epochs[0]:
        frames = [lengths[i] for i, _ in batch]
        assert len(batch) == 4 and max(frames) - min(frames) < 40


def test_remainder_is_left_out():
    """Of 11 dialogues in batches of 4, three are left out, not always the same."""
    seen = [{key[0] for batch in epoch_batches(range(0, 1100, 100), 4, epoch, 0) for key in batch}
            for epoch in range(20)]
    assert all(len(part) == 8 for part in seen) and set.union(*seen) == set(range(11))


def test_system_rows_come_first(dialogues, tokenizer):
    kept = [(d, [streams(d, side, tokenizer, FORMAT) for side in (0, 1)]) for d in dialogues]
    dialogue, (one, two) = next((d, sides) for d, sides in kept if None not in sides)
    codebooks = len(dialogue["dsu_c1_path"])
    assert one["audio"][:codebooks].tolist() == two["audio"][codebooks:].tolist()
    assert one["audio"][0, 2:].tolist() == dialogue["dsu_c1_path"][0] and one["audio"][0, 0] == 64
    assert torch.equal(two["speaker"], torch.tensor(dialogue["spk_emb_c2"]))


def test_no_text_stream(dialogues, tokenizer):
    item = streams(dialogues[0], 0, tokenizer, StreamFormat(alignment="none", codebook_size=64))
    assert item["text"].unique().tolist() == [tokenizer.convert_tokens_to_ids("[SILENCE_PAD]")]


def test_dropped_dialogues_are_counted(tiny_data, dialogues, tokenizer):
    data = Dialogues(load_dialogues(tiny_data, "train"), tokenizer, FORMAT)
    assert len(data) + len(data.dropped) == len(dialogues) and data.dropped
    assert all("does not fit" in reason or "no words" in reason for _, reason in data.dropped)
    assert any(data.dropped[0][0] in line for line in data.notes())


def test_kept_items_are_the_streams(tiny_data, dialogues, tokenizer):
    """What is kept in few bytes comes back as it was laid out, from both sides."""
    data = Dialogues(load_dialogues(tiny_data, "train"), tokenizer, FORMAT)
    laid_out = [[streams(d, side, tokenizer, FORMAT) for side in (0, 1)] for d in dialogues]
    laid_out = [sides for sides in laid_out if None not in sides]
    assert data.lengths == [sides[0]["audio"].shape[1] for sides in laid_out]
    for i, sides in enumerate(laid_out):
        for side in (0, 1):
            for key, value in sides[side].items():
                assert torch.equal(data[i, side][key], value)
                assert data[i, side][key].dtype == value.dtype


@pytest.mark.parametrize("files, world", [(1, 1), (1, 2), (4, 2), (3, 2)])
def test_streaming(files, world, tmp_path, dialogues, tokenizer):
    """In an epoch every dialogue comes once over all processes, roles alternate, and any place is
    found again."""
    per_file = -(-len(dialogues) // files)
    for i in range(files):
        write_split(tmp_path, dialogues[i * per_file:(i + 1) * per_file], "train", i, files)
    opened = load_dialogues(tmp_path, "train", streaming=True)
    kept = {tuple(item["audio"].flatten().tolist()): (d["soda_index"], side)
            for d in dialogues for side in (0, 1) if (item := streams(d, side, tokenizer, FORMAT))}
    epochs = [{}, {}]
    for rank in range(world):
        taken = []
        for item, place in stream_items(opened, tokenizer, FORMAT, 3, rank, world):
            if place[0] == 2:
                break
            taken.append((item, place))
            index, side = kept[tuple(item["audio"].flatten().tolist())]
            assert index not in epochs[place[0]]
            epochs[place[0]][index] = side
        middle = len(taken) // 2
        again, _ = next(stream_items(opened, tokenizer, FORMAT, 3, rank, world, taken[middle][1]))
        if middle + 1 < len(taken):
            assert torch.equal(again["audio"], taken[middle + 1][0]["audio"])
    both = {index for index, side in kept.values() if (index, 1 - side) in kept.values()}
    assert both and all(epochs[0][index] == 1 - epochs[1][index] for index in both)


def test_stream_without_dialogues(tiny_data, tokenizer, dialogues, tmp_path):
    write_split(tmp_path, dialogues[:1], "train")
    with pytest.raises(InputError, match="process 1 of 2 got 0 dialogues"):
        next(stream_items(load_dialogues(tmp_path, "train", True), tokenizer, FORMAT, 0, 1, 2))


def test_draws_streams(run, tiny_data, tmp_path):
    done = run("data.py", f"model={GOLDEN}/checkpoint", f"data={tiny_data}", "index=1",
               f"out={tmp_path}/streams.png")
    assert "Your behaviors:" in done.stdout
    assert (tmp_path / "streams.png").stat().st_size > 5000


def broken(dialogue, **change):
    dialogue = copy.deepcopy(dialogue)
    for key, value in change.items():
        dialogue[key] = value(dialogue[key])
    return dialogue


def with_utterance(**change):
    return lambda utterances: [utterances[0] | change, *utterances[1:]]


def with_word(**change):
    def apply(utterances):
        utterances[1]["words"][1] |= change
        return utterances
    return apply


BROKEN = [
    ("outside 0..63", {"dsu_c1_path": lambda rows: [[64] + row[1:] for row in rows]}),
    ("differ in length", {"dsu_c1_path": lambda rows: [rows[0][:-3]] + rows[1:]}),
    ("codes and times disagree", {"dsu_c1_path": lambda rows: [row * 2 for row in rows],
                                  "dsu_c2_path": lambda rows: [row * 2 for row in rows]}),
    ("has no codes", {"dsu_c2_path": lambda rows: [[] for _ in rows],
                      "dsu_c1_path": lambda rows: [[] for _ in rows]}),
    ("no utterances", {"utterances": lambda _: []}),
    ("must be seconds", {"utterances": with_utterance(start_time="0.2781")}),
    ("must be seconds", {"utterances": with_utterance(end_time=math.nan)}),
    ("must be seconds", {"utterances": with_utterance(start_time=None)}),
    ("not 0 or 1", {"utterances": with_utterance(speaker_idx=2)}),
    ("has no words", {"utterances": with_utterance(words=[])}),
    ("TypeError", {"utterances": with_utterance(backchannels=None)}),
    ("must be seconds", {"utterances": with_word(start="00:00:01.278")}),
    ("must be seconds", {"utterances": with_word(dur=math.inf)}),
    ("lies outside its utterance", {"utterances": with_word(start=0.0)}),
    ("sort utterances", {"utterances": lambda some: [some[1], some[0], *some[2:]]}),
    ("name or a narrative", {"new_narrative_s2": lambda _: None}),
    ("no finite number", {"spk_emb_c1": lambda numbers: [math.nan] + numbers[1:]}),
]


@pytest.mark.parametrize("message, change", BROKEN)
def test_values_are_not_believed(dialogues, message, change):
    check_dialogue(dialogues[0], FORMAT)
    with pytest.raises(InputError, match=message):
        check_dialogue(broken(dialogues[0], **change), FORMAT)


def test_words_in_order(dialogues):
    def swap(utterances):
        words = utterances[1]["words"]
        words[0], words[1] = words[1], words[0]
        return utterances
    with pytest.raises(InputError, match="sort words by start"):
        check_dialogue(broken(dialogues[0], utterances=swap), FORMAT)


def test_a_bad_dialogue_stops_nothing(dialogues, tokenizer, tmp_path, capsys):
    """It is dropped with its file's name and the reason, stored or streamed; all bad is an
    error."""
    bad = broken(dialogues[1], utterances=with_word(start=0.0))
    named = [d | {"file_name": f"talk{i}", "soda_index": None}
             for i, d in enumerate([dialogues[0], bad, dialogues[2]])]
    write_split(tmp_path, named, "train")
    data = Dialogues(load_dialogues(tmp_path, "train"), tokenizer, FORMAT)
    reasons = dict(data.dropped)
    assert len(data) + len(reasons) == 3 and "lies outside its utterance" in reasons["talk1"]
    items = stream_items(load_dialogues(tmp_path, "train", True), tokenizer, FORMAT, 0)
    while next(items)[1][0] < 1:  # an epoch
        pass
    assert "dropped dialogue talk1: the word" in capsys.readouterr().err
    write_split(tmp_path, named[1:2], "train")
    with pytest.raises(InputError, match="none of the 1 dialogues can be used; dialogue talk1"):
        Dialogues(load_dialogues(tmp_path, "train"), tokenizer, FORMAT)


def test_dialogues_of_another_shape(dialogues, tokenizer):
    other = dialogues[2] | {"spk_emb_c1": [1.0, 2.0], "spk_emb_c2": [1.0, 2.0]}
    data = Dialogues([d for d in (*dialogues[:2], other)], tokenizer, FORMAT)
    assert "[2, 2] speaker numbers" in dict(data.dropped)[str(other["soda_index"])]


def test_what_is_behind_max_frames_is_told(tiny_data, tokenizer):
    short = StreamFormat(codebook_size=64, max_frames=50)
    data = Dialogues(load_dialogues(tiny_data, "train"), tokenizer, short)
    assert data.seconds_used == len(data) * 50 / 12.5 < data.seconds
    assert any(" s are used, the rest is behind max_frames" in line for line in data.notes())


def test_unmarked_events_are_no_zero(dialogues, tokenizer):
    """Where no transcript marks events, a line says so; one marked event is enough."""
    flat = [broken(d, utterances=lambda us: [u | {"uttr_type": None, "backchannels": []}
                                             for u in us]) for d in dialogues]
    line = "no backchannels or interruptions are marked"
    assert any(line in note for note in Dialogues(flat, tokenizer, FORMAT).notes())
    assert not any(line in note for note in Dialogues(dialogues, tokenizer, FORMAT).notes())


def test_path_is_no_pattern(dialogues, tmp_path):
    write_split(tmp_path / "data [v1]*", dialogues[:2], "train")
    for streaming in (False, True):
        loaded = load_dialogues(tmp_path / "data [v1]*", "train", streaming)
        assert [d["soda_index"] for d in loaded] == [d["soda_index"] for d in dialogues[:2]]


def talk_with_events(backchannels, interruptions):
    """20 s in which speaker 0 makes so many of each, in this order; the codes are zeros."""
    def part(begin, seconds, **more):
        words = [{"word": "yes", "start": begin, "dur": seconds}]
        return {"start_time": begin, "end_time": begin + seconds, "words": words, **more}
    step = 9 / max(1, backchannels)
    inside = [part(0.5 + step * i, step / 2) for i in range(backchannels)]
    own = [part(10 + 0.1 * i, 0.05, speaker_idx=0, uttr_type="interrupt", backchannels=[])
           for i in range(interruptions)]
    first = part(0.0, 9.9, speaker_idx=1, uttr_type=None, backchannels=inside)
    last = part(19.0, 1.0, speaker_idx=1, uttr_type=None, backchannels=[])
    codes = [[0] * 250]
    return {"utterances": [first, *own, last], "dsu_c1_path": codes, "dsu_c2_path": codes}


def test_count_marks():
    """Up: as they come; down: how many are still to come; and the prompt's count is the largest."""
    dialogue = talk_with_events(3, 2)

    def opening(kind, **more):
        return marks(dialogue, 0, StreamFormat(behaviour_tokens=kind, codebook_size=64, **more))
    assert opening("none") == [""] * 5
    assert opening("plain") == ["[BC]"] * 3 + ["[INTER]"] * 2
    assert opening("count_up") == ["[BC1]", "[BC2]", "[BC3]", "[INTERRUPT1]", "[INTERRUPT2]"]
    assert opening("count_down") == ["[BC3]", "[BC2]", "[BC1]", "[INTERRUPT2]", "[INTERRUPT1]"]
    assert event_counts(dialogue, 0, FORMAT) == (3, 2)
    # behind max_frames (10.1 s here) lies the second interruption: not counted, so not numbered
    assert event_counts(dialogue, 0, StreamFormat(max_frames=126)) == (3, 1)
    assert opening("count_down", max_frames=126)[3:] == ["[INTERRUPT1]", "[INTER]"]
    assert set(marks(dialogue, 1, StreamFormat(behaviour_tokens="count_up"))) == {""}


def test_count_marks_end_at_the_last_token():
    dialogue = talk_with_events(42, 22)
    up, down = (marks(dialogue, 0, StreamFormat(behaviour_tokens=kind))
                for kind in ("count_up", "count_down"))
    assert up[39:42] == ["[BC40]"] * 3 and up[-1] == "[INTERRUPT20]"
    assert down[:4] == ["[BC40]"] * 3 + ["[BC39]"] and down[-1] == "[INTERRUPT1]"


def test_marks_in_the_text(tokenizer):
    """The mark stands where its event's first word begins, the word's tokens behind it."""
    fmt = StreamFormat(behaviour_tokens="count_down")
    row, _ = text_stream(talk_with_events(3, 0), 0, tokenizer, fmt)
    tokens = tokenizer.convert_ids_to_tokens(row.tolist())
    found = {t: token for t, token in enumerate(tokens) if mark_kind(token)}
    assert found == {6: "[BC3]", 43: "[BC2]", 81: "[BC1]"}  # 0.5, 3.5 and 6.5 s
    assert tokenizer.decode(row[7:10]).split("[WORD_PAD]")[0].strip() == "yes"


def test_mark_kinds():
    kinds = [mark_kind(token) for token in EXTRA_TOKENS]
    assert kinds.count("backchannel") == 41 and kinds.count("interruption") == 21
    assert kinds[:5] == ["", "", "", "backchannel", "interruption"] and mark_kind("yes") == ""


@pytest.mark.parametrize("given, meant", [(True, "plain"), (False, "none"), ("true", "plain"),
                                          ("False", "none"), ("count_up", "count_up")])
def test_behaviour_tokens_of_older_files(given, meant):
    assert StreamFormat(behaviour_tokens=given).behaviour_tokens == meant


def test_pad_left():
    ids, mask = pad_left([[1, 2, 3], [4]], 9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[True] * 3, [False, False, True]]
    assert pad_left([[1, 2], [3, 4]], 9)[1] is None


@pytest.fixture(scope="module")
def whole_words(tiny_data, tmp_path_factory):
    """A tokenizer learnt on the golden dialogues, stored and read again."""
    folder = tmp_path_factory.mktemp("tokenizer")
    learnt = new_tokenizer(load_dialogues(tiny_data, "train"), 8192, FORMAT)
    learnt.add_special_tokens({"additional_special_tokens": EXTRA_TOKENS})
    learnt.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_taken_up(dialogues, tokenizer):
    """Frames that say a word of the prompt for the first time, common words left out, and the third
    to fifth word: counted word by word."""
    split = Dialogues(dialogues, tokenizer, FORMAT)
    items = [split[i, side] for i in range(min(8, len(split))) for side in (0, 1)]
    prompts = [set(split[i, side]["prompt"].tolist()) for i in range(len(split)) for side in (0, 1)]
    rare = rare_words(split, len(tokenizer))
    for token in set.union(*prompts):
        assert rare[token] == (sum(token in prompt for prompt in prompts) < 0.2 * len(prompts))
    rare = torch.arange(len(tokenizer)) % 3 > 0  # few dialogues have none
    decisions = decision_ids(tokenizer, len(tokenizer))
    found = taken_up(collate(items, tokenizer.eos_token_id, FORMAT), rare, decisions)
    for item, row in zip(items, found):
        said, words, prompt = set(), 0, set(item["prompt"].tolist())
        for t, token in enumerate(item["text"].tolist()):
            is_word = tokenizer.convert_ids_to_tokens(token) not in (*EXTRA_TOKENS,
                                                                     tokenizer.eos_token)
            words += is_word
            new = token in prompt and bool(rare[token]) and token not in said
            assert row[t] == (new or is_word and 3 <= words <= 5)
            said.add(token)
        assert not row[len(item["text"]):].any()
    assert found.any() and not found.all()


def test_spoil(dialogues, tokenizer):
    """Only the system's own codes change, at most the share asked for, in stretches, and always the
    same for a seed; delay and end ids stay where they are."""
    found = [streams(dialogue, 0, tokenizer, FORMAT) for dialogue in dialogues[:8]]
    items = [item for item in found if item]
    batch = collate(items, 0, FORMAT)
    audio, system = batch["audio"], batch["audio"].shape[1] // 2
    changed = []
    for seed in range(20):
        spoiled = spoil(batch, 0.6, FORMAT, range(seed, seed + len(items)))
        assert torch.equal(spoiled, spoil(batch, 0.6, FORMAT, range(seed, seed + len(items))))
        assert torch.equal(spoiled[:, system:], audio[:, system:])
        assert torch.equal(spoiled >= 64, audio >= 64)
        changed.append((spoiled != audio).any(1).sum().item() / batch["frame_mask"].sum().item())
    assert 0.1 < sum(changed) / len(changed) < 0.4 and max(changed) > 0.3
    assert torch.equal(spoil(batch, 0.0, FORMAT, [0] * len(items)), audio)
    # mistakes that the data set has: in every second dialogue
    batch["slip"] = torch.where(audio < 64, (audio + 1) % 64, audio)[:, :system]
    slipped = spoil(batch, 0.0, FORMAT, range(len(items)))
    assert torch.equal(slipped[1::2, :system], batch["slip"][1::2])
    assert torch.equal(slipped[::2], audio[::2]) and torch.equal(slipped[:, system:],
                                                                 audio[:, system:])


def test_every_word_is_one_token(whole_words, dialogues):
    """The same one at the start, behind a mark, inside a sentence and in the prompt."""
    def ids(text):
        return whole_words.encode(text, add_special_tokens=False)
    said = {word["word"] for d in dialogues for side in (0, 1)
            for segment, _, _ in segments(d, side) for word in segment["words"] or []}
    assert any("'" in word for word in said)
    name = dialogues[0]["speakers"][0]
    for word in said | {name}:
        (one,) = ids(word.lower())
        assert ids(f"[BC] {word.lower()}")[1:] == ids(" " + word) == [one]
        assert one in ids(f"between you ({word}) and") and one in ids(f"Hi {word}.")
        assert whole_words.decode([one]) == " " + word.lower()


def test_tokenizer_learns_on_no_more_than_the_limit(dialogues):
    read = iter(dialogues)
    two = new_tokenizer(read, 8192, FORMAT, limit=2)
    assert next(read) is dialogues[2] and two.get_vocab() == new_tokenizer(
        dialogues[:2], 8192, FORMAT).get_vocab()


def test_other_text_is_encoded_too(whole_words):
    for text in ("zyxw 日本 Łódź", "3.50 well-known", "don’t"):
        plain = text.lower().replace("’", "'")
        ids = whole_words.encode(text, add_special_tokens=False)
        assert whole_words.decode(ids).strip() == plain


def test_words_come_back(whole_words, dialogues):
    """generate.stream_words reads from a text row what was laid into it."""
    fmt = StreamFormat(codebook_size=64, behaviour_tokens="plain", max_frames=10_000)
    read = 0
    for dialogue in dialogues:
        row, pushed = text_stream(dialogue, 0, whole_words, fmt)
        parts = sorted((part for part, _, _ in segments(dialogue, 0)),
                       key=lambda part: part["start_time"])
        overlaps = any(b["start_time"] < a["end_time"] for a, b in zip(parts, parts[1:]))
        if row is None or pushed or overlaps:  # then words stand in each other's frames
            continue
        said = [word["word"].lower() for part in parts for word in part["words"]]
        assert [word["word"] for word in stream_words(row, whole_words)] == said
        read += 1
    assert read


def test_bad_data_sets(tmp_path, dialogues):
    nameless = [{k: v for k, v in d.items() if k != "speakers"} for d in dialogues]
    write_split(tmp_path, nameless, "train")
    with pytest.raises(InputError, match="lacks the column speakers"):
        load_dialogues(tmp_path, "train")
    with pytest.raises(InputError, match="no test-"):
        load_dialogues(tmp_path, "test")
    (tmp_path / "test-00000-of-00001.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(InputError, match="cannot open"):
        load_dialogues(tmp_path, "test")
    with pytest.raises(InputError, match="use word, utterance or none"):
        StreamFormat(alignment="letters")
    with pytest.raises(InputError, match="use none, plain, count_up or count_down"):
        StreamFormat(behaviour_tokens="some")
