"""Streams, batches and the messages for data that cannot be used."""
import copy

import pytest
import torch
from conftest import GOLDEN, write_split

from config import InputError
from data import Dialogues, StreamFormat, check_dialogue, collate, epoch_batches, load_dialogues, stream_items, streams
from model import load_checkpoint

FORMAT = StreamFormat(codebook_size=64)


@pytest.fixture(scope="module")
def tokenizer():
    return load_checkpoint(GOLDEN / "checkpoint")[1]


def test_roles_alternate_and_every_dialogue_is_seen():
    lengths = [200 + 7 * (i % 10) for i in range(20)]
    epochs = [epoch_batches(lengths, 4, epoch, seed=1) for epoch in (0, 1)]
    seen = [dict(key for batch in batches for key in batch) for batches in epochs]
    assert set(seen[0]) == set(seen[1]) == set(range(20))
    assert all(seen[0][i] == 1 - seen[1][i] for i in range(20))
    assert epochs[0] == epoch_batches(lengths, 4, 0, seed=1) != epoch_batches(lengths, 4, 0, seed=2)
    assert max(max(lengths[i] for i, _ in batch) - min(lengths[i] for i, _ in batch) for batch in epochs[0]) < 40


def test_system_rows_come_first(dialogues, tokenizer):
    kept = [(d, [streams(d, side, tokenizer, FORMAT) for side in (0, 1)]) for d in dialogues]
    dialogue, (one, two) = next((d, sides) for d, sides in kept if None not in sides)
    codebooks = len(dialogue["dsu_c1_path"])
    assert one["audio"][:codebooks].tolist() == two["audio"][codebooks:].tolist()
    assert one["audio"][0, 2:].tolist() == dialogue["dsu_c1_path"][0] and one["audio"][0, 0] == 64
    assert torch.equal(two["speaker"], torch.tensor(dialogue["spk_emb_c2"]))


def test_padding_changes_no_loss(dialogues):
    """The loss of a batch of several lengths is the mean of the dialogues' own."""
    model, tokenizer, fmt, _ = load_checkpoint(GOLDEN / "checkpoint")
    items = [item for d in dialogues[:4] if (item := streams(d, 1, tokenizer, fmt))]
    items[0] = items[0] | {"prompt": items[0]["prompt"][:50]}
    assert len({item["audio"].shape[1] for item in items}) > 1

    def loss(part):
        batch = collate(part, tokenizer.eos_token_id, fmt)
        hidden = model(batch["audio"][..., :-1], batch["text"][:, :-1], batch["prompt"], batch["speaker"],
                       batch["prompt_mask"])
        return model.loss(hidden, batch, prompt_text=True)["loss"]

    with torch.inference_mode():
        together, alone = loss(items), torch.stack([loss([item]) for item in items]).mean()
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_listening_weight(dialogues):
    """It adds to the loss the text's cross-entropy at the frames after a silence pad and at the first, and nothing else."""
    model, tokenizer, fmt, _ = load_checkpoint(GOLDEN / "checkpoint")
    item = next(item for d in dialogues if (item := streams(d, 0, tokenizer, fmt)))
    batch, silence = collate([item], tokenizer.eos_token_id, fmt), tokenizer.convert_tokens_to_ids("[SILENCE_PAD]")
    with torch.inference_mode():
        hidden = model(batch["audio"][..., :-1], batch["text"][:, :-1], batch["prompt"], batch["speaker"])
        frames, text = hidden[0, -batch["text"].shape[1]:-1], batch["text"][0, :-1]
        ce = torch.nn.functional.cross_entropy(model.text_logits(frames), text, reduction="none")
        listening = torch.tensor([True] + [token == silence for token in text[:-1].tolist()])
        plain, weighted = (model.loss(hidden, batch, listening_weight=w, silence_pad=silence)["loss"] for w in (1.0, 3.0))
    assert 0 < listening.sum() < len(listening)
    torch.testing.assert_close(weighted - plain, 2 * (ce * listening).sum() / len(text), atol=1e-4, rtol=0)


def test_no_text_stream(dialogues, tokenizer):
    item = streams(dialogues[0], 0, tokenizer, StreamFormat(alignment="none", codebook_size=64))
    assert item["text"].unique().tolist() == [tokenizer.convert_tokens_to_ids("[SILENCE_PAD]")]


def test_dropped_dialogues_are_counted(tiny_data, dialogues, tokenizer):
    data = Dialogues(load_dialogues(tiny_data, "train"), tokenizer, FORMAT)
    assert len(data) + len(data.dropped) == len(dialogues) and data.dropped


def test_kept_items_are_the_streams(tiny_data, dialogues, tokenizer):
    """What is kept in few bytes comes back as it was laid out, from both sides."""
    data = Dialogues(load_dialogues(tiny_data, "train"), tokenizer, FORMAT)
    laid_out = [sides for d in dialogues if None not in (sides := [streams(d, side, tokenizer, FORMAT) for side in (0, 1)])]
    assert len(data) == len(laid_out) and data.lengths == [sides[0]["audio"].shape[1] for sides in laid_out]
    for i, sides in enumerate(laid_out):
        for side in (0, 1):
            assert all(torch.equal(data[i, side][key], value) and data[i, side][key].dtype == value.dtype
                       for key, value in sides[side].items())


@pytest.mark.parametrize("files, world", [(1, 1), (1, 2), (4, 2), (3, 2)])
def test_streaming(files, world, tmp_path, dialogues, tokenizer):
    """In an epoch every dialogue comes once over all processes, roles alternate, and any place is found again."""
    per_file = -(-len(dialogues) // files)
    for i in range(files):
        write_split(tmp_path, dialogues[i * per_file:(i + 1) * per_file], "train", i, files)
    opened = load_dialogues(tmp_path, "train", streaming=True)
    kept = {tuple(item["audio"].flatten().tolist()): (d["soda_index"], side) for d in dialogues for side in (0, 1)
            if (item := streams(d, side, tokenizer, FORMAT))}
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
    done = run("data.py", f"model={GOLDEN}/checkpoint", f"data={tiny_data}", "index=1", f"out={tmp_path}/streams.png")
    assert "Your behaviors:" in done.stdout and (tmp_path / "streams.png").stat().st_size > 5000


def broken(dialogue, **change):
    dialogue = copy.deepcopy(dialogue)
    for key, value in change.items():
        dialogue[key] = value(dialogue[key])
    return dialogue


@pytest.mark.parametrize("message, change", [
    ("outside 0..63", {"dsu_c1_path": lambda rows: [[64] + row[1:] for row in rows]}),
    ("differ in length", {"dsu_c1_path": lambda rows: [rows[0][:-3]] + rows[1:]}),
    ("codes and times disagree", {"dsu_c1_path": lambda rows: [row * 2 for row in rows],
                                  "dsu_c2_path": lambda rows: [row * 2 for row in rows]}),
])
def test_bad_codes(dialogues, message, change):
    with pytest.raises(InputError, match=message):
        check_dialogue(broken(dialogues[0], **change), FORMAT)


def test_word_outside_its_utterance(dialogues):
    def shift(utterances):
        utterances[1]["words"][0]["start"] -= 1
        return utterances
    with pytest.raises(InputError, match="lies outside its utterance"):
        check_dialogue(broken(dialogues[0], utterances=shift), FORMAT)


def test_bad_data_sets(tmp_path, dialogues):
    write_split(tmp_path, [{k: v for k, v in d.items() if k != "speakers"} for d in dialogues], "train")
    with pytest.raises(InputError, match="lacks the column speakers"):
        load_dialogues(tmp_path, "train")
    with pytest.raises(InputError, match="no test-"):
        load_dialogues(tmp_path, "test")
    (tmp_path / "test-00000-of-00001.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(InputError, match="cannot open"):
        load_dialogues(tmp_path, "test")
    with pytest.raises(InputError, match="use word, utterance or none"):
        StreamFormat(alignment="letters")
