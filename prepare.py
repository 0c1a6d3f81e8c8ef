"""Recordings to training data: a raw Behavior-SD folder -> the released columns, as parquet files
`datasets` opens.

    python prepare.py raw=my_recordings out=data    # transcripts with or without times
    python prepare.py raw=my_recordings out=data codec=nanocodec.nemo
    torchrun --standalone --nproc_per_node=N prepare.py raw=behavior-sd out=data device=cuda
    python prepare.py rewrite data=data out=rewritten model=CHAT_MODEL    # see rewrite.py

Raw: RAW/{train,validation,test}/NAME.wav (or any kind that libsndfile reads; stereo, channel 0 =
speakers[0]) and NAME.json beside each, there or deeper (as in the unpacked tars of Behavior-SD); a
folder without these sub-folders is one split. The JSON holds the released columns that aren't made
here; `speakers`, `narrative` and `utterances` (each with `speaker`, `tts_text`) are enough. Per
recording:

    words       kept where given, else by forced alignment (align.py): inside the segment's times if
                given, else from the order of the text alone. Both are tested against the sound
    events      backchannels and interruptions as the transcript marks them; counted by turns.py in
                one that marks none
    pieces      a recording longer than max_frames (give the one that train.py is to have) is cut at
                pauses into dialogues of their own
    codes       both channels through the codec: dsu_c1_path, dsu_c2_path, K lists of T ids
    embeddings  of each speaker's first five seconds of speech (paper 2): spk_emb_c1, spk_emb_c2
    narratives  new_narrative_s1/s2 kept where given, else by a plain rule: rewrite.from_the_side_of

Out: OUT/SPLIT-00000-of-0000N.parquet, info.json (codec, encoder, counts, words not found),
voices.json (voice -> embedding), dropped.jsonl (dialogues that cannot be used, and why; one never
stops the run). Shards that exist are skipped: the same command resumes a run that was cut off, if
RAW is as it was. With N ranks (RANK and WORLD_SIZE in the environment) each makes every N-th shard,
and rank 0 the rest of the files when all shards are there.
"""
import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

import rewrite
from align import align, end_of, misfit, segments, to_words
from codec import (
    AUDIO_SUFFIXES,
    encode_in_pieces,
    fingerprint,
    load_codec,
    missing_recording,
    read_audio,
    set_level,
)
from config import (
    InputError,
    brief,
    count_cores,
    load_settings,
    make_folder,
    over_cores,
    read_json,
    read_text,
    write_atomically,
    write_json,
)
from data import StreamFormat, check_dialogue, lasting
from listen import RATE, TAG, own_speech, speaker_encoder, strip_tags, to_16k, voiced
from turns import label_segments, merge_words

SPLITS = ("train", "validation", "test")
VOICED_SECONDS = 5.0  # how much speech a speaker embedding is made of (paper 2)
TAIL = 0.25  # seconds of recording kept after the last word
LISTENING_LEVEL = -15.0  # dB of full scale at which alignment and the encoders of speakers hear
MARGIN = 1.0  # seconds of a pause kept at each side, where a recording is cut


@dataclasses.dataclass
class PrepareSettings:
    raw: str = "corpus"  # folder of recordings with a JSON beside each
    out: str = "data"  # folder of the data set
    codec: str = "default/codec.safetensors"  # anything that codec.load_codec opens
    split: str = "train"  # the split of a raw folder that has no train/, validation/, test/ inside
    speaker_encoder: str = "resemblyzer"  # see listen.speaker_encoder
    one_embedding_per_voice: bool = False  # all get that of the voice's first (training) dialogue
    level: float = -20.0  # dB of full scale that each channel's speech is brought to; 0: as it is
    events: str = "auto"  # what backchannels are: marked | count (turns.py) | auto: where unmarked
    lost_backchannel: str = "drop"  # if one is not found: drop the dialogue (paper) | leave_out
    max_frames: int = 2048  # longer recordings are cut at pauses into such pieces; 0: never
    shard_size: int = 100  # recordings a parquet file; also what a cut-off run may lose
    workers: int = 0  # processes, one thread each; 0: one per core, shared by the machine's ranks
    device: str = "cpu"  # where the codec and the speaker encoder run; cuda: the GPU of this rank


# ---- columns: those of the released data set and of world/corpus.py, fixed, so that shards
# concatenate

INT, FLOAT, TEXT = pa.int64(), pa.float64(), pa.string()
WORDS = pa.list_(pa.struct([("word", TEXT), ("start", FLOAT), ("dur", FLOAT)]))
SEGMENT = [("tts_text", TEXT), ("start_time", FLOAT), ("end_time", FLOAT), ("words", WORDS)]
BEHAVIOR = [(key, INT) for key in (
    "utterance_length", "filler_words", "backchannels", "interruptions")]
STATISTICS = [("durations", pa.list_(FLOAT))] + [(f"num_{key}", pa.list_(INT)) for key in (
    "backchannels", "filler_words", "interruptions", "turntaking", "utterances")]
UTTERANCE = [("uttr_idx", INT), ("uttr_type", TEXT), ("speaker_idx", INT), ("speaker", TEXT),
             *SEGMENT, ("backchannels", pa.list_(pa.struct(SEGMENT)))]
COLUMNS = pa.schema([
    ("soda_index", INT), ("file_name", TEXT), ("narrative", TEXT), ("new_narrative_s1", TEXT),
    ("new_narrative_s2", TEXT), ("speakers", pa.list_(TEXT)),
    ("behaviors", pa.list_(pa.struct(BEHAVIOR))), ("num_turns", INT),
    ("utterances", pa.list_(pa.struct(UTTERANCE))), ("tts_speaker_ids", pa.list_(TEXT)),
    ("tts_genders", pa.list_(TEXT)), ("statistics", pa.struct(STATISTICS)),
    ("dsu_c1_path", pa.list_(pa.list_(pa.int32()))),
    ("dsu_c2_path", pa.list_(pa.list_(pa.int32()))),
    ("spk_emb_c1", pa.list_(pa.float32())), ("spk_emb_c2", pa.list_(pa.float32())),
    ("situation", TEXT), ("starter", INT), ("biased_narrative", pa.bool_())])


# ---- transcripts


def read_dialogue(path, raw_folder=""):
    """A raw JSON -> (a dict of COLUMNS without codes and embeddings, notes for the report).

    Utterances are sorted by start_time where all have one; marks of noise ([laughter]) are taken
    out. Raises InputError, with the path, on a file that is no JSON of a dialogue, or on values
    that cannot be.
    """
    notes = {"tags": 0, "only_tags": 0}
    try:
        raw = json.loads(read_text(path))
        row = {column: raw.get(column) for column in COLUMNS.names}
        row["file_name"] = tidy(raw.get("file_name") or path.stem)
        row["soda_index"] = raw.get("soda_index", raw.get("sample"))
        row["speakers"] = [tidy(name) for name in raw["speakers"]]
        row["utterances"] = read_utterances(raw["utterances"], row["speakers"], notes)
        row["num_turns"] = raw.get("num_turns") or len(row["utterances"])
        notes["marked"] = any("uttr_type" in u or u.get("backchannels") for u in raw["utterances"])
        notes["flaws"] = tell_sides(row, raw["narrative"])
        # a recording that doesn't name its voices has two of its own
        own = path.relative_to(raw_folder or path.parent).with_suffix("").as_posix()
        voices = row["tts_speaker_ids"] or [f"{own}_c1", f"{own}_c2"]
        row["tts_speaker_ids"] = [str(voice).strip() for voice in voices]
    except InputError as e:
        raise InputError(f"{path}: {str(e).removeprefix(f'{path}: ')}") from e
    except KeyError as e:
        raise InputError(f"{path}: lacks the key {e}; a transcript needs speakers, narrative and "
                         "utterances, an utterance speaker and tts_text, a word word, start and "
                         "dur") from e
    except (OSError, ValueError, TypeError, AttributeError, IndexError) as e:
        raise InputError(f"{path}: not the JSON of a dialogue ({type(e).__name__}: "
                         f"{' '.join(str(e).split())})") from e
    if not row["utterances"]:
        raise InputError(f"{path}: has no utterances; a dialogue needs at least one")
    return row, notes


def tidy(text):
    """A name or word without the spaces around it. Raises InputError on what is no text."""
    if type(text) is not str:
        raise InputError(f"a name or word is {text!r}; it must be text")
    return " ".join(text.split())


def read_utterances(raw, speakers, notes):
    """The transcript's utterances with all their keys, in order of time where all have one; counts
    in `notes` what is left out. speakers: the two names."""
    if len(set(speakers)) != 2 or len(speakers) != 2:
        raise InputError(f"has speakers {speakers}; needs two speakers of different names")
    utterances = []
    for i, given in enumerate(raw):
        where = f"utterance {i}"
        if tidy(given["speaker"]) not in speakers:
            raise InputError(f"{where} is by {given['speaker']!r}, who is not one of the speakers "
                             f"{speakers}; correct the transcript")
        speaker = speakers.index(tidy(given["speaker"]))
        parts = [read_segment(part, where, notes) for part in given.get("backchannels") or []]
        backchannels = [part for part in parts if part]
        part = read_segment(given, where, notes)
        if part:
            utterances.append(as_utterance(part, speaker, speakers, given.get("uttr_type"),
                                           backchannels))
        else:  # beside a laughter, what would be backchannels stand alone
            utterances += [as_utterance(b, 1 - speaker, speakers) for b in backchannels]
    starts = [u["start_time"] for u in utterances]
    notes["sorted"] = None not in starts and starts != sorted(starts)
    return in_order(utterances)


def as_utterance(part, speaker, speakers, kind=None, backchannels=()):
    return part | {"uttr_type": kind, "speaker_idx": speaker, "speaker": speakers[speaker],
                   "backchannels": list(backchannels)}


def in_order(utterances):
    """Utterances, sorted by start_time if all have one, numbered."""
    if all(u["start_time"] is not None for u in utterances):
        utterances = sorted(utterances, key=lambda u: u["start_time"])
    for i, u in enumerate(utterances):
        u["uttr_idx"] = i
    return utterances


def read_segment(raw, where, notes):
    """An utterance or backchannel -> dict of SEGMENT's keys, or None if it holds noise alone.

    Times that are missing are None, missing words []. Raises InputError on times that are no
    seconds.
    """
    text, words = raw["tts_text"], []
    for word in raw.get("words") or []:
        if strip_tags(tidy(word["word"])):
            words.append({"word": strip_tags(tidy(word["word"])),
                          "start": seconds(word["start"], f"{where}: start of {word['word']!r}"),
                          "dur": seconds(word["dur"], f"{where}: dur of {word['word']!r}")})
    part = {"tts_text": strip_tags(tidy(text)), "words": words}
    for key in ("start_time", "end_time"):
        value = raw.get(key)
        part[key] = None if value is None else seconds(value, f"{where}: {key}")
    if words and part["start_time"] is None:
        part["start_time"] = words[0]["start"]
    if words and part["end_time"] is None:
        part["end_time"] = end_of(words[-1])
    if None not in (part["start_time"], part["end_time"]) and part["start_time"] > part["end_time"]:
        raise InputError(f"{where}: ends at {part['end_time']} s, before it starts")
    tags = len(TAG.findall(text))
    notes["tags"] += tags
    if words or to_words(part["tts_text"]):
        return part
    if not tags:
        raise InputError(f"{where} has a segment without words: {text!r}")
    notes["only_tags"] += 1
    return None


def seconds(value, what):
    """A time of a transcript as float. Raises InputError on text, clock times, NaN, what is below
    0."""
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise InputError(f"{what} is {value!r}; it must be a number of seconds, 0 or more")
    return float(value)


def tell_sides(row, narrative):
    """Fills in the narratives of a row; those that are not given, from each speaker's side by the
    plain rule. Returns what is wrong with these (rewrite.flaw)."""
    if type(narrative) is not str:
        raise InputError(f"narrative is {narrative!r}; it must be text")
    row["narrative"], flaws = narrative, []
    for c, name in enumerate(row["speakers"]):
        key = f"new_narrative_s{c + 1}"
        if not row[key]:
            row[key] = rewrite.from_the_side_of(name, narrative)
            wrong = rewrite.flaw(row[key], name, row["speakers"][1 - c], narrative,
                                 rewrite.RewriteSettings())
            flaws += [f"{row['file_name']}: {wrong}: {row[key][:80]!r}"] if wrong else []
    return flaws


# ---- times


def check_times(row, length):
    """Gives segments the times of their words where they have none. Raises InputError unless every
    segment has words, these lie in it one after the other, and it in the recording's `length`
    (s)."""
    for i, u in enumerate(row["utterances"]):
        for part in [u, *u["backchannels"]]:
            what = f"utterance {i}, {part['tts_text']!r}"
            if not part["words"]:
                raise InputError(f"{what}: none of its words was found in the audio")
            if part["start_time"] is None:
                part["start_time"] = part["words"][0]["start"]
            if part["end_time"] is None:
                part["end_time"] = max(map(end_of, part["words"]))
            for word in part["words"]:
                if (word["start"] < part["start_time"] - 0.001
                        or end_of(word) > part["end_time"] + 0.001):
                    raise InputError(
                        f"{what}: the word {word['word']!r} at {word['start']}-{end_of(word)} s "
                        f"lies outside {part['start_time']}-{part['end_time']} s")
            if part["end_time"] > length + 0.1:
                raise InputError(f"{what}: ends at {part['end_time']} s, but the recording has "
                                 f"{length:.2f} s")


def lost_backchannels(row):
    """Takes the backchannels without words out of a row; returns their texts."""
    lost = []
    for u in row["utterances"]:
        lost += [b["tts_text"] for b in u["backchannels"] if not b["words"]]
        u["backchannels"] = [b for b in u["backchannels"] if b["words"]]
    return lost


def mark_events(row):
    """Marks backchannels and interruptions anew, as evaluate.py hears them (turns.py, paper C.2): a
    backchannel moves into the utterance that it lies in or, where the transcript splits the other's
    turn at it, the one before it; an interruption's uttr_type is "interrupt"."""
    said = []
    for u in row["utterances"]:
        said.append(as_utterance(u, u["speaker_idx"], row["speakers"]))
        said += [as_utterance(b, 1 - u["speaker_idx"], row["speakers"]) for b in u["backchannels"]]
    words = [[{"word": w["word"], "start": w["start"], "end": end_of(w)}
              for u in said if u["speaker_idx"] == c for w in u["words"]] for c in (0, 1)]
    heard = label_segments(merge_words(words))
    utterances = []
    for u in sorted(said, key=lambda u: u["start_time"]):
        start, end = u["words"][0]["start"], end_of(u["words"][-1])
        own = [s for s in heard if s["speaker"] == u["speaker_idx"]]
        if any(s["label"] == "interruption" and abs(s["start"] - start) < 0.01 for s in own):
            u["uttr_type"] = "interrupt"
        turns = [s["start"] for s in heard
                 if s["speaker"] != u["speaker_idx"] and s["start"] <= start]
        hosts = [h for h in utterances if h["speaker_idx"] != u["speaker_idx"] and turns
                 and h["start_time"] <= start and end_of(h["words"][-1]) > turns[-1]]
        if hosts and any(s["label"] == "backchannel" and s["start"] <= start + 0.01
                         and end <= s["end"] + 0.01 for s in own):
            hosts[-1]["backchannels"].append({key: u[key] for key, _ in SEGMENT})
        else:
            utterances.append(u)
    row["utterances"] = in_order(utterances)


# ---- pieces


def pauses(row):
    """Where neither speaker says a word: [(start, end, whether it lies between utterances)] (s)."""
    parts = [part for c in (0, 1) for part in segments(row, c)]
    words = sorted((w["start"], end_of(w)) for part in parts for w in part["words"])
    spans = sorted((part["start_time"], part["end_time"]) for part in parts)
    found, latest, inside, k = [], words[0][1], 0.0, 0
    for start, end in words[1:]:
        if start > latest:
            while k < len(spans) and spans[k][0] < start:  # utterances that have begun
                inside, k = max(inside, spans[k][1]), k + 1
            found.append((latest, start, inside <= start))
        latest = max(latest, end)
    return found


def cut(row, most):
    """[(start, end)] in seconds of the pieces of a recording, each of at most `most` seconds (0:
    one piece). A piece ends at the longest pause in its second half, between utterances if there
    is one.

    Of a pause longer than twice MARGIN the middle is left out. Raises InputError where nobody
    pauses.
    """
    parts = [part for c in (0, 1) for part in segments(row, c)]
    last = max(part["end_time"] for part in parts) + TAIL
    if not most or last <= most:
        return [(0.0, last)]
    begin = max(0.0, min(part["start_time"] for part in parts) - MARGIN)
    pieces, gaps = [], pauses(row)
    while last - begin > most:
        near = [gap for gap in gaps if begin + most / 2 < gap[0] < begin + most]
        near = near or [gap for gap in gaps if begin + MARGIN < gap[0] < begin + most]
        if not near:
            raise InputError(f"has no pause between {begin:.1f} and {begin + most:.1f} s to cut it "
                             "at; raise max_frames, or 0 to leave it whole")
        start, end, _ = max(near, key=lambda gap: (gap[2], gap[1] - gap[0]))
        middle = (start + end) / 2
        pieces.append((begin, min(middle, start + MARGIN, begin + most)))
        begin = max(middle, end - MARGIN)
    return [*pieces, (begin, last)]


def piece_of(row, start, end, number):
    """The part of a dialogue from `start` to `end` (s) as a dialogue of its own."""
    utterances = []
    for u in row["utterances"]:
        backchannels = [part_of(b, start, end) for b in u["backchannels"]]
        backchannels = [b for b in backchannels if b["words"]]
        part = part_of(u, start, end)
        if part["words"]:
            # of one that is cut, the interruption was in the piece before
            kind = u["uttr_type"] if start <= u["words"][0]["start"] else None
            utterances.append(as_utterance(part, u["speaker_idx"], row["speakers"], kind,
                                           backchannels))
        else:  # the other's utterance goes on in another piece only
            utterances += [as_utterance(b, 1 - u["speaker_idx"], row["speakers"])
                           for b in backchannels]
    return row | {"utterances": in_order(utterances), "num_turns": len(utterances),
                  "file_name": f"{row['file_name']}_{number:03d}", "statistics": None,
                  "starter": None}


def part_of(segment, start, end):
    """A segment's words from `start` to `end` (s), and its times, counted from `start`."""
    words = [w | {"start": w["start"] - start} for w in segment["words"]
             if start <= w["start"] < end]
    if not words:
        return {"words": []}
    whole = len(words) == len(segment["words"])
    text = segment["tts_text"] if whole else " ".join(w["word"] for w in words)
    first, last = segment["start_time"] - start, segment["end_time"] - start
    return {"tts_text": text, "words": words,
            "start_time": max(0.0, first) if whole else words[0]["start"],
            "end_time": min(end - start, last) if whole else max(map(end_of, words))}


# ---- a recording


@functools.cache
def codec_on(path, device):
    """The codec, once per process."""
    return load_codec(path).to(device)


def embed(audio, settings, where, speech=None):
    """Speaker embedding (paper 2) of the first five seconds of speech in `audio` (samples at 16
    kHz): list of numbers. speech: the stretches, else by voice activity."""
    pieces = [audio[:0]]
    for start, end in voiced(audio) if speech is None else speech:
        pieces.append(audio[round(start * RATE):round(end * RATE)])
        if sum(map(len, pieces)) >= VOICED_SECONDS * RATE:
            break
    speech = np.concatenate(pieces)
    if len(speech) < RATE / 2:
        raise InputError(f"{where}: {len(speech) / RATE:.1f} s of speech is too little for a "
                         "speaker embedding")
    encode = speaker_encoder(settings.speaker_encoder, settings.device)[0]
    return [float(v) for v in encode(speech[:round(VOICED_SECONDS * RATE)])]


def set_clock(row, frames, frame_rate):
    """The clock of the text stream is (frames of codes) / (end of the last utterance), in the
    released data and in data.frames_per_second. With this end it is exactly the codec's frame
    rate."""
    row["utterances"][-1]["end_time"] = frames / frame_rate


@torch.inference_mode()
def prepare_recording(item, settings):
    """item (JSON path, audio path) -> (rows of COLUMNS, report); no rows, and a report with the
    `reason`, if it is not usable, whatever that is: one recording never stops the run."""
    transcript, recording = item
    report = {"name": (transcript or recording).stem}
    try:
        if not transcript:
            raise InputError(f"{recording}: has no JSON of its name")
        if not recording:
            raise InputError(f"{transcript}: {missing_recording(transcript)}")
        rows = make_rows(transcript, recording, settings, report)
        # a value of an odd type shows here, not in the finished shard
        pa.Table.from_pylist(rows, schema=COLUMNS)
        return rows, report
    except InputError as e:
        return [], report | {"reason": str(e)}
    except Exception as e:
        return [], report | {"reason": f"{transcript}: {type(e).__name__}: {brief(e)!r}"}


def make_rows(transcript, recording, settings, report):
    """The rows of a recording, one a piece. `report` is filled on the way. Raises InputError."""
    codec = codec_on(settings.codec, settings.device)
    audio = read_audio(recording, channels=2, sample_rate=codec.sample_rate)  # (2, samples)
    report["recorded"] = audio.shape[1] / codec.sample_rate
    row, notes = read_dialogue(transcript, settings.raw)
    report |= notes
    low = to_16k(audio, codec.sample_rate)
    set_level(torch.from_numpy(low), RATE, LISTENING_LEVEL)
    heard = [voiced(channel) for channel in low]
    speech = own_speech(low, heard)
    lengths = [sum(end - start for start, end in own) for own in (*heard, *speech)]
    report["crosstalk"] = sum(lengths[:2]) - sum(lengths[2:])  # seconds
    set_level(audio, codec.sample_rate, settings.level)
    try:
        settle(row, low, speech, settings, report)
        frame_rate = codec.sample_rate / codec.samples_per_frame
        pieces = cut(row, settings.max_frames / frame_rate)
    except InputError as e:
        raise InputError(f"{transcript}: {e}{crosstalk_of(report)}") from e
    add_embeddings(row, low, speech, settings, recording)
    rows = [row]
    if len(pieces) > 1:
        rows = [piece_of(row, *piece, i) for i, piece in enumerate(pieces)]
    for row, (start, end) in zip(rows, pieces):
        part = audio[:, round(start * codec.sample_rate):round(end * codec.sample_rate)]
        codes = encode_in_pieces(codec, part.to(settings.device)).cpu()  # (2, K, T)
        row["dsu_c1_path"], row["dsu_c2_path"] = codes.tolist()
        set_clock(row, codes.shape[2], frame_rate)
        check(row, codec, transcript)
    report["pieces"] = len(rows)
    kept = sum(row["utterances"][-1]["end_time"] for row in rows)  # the last frame padded
    report["seconds"] = min(kept, report["recorded"])
    return rows


def crosstalk_of(report):
    """What a reason adds where channels hold the other speaker too; '' where they do not."""
    if report["crosstalk"] < 1:
        return ""
    return (f" (cross-talk: the channels hold {report['crosstalk']:.0f} s of the other speaker, "
            "which are not counted)")


def settle(row, low, speech, settings, report):
    """Gives every word of a row its time, tests it, and marks events. low: (2, samples) at 16 kHz;
    speech: of both channels. Raises InputError on what cannot be used."""
    given = [bool(part["words"]) for c in (0, 1) for part in segments(row, c)]
    report |= align(row, low, speech)
    lost = lost_backchannels(row) if settings.lost_backchannel == "leave_out" else []
    report["left_out"] = [f"{row['file_name']}: {text!r}" for text in lost]
    report["segment_lost"] = any(not part["words"] for c in (0, 1) for part in segments(row, c))
    check_times(row, low.shape[1] / RATE)
    wrong, report["unclaimed"] = misfit(row, speech, report["by_order"])
    if wrong:
        source = "the given times do not fit" if all(given) else "alignment failed"
        raise InputError(f"{source}: {wrong}")
    row["utterances"] = in_order(row["utterances"])
    if settings.events == "count" or settings.events == "auto" and not report["marked"]:
        report["counted"] = True
        mark_events(row)


def add_embeddings(row, low, speech, settings, recording):
    """Both speakers' embeddings: of this recording, or of their voices (voices.json)."""
    for c, voice in enumerate(row["tts_speaker_ids"]):
        if settings.one_embedding_per_voice:
            if voice not in voices(settings.out):
                raise InputError(f"{recording}: no recording of the voice {voice} has enough "
                                 "speech for an embedding")
            row[f"spk_emb_c{c + 1}"] = voices(settings.out)[voice]
        else:
            who = f"{recording}, {row['speakers'][c]}"
            row[f"spk_emb_c{c + 1}"] = embed(low[c], settings, who, speech[c])


def check(row, codec, transcript):
    """Raises InputError, with the file's name, on a row that train.py would not take."""
    frames = len(row["dsu_c1_path"][0])
    try:
        check_dialogue(row, StreamFormat(codebook_size=codec.codebook_size, max_frames=frames))
    except InputError as e:
        raise InputError(f"{transcript}: {e}") from e


# ---- the data set


def find_dialogues(settings):
    """The raw folder -> {split: [(JSON path, audio path)]} by name; None for a path that is
    missing."""
    raw = Path(settings.raw)
    if not raw.is_dir():
        raise InputError(f"{raw}: no such folder; give raw=FOLDER with recordings and a "
                         "JSON beside each")
    folders = {split: raw / split for split in SPLITS if (raw / split).is_dir()}
    for other in sorted(raw.iterdir()) if folders else []:
        if other.name not in folders and other.name[0] != "." and (
                other.is_dir() or other.suffix.lower() in (".json", *AUDIO_SUFFIXES)):
            print(f"note: {other} is left out; a split is called {', '.join(SPLITS)}")
    found = {split: pairs(folder) for split, folder in (folders or {settings.split: raw}).items()}
    if not any(found.values()):
        raise InputError(f"{raw}: no recordings in it (NAME with {', '.join(AUDIO_SUFFIXES[:6])} "
                         "... and NAME.json beside it)")
    return found


def pairs(folder):
    """[(JSON path, audio path)] in a folder and below it; None for the one that is missing."""
    found = collections.defaultdict(lambda: [None, None])
    for path in sorted(folder.rglob("*")):
        kind, name = path.suffix.lower(), path.with_suffix("")
        if path.name[0] == "." or not path.is_file():
            continue
        if kind == ".json":
            found[name][0] = path
        elif kind in AUDIO_SUFFIXES and found[name][1]:
            print(f"note: {path} is left out; {found[name][1].name} of the same name is taken")
        elif kind in AUDIO_SUFFIXES:
            found[name][1] = path
    return [tuple(found[name]) for name in sorted(found)]


def identity(settings, dialogues):
    """What the data set is made of: a folder holds one, and its readers can refuse what does not
    fit."""
    codec = codec_on(settings.codec, settings.device)
    same = ("one_embedding_per_voice", "level", "events", "lost_backchannel", "max_frames",
            "shard_size")
    return {
        "codec": Path(settings.codec).name, "codec_fingerprint": fingerprint(settings.codec),
        "num_codebooks": codec.num_codebooks, "codebook_size": codec.codebook_size,
        "sample_rate": codec.sample_rate, "frame_rate": codec.sample_rate / codec.samples_per_frame,
        "speaker_encoder": Path(settings.speaker_encoder).stem,  # x/ecapa_tdnn.nemo is ecapa_tdnn
        "speaker_size": speaker_encoder(settings.speaker_encoder, settings.device)[1],
        **{key: getattr(settings, key) for key in same},
        "dialogues": {split: len(items) for split, items in dialogues.items()},
        "raw_fingerprint": raw_fingerprint(settings.raw, dialogues)}


def raw_fingerprint(folder, dialogues):
    """16 hex digits of all names below the raw folder, transcripts and sizes of recordings; not of
    where the folder lies, nor of times of files, which copying changes."""
    digest = hashlib.sha256()
    for split, items in dialogues.items():
        for transcript, recording in items:
            names = [path and path.relative_to(folder) for path in (transcript, recording)]
            digest.update(f"\n{split}/{names[0]} {names[1]} ".encode(errors="surrogateescape"))
            with contextlib.suppress(OSError):  # one that cannot be read is dropped in its turn
                digest.update(f"{recording.stat().st_size} ".encode() if recording else b"")
                digest.update(transcript.read_bytes() if transcript else b"")
    return digest.hexdigest()[:16]


def first_samples(dialogues, settings):
    """{voice: embedding from the first usable dialogue, training ones first, in which it is
    heard}."""
    found, items = {}, [item for split in dialogues.values() for item in split if all(item)]
    for transcript, recording in tqdm(items, "voices"):
        try:
            names = read_dialogue(transcript, settings.raw)[0]["tts_speaker_ids"]
            if all(voice in found for voice in names):
                continue
            audio = read_audio(recording, channels=2, sample_rate=RATE)
            audio = set_level(audio, RATE, LISTENING_LEVEL).numpy()
            speech = own_speech(audio)
        except Exception:  # the dialogue is dropped, with this reason, in its turn
            continue
        for c, voice in enumerate(names):
            with contextlib.suppress(InputError):  # too little speech: perhaps another has more
                if voice not in found:
                    found[voice] = embed(audio[c], settings, f"{recording}, {voice}", speech[c])
    return found


@functools.cache
def voices(out):
    """OUT/voices.json, once per process."""
    return read_json(Path(out, "voices.json"), "prepare.py writes such a file")


def write_shard(path, rows, reports, columns=COLUMNS):
    """Writes rows of `columns` as parquet, atomically; the reports go in its metadata, so that
    resuming has them."""
    schema = columns.with_metadata({"reports": json.dumps(reports)})
    table = pa.Table.from_pylist(rows, schema=schema)
    write_atomically(path, lambda new: pq.write_table(table, new, compression="zstd"))


def list_some(lines, most=20):
    for i, line in enumerate(lines):
        if i <= most:
            print("  " + (line if i < most else "... and more"))


def summarise(out, shards, info):
    """Collects what the shards hold into voices.json, dropped.jsonl and info.json, and prints
    it."""
    reports, heard = [], {}
    for path in shards:
        split = path.name.split("-")[0]
        stored = json.loads(pq.read_schema(path).metadata[b"reports"])
        reports += [{"split": split} | report for report in stored]
        table = pq.read_table(path, columns=["tts_speaker_ids", "spk_emb_c1", "spk_emb_c2"])
        for names, *embeddings in zip(*table.to_pydict().values()):
            heard = dict(zip(names, embeddings)) | heard  # the first one stays
    if not info["one_embedding_per_voice"]:
        write_json(out / "voices.json", heard)
    dropped = [{key: r[key] for key in ("split", "name", "reason")}
               for r in reports if "reason" in r]
    lines = "".join(json.dumps(d) + "\n" for d in dropped)
    write_atomically(out / "dropped.jsonl", lambda new: new.write_text(lines))
    kept = [r for r in reports if "reason" not in r]
    result = count(kept, reports)
    pieces = sum(result["kept"].values())
    cuts = f"; cut at pauses into {pieces}" if pieces > len(kept) else ""
    print(f"{out}: {len(kept)} of {len(reports)} dialogues, {lasting(total(kept, 'seconds'))} of "
          f"{lasting(3600 * result['recorded_hours'])}, {len(heard)} voices; {len(dropped)} "
          f"dropped{cuts}")
    list_some(f"dropped {d['split']}: {d['reason']}" for d in dropped)
    tell_transcripts(reports, info)
    tell_losses(reports)
    result |= {"dropped": len(dropped)} | tell_alignment(reports)
    write_json(out / "info.json", info | result, indent=1)
    if not kept:
        raise InputError(f"none of the {len(dropped)} dialogues could be used; the first: "
                         f"{dropped[0]['reason']}")


def count(kept, reports):
    """What info.json says of the reports: dialogues kept in each split, hours of them and
    recorded."""
    number = collections.Counter()
    for r in kept:
        number[r["split"]] += r.get("pieces", 1)
    recorded = sum(r.get("recorded", r.get("seconds", 0)) for r in reports)
    return {"kept": number, "hours": round(sum(r["seconds"] for r in kept) / 3600, 3),
            "recorded_hours": round(recorded / 3600, 5)}


def total(reports, key):
    return sum(r.get(key) or 0 for r in reports)


def all_of(reports, key):
    return [line for r in reports for line in r.get(key) or []]


def tell_transcripts(reports, info):
    """Prints what is not as the transcripts have it."""
    read = [r for r in reports if "marked" in r]
    unmarked = [r for r in read if not r["marked"]]
    if counted := total(read, "counted"):
        why = ", whose transcripts mark none" if info["events"] == "auto" else ""
        print(f"events: backchannels and interruptions counted by turns.py in {counted} of "
              f"{len(read)} dialogues{why}")
    elif unmarked:
        print(f"note: no backchannels or interruptions are marked in {len(unmarked)} of "
              f"{len(read)} dialogues; their prompts say 0 (events=auto counts them)")
    if unsorted := total(read, "sorted"):
        print(f"note: {unsorted} of {len(read)} transcripts list their utterances in another order "
              "than that of time; they were sorted by start_time")
    if tags := total(read, "tags"):
        print(f"note: {tags} marks such as [laughter] are no words and left out; "
              f"{total(read, 'only_tags')} segments held nothing else")
    if foreign := total(read, "foreign"):
        print(f"note: {foreign} words cannot be spelt in English letters, so they are not found; "
              "alignment is for English, but word times can be given")
    if flaws := all_of(read, "flaws"):
        print(f"note: {len(flaws)} narratives are not right from their speaker's side by the plain "
              "rule (python prepare.py rewrite has a chat model do it):")
        list_some(flaws)


def tell_losses(reports):
    """Prints what sound and segments were left out."""
    leaks = [r for r in reports if r.get("crosstalk", 0) >= 1]
    if leaks:
        print(f"note: cross-talk: in {len(leaks)} of {len(reports)} recordings a channel holds the "
              f"other speaker too, {total(leaks, 'crosstalk'):.0f} s in all, which do not count")
    if (unclaimed := total(reports, "unclaimed")) >= 1:
        print(f"note: {unclaimed:.0f} s of speech belong to no segment of the transcripts")
    if left := all_of(reports, "left_out"):
        print(f"note: {len(left)} backchannels were not found and are left out:")
        list_some(left)
    lost = [r for r in reports if r.get("segment_lost") and "reason" in r]
    if lost:
        print(f"note: {lasting(total(lost, 'recorded'))} ({len(lost)} dialogues) are dropped "
              "because a segment was not found; lost_backchannel=leave_out keeps those that lack a "
              "backchannel")


def tell_alignment(reports):
    """Prints how well alignment did; returns it for info.json, {} where nothing was aligned."""
    words, found = (sum(r.get(key, 0) for r in reports) for key in ("words", "found"))
    if not words:
        return {}
    unfound = [u for r in reports for u in r.get("unfound", [])]
    print(f"aligned: {found} of {words} words found ({100 * found / words:.1f} %)")
    list_some(unfound)
    result = {"words_aligned": words, "words_found": found, "unfound": unfound}
    for border in ("starts", "ends"):
        off = 1000 * np.array([t for r in reports for t in r.get(border, [])] or [0])
        numbers = [round(float(x)) for x in (np.median(off), off.mean(), np.quantile(off, 0.9))]
        result[f"{border}_off_ms"] = numbers
        print("segment {}: off from voice activity by {} ms (median), {} (mean), {} (90 %)".format(
            border, *numbers))
    return result


def wait_for(paths, what):
    """Returns when all paths are there: what other ranks make."""
    if not all(path.exists() for path in paths):
        print(f"waiting for {what} of other ranks; if one has ended, end this too and give the "
              "same command again")
        while not all(path.exists() for path in paths):
            time.sleep(2)


def check_settings(settings):
    """Raises InputError on values that there are not."""
    choices = {"split": SPLITS, "events": ("auto", "marked", "count"),
               "lost_backchannel": ("drop", "leave_out")}
    for key, known in choices.items():
        if getattr(settings, key) not in known:
            raise InputError(f"{key}={getattr(settings, key)}: must be one of {', '.join(known)}")
    if settings.shard_size < 1 or settings.workers < 0:
        raise InputError("shard_size must be at least 1 and workers at least 0")
    if not -60 <= settings.level <= 0:
        raise InputError(f"level={settings.level}: must be from -60 to 0 dB; 0 leaves it as it is")
    if settings.max_frames < 0 or 0 < settings.max_frames < 125:
        raise InputError(f"max_frames={settings.max_frames}: must be 0 (never cut) or at least "
                         "125, ten seconds")


def claim(path, mark, rank=0):
    """Makes the folder of the JSON file `path`, in which rank 0 writes down what the data set in it
    is (`mark`, a dict). Raises InputError if the folder holds another one."""
    make_folder(path.parent)
    if path.exists():
        old = read_json(path, "it should tell what the folder holds")
        differs = [f"{key} was {old.get(key)} and is {mark[key]}"
                   for key in mark if old.get(key) != mark[key]]
        if any(line.startswith("raw_fingerprint") for line in differs):
            differs.append("so a transcript or recording in raw= is another")
        if differs:
            raise InputError(f"{path.parent}: holds a data set whose {', '.join(differs)}; give "
                             "another out= or remove it")
    elif rank == 0:
        write_json(path, mark, indent=1)


def device_of(settings, local_rank):
    """The name of the device that this process is to use. Raises InputError where there is none."""
    name = settings.device
    if name == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise InputError(f"device=cuda: this machine shows {torch.cuda.device_count()} GPUs, "
                             f"too few for local rank {local_rank}; start as many processes as "
                             "GPUs, or leave device=cpu")
        return f"cuda:{local_rank}"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as e:  # no such word; a word without its hardware
        raise InputError(f"device={name}: cannot be used ({brief(e)}); give cpu or cuda") from e
    return name


def main(argv):
    if argv[:1] == ["rewrite"]:
        return rewrite.main(argv[1:])
    settings = load_settings(PrepareSettings, argv)
    check_settings(settings)
    place = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    rank, world, local_rank, local_world = (
        int(os.environ.get(name, default)) for name, default in place.items())
    settings.device = device_of(settings, local_rank)
    out, dialogues = Path(settings.out), find_dialogues(settings)
    info = identity(settings, dialogues)
    claim(out / "info.json", info, rank)
    if settings.one_embedding_per_voice:
        if rank == 0 and not (out / "voices.json").exists():
            write_json(out / "voices.json", first_samples(dialogues, settings))
        wait_for([out / "voices.json"], "the voices")
    shards = {}  # path -> its items
    for split, items in dialogues.items():
        starts = range(0, len(items), settings.shard_size)
        for i, start in enumerate(starts):
            path = out / f"{split}-{i:05d}-of-{len(starts):05d}.parquet"
            shards[path] = items[start:start + settings.shard_size]
    todo = {path: shards[path] for path in list(shards)[rank::world] if not path.exists()}
    print(f"rank {rank} of {world}: {sum(map(len, todo.values()))} dialogues to do, {len(todo)} of "
          f"{len(shards)} shards")
    make_shards(todo, settings, settings.workers or max(1, count_cores() // local_world), rank)
    if rank == 0:
        wait_for(shards, "shards")
        summarise(out, shards, info)


def make_shards(todo, settings, workers, rank):
    """Prepares and writes {path: its items}, over `workers` processes."""
    items = [item for shard in todo.values() for item in shard]
    done = over_cores(functools.partial(prepare_recording, settings=settings), items, workers)
    with contextlib.closing(done), tqdm(total=len(items), unit="dialogue", smoothing=0.05,
                                        disable=rank > 0) as bar:
        for path, shard in todo.items():
            rows, reports = [], []
            for _ in shard:
                made, report = next(done)
                rows, reports = rows + made, [*reports, report]
                bar.update()
            write_shard(path, rows, reports)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as e:
        sys.exit(f"prepare.py: {e}")
