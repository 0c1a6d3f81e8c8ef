"""Dialogues to streams: what the model reads and predicts at every 80 ms frame (paper sections 4 and 6, spec 1-3).

One dialogue in the released columns becomes, seen from one of its speakers (the *system*; the other is the *user*):

    prompt  the instruction, as text tokens                                          (P,)
    audio   system codebooks 1..K, then user codebooks 1..K, one id a frame          (2K, T)
    text    the system's words, on the frames where they are spoken, pads elsewhere  (T,)

    audio row   D  D  a0 a1 a2 a3 ...  E     D = delay id (C), a = codes 0..C-1, E = end id (C+1)
    text row    t0 t1 t2 t3 ...  S  S  eot   S = silence pad: text leads audio by the delay

`python data.py` prints the prompt of a test dialogue and draws a piece of its streams.
"""
import itertools
import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from datasets.distributed import split_dataset_by_node

from config import InputError, hub_problem, load_settings

# In this order behind the tokenizer's own vocabulary; the counting tokens only keep the rows of released checkpoints.
SILENCE_PAD, UTTERANCE_PAD, WORD_PAD, BC, INTER = "[SILENCE_PAD]", "[UTTERANCE_PAD]", "[WORD_PAD]", "[BC]", "[INTER]"
EXTRA_TOKENS = ([SILENCE_PAD, UTTERANCE_PAD, WORD_PAD, BC, INTER]
                + [f"[INTERRUPT{i}]" for i in range(1, 21)] + [f"[BC{i}]" for i in range(1, 41)])
COLUMNS = ["narrative", "new_narrative_s1", "new_narrative_s2", "speakers", "utterances",
           "dsu_c1_path", "dsu_c2_path", "spk_emb_c1", "spk_emb_c2"]
FRAME_RATE = 12.5  # frames per second


@dataclass
class StreamFormat:
    """How a dialogue is laid out in streams; stored with a checkpoint, so that generation lays out the same."""
    alignment: str = "word"  # text stream: word | utterance | none
    delay: int = 2  # frames by which text leads audio
    behaviour_tokens: bool = False  # [BC] and [INTER] in front of backchannels and interruptions
    max_frames: int = 2048  # longer dialogues are cut to this many frames, before the delay
    rewritten_narrative: bool = True  # the narrative from the system's side; False: the plain one (paper section 6.1)
    codebook_size: int = 4032  # C

    def __post_init__(self):
        if self.alignment not in ("word", "utterance", "none"):
            raise InputError(f"alignment is '{self.alignment}'; use word, utterance or none")
        if self.delay < 0 or self.max_frames < 1:
            raise InputError(f"delay={self.delay} and max_frames={self.max_frames}: a delay is 0 or more frames, "
                             "max_frames at least 1")


def make_prompt(name, other, narrative, backchannels, interruptions, starts):
    """The instruction to the speaker `name` as the text that the model reads (paper Fig. 2, spec 3)."""
    return (f"Generate a dialogue between you ({name}) and another speaker ({other}) based on the given narrative. "
            "Follow the specific behavior instructions for you.\n\n"
            f"Narrative:\n- {narrative}\n\n"
            f"Your behaviors:\n- backchannels: {backchannels}\n- interruptions: {interruptions}\n"
            f"- starts the dialogue: {starts}\n\n"
            "Ensure that the dialogue reflects the behaviours of you.\n<|SOS|>")


def frames_per_second(dialogue):
    """Frames per second of the annotation: close to 12.5, since the recording ends near the last utterance's end."""
    return len(dialogue["dsu_c1_path"][0]) / dialogue["utterances"][-1]["end_time"]


def segments(dialogue, speaker):
    """What `speaker` (0 or 1) says, as (segment, behaviour token or '', utterance): own utterances, and backchannels
    that lie in an utterance of the other. A segment is a dict with `words`, `start_time`, `end_time` in seconds."""
    for utterance in dialogue["utterances"]:
        if utterance["speaker_idx"] == speaker:
            yield utterance, INTER if utterance["uttr_type"] == "interrupt" else "", utterance
        else:
            for backchannel in utterance["backchannels"]:
                yield backchannel, BC, utterance


def event_counts(dialogue, system, fmt):
    """(backchannels, interruptions) of speaker `system` that end in the first `max_frames` frames; a backchannel counts
    with the utterance that it lies in, as in the authors' program."""
    last = fmt.max_frames / frames_per_second(dialogue)
    kinds = [kind for _, kind, utterance in segments(dialogue, system) if utterance["end_time"] <= last]
    return kinds.count(BC), kinds.count(INTER)


def instruction(dialogue, system, fmt):
    """The prompt text for speaker `system` of a dialogue, with the counts of event_counts."""
    narrative = dialogue[f"new_narrative_s{system + 1}" if fmt.rewritten_narrative else "narrative"]
    return make_prompt(dialogue["speakers"][system], dialogue["speakers"][1 - system], narrative,
                       *event_counts(dialogue, system, fmt), dialogue["utterances"][0]["speaker_idx"] == system)


def text_stream(dialogue, system, tokenizer, fmt):
    """The text row of speaker `system` (spec 2), before cut and delay.

    Returns (list of T ids, number of words pushed back by the tokens before them). Returns (None, n) when the dialogue
    cannot be laid out and is dropped, as the paper does: a segment without words, or tokens that do not fit.
    Raises InputError when a word lies outside its utterance.
    """
    silence, utterance_pad, word_pad = tokenizer.convert_tokens_to_ids([SILENCE_PAD, UTTERANCE_PAD, WORD_PAD])
    num_frames, rate, overflow = len(dialogue["dsu_c1_path"][0]), frames_per_second(dialogue), 0
    row = [silence] * num_frames
    for segment, kind, _ in segments(dialogue, system):
        words = [dict(word, end=word["start"] + word["dur"]) for word in segment["words"] or []]
        if not words:
            return None, overflow
        for word in words:  # a millisecond of rounding is allowed
            if word["start"] < segment["start_time"] - 1e-3 or word["end"] > segment["end_time"] + 1e-3:
                raise InputError(f"dialogue {dialogue.get('soda_index')}: the word '{word['word']}' at {word['start']:.3f}-"
                                 f"{word['end']:.3f} s lies outside its utterance ({segment['start_time']:.3f}-"
                                 f"{segment['end_time']:.3f} s); correct its times")
        mark = kind + " " if fmt.behaviour_tokens and kind else ""
        first, last = int(words[0]["start"] * rate), int(words[-1]["end"] * rate)
        row[first:last] = [utterance_pad] * len(row[first:last])
        if fmt.alignment == "utterance":
            text = re.sub(r"[.,!?](?= )", "", " ".join(word["word"] for word in words).lower())
            ids = tokenizer.encode(mark + text, add_special_tokens=False)
            if len(ids) > last - first:
                return None, overflow
            row[first:first + len(ids)] = ids
            continue
        free = 0  # the first frame that no earlier word of this segment needs
        texts = [(" " if i else mark) + word["word"].lower() for i, word in enumerate(words)]
        for word, ids in zip(words, tokenizer(texts, add_special_tokens=False)["input_ids"]):  # one call is faster
            start = int(word["start"] * rate)
            overflow += free > start
            start = max(start, free)
            free = max(start + len(ids), int(word["end"] * rate))
            if start + len(ids) > num_frames:
                return None, overflow
            free = min(free, num_frames)
            row[start:free] = ids + [word_pad] * (free - start - len(ids))
    return row, overflow


def streams(dialogue, system, tokenizer, fmt):
    """One dialogue from the side of speaker `system`, without the end marks.

    Returns a dict of prompt (P,), audio (2K, T+delay), text (T+delay,) as long tensors and speaker (S,) float; or None
    if the dialogue's text cannot be laid out (see text_stream). With alignment 'none' the text row is silence pads.
    """
    silence = tokenizer.convert_tokens_to_ids(SILENCE_PAD)
    codes = [dialogue["dsu_c1_path"], dialogue["dsu_c2_path"]]
    text = [silence] * len(codes[0][0])
    if fmt.alignment != "none":
        text, _ = text_stream(dialogue, system, tokenizer, fmt)
    if text is None:
        return None
    audio = torch.tensor([row[:fmt.max_frames] for row in codes[system] + codes[1 - system]])  # (2K, T)
    delay_ids = torch.full((audio.shape[0], fmt.delay), fmt.codebook_size)
    return {"prompt": torch.tensor(tokenizer.encode(instruction(dialogue, system, fmt), add_special_tokens=False)),
            "audio": torch.cat([delay_ids, audio], dim=1),
            "text": torch.tensor(text[:fmt.max_frames] + [silence] * fmt.delay),
            "speaker": torch.tensor(dialogue[f"spk_emb_c{system + 1}"], dtype=torch.float32)}


def collate(items, end_token, fmt):
    """Items of `streams` to one batch of B. Prompts are padded on the left, frames on the right, so that frame 0 is at
    the same position for all; every item's frames are closed by the end id and the end token.

    Returns prompt (B, P) and prompt_mask (B, P), audio (B, 2K, T) and text (B, T) with frame_mask (B, T), speaker (B, S).
    prompt_mask is None if no prompt is padded: attention is faster without.
    """
    size, prompt_len = len(items), max(len(item["prompt"]) for item in items)
    num_frames = max(item["audio"].shape[1] for item in items) + 1
    batch = {"prompt": torch.full((size, prompt_len), end_token),
             "prompt_mask": torch.zeros(size, prompt_len, dtype=torch.bool),
             "audio": torch.full((size, items[0]["audio"].shape[0], num_frames), fmt.codebook_size + 1),
             "text": torch.full((size, num_frames), end_token),
             "frame_mask": torch.zeros(size, num_frames, dtype=torch.bool),
             "speaker": torch.stack([item["speaker"] for item in items])}
    for b, item in enumerate(items):
        length = item["audio"].shape[1]
        batch["prompt"][b, prompt_len - len(item["prompt"]):] = item["prompt"]
        batch["prompt_mask"][b, prompt_len - len(item["prompt"]):] = True
        batch["audio"][b, :, :length] = item["audio"]
        batch["text"][b, :length] = item["text"]
        batch["frame_mask"][b, :length + 1] = True
    if batch["prompt_mask"].all():
        batch["prompt_mask"] = None
    return batch


def load_dialogues(source, split, streaming=False):
    """A split of a prepared data set: a folder of `prepare.py` (SPLIT-*.parquet), or a hub id.

    Returns a datasets.Dataset with the released columns (spec 9), or an IterableDataset, which reads (and fetches) no more
    than is asked of it, if streaming. Raises InputError if it is not there, has no such split, or lacks a column.
    """
    files = sorted(map(str, Path(source).glob(f"{split}-*.parquet")))
    try:
        if files:
            loaded = datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming)
        elif Path(source).exists():
            raise InputError(f"{source}: no {split}-*.parquet here; prepare.py writes such a folder")
        else:
            loaded = datasets.load_dataset(source, split=split, streaming=streaming)
        columns = loaded.column_names or list(next(iter(loaded)))  # a stream may not know them before it reads
    except InputError:
        raise
    except Exception as e:  # datasets wraps the many ways of a broken file or a missing network in as many classes
        raise InputError(f"{source}: cannot open the data set's split '{split}': {hub_problem(e)}") from e
    missing = [column for column in COLUMNS if column not in columns]
    if missing:
        raise InputError(f"{source} ({split}): the data set lacks the column {', '.join(missing)}; see spec of the "
                         "released columns in README.md, or make it with prepare.py")
    return loaded


def made_with(source):
    """What codes and embeddings of the data set in folder `source` are made with, a dict of codec_fingerprint, speaker_encoder
    and speaker_size, out of prepare.py's info.json; {} where there is none, as in the released data. train.py copies it to the
    checkpoint's config, so that generate.py can refuse what does not fit.
    """
    path = Path(source) / "info.json"
    info = json.loads(path.read_text()) if path.exists() else {}
    return {key: info[key] for key in ("codec_fingerprint", "speaker_encoder", "speaker_size") if key in info}


def check_dialogue(dialogue, fmt):
    """Raise InputError if a dialogue's codes do not fit the format, each other, or its times."""
    where = f"dialogue {dialogue.get('soda_index')}"
    rows = dialogue["dsu_c1_path"] + dialogue["dsu_c2_path"]
    if not dialogue["utterances"] or not dialogue["utterances"][-1]["end_time"] or not rows or not all(rows):
        raise InputError(f"{where}: has no utterances, no codes, or no end_time of the last utterance; prepare it again")
    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or len(dialogue["dsu_c1_path"]) != len(dialogue["dsu_c2_path"]):
        raise InputError(f"{where}: the codebook rows differ in length or number ({sorted(lengths)} frames); "
                         "encode the dialogue again")
    low, high = min(map(min, rows)), max(map(max, rows))
    if low < 0 or high >= fmt.codebook_size:
        raise InputError(f"{where}: codes from {low} to {high} are outside 0..{fmt.codebook_size - 1}; "
                         "set codebook_size to that of the data's codec")
    rate = frames_per_second(dialogue)
    if abs(rate - FRAME_RATE) > 0.1 * FRAME_RATE:
        raise InputError(f"{where}: {len(rows[0])} frames of codes but {dialogue['utterances'][-1]['end_time']:.2f} s of "
                         f"times, which is {rate:.1f} frames a second instead of {FRAME_RATE}; codes and times disagree")


class Dialogues(torch.utils.data.Dataset):
    """A split as streams. Item (index, side) is dialogue `index` from the side of speaker `side`.

    Everything is laid out once at the start, so that an epoch costs nothing, and kept in few bytes: 2,000 hours take about
    3 GB. Dialogues that cannot be laid out are dropped and counted in `dropped`. `lengths`: frames of each that is kept.
    """

    def __init__(self, dialogues, tokenizer, fmt, limit=0):
        """dialogues: of load_dialogues; limit: only the first so many, 0 for all."""
        self.kept, self.lengths, self.dropped = [], [], []
        ids = torch.int16 if fmt.codebook_size + 1 < 2 ** 15 else torch.int32
        for dialogue in dialogues.take(limit) if limit else dialogues:
            check_dialogue(dialogue, fmt)
            sides = [streams(dialogue, side, tokenizer, fmt) for side in (0, 1)]
            if None in sides:
                self.dropped.append(dialogue["soda_index"])
                continue
            audio = sides[0]["audio"].to(ids)  # of the other side: the same with the halves exchanged
            self.kept.append((audio, [(item["prompt"].int(), item["text"].int(), item["speaker"]) for item in sides]))
            self.lengths.append(audio.shape[1])
        if not self.kept:
            raise InputError(f"none of the {len(self.dropped)} dialogues can be laid out as streams; every segment needs words "
                             "that fit its frames")

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, key):
        """An item of `streams`."""
        index, side = key
        audio, sides = self.kept[index]
        prompt, text, speaker = sides[side]
        return {"prompt": prompt.long(), "audio": audio.roll(side * len(audio) // 2, 0).long(), "text": text.long(),
                "speaker": speaker}


def stream_items(dialogues, tokenizer, fmt, seed, rank=0, world=1, place=(0, 0, 0)):
    """An endless stream of items, laid out when asked for, of a split that is too large to be laid out at the start.

    dialogues: of load_dialogues(streaming=True). Every process reads a part of its own: whole files if their number is a
    multiple of `world`, else every world-th dialogue. An epoch is shuffled in buffers of 1,000; roles alternate as in
    epoch_batches. Yields (item, place); place: (epoch, dialogues read in it, dialogues dropped so far) of this process.
    Given back, it goes on behind that item; what was read before in that epoch is read again, but not laid out.
    """
    epoch, read, dropped = place
    while True:
        order = split_dataset_by_node(dialogues.shuffle(seed=seed + epoch, buffer_size=1000), rank, world)
        useful = bool(read)
        for dialogue in itertools.islice(order, read, None):  # IterableDataset.skip would skip before it splits
            read += 1
            check_dialogue(dialogue, fmt)
            first_side = random.Random(f"{seed}/{dialogue['soda_index']}").randrange(2)
            item = streams(dialogue, (first_side + epoch) % 2, tokenizer, fmt)
            if item is None:
                dropped += 1
            else:
                useful = True
                yield item, (epoch, read, dropped)
        if not useful:
            raise InputError(f"process {rank} of {world} got {read} dialogues, and none can be laid out as streams; use fewer "
                             "processes or other data")
        epoch, read = epoch + 1, 0


def epoch_batches(lengths, batch_size, epoch, seed):
    """The order of one epoch: a list of batches, each a list of (index, side), equal for everybody with the same seed.

    Roles alternate: a dialogue seen from one side in this epoch is seen from the other in the next, which doubles the
    data (the authors draw one side once, spec 4). Dialogues of like length share a batch, so that little is padding.
    A last batch that is not full is left out in this epoch.
    """
    rng = random.Random(seed)
    first_side = [rng.randrange(2) for _ in lengths]
    rng = random.Random(f"{seed}/{epoch}")
    order = sorted(range(len(lengths)), key=lambda i: lengths[i] + rng.uniform(-8, 8))  # frames: near-ties are shuffled
    skip = rng.randrange(len(order) % batch_size + 1)  # so that it is not always the longest that are left out
    batches = [[(i, (first_side[i] + epoch) % 2) for i in order[k:k + batch_size]]
               for k in range(skip, len(order) - batch_size + 1, batch_size)]
    rng.shuffle(batches)
    return batches


@dataclass
class Config:
    model: str = "default/model"  # whose tokenizer and stream format
    data: str = "default/data"
    split: str = "test"
    index: int = 0  # of the dialogue
    system: int = 0  # speaker 0 or 1
    start: float = 0.0  # seconds
    out: str = "streams.png"


def draw_streams(item, tokenizer, fmt, names, begin, path, count=50):
    """Draw `count` frames of an item of `streams`, from frame `begin` on: the text row and all audio rows."""
    import matplotlib.pyplot as plt
    audio, text = item["audio"][:, begin:begin + count], item["text"][begin:begin + count]
    rows, frames = audio.shape
    fig, (top, ax) = plt.subplots(2, 1, figsize=(17, 4.4), height_ratios=(1.3, rows), sharex=True)
    for t, token in enumerate(tokenizer.convert_ids_to_tokens(text.tolist())):
        short = {SILENCE_PAD: "·", UTTERANCE_PAD: "u", WORD_PAD: "–"}.get(token, tokenizer.decode([text[t]]).strip())
        top.text(t, 0, short, ha="center", va="center", fontsize=8, rotation=0 if len(short) < 4 else 45,
                 color="grey" if token in (SILENCE_PAD, UTTERANCE_PAD, WORD_PAD) else "tab:red" if token in (BC, INTER)
                 else "black")
    top.set(ylim=(-1, 1), yticks=[0], yticklabels=[f"{names[0]} (system): text"])
    ax.imshow(torch.where(audio < fmt.codebook_size, audio, torch.nan), aspect="auto", cmap="viridis",
              interpolation="nearest")
    for row in range(rows):
        for t in range(frames):
            mark = {fmt.codebook_size: "D", fmt.codebook_size + 1: "E"}.get(int(audio[row, t]), str(int(audio[row, t])))
            ax.text(t, row, mark, ha="center", va="center", fontsize=6, color="white" if len(mark) > 1 else "black")
    ax.axhline(rows / 2 - 0.5, color="white", lw=3)
    ax.set(yticks=range(rows), xlabel="frame (80 ms each): D delay, · silence pad, u utterance pad, – word pad",
           yticklabels=[f"{names[row * 2 // rows]} ({'system' if 2 * row < rows else 'user'}): codebook "
                        f"{row % (rows // 2) + 1}" for row in range(rows)],
           xticks=range(0, frames, 5), xticklabels=range(begin, begin + frames, 5))
    fig.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=80)


def main(argv):
    """Print what the model is told about a dialogue, and draw a piece of what it reads and predicts."""
    from model import load_checkpoint  # model.py reads this file
    cfg = load_settings(Config, argv)
    _, tokenizer, fmt, _ = load_checkpoint(cfg.model)
    dialogues = load_dialogues(cfg.data, cfg.split)
    if not 0 <= cfg.index < len(dialogues) or cfg.system not in (0, 1):
        raise InputError(f"index={cfg.index}, system={cfg.system}: {cfg.data} has {len(dialogues)} dialogues in split "
                         f"'{cfg.split}', each with speakers 0 and 1")
    dialogue = dialogues[cfg.index]
    item = streams(dialogue, cfg.system, tokenizer, fmt)
    if item is None:
        raise InputError(f"dialogue {cfg.index} cannot be laid out as streams; its text does not fit its frames")
    print(instruction(dialogue, cfg.system, fmt))
    if not 0 <= cfg.start * FRAME_RATE < item["text"].shape[0]:
        raise InputError(f"start={cfg.start}: the dialogue lasts {item['text'].shape[0] / FRAME_RATE:.1f} s")
    names = [dialogue["speakers"][cfg.system], dialogue["speakers"][1 - cfg.system]]
    draw_streams(item, tokenizer, fmt, names, int(cfg.start * FRAME_RATE), cfg.out)
    print(f"\n{len(item['prompt'])} prompt tokens, {item['text'].shape[0]} frames; drawn to {cfg.out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as e:
        sys.exit(f"data.py: {e}")
