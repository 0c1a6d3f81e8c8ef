"""Dialogues to streams: what the model reads and predicts at every frame (paper sections 4 and 6).

One dialogue, as a row of the released columns, becomes, seen from one of its two speakers:

    prompt  the instruction, as text tokens                                          (P,)
    audio   system codebooks 1..K, then user codebooks 1..K, one id a frame          (2K, T)
    text    the system's words, on the frames where they are spoken, pads elsewhere  (T,)

    audio row   D  D  a0 a1 a2 a3 ...  E     D = delay id (C), a = codes 0..C-1, E = end id (C+1)
    text row    t0 t1 t2 t3 ...  S  S  eot   S = silence pad: text leads audio by the delay, here 2

The paper's words:
    system, user   the speaker that the model plays, and the one that it hears
    frame          80 ms, 12.5 a second; T frames in a dialogue, P tokens in a prompt
    DAU            discrete audio unit: one code, of one codebook in one frame
    K, C           codebooks of the codec, and codes of each: 4 and 4032 of the paper's NanoCodec
    d              the delay: in frame t stands the audio of time t-d, but the text of time t

Why text leads: the heads predict text and audio of a frame in parallel, from one hidden state. So
the audio of a frame cannot know the text of the same frame; only *earlier* text can steer it.

`python data.py` prints the prompt of a test dialogue and draws a piece of its streams.
"""
import dataclasses
import functools
import glob
import itertools
import math
import os
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast

from config import InputError, brief, hub_problem, load_settings, make_folder, read_json

# a handful of words at a time: handing them to threads takes longer, on a busy machine much longer
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SILENCE_PAD, UTTERANCE_PAD, WORD_PAD = "[SILENCE_PAD]", "[UTTERANCE_PAD]", "[WORD_PAD]"
BC, INTER = "[BC]", "[INTER]"
COUNTED = {BC: [f"[BC{i}]" for i in range(1, 41)], INTER: [f"[INTERRUPT{i}]" for i in range(1, 21)]}
# in this order behind the tokenizer's own vocabulary, as in the released checkpoints
EXTRA_TOKENS = [SILENCE_PAD, UTTERANCE_PAD, WORD_PAD, BC, INTER, *COUNTED[INTER], *COUNTED[BC]]
# the counts in a prompt, and their marks' kind as mark_kind names it
KINDS = {"backchannels": "backchannel", "interruptions": "interruption"}
MARK_KINDS = (dict.fromkeys([BC, *COUNTED[BC]], "backchannel")
              | dict.fromkeys([INTER, *COUNTED[INTER]], "interruption"))
COLUMNS = ["narrative", "new_narrative_s1", "new_narrative_s2", "speakers", "utterances",
           "dsu_c1_path", "dsu_c2_path", "spk_emb_c1", "spk_emb_c2"]
FRAME_RATE = 12.5  # frames per second
STRETCH = 12  # frames that `spoil` replaces together


@dataclass
class StreamFormat:
    """How a dialogue is laid out in streams; stored with a checkpoint, so that generation lays out
    the same. Raises InputError on values that there are not."""
    alignment: str = "word"  # text stream: word | utterance | none
    delay: int = 2  # frames by which text leads audio
    behaviour_tokens: str = "none"  # marks before events: none | plain | count_up | count_down
    max_frames: int = 2048  # longer dialogues are cut to this many frames, before the delay
    rewritten_narrative: bool = True  # from the system's side; False: the plain one (section 6.1)
    codebook_size: int = 4032  # C

    def __post_init__(self):
        # true and false are what older configs and checkpoints hold
        older = {"true": "plain", "false": "none"}
        marks = str(self.behaviour_tokens)
        self.behaviour_tokens = older.get(marks.lower(), marks)
        if self.behaviour_tokens not in ("none", "plain", "count_up", "count_down"):
            raise InputError(f"behaviour_tokens is '{marks}'; use none, plain, count_up or "
                             "count_down")
        if self.alignment not in ("word", "utterance", "none"):
            raise InputError(f"alignment is '{self.alignment}'; use word, utterance or none")
        if self.delay < 0 or self.max_frames < 1:
            raise InputError(f"delay={self.delay} and max_frames={self.max_frames}: a delay is 0 "
                             "or more frames, max_frames at least 1")


def stored_format(config):
    """The StreamFormat in a checkpoint's config.json (a dict). A released one has none: it is the
    paper's best."""
    stored = config.get("stream_format") or {}
    if "audio_vocab_size" in config:
        stored = stored | {"codebook_size": config["audio_vocab_size"]}
    known = {field.name for field in dataclasses.fields(StreamFormat)}
    return StreamFormat(**{key: value for key, value in stored.items() if key in known})


# ---- the instruction ----


def make_prompt(name, other, narrative, backchannels, interruptions, starts):
    """The instruction to the speaker `name`, as the text that the model reads (paper Fig. 2)."""
    return (f"Generate a dialogue between you ({name}) and another speaker ({other}) based on the "
            "given narrative. Follow the specific behavior instructions for you.\n\n"
            f"Narrative:\n- {narrative}\n\n"
            f"Your behaviors:\n- backchannels: {backchannels}\n- interruptions: {interruptions}\n"
            f"- starts the dialogue: {starts}\n\n"
            "Ensure that the dialogue reflects the behaviours of you.\n<|SOS|>")


def frames_per_second(dialogue):
    """Frames per second of the annotation, which words are placed by: close to 12.5, but not equal,
    since the recording ends near the last utterance's end."""
    return len(dialogue["dsu_c1_path"][0]) / dialogue["utterances"][-1]["end_time"]


def segments(dialogue, speaker):
    """What `speaker` (0 or 1) says, as (segment, BC, INTER or '', utterance): own utterances, and
    backchannels that lie in an utterance of the other.

    A segment is a dict with `words`, `start_time`, `end_time` in seconds.
    """
    for utterance in dialogue["utterances"]:
        if utterance["speaker_idx"] == speaker:
            yield utterance, INTER if utterance["uttr_type"] == "interrupt" else "", utterance
        else:
            for backchannel in utterance["backchannels"]:
                yield backchannel, BC, utterance


def counted_events(dialogue, system, fmt):
    """{BC: [...], INTER: [...]}: which of `segments(dialogue, system)` the prompt counts, as
    positions in order of time. It counts what ends in the first `max_frames` frames, a backchannel
    with the utterance that it lies in, as in the authors' program."""
    last = fmt.max_frames / frames_per_second(dialogue)  # seconds
    found = {BC: [], INTER: []}
    parts = list(segments(dialogue, system))
    for i, (_, kind, utterance) in enumerate(parts):
        if kind and utterance["end_time"] <= last:
            found[kind].append(i)
    for positions in found.values():
        positions.sort(key=lambda i: parts[i][0]["start_time"])
    return found


def event_counts(dialogue, system, fmt):
    """(backchannels, interruptions) of speaker `system`, as the prompt tells them."""
    found = counted_events(dialogue, system, fmt)
    return len(found[BC]), len(found[INTER])


def prompt_parts(dialogue, system, fmt):
    """What make_prompt takes, for speaker `system` of a dialogue: the counts are event_counts'."""
    rewritten = f"new_narrative_s{system + 1}"
    narrative = dialogue[rewritten if fmt.rewritten_narrative else "narrative"]
    starts = dialogue["utterances"][0]["speaker_idx"] == system
    return (dialogue["speakers"][system], dialogue["speakers"][1 - system], narrative,
            *event_counts(dialogue, system, fmt), starts)


def instruction(dialogue, system, fmt):
    """The prompt text for speaker `system` of a dialogue."""
    return make_prompt(*prompt_parts(dialogue, system, fmt))


# ---- the streams ----


def mark_kind(token):
    """'backchannel', 'interruption', or '' for a token's string that is no mark, whatever the
    numbering."""
    return MARK_KINDS.get(token, "")


def mark_ids(tokenizer, kind):
    """The text ids of all marks of a kind, as of mark_kind: a list."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return [k for k, token in enumerate(tokens) if mark_kind(token) == kind]


def decision_ids(tokenizer, size):
    """Which of `size` text ids are decisions (pads, marks, the end), not words: (V,) of bool."""
    decisions = torch.zeros(size, dtype=torch.bool)
    decisions[[*tokenizer.convert_tokens_to_ids(EXTRA_TOKENS), tokenizer.eos_token_id]] = True
    return decisions


def marks(dialogue, system, fmt):
    """The mark, or '', that opens each of `segments(dialogue, system)`.

    count_up numbers events as they come, which is an option of the authors' program that the paper
    does not report; count_down is ours: the mark says how many are still to come, this one
    included. What the prompt does not count, since it ends behind max_frames, has the plain mark;
    numbers beyond the last counting token stay at it.
    """
    opening = [kind for _, kind, _ in segments(dialogue, system)]
    if fmt.behaviour_tokens == "none":
        return [""] * len(opening)
    if fmt.behaviour_tokens == "plain":
        return opening
    for kind, positions in counted_events(dialogue, system, fmt).items():
        for before, i in enumerate(positions):
            up = fmt.behaviour_tokens == "count_up"
            number = before + 1 if up else len(positions) - before
            opening[i] = COUNTED[kind][min(number, len(COUNTED[kind])) - 1]
    return opening


@functools.lru_cache(100_000)
def token_ids(text, tokenizer):
    """A word's tokens. The same words come all the time, and a call of the tokenizer costs more
    than the rest of the layout."""
    return tokenizer.encode(text, add_special_tokens=False)


def place_words(row, words, mark, rate, tokenizer, word_pad):
    """Write a segment's words into `row` (T,): a word's tokens from its start frame on, then word
    pads up to its end. Tokens that outlast their word push the next word back.

    words: dicts of word, start, dur (seconds). Returns (whether all fit, words pushed back).
    """
    texts = [mark + words[0]["word"].lower()] + [" " + word["word"].lower() for word in words[1:]]
    pushed, free = 0, 0  # free: the first frame that no earlier word of the segment needs
    for word, text in zip(words, texts):
        ids, start = token_ids(text, tokenizer), int(word["start"] * rate)
        pushed += free > start
        start = max(start, free)
        if start + len(ids) > len(row):
            return False, pushed
        free = max(start + len(ids), int((word["start"] + word["dur"]) * rate))
        row[start:free] = word_pad
        row[start:start + len(ids)] = ids
    return True, pushed


def place_utterance(row, words, mark, rate, tokenizer):
    """Write a segment's words into `row` (T,), all tokens from its start frame on, without the
    punctuation inside. Returns whether they fit into the segment."""
    first, last = int(words[0]["start"] * rate), int((words[-1]["start"] + words[-1]["dur"]) * rate)
    text = re.sub(r"[.,!?](?= )", "", " ".join(word["word"] for word in words).lower())
    ids = tokenizer.encode(mark + text, add_special_tokens=False)
    if first + len(ids) > min(last, len(row)):
        return False
    row[first:first + len(ids)] = ids
    return True


def text_stream(dialogue, system, tokenizer, fmt):
    """The text row of speaker `system`, before cut and delay (paper section 4).

    Returns (T ids as an array, number of words pushed back by the tokens before them). Returns
    (None, n) when the dialogue cannot be laid out and is dropped, as the paper does: a segment
    without words, or tokens that do not fit.
    """
    silence, utterance_pad, word_pad = tokenizer.convert_tokens_to_ids(
        [SILENCE_PAD, UTTERANCE_PAD, WORD_PAD])
    rate, overflow = frames_per_second(dialogue), 0
    row = np.full(len(dialogue["dsu_c1_path"][0]), silence)
    opening = marks(dialogue, system, fmt)
    for (segment, _, _), mark in zip(segments(dialogue, system), opening):
        words, mark = segment["words"], mark and mark + " "
        if not words:
            return None, overflow
        end = words[-1]["start"] + words[-1]["dur"]
        row[int(words[0]["start"] * rate):int(end * rate)] = utterance_pad
        if fmt.alignment == "utterance":
            fits = place_utterance(row, words, mark, rate, tokenizer)
        else:
            fits, pushed = place_words(row, words, mark, rate, tokenizer, word_pad)
            overflow += pushed
        if not fits:
            return None, overflow
    return row, overflow


def streams(dialogue, system, tokenizer, fmt):
    """One dialogue from the side of speaker `system`, without the end marks.

    Returns a dict of prompt (P,), audio (2K, T+delay), text (T+delay,) as long tensors and speaker
    (S,) float; where the data set has mistakes for `spoil` (columns slip_c1_path, slip_c2_path),
    also slip (K, T+delay), the system's own codes with these. None if the dialogue's text cannot be
    laid out (see text_stream). With alignment 'none' the text row is silence pads.
    """
    silence = tokenizer.convert_tokens_to_ids(SILENCE_PAD)
    codes = [dialogue["dsu_c1_path"], dialogue["dsu_c2_path"]]
    text = np.full(len(codes[0][0]), silence)
    if fmt.alignment != "none":
        text, _ = text_stream(dialogue, system, tokenizer, fmt)
    if text is None:
        return None
    audio = codes[system] + codes[1 - system]  # (2K, T)
    slip = dialogue.get(f"slip_c{system + 1}_path")
    text = torch.from_numpy(text)[:fmt.max_frames]  # (T,)
    prompt = tokenizer.encode(instruction(dialogue, system, fmt), add_special_tokens=False)
    speaker = dialogue[f"spk_emb_c{system + 1}"]
    item = {"prompt": torch.tensor(prompt), "audio": delayed(audio, fmt),
            "text": torch.nn.functional.pad(text, (0, fmt.delay), value=silence),
            "speaker": torch.tensor(speaker, dtype=torch.float32)}
    return item if slip is None else item | {"slip": delayed(slip, fmt)}


def delayed(codes, fmt):
    """R lists of T codes -> (R, T + delay), T at most max_frames, behind delay ids."""
    codes = torch.from_numpy(np.array(codes))[:, :fmt.max_frames]  # a tensor of lists takes longer
    return torch.nn.functional.pad(codes, (fmt.delay, 0), value=fmt.codebook_size)


def pad_left(rows, pad):
    """Prompts of several lengths as one batch that ends together.

    rows: B lists (or tensors) of ids. Returns (ids (B, P) with `pad` on the left, mask (B, P),
    False there); the mask is None if nothing is padded: attention is faster without.
    """
    rows = [torch.as_tensor(row) for row in rows]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
    mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True,
                        padding_value=False, padding_side="left")
    return ids, None if mask.all() else mask


def collate(items, end_token, fmt):
    """Items of `streams` to one batch of B. Prompts are padded on the left, frames on the right, so
    that frame 0 is at the same position for all; every item's frames are closed by the end id and
    the end token, which are the padding too.

    Returns prompt (B, P) and prompt_mask (B, P) or None as of pad_left, audio (B, 2K, T) and text
    (B, T) with frame_mask (B, T), speaker (B, S); and slip (B, K, T) if all items have one.
    """
    def close(rows, end):  # rows (T, ...) of several lengths -> (B, longest T + 1, ...)
        rows = [torch.cat([row, row.new_full((1, *row.shape[1:]), end)]) for row in rows]
        return pad_sequence(rows, batch_first=True, padding_value=end)

    prompt, prompt_mask = pad_left([item["prompt"] for item in items], end_token)
    def codes(key):  # (B, R, T)
        return close([item[key].T for item in items], fmt.codebook_size + 1).transpose(1, 2)

    slip = {"slip": codes("slip")} if all("slip" in item for item in items) else {}
    text = close([item["text"] for item in items], end_token)
    frames = torch.tensor([len(item["text"]) + 1 for item in items])
    return {"prompt": prompt, "prompt_mask": prompt_mask, "audio": codes("audio"),
            "text": text, "frame_mask": torch.arange(text.shape[1]) < frames[:, None],
            "speaker": torch.stack([item["speaker"] for item in items])} | slip


def text_mask(batch):
    """Which frames of a batch of `collate` have a text target, (B, T): all but the end token.
    So the model never learns to say it: what ends a dialogue is the audio's end id."""
    return torch.nn.functional.pad(batch["frame_mask"][:, 1:], (0, 1))


def spoil(batch, most, fmt, seeds):
    """The audio (B, 2K, T) of a batch of `collate`, with mistakes in what the system says: each
    stretch of a second, with a probability drawn per dialogue from 0 to `most`, gets the codes that
    the system says at another time; and where the data set has mistakes of its own (`slip`), every
    second dialogue has these. One seed a dialogue.

    As a model's input, not its target. With true codes only, a model reads its next word off its
    own audio and hardly looks at its own text; when it then runs freely, each slip of the audio
    becomes one of the words, and the next slip. Not in the paper.
    """
    audio, system = batch["audio"].clone(), batch["audio"].shape[1] // 2
    slips = batch.get("slip", [None] * len(audio))
    for row, slip, mask, seed in zip(audio, slips, batch["frame_mask"], seeds):
        rng = torch.Generator().manual_seed(seed)
        if slip is not None and seed % 2:
            row[:system] = slip
        said = row[:system, fmt.delay:int(mask.sum()) - 1]  # (K, frames)
        frames = said.shape[1]
        share = most * torch.rand((), generator=rng)
        wrong = torch.rand(frames // STRETCH + 2, generator=rng) < share
        phase = int(torch.randint(STRETCH, (), generator=rng))
        wrong = wrong.repeat_interleave(STRETCH)[phase:phase + frames]
        shift = int(torch.randint(frames, (), generator=rng))
        said[:, wrong] = said.roll(shift, 1)[:, wrong]
    return audio


def rare_words(dialogues, size):
    """Which ids, (size,), stand in less than a fifth of the prompts of `Dialogues`: names and
    things, rather than "the"."""
    prompts = [prompt for _, sides, _ in dialogues.kept for prompt, _, _ in sides]
    found = torch.cat([prompt.unique() for prompt in prompts]).bincount(minlength=size)
    return found < 0.2 * len(prompts)


def taken_up(batch, rare, decisions):
    """Where the system's words have to be read in the prompt, (B, T), of a batch of `collate`: a
    rare word of the prompt said for the first time; and its third to fifth word, behind the
    greeting, which tell who of the story it is. rare: of rare_words; decisions: of decision_ids.

    For the small world and the tokenizer of new_tokenizer, by which a word is one token in the
    prompt and in the text. With a pretrained one a name has other ids in the lower-cased text."""
    text = batch["text"]
    asked = (text[..., None] == batch["prompt"][:, None]).any(-1) & rare[text]  # (B, T)
    said = (text[..., None] == text[:, None]).tril(-1).any(-1)  # (B, T): at an earlier frame
    number = (~decisions[text]).cumsum(1)  # of words so far
    begins = ~decisions[text] & (number >= 3) & (number <= 5)
    return (asked & ~said | begins) & text_mask(batch)  # prompts are padded with the end token


def new_tokenizer(dialogues, vocab_size, fmt, limit=0):
    """A byte-level BPE tokenizer learnt on the prompts and words of dialogues (of load_dialogues;
    limit: only the first so many, 0 for all), but not of those that cannot be used.

    With enough room, every word that occurs is one token, and the same one wherever it stands: text
    is lower-cased and each word gets a leading space, so that "Hi (Anna)." in the prompt and "anna"
    at the start of a segment or behind a mark share their ids. That makes taking up a name or a
    thing of the prompt a matter of copying. Other text still encodes, in pieces, down to bytes.
    """
    def texts():
        for dialogue in itertools.islice(dialogues, limit or None):
            for side in (0, 1) if is_usable(dialogue, fmt) else ():
                yield instruction(dialogue, side, fmt)
                for segment, _, _ in segments(dialogue, side):
                    yield " ".join(word["word"] for word in segment["words"] or [])

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Lowercase(), normalizers.Replace("’", "'"),
        normalizers.Replace("(", "( "), normalizers.Prepend(" "),  # no word without a space
        normalizers.Replace(Regex(" +"), " ")])
    pieces = r" ?\w+(?:[.,'-]\w+)*| ?[^\w\s]+|\s+"  # words, punctuation, space
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pieces), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts(), trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|begin_of_text|>", "<|eot_id|>"],
        show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin_of_text|>",
                                   eos_token="<|eot_id|>")


# ---- data sets ----


def load_dialogues(source, split, streaming=False):
    """A split of a prepared data set: a folder of `prepare.py` (SPLIT-*.parquet), or a hub id.

    Returns a datasets.Dataset with the released columns, or an IterableDataset, which reads (and
    fetches) no more than is asked of it, if streaming. Raises InputError if it is not there, has no
    such split, or lacks a column.
    """
    files = sorted(map(str, Path(source).glob(f"{glob.escape(split)}-*.parquet")))
    try:
        if files:
            files = list(map(glob.escape, files))  # datasets takes paths for patterns
            loaded = datasets.load_dataset("parquet", data_files=files, split="train",
                                           streaming=streaming)
        elif Path(source).exists():
            raise InputError(f"{source}: no {split}-*.parquet here; prepare.py writes such a "
                             "folder")
        else:
            loaded = datasets.load_dataset(source, split=split, streaming=streaming)
        columns = loaded.column_names or list(next(iter(loaded)))  # a stream may not know them yet
    except InputError:
        raise
    except Exception as e:  # of a broken file or a missing network, in as many classes as there are
        raise InputError(f"{source}: cannot open the data set's split '{split}': "
                         f"{hub_problem(e)}") from e
    if missing := [column for column in COLUMNS if column not in columns]:
        raise InputError(f"{source} ({split}): the data set lacks the column {', '.join(missing)}; "
                         "README.md lists the columns, and prepare.py makes them")
    return loaded


def data_info(source):
    """The info.json that prepare.py writes into a data set's folder; {} where there is none, as in
    the released data. Raises InputError if it is no JSON."""
    path = Path(source) / "info.json"
    return read_json(path, "prepare.py writes such a file") if path.exists() else {}


def made_with(source):
    """What codes and embeddings of the data set in folder `source` are made with, a dict of
    codec_fingerprint, speaker_encoder and speaker_size, as far as
    data_info tells. train.py copies it to the checkpoint's config, so that
    generate.py can refuse what does not fit.
    """
    info = data_info(source)
    keys = ("codec_fingerprint", "speaker_encoder", "speaker_size")
    return {key: info[key] for key in keys if key in info}


def check_codec(folder, source, goes_with):
    """Raise InputError where the codes of the data set in `folder` are not of the codec whose
    fingerprint is `goes_with`; of a set that does not tell, they may be. source: what it is the
    codec of, for the message."""
    if (made := made_with(folder).get("codec_fingerprint", goes_with)) != goes_with:
        raise InputError(f"{folder}: its codes are of another codec (fingerprint {made}) than "
                         f"{source} ({goes_with}), and mean other sounds; give what belongs "
                         "together")


def dialogue_name(dialogue):
    """How a dialogue is called in messages: its file's name, else its number."""
    return str(dialogue.get("file_name") or dialogue.get("soda_index"))


def check_dialogue(dialogue, fmt):
    """Raise InputError with the reason if a dialogue cannot be used: its codes do not fit the
    format, each other or its times, or a value is not what it should be."""
    try:
        check_codes(dialogue, fmt)
        check_times(dialogue, fmt)
        check_prompt(dialogue, fmt)
    except InputError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as e:
        raise InputError(f"something is missing or of another form: {type(e).__name__}: "
                         f"{e}; prepare it again") from e


def is_usable(dialogue, fmt):
    """Whether check_dialogue takes a dialogue; what it refuses is named where all are laid out."""
    try:
        check_dialogue(dialogue, fmt)
    except InputError:
        return False
    return True


def usable_streams(dialogue, system, tokenizer, fmt):
    """`streams` of a dialogue, None also where check_dialogue refuses it."""
    return streams(dialogue, system, tokenizer, fmt) if is_usable(dialogue, fmt) else None


def first_usable(dialogues, fmt, limit=0):
    """The first of the dialogues, of the first `limit` if not 0, that can be used. Raises
    InputError if none can."""
    count, reason = 0, "it is empty"
    for count, dialogue in enumerate(itertools.islice(dialogues, limit or None), 1):
        try:
            check_dialogue(dialogue, fmt)
            return dialogue
        except InputError as e:
            reason = f"dialogue {dialogue_name(dialogue)}: {e}" if count == 1 else reason
    raise InputError(f"none of the {count} dialogues can be used; {reason}")


def check_codes(dialogue, fmt):
    """Of check_dialogue: the codes, and their number against the seconds."""
    sides = dialogue["dsu_c1_path"], dialogue["dsu_c2_path"]
    lengths = {len(row) for side in sides for row in side}
    if not lengths or 0 in lengths:
        raise InputError("has no codes; encode it again")
    if len(lengths) != 1 or len(sides[0]) != len(sides[1]):
        raise InputError(f"the codebook rows differ in length or number ({sorted(lengths)} "
                         "frames); encode it again")
    codes = np.array(sides)  # (2, K, T)
    if codes.dtype.kind != "i" or codes.min() < 0 or codes.max() >= fmt.codebook_size:
        raise InputError(f"codes from {codes.min()} to {codes.max()} are outside "
                         f"0..{fmt.codebook_size - 1}; set codebook_size to that of the data's "
                         "codec")
    end = dialogue["utterances"][-1]["end_time"] if dialogue["utterances"] else 0
    if not is_number(end) or end <= 0:
        raise InputError("has no utterances, or no end_time of the last one; prepare it again")
    if abs(frames_per_second(dialogue) - FRAME_RATE) > 0.1 * FRAME_RATE:
        raise InputError(f"{codes.shape[-1]} frames of codes but {end:.2f} s of times, which is "
                         f"{frames_per_second(dialogue):.1f} frames a second instead of "
                         f"{FRAME_RATE}; codes and times disagree")


def check_times(dialogue, fmt):
    """Of check_dialogue: utterances, segments and words have times in seconds, in order, one in the
    other. A millisecond of rounding is allowed."""
    begin = 0
    for utterance in dialogue["utterances"]:
        if utterance["speaker_idx"] not in (0, 1):
            raise InputError(f"the speaker_idx {utterance['speaker_idx']} is not 0 or 1")
        for segment in (utterance, *utterance["backchannels"]):
            check_segment(segment, fmt)
        if utterance["start_time"] < begin:
            raise InputError(f"the utterance at {utterance['start_time']:.3f} s stands behind one "
                             f"at {begin:.3f} s; sort utterances by start_time")
        begin = utterance["start_time"]


def check_segment(segment, fmt):
    """Of check_times: one utterance or backchannel."""
    begin, end = segment["start_time"], segment["end_time"]
    if not is_number(begin) or not is_number(end) or not 0 <= begin <= end:
        raise InputError(f"a segment's times are {begin!r} and {end!r}; they must be seconds, in "
                         "order")
    if not segment["words"] and fmt.alignment != "none":
        raise InputError(f"the segment at {begin:.3f} s has no words")
    earliest = begin
    for word in segment["words"] or []:
        start, dur = word["start"], word["dur"]
        if not is_number(start) or not is_number(dur) or dur < 0 or type(word["word"]) is not str:
            raise InputError(f"the word {word['word']!r} has start {start!r} and dur {dur!r}; they "
                             "must be seconds")
        if start < begin - 1e-3 or start + dur > end + 1e-3:
            raise InputError(f"the word '{word['word']}' at {start:.3f}-{start + dur:.3f} s lies "
                             f"outside its utterance ({begin:.3f}-{end:.3f} s); correct its times")
        if start < earliest - 1e-3:
            raise InputError(f"the word '{word['word']}' at {start:.3f} s stands behind one at "
                             f"{earliest:.3f} s; sort words by start")
        earliest = start


def check_prompt(dialogue, fmt):
    """Of check_dialogue: what prompts are made of. Names, narratives and speaker embeddings."""
    rewritten = ["new_narrative_s1", "new_narrative_s2"]
    texts = [dialogue[key] for key in (rewritten if fmt.rewritten_narrative else ["narrative"])]
    names = dialogue["speakers"]
    if len(names) != 2 or not dialogue["utterances"]:
        raise InputError(f"it has {len(names)} speakers and {len(dialogue['utterances'])} "
                         "utterances; 2 speakers and an utterance are needed")
    if not all(type(text) is str and text.strip() for text in texts + names):
        raise InputError("a name or a narrative is missing; rewrite.py makes the rewritten ones")
    for key in ("spk_emb_c1", "spk_emb_c2"):
        if not np.isfinite(np.array(dialogue[key], dtype=float)).all():
            raise InputError(f"{key} holds what is no finite number; prepare it again")


def is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def are_numbers(value):
    """Whether this is a list of finite numbers, as an embedding is."""
    return isinstance(value, list) and all(map(is_number, value))


def marks_events(dialogue):
    """Whether any backchannel or interruption is marked in a dialogue. Where none is in a whole
    data set, its transcripts do not mark them, and every prompt would say 0."""
    return any(kind for side in (0, 1) for _, kind, _ in segments(dialogue, side))


def lasting(seconds):
    """How much sound, as text: hours, or of what is shorter than six minutes the seconds."""
    return f"{seconds / 3600:.2f} h" if seconds >= 360 else f"{seconds:.1f} s"


def both_sides(dialogue, tokenizer, fmt):
    """`streams` of a dialogue from both sides. Raises InputError with the reason if it cannot be
    used."""
    check_dialogue(dialogue, fmt)
    sides = [streams(dialogue, side, tokenizer, fmt) for side in (0, 1)]
    if None in sides:
        raise InputError("the text does not fit its frames")
    return sides


class Dialogues(torch.utils.data.Dataset):
    """A split as streams. Item (index, side) is dialogue `index` from the side of speaker `side`.

    Everything is laid out once at the start, so that an epoch costs nothing, and kept in few bytes:
    2,000 hours take about 3 GB.
    lengths: frames, the delay included, of each dialogue that is kept.
    dropped: (name, reason) of each that is not.
    seconds, seconds_used: of the kept dialogues, and what of that lies before max_frames.
    marked: in how many of them a backchannel or an interruption is marked.
    """

    def __init__(self, dialogues, tokenizer, fmt, limit=0):
        """dialogues: of load_dialogues; limit: only the first so many, 0 for all. Raises InputError
        if none can be used."""
        self.kept, self.lengths, self.dropped = [], [], []
        self.seconds = self.seconds_used = self.marked = 0
        for dialogue in itertools.islice(dialogues, limit or None):
            try:
                self.keep(dialogue, both_sides(dialogue, tokenizer, fmt), fmt)
            except InputError as e:
                self.dropped.append((dialogue_name(dialogue), str(e)))
        if not self.kept:
            first = "dialogue {}: {}".format(*self.dropped[0]) if self.dropped else "it is empty"
            raise InputError(f"none of the {len(self.dropped)} dialogues can be used; {first}")

    def keep(self, dialogue, sides, fmt):
        ids = torch.int16 if fmt.codebook_size + 1 < 2 ** 15 else torch.int32
        audio = sides[0]["audio"].to(ids)  # of the other side: the same with the halves exchanged
        texts = [(item["prompt"].int(), item["text"].int(), item["speaker"]) for item in sides]
        slips = [item["slip"].to(ids) for item in sides if "slip" in item]
        shape = len(audio), [len(item["speaker"]) for item in sides]
        if self.kept and shape != self.shape:
            raise InputError(f"has {shape[0]} rows of codes and {shape[1]} speaker numbers, the "
                             f"first one {self.shape[0]} and {self.shape[1]}; prepare all alike")
        self.shape = shape
        self.kept.append((audio, texts, slips))
        self.lengths.append(audio.shape[1])
        self.seconds += len(dialogue["dsu_c1_path"][0]) / FRAME_RATE
        self.seconds_used += (audio.shape[1] - fmt.delay) / FRAME_RATE
        self.marked += marks_events(dialogue)

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, key):
        """An item of `streams`."""
        index, side = key
        audio, sides, slips = self.kept[index]
        prompt, text, speaker = sides[side]
        audio = audio.roll(side * len(audio) // 2, 0)  # (2K, T)
        item = {"prompt": prompt.long(), "audio": audio.long(), "text": text.long(),
                "speaker": speaker}
        return item | {"slip": slips[side].long()} if slips else item

    def notes(self):
        """Lines that whoever starts a training should read: what is left out, and why."""
        lines = []
        if self.dropped:
            lines.append(f"{len(self.dropped)} of {len(self.dropped) + len(self)} dialogues are "
                         "dropped:")
            lines += [f"  {name}: {reason}" for name, reason in self.dropped[:10]]
            if len(self.dropped) > 10:
                lines.append(f"  ... and {len(self.dropped) - 10} more")
        if self.seconds_used < self.seconds:
            lines.append(f"{lasting(self.seconds_used)} of {lasting(self.seconds)} are used, the "
                         "rest is behind max_frames")
        if not self.marked:
            lines.append("no backchannels or interruptions are marked in any of the "
                         f"{len(self)} dialogues; the prompts all say 0")
        return lines


def stream_items(dialogues, tokenizer, fmt, seed, rank=0, world=1, place=(0, 0, 0)):
    """An endless stream of items, laid out when asked for, of a split that is too large to be laid
    out at the start.

    dialogues: of load_dialogues(streaming=True). Every process reads a part of its own: whole files
    if their number is a multiple of `world`, else every world-th dialogue. An epoch is shuffled in
    buffers of 1,000; roles alternate as in epoch_batches. What cannot be used is dropped; the first
    ten are named on stderr.
    Yields (item, place); place: (epoch, dialogues read in it, dialogues dropped so far) of this
    process. Given back, it goes on behind that item; what was read before in that epoch is read
    again, but not laid out. Raises InputError if an epoch yields nothing.
    """
    epoch, read, dropped = place
    while True:
        shuffled = dialogues.shuffle(seed=seed + epoch, buffer_size=1000)
        order = split_dataset_by_node(shuffled, rank, world)
        useful, reason = bool(read), ""
        for dialogue in itertools.islice(order, read, None):  # .skip would skip before it splits
            read += 1
            name = dialogue_name(dialogue)
            side = (random.Random(f"{seed}/{name}").randrange(2) + epoch) % 2
            try:
                check_dialogue(dialogue, fmt)
                item = streams(dialogue, side, tokenizer, fmt)
                if item is None:
                    raise InputError("the text does not fit its frames")
            except InputError as e:
                dropped, reason = dropped + 1, f"; dialogue {name}: {e}"
                if dropped <= 10:
                    print(f"dropped dialogue {name}: {e}", file=sys.stderr)
                continue
            useful = True
            yield item, (epoch, read, dropped)
        if not useful:
            raise InputError(f"process {rank} of {world} got {read} dialogues, and none can be "
                             f"laid out as streams{reason}; use fewer processes or other data")
        epoch, read = epoch + 1, 0


def epoch_batches(lengths, batch_size, epoch, seed):
    """The order of one epoch: a list of batches, each a list of (index, side), equal for everybody
    with the same seed. lengths: frames of each dialogue.

    Roles alternate: a dialogue seen from one side in this epoch is seen from the other in the next,
    which doubles the data (the authors draw one side once). Dialogues of like length share a batch,
    so that little is padding. What does not fill a batch, some of the shortest and of the longest,
    is left out in this epoch.
    """
    rng = random.Random(seed)
    sides = [(rng.randrange(2) + epoch) % 2 for _ in lengths]
    rng = random.Random(f"{seed}/{epoch}")
    buckets = sorted(range(len(lengths)), key=lambda i: lengths[i] + rng.uniform(-8, 8))  # frames
    remainder = len(lengths) % batch_size
    skip = rng.randrange(remainder + 1)  # of it at the short end, the rest at the long one
    kept = buckets[skip:len(buckets) - (remainder - skip)]
    batches = [[(i, sides[i]) for i in kept[k:k + batch_size]]
               for k in range(0, len(kept), batch_size)]
    rng.shuffle(batches)
    return batches


# ---- the script ----


@dataclass
class Config:
    model: str = "default/model"  # whose tokenizer and stream format: folder or hub id
    data: str = "default/data"
    split: str = "test"
    index: int = 0  # of the dialogue
    system: int = 0  # speaker 0 or 1
    start: float = 0.0  # seconds
    out: str = "streams.png"


def draw_text(axes, text, tokenizer):
    """Write a text row (T,) over its frames: pads short and grey, marks red."""
    short = {SILENCE_PAD: "·", UTTERANCE_PAD: "u", WORD_PAD: "–"}
    for t, token in enumerate(tokenizer.convert_ids_to_tokens(text.tolist())):
        label = short.get(token) or tokenizer.decode([text[t]]).strip()
        colour = "grey" if token in short else "tab:red" if mark_kind(token) else "black"
        axes.text(t, 0, label, ha="center", va="center", fontsize=8, color=colour,
                  rotation=0 if len(label) < 4 else 45)


def draw_streams(item, tokenizer, fmt, names, begin, path, count=50):
    """Draw `count` frames of an item of `streams`, from frame `begin` on: the text row and all
    audio rows. names: of system and user."""
    import matplotlib.pyplot as plt
    audio, text = item["audio"][:, begin:begin + count], item["text"][begin:begin + count]
    rows, frames = audio.shape
    fig, (top, ax) = plt.subplots(2, 1, figsize=(17, 4.4), height_ratios=(1.3, rows), sharex=True)
    draw_text(top, text, tokenizer)
    top.set(ylim=(-1, 1), yticks=[0], yticklabels=[f"{names[0]} (system): text"])
    ax.imshow(torch.where(audio < fmt.codebook_size, audio, torch.nan), aspect="auto",
              cmap="viridis", interpolation="nearest")
    special = {fmt.codebook_size: "D", fmt.codebook_size + 1: "E"}
    for row, codes in enumerate(audio.tolist()):
        for t, code in enumerate(codes):
            ax.text(t, row, special.get(code, code), ha="center", va="center", fontsize=6,
                    color="black" if code in special else "white")
    ax.axhline(rows / 2 - 0.5, color="white", lw=3)
    labels = [f"{name} ({role}): codebook {k + 1}"
              for name, role in zip(names, ("system", "user")) for k in range(rows // 2)]
    ax.set(yticks=range(rows), yticklabels=labels, xticks=range(0, frames, 5),
           xticklabels=range(begin, begin + frames, 5),
           xlabel="frame (80 ms each): D delay, · silence pad, u utterance pad, – word pad")
    fig.tight_layout()
    make_folder(Path(path).parent)
    fig.savefig(path, dpi=80)
    plt.close(fig)


def main(argv):
    """Print what the model is told about a dialogue, and draw a piece of what it reads and
    predicts."""
    cfg = load_settings(Config, argv)
    try:
        tokenizer = AutoTokenizer.from_pretrained(cfg.model)
        fmt = stored_format(PretrainedConfig.get_config_dict(cfg.model)[0])
    except Exception as e:  # no network, no such folder, files that are cut off ...
        raise InputError(f"model={cfg.model}: its tokenizer and config.json cannot be read: "
                         f"{hub_problem(e)}") from e
    dialogues = load_dialogues(cfg.data, cfg.split)
    if not 0 <= cfg.index < len(dialogues) or cfg.system not in (0, 1):
        raise InputError(f"index={cfg.index}, system={cfg.system}: {cfg.data} has {len(dialogues)} "
                         f"dialogues in split '{cfg.split}', each with speakers 0 and 1")
    dialogue = dialogues[cfg.index]
    try:
        item = both_sides(dialogue, tokenizer, fmt)[cfg.system]
    except InputError as e:
        raise InputError(f"dialogue {cfg.index} cannot be laid out as streams: {e}") from e
    print(instruction(dialogue, cfg.system, fmt))
    if not 0 <= cfg.start * FRAME_RATE < len(item["text"]):
        raise InputError(f"start={cfg.start}: the dialogue lasts "
                         f"{len(item['text']) / FRAME_RATE:.1f} s")
    names = [dialogue["speakers"][cfg.system], dialogue["speakers"][1 - cfg.system]]
    try:
        draw_streams(item, tokenizer, fmt, names, int(cfg.start * FRAME_RATE), cfg.out)
    except (OSError, ValueError) as e:  # no such folder, a suffix that is no picture's
        raise InputError(f"out={cfg.out}: {brief(e)}; give the path of a .png") from e
    print(f"\n{len(item['prompt'])} prompt tokens, {len(item['text'])} frames; drawn to {cfg.out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as e:
        sys.exit(f"data.py: {e}")
