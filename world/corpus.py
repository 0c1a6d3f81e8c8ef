"""Make a small Behavior-SD: dialogues of two, composed of recorded sentences, every word time
known.

    python -m world.corpus hours=200 out=runs/world            # in codes, as prepare.py writes them
    python -m world.corpus hours=1 audio=runs/bank out=corpus  # as stereo recordings, a JSON each
    python -m world.corpus bank out=runs/bank                  # speak every sentence there is
    python -m world.corpus encode bank=runs/bank codec=FILE out=default/bank.safetensors
    python -m world.corpus compare audio=runs/bank codec=FILE  # composed codes against coded audio

What people say is in world/situations.yaml, the clips that are spoken of it in world/bank.py. A
dialogue is put together frame by frame (80 ms): sentences of a turn one after another, turns with
small gaps or overlaps, interruptions that stop the other at a word's end, backchannels inside the
other's turn. In codes nothing is synthesised or encoded: a dialogue takes milliseconds. Dialogue i
depends on (seed, i) alone, so that a larger set holds the smaller one, and both forms the same.
`bank`, `encode` and the speaker embeddings need requirements-corpus.txt.
"""
import functools
import hashlib
import itertools
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml
from tqdm import tqdm

from codec import fingerprint
from config import (
    InputError,
    load_settings,
    make_folder,
    over_cores,
    read_text,
    write_atomically,
    write_json,
)
from prepare import COLUMNS, SPLITS, claim, summarise, write_shard
from turns import count_events, label_segments, merge_words
from world import bank
from world.bank import FADE, FRAME, RATE, VOICES

SECONDS = FRAME / RATE  # of a frame
MEAN_SECONDS = 27.0  # of a dialogue; turns hours into a number of dialogues
SHORTEST, LONGEST = 18.0, 34.0  # seconds of a dialogue
TURNS = (7, 10)  # turns of a dialogue, both included; at most as many as its situation has

# chances, and seconds from-to, drawn anew for each dialogue
BIASED = 0.2  # of dialogues: who is named first in the narrative also speaks first
FILLER = 0.2  # chance of a filler before a turn, times the speaker's level 0, 1 or 2
CUT_IN = 0.4  # chance that an interrupting turn opens with one of the cut-ins
MOST = {"fillers": 2, "backchannels": 5, "interruptions": 2}  # of a speaker
BEGIN, END = (0.15, 0.6), (0.2, 0.6)  # before the first word, after the last one
# who listens has to tell a pause from a turn's end by how long it is quiet, and a small overlap
# from an interruption by how long both speak: nothing else in these clips says so
BETWEEN_SENTENCES = 2  # frames: pauses inside a turn are shorter, besides what the clips hold
SMALL_OVERLAP, SMALL_OVERLAP_CHANCE = (0.03, 0.13), 0.05  # not as long as turns.INTERRUPTION
LONG_GAP, LONG_GAP_CHANCE = (0.7, 1.0), 0.1
GAP, GAP_SHAPE, GAP_SCALE = 0.32, 3, 0.06  # else 0.32 s + gamma(3, 0.06 s)
INTERRUPTING_OVERLAP = (0.7, 1.05)
HEARD = (1.7, 2.6)  # at least, of an interrupted turn; the second if it interrupts itself
LONG_TURN = 9  # words a turn needs to be interrupted
APART = 0.65  # around a backchannel in its own channel: more than turns.SPLIT
INSIDE = 0.3  # of the other's turn before and after a backchannel
SLIPPED = COLUMNS
for name in ("slip_c1_path", "slip_c2_path"):
    SLIPPED = SLIPPED.append(COLUMNS.field("dsu_c1_path").with_name(name))
WEAK = set("a an the to of in on at for with and or but my your our his her their is are was be i "
           "you we they it's i'm that this some so if as by from very really not no it".split())


@dataclass
class BankSettings:
    out: str = "runs/bank"  # folder to write
    workers: int = 0  # processes; 0: one per core
    situations: str = str(Path(__file__).with_name("situations.yaml"))  # what is talked about


@dataclass
class EncodeSettings:
    bank: str = "runs/bank"  # what `bank` wrote
    codec: str = "default/codec.safetensors"  # anything that codec.load_codec opens
    out: str = "default/bank.safetensors"  # file to write
    speaker_encoder: str = "resemblyzer"  # see listen.speaker_encoder
    situations: str = str(Path(__file__).with_name("situations.yaml"))


@dataclass
class Settings:
    out: str = "runs/world"  # folder to write
    hours: float = 200.0  # hours of dialogue, about
    seed: int = 0  # same seed, same dialogues
    bank: str = "default/bank.safetensors"  # the bank in codes
    audio: str = ""  # the bank's folder: recordings are written, not codes
    workers: int = 0  # processes; 0: one per core
    shard_size: int = 1000  # dialogues a parquet file
    situations: str = str(Path(__file__).with_name("situations.yaml"))
    slips: bool = False  # also write codes with mistakes, for train.py's wrong_history
    topics: int = 0  # a smaller world: only the first N situations, none unseen; 0: all


@dataclass
class CompareSettings:
    audio: str = "runs/bank"  # the bank's folder
    bank: str = "default/bank.safetensors"  # the same in codes
    codec: str = "default/codec.safetensors"  # the codec it is coded with
    n: int = 20  # dialogues
    situations: str = str(Path(__file__).with_name("situations.yaml"))


# --------------------------------------------------------------------------------------------------
# What is said


PRONOUN = re.compile(r"\$[AB]_(they|their|them)\b")  # of a narrative
ALWAYS = ("openings", "fillers", "cut_ins", "backchannels")  # said in every situation


def alternatives(text):
    return re.split(r"\s+/\s+", text.strip())


def sentences_of(text):
    return re.split(r"(?<=[.?!])\s+", " ".join(text.split()))


@functools.cache
def read_situations(path, topics=0):
    """world/situations.yaml as a dict: names, openings, fillers, cut_ins, backchannels (lists of
    str), situations (name -> slots, narrative, ask, tell, turns, test_only; lists of
    alternatives). topics: only the first so many that training may have; 0: all, those for the
    test only too. Raises InputError on a file that is odd."""
    try:
        raw = yaml.safe_load(read_text(path))

        def slots(values):
            return {key: text.split(", ") for key, text in values.items()}
        world = {"names": raw["names"].split(), "situations": {}}
        world |= {key: alternatives(raw[key]) for key in ALWAYS}
        for name, s in raw["situations"].items():
            world["situations"][name] = {
                "slots": slots(raw.get("slots") or {}) | slots(s.get("slots") or {}),
                "narrative": alternatives(s["narrative"]), "ask": alternatives(s["ask"]),
                "tell": alternatives(s["tell"]),
                "turns": [alternatives(turn) for turn in s["turns"]],
                "test_only": s.get("test_only", False)}
    except yaml.YAMLError as e:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from e
    except (KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{path}: a situation needs narrative, ask, tell and turns as text (see "
                         f"the top of world/situations.yaml); trouble with {e}") from e
    if len(world["names"]) < 4:
        raise InputError(f"{path}: names are {' '.join(world['names'])}; two men's, then two "
                         "women's are the least")
    if len({s["test_only"] for s in world["situations"].values()}) < 2:
        raise InputError(f"{path}: needs situations with and without test_only")
    for name, s in world["situations"].items():
        if len(s["turns"]) + 1 < TURNS[0]:  # the first of the lines is `tell`
            raise InputError(f"{path}: {name} has {len(s['turns'])} turns; {TURNS[0] - 1} are "
                             "the least")
        check_narratives(s, f"{path}: {name}")
    if topics:
        trained = [(name, s) for name, s in world["situations"].items() if not s["test_only"]]
        world["situations"] = dict(trained[:topics])
    return world


def used_slots(text, slots, where):
    """The slots of a text, sorted. Raises InputError for one that is none of `slots`."""
    used = sorted(set(re.findall(r"\$(\w+)", text)))
    if unknown := [key for key in used if key not in slots]:
        raise InputError(f"{where}: {text!r} has no slot called {unknown[0]}; add it to slots")
    return used


def check_narratives(situation, where):
    """Raise InputError for a narrative that names nobody, or a slot that is none."""
    for template in situation["narrative"]:
        used = used_slots(re.sub(PRONOUN, r"\1", template), {"A", "B", *situation["slots"]}, where)
        if not {"A", "B"} & set(used):
            raise InputError(f"{where}: the narrative {template!r} names neither $A nor $B")


def fill(template, slots):
    """A template with every $slot replaced; each sentence starts with a capital."""
    text = re.sub(r"\$(\w+)", lambda m: slots[m[1]], " ".join(template.split()))
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return re.sub(r"(^|[.?!] )([a-z])", lambda m: m[1] + m[2].upper(), text)


def narrate(template, slots, you=None):
    """The narrative from outside (you=None) or with role `you` ("A" or "B") as "you".

    In templates: $A, $A's, `$A was`, and $A_they, $A_their, $A_them, written with past tense so
    that verbs agree.
    """
    if you:
        template = re.sub(rf"\${you}'s|\${you}_their", "your", template)
        template = re.sub(rf"\${you} was\b", "you were", template)
        template = re.sub(rf"\${you}(_they|_them)?(?![\w])", "you", template)
    return fill(re.sub(PRONOUN, r"\1", template), slots)


def families(world, where="the situations"):
    """Per sentence that can be said, the list of all its forms: one, or one for each filling of its
    slot. where: for an InputError's line."""
    names = {key: world["names"] for key in ("other", "A", "B")}
    lines = [(text, names) for key in ALWAYS for text in world[key]]
    for situation in world["situations"].values():
        for line in (situation["ask"], situation["tell"], *situation["turns"]):
            lines += [(text, situation["slots"] | names) for text in line]
    for text, slots in lines:
        for sentence in sentences_of(text):
            used = used_slots(sentence, slots, where)
            values = itertools.product(*(slots[key] for key in used))
            yield [fill(sentence, dict(zip(used, one))) for one in values]


def every_sentence(world, where="the situations"):
    """All sentences that can be said, slots filled, sorted: what the bank holds."""
    return sorted(set(itertools.chain.from_iterable(families(world, where))))


def split_of(i):
    """Which split dialogue i belongs to. Test: 20 of the first 40, so that small sets have some,
    then a twentieth from 400 up to 5,000; validation: a twentieth up to 5,000; large sets need no
    more, and the rest is training."""
    if i >= 5000:
        return "train"
    if i % 20 == 1:
        return "validation"
    return "test" if (i % 2 == 0 if i < 40 else i >= 400 and i % 20 == 0) else "train"


class Redraw(Exception):
    """This draw of texts and gaps cannot hold what was asked for; draw again."""


def draw(rng, options):
    return options[rng.integers(len(options))]


def plan(rng, split, world):
    """Everything about a dialogue that a redraw of its texts must not change."""
    situations = world["situations"]
    unseen = any(s["test_only"] for s in situations.values())
    held_out = split == "test" and rng.random() < 0.5 and unseen
    name = draw(rng, sorted(key for key, s in situations.items() if s["test_only"] == held_out))
    role_of = draw(rng, ("AB", "BA"))  # role of speakers[0], role of speakers[1]
    biased = bool(rng.random() < BIASED)
    template = draw(rng, situations[name]["narrative"])
    first_named = re.search(r"\$([AB])", template)[1]
    starter = role_of.index(first_named) if biased else int(rng.integers(2))
    voices = [sorted(VOICES)[k] for k in rng.choice(len(VOICES), 2, replace=False)]
    names = {"male": world["names"][:len(world["names"]) // 2],
             "female": world["names"][len(world["names"]) // 2:]}
    speakers = []
    for voice in voices:
        speakers.append(draw(rng, [n for n in names[VOICES[voice]] if n not in speakers]))
    slots = {key: draw(rng, values) for key, values in sorted(situations[name]["slots"].items())}
    slots |= dict(zip(role_of, speakers)) | {"other": speakers[1 - starter]}
    p = {"situation": name, "role_of": role_of, "biased": biased, "template": template,
         "starter": starter, "speakers": speakers, "voices": voices, "slots": slots}
    for kind, most in MOST.items():
        p[kind] = rng.integers(0, most + 1, 2).tolist()
    return p


def choose_interruptions(rng, turns, counts):
    """The set of turns that interrupt the one before: `counts` of each speaker. Rather not one
    who interrupts."""
    options = ([], [])
    for k in range(1, len(turns)):
        if sum(len(sentence.split()) for sentence in turns[k - 1][1]) >= LONG_TURN:
            options[turns[k][0]].append(k)
    if any(len(own) < count for own, count in zip(options, counts)):
        raise Redraw
    for _ in range(10):
        cuts = set()
        for own, count in zip(options, counts):
            cuts |= set(rng.choice(own, count, replace=False).tolist())
        if not any(k + 1 in cuts for k in cuts):
            break
    return cuts


def write_turns(rng, p, world):
    """Turns [(speaker 0/1, [sentence, ...])] of the dialogue and the set of those that interrupt
    the one before."""
    situation = world["situations"][p["situation"]]
    opens = [] if p["role_of"][p["starter"]] == "A" else [situation["ask"]]
    lines = [*opens, situation["tell"], *situation["turns"]]
    lines = lines[:rng.integers(TURNS[0], min(len(lines), TURNS[1]) + 1)]
    turns = []
    for k, line in enumerate(lines):
        speaker = (p["starter"] + k) % 2
        said = sentences_of(fill(draw(rng, line), p["slots"]))
        if rng.random() < FILLER * p["fillers"][speaker]:
            said.insert(0, draw(rng, world["fillers"]))
        if k == 0:
            said.insert(0, fill(draw(rng, world["openings"]), p["slots"]))
        turns.append((speaker, said))
    cuts = choose_interruptions(rng, turns, p["interruptions"])
    for k in sorted(cuts):
        if rng.random() < CUT_IN:
            turns[k][1].insert(0, draw(rng, world["cut_ins"]))
    return turns, cuts


# --------------------------------------------------------------------------------------------------
# When it is said. A `said` is (pieces, words): pieces [(voice, text, first frame, frames)] of
# clips, words [[word with its punctuation, start, end]] in seconds, from the first clip's begin


def join(rng, clips, voice, sentences):
    """Sentences one after another with short pauses -> said."""
    pieces, words, at = [], [], 0
    for text in sentences:
        clip = clips[voice, text]
        pieces.append((voice, text, at, clip["frames"]))
        words += [[token, start + at * SECONDS, end + at * SECONDS]
                  for token, (_, start, end) in zip(text.split(), clip["words"])]
        at += clip["frames"] + int(rng.integers(BETWEEN_SENTENCES))
    return pieces, words


def stop_early(rng, said, shortest):
    """`said`, stopped at a word's end past its half, heard for at least `shortest` seconds.

    Clips are cut between frames, so a word is best whose last frame has little of the next word
    in it.
    """
    pieces, words = said
    fits = []
    for k in range(len(words) // 2, len(words) - 1):
        stop = math.ceil(words[k][2] / SECONDS - 1e-6)
        if words[k][2] - words[0][1] >= shortest:
            fits.append((max(0.0, stop * SECONDS - words[k + 1][1]), k, stop))
    if not fits:
        raise Redraw
    _, last, stop = sorted(fits)[rng.integers(min(2, len(fits)))]
    kept = [(voice, text, at, min(frames, stop - at)) for voice, text, at, frames in pieces
            if at < stop]
    return kept, words[:last + 1]


def draw_gap(rng):
    """Seconds from a turn's last word to the next turn's first one; below 0 they overlap a
    little."""
    kind = rng.random()
    if kind < SMALL_OVERLAP_CHANCE:
        return -rng.uniform(*SMALL_OVERLAP)
    if kind < SMALL_OVERLAP_CHANCE + LONG_GAP_CHANCE:
        return rng.uniform(*LONG_GAP)
    return min(GAP + rng.gamma(GAP_SHAPE, GAP_SCALE), LONG_GAP[1])


def first_frame(said, start):
    """The frame at which `said` begins for its first word to start at about `start` seconds."""
    return max(0, round((start - said[1][0][1]) / SECONDS))


def segment(said, at):
    """The columns of a segment whose clips begin at frame `at`."""
    words = [{"word": token.strip(".,?!"), "start": round(start + at * SECONDS, 4),
              "dur": round(end - start, 4)} for token, start, end in said[1]]
    return {"tts_text": " ".join(token for token, _, _ in said[1]), "start_time": words[0]["start"],
            "end_time": round(words[-1]["start"] + words[-1]["dur"], 4), "words": words}


def place_turns(rng, p, turns, cuts, clips):
    """The turns in time -> (utterances, pieces [(speaker, voice, text, first frame, frames)])."""
    utterances, placed = [], []
    for k, (speaker, sentences) in enumerate(turns):
        said = join(rng, clips, p["voices"][speaker], sentences)
        if k + 1 in cuts:
            said = stop_early(rng, said, HEARD[k in cuts])
        start = rng.uniform(*BEGIN)
        if k:
            gap = -rng.uniform(*INTERRUPTING_OVERLAP) if k in cuts else draw_gap(rng)
            start = utterances[-1]["end_time"] + gap
        at = first_frame(said, start)
        u = {"uttr_idx": k, "uttr_type": None, "speaker_idx": speaker,
             "speaker": p["speakers"][speaker], **segment(said, at), "backchannels": []}
        if k in cuts:
            u["uttr_type"] = "interrupt"
        elif k + 1 in cuts:
            u["uttr_type"] = "interrupted"
        if k + 1 in cuts:
            u["tts_text"] = u["tts_text"].rstrip(".,?!")
        if k in cuts and u["end_time"] < utterances[-1]["end_time"] + 0.2:
            raise Redraw
        utterances.append(u)
        placed += [(speaker, voice, text, at + first, frames)
                   for voice, text, first, frames in said[0]]
    return utterances, placed


def backchannel_spots(utterances, speaker):
    """Where `speaker` may begin a backchannel: [(weight, utterance, second, latest end)], at word
    ends of the other's turns, away from the speaker's own words."""
    spots = []
    own = [u for u in utterances if u["speaker_idx"] == speaker]
    for k, u in enumerate(utterances):
        if u["speaker_idx"] == speaker:
            continue
        low, high = u["start_time"] + INSIDE, u["end_time"] - INSIDE
        for o in own:
            if o["uttr_idx"] < k:
                low = max(low, o["end_time"] + APART)
            else:
                high = min(high, o["start_time"] - APART)
        for token, word in zip(u["tts_text"].split(), u["words"]):
            weight = 3.0 if token[-1] in ",.?!" else 0.1 if token.lower() in WEAK else 1.0
            if low <= (end := word["start"] + word["dur"]) < high:
                spots.append((weight, k, end, high))
    return spots


def first_fit(said, spots, taken):
    """Where a backchannel goes: the first of `spots` that is not near those in `taken` [(start,
    end)] -> (utterance, first frame, its segment). Redraw if there is none."""
    for _, k, second, latest in spots:
        at = math.ceil((second - said[1][0][1]) / SECONDS)
        part = segment(said, at)
        clear = all(part["start_time"] > end + APART or part["end_time"] < start - APART
                    for start, end in taken)
        if clear and part["end_time"] <= latest:
            return k, at, part
    raise Redraw


def place_backchannels(rng, p, utterances, speaker, world, clips):
    """Adds the speaker's backchannels, all of different words, to the utterances they answer;
    returns their pieces."""
    numbers = rng.choice(len(world["backchannels"]), p["backchannels"][speaker], replace=False)
    # the order of weighted drawing without replacement (Efraimidis and Spirakis 2006)
    spots = sorted(backchannel_spots(utterances, speaker),
                   key=lambda spot: -rng.random() ** (1 / spot[0]))
    taken, pieces = [], []
    for number in numbers:
        said = join(rng, clips, p["voices"][speaker], [world["backchannels"][number]])
        k, at, part = first_fit(said, spots, taken)
        taken.append((part["start_time"], part["end_time"]))
        utterances[k]["backchannels"].append(part)
        voice, text, _, frames = said[0][0]
        pieces.append((speaker, voice, text, at, frames))
    return pieces


def check_events(utterances, p):
    """Redraw unless what turns.py counts on the word times is what was asked, and each part is
    one segment."""
    words = [[], []]
    for u in utterances:
        parts = [(u["speaker_idx"], u)] + [(1 - u["speaker_idx"], b) for b in u["backchannels"]]
        for speaker, part in parts:
            words[speaker] += [w | {"end": w["start"] + w["dur"]} for w in part["words"]]
    segments = label_segments(merge_words(words))
    asked = [list(counts) for counts in zip(p["backchannels"], p["interruptions"])]
    whole = len(segments) == len(utterances) + sum(p["backchannels"])
    if count_events(segments) != asked or not whole:
        raise Redraw


def compose(rng, p, world, clips):
    """One attempt at a dialogue -> (dict of the raw columns, pieces, frames); Redraw if it does
    not fit."""
    turns, cuts = write_turns(rng, p, world)
    utterances, pieces = place_turns(rng, p, turns, cuts, clips)
    end = max(u["end_time"] for u in utterances)
    frames = math.ceil((end + rng.uniform(*END)) / SECONDS)
    if not SHORTEST <= frames * SECONDS <= LONGEST:
        raise Redraw
    for speaker in (0, 1):
        pieces += place_backchannels(rng, p, utterances, speaker, world, clips)
    for u in utterances:
        u["backchannels"].sort(key=lambda part: part["start_time"])
    check_events(utterances, p)
    return describe(p, utterances), pieces, max(frames, *(at + length for *_, at, length in pieces))


def describe(p, utterances):
    """The columns of a dialogue besides its number, codes and embeddings."""
    behaviors = []
    for k in (0, 1):
        mean = np.mean([len(u["words"]) for u in utterances if u["speaker_idx"] == k])
        behaviors.append({"utterance_length": int(mean >= 10) + int(mean >= 13),
                          "filler_words": p["fillers"][k], "backchannels": p["backchannels"][k],
                          "interruptions": p["interruptions"][k]})
    return {
        "narrative": narrate(p["template"], p["slots"]),
        "new_narrative_s1": narrate(p["template"], p["slots"], p["role_of"][0]),
        "new_narrative_s2": narrate(p["template"], p["slots"], p["role_of"][1]),
        "speakers": p["speakers"], "behaviors": behaviors,
        "num_turns": len(utterances), "utterances": utterances, "tts_speaker_ids": p["voices"],
        "tts_genders": [VOICES[voice] for voice in p["voices"]],
        "statistics": {f"num_{kind}": p[kind] for kind in ("backchannels", "interruptions")},
        "situation": p["situation"], "starter": p["starter"], "biased_narrative": p["biased"]}


def make_dialogue(seed, i, world, clips):
    """Dialogue i of the set with this seed -> (dict of the raw columns, pieces, frames)."""
    asked = {}
    for redraw in range(200):
        p = plan(np.random.default_rng([seed, i, 0, redraw]), split_of(i), world)
        # many events may not fit in short turns: then another situation, but the same counts
        asked = asked or {key: p[key] for key in ("backchannels", "interruptions")}
        p |= asked
        for attempt in range(1, 51):
            try:
                rng = np.random.default_rng([seed, i, attempt, redraw])
                info, pieces, frames = compose(rng, p, world, clips)
                return {"soda_index": i, "file_name": f"{i:06d}", **info}, pieces, frames
            except Redraw:
                pass
    raise InputError(f"situation '{p['situation']}' and others: no draw gave a dialogue of "
                     f"{SHORTEST:.0f}-{LONGEST:.0f} s that holds {asked}; lengthen their turns")


# --------------------------------------------------------------------------------------------------
# How it sounds: in codes or as audio


def codes_of(pieces, frames, coded):
    """Pieces of a dialogue -> its codes (2, K, frames); where nobody speaks, the codec's code of
    silence."""
    codes = np.tile(coded["silence"][None, :, None], (2, 1, frames))
    for speaker, voice, text, at, length in pieces:
        codes[speaker, :, at:at + length] = coded["clips"][voice, text]["codes"][:, :length]
    return codes


def slipped(rng, pieces, codes, coded, forms):
    """Codes (2, K, frames) of a dialogue in which each sentence with a slot begins as with another
    filling, up to its slot: mistakes for data.spoil.

    A synthesiser says "I can come on" before "Monday" a little otherwise than before "Friday". Who
    has learnt by heart how can tell the day before it is said, from its own first codes of the
    sentence, and does so instead of reading it in the prompt (docs/results.md). forms: {sentence:
    all its forms}.
    """
    codes = codes.copy()
    for speaker, voice, text, at, length in pieces:
        if others := [form for form in forms[text] if form != text]:
            other, clip = draw(rng, others), coded["clips"][voice, text]
            same = os.path.commonprefix([text.split(), other.split()])
            until = round(clip["words"][len(same)][1] / SECONDS)
            part = coded["clips"][voice, other]["codes"][:, :min(until, length)]
            codes[speaker, :, at:at + part.shape[1]] = part
    return codes


def audio_of(pieces, frames, clips):
    """Pieces of a dialogue -> (audio (2, frames * 1764) int16, phones of both channels [[phone,
    start, duration]])."""
    audio, phones = np.zeros((2, frames * FRAME), np.int16), [[], []]
    ramp = np.linspace(1, 0, round(FADE * RATE))
    for speaker, voice, text, at, length in pieces:
        clip = clips[voice, text]
        piece = clip["audio"][:length * FRAME].copy()
        if length < clip["frames"]:
            piece[-len(ramp):] = piece[-len(ramp):] * ramp
        audio[speaker, at * FRAME:at * FRAME + len(piece)] = piece
        phones[speaker] += [[phone, round(start + at * SECONDS, 4), round(end - start, 4)]
                            for phone, start, end in clip["phones"] if end <= length * SECONDS]
    return audio, [sorted(channel, key=lambda x: x[1]) for channel in phones]


@functools.cache
def audio_clips(folder):
    """The clips of a bank as (voice, text) -> clip, once per process."""
    clips = {(clip["voice"], clip["text"]): clip for clip in bank.read_bank(folder)}
    return {key: clip | {"frames": len(clip["audio"]) // FRAME} for key, clip in clips.items()}


def record_dialogue(i, settings):
    """Writes dialogue i as FLAC and JSON; the JSON comes last, so that it means a whole dialogue.
    Returns its seconds."""
    clips = audio_clips(settings.audio)
    world = read_situations(settings.situations, settings.topics)
    info, pieces, frames = make_dialogue(settings.seed, i, world, clips)
    audio, info["phones"] = audio_of(pieces, frames, clips)
    base = str(Path(settings.out) / split_of(i) / info["file_name"])
    write_atomically(f"{base}.flac", lambda new: soundfile.write(new, audio.T, RATE, "PCM_16",
                                                                 format="FLAC"))
    write_json(f"{base}.json", info)
    return frames * SECONDS


def compose_shard(item, settings):
    """item (path, numbers of dialogues): writes these in codes as one parquet file. Returns
    (their number, seconds)."""
    path, numbers = item
    coded = bank.read_codes(settings.bank)
    world = read_situations(settings.situations, settings.topics)
    forms = {text: family for family in families(world) for text in family}
    rows, reports = [], []
    for i in numbers:
        row, pieces, frames = make_dialogue(settings.seed, i, world, coded["clips"])
        codes = codes_of(pieces, frames, coded)
        row["dsu_c1_path"], row["dsu_c2_path"] = codes.tolist()
        if settings.slips:
            rng = np.random.default_rng([settings.seed, i, 0, 0, 1])  # no plan's
            wrong = slipped(rng, pieces, codes, coded, forms)
            row["slip_c1_path"], row["slip_c2_path"] = wrong.tolist()
        for channel, voice in enumerate(row["tts_speaker_ids"], 1):
            row[f"spk_emb_c{channel}"] = coded["embeddings"][voice]
        # the text stream's clock, as in prepare.py
        row["utterances"][-1]["end_time"] = seconds = frames * FRAME / RATE
        rows.append(row)
        reports.append({"name": row["file_name"], "seconds": seconds})
    write_shard(path, rows, reports, SLIPPED if settings.slips else COLUMNS)
    return len(rows), sum(report["seconds"] for report in reports)


# --------------------------------------------------------------------------------------------------
# The commands


def bank_fingerprint(settings):
    """16 hex digits that tell banks apart: of the file of codes, or of the recordings' names and
    sizes."""
    if not settings.audio:
        return fingerprint(settings.bank)
    clips = sorted(Path(settings.audio).glob("*/*.*"))
    told = json.dumps([[*path.parts[-2:], path.stat().st_size] for path in clips])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def write_recordings(settings, count, mark):
    out = Path(settings.out)
    bank.check_whole(settings.audio, every_sentence(read_situations(settings.situations,
                                                                       settings.topics)))
    claim(out / "corpus.json", mark)
    for split in SPLITS:
        make_folder(out / split)
    todo = [i for i in range(count) if not (out / split_of(i) / f"{i:06d}.json").exists()]
    done = over_cores(functools.partial(record_dialogue, settings=settings), todo, settings.workers)
    seconds = sum(tqdm(done, total=count, initial=count - len(todo), unit="dialogue"))
    print(f"{out}: {count} dialogues, {seconds / 3600:.2f} hours of them made now")


def write_codes(settings, count, mark):
    out, coded = Path(settings.out), bank.read_codes(settings.bank)
    sentences = every_sentence(read_situations(settings.situations, settings.topics))
    for voice, text in itertools.product(VOICES, sentences):
        if (voice, text) not in coded["clips"]:
            raise InputError(f"{settings.bank}: lacks {text!r} by {voice}; encode the bank of "
                             "these situations")
    numbers = {split: [i for i in range(count) if split_of(i) == split] for split in SPLITS}
    dialogues = {split: len(own) for split, own in numbers.items()}
    info = coded["info"] | mark | {"one_embedding_per_voice": True, "dialogues": dialogues,
                                   "slips": settings.slips, "shard_size": settings.shard_size}
    claim(out / "info.json", info)
    write_json(out / "voices.json", coded["embeddings"])
    shards = {}
    for split, own in numbers.items():
        parts = [own[k:k + settings.shard_size] for k in range(0, len(own), settings.shard_size)]
        for k, part in enumerate(parts):
            shards[out / f"{split}-{k:05d}-of-{len(parts):05d}.parquet"] = part
    todo = [item for item in shards.items() if not item[0].exists()]
    done = over_cores(functools.partial(compose_shard, settings=settings), todo, settings.workers)
    with tqdm(total=sum(len(part) for _, part in todo), unit="dialogue") as bar:
        for made, _ in done:
            bar.update(made)
    summarise(out, list(shards), info)


def compare(settings):
    """Prints how many codes of composed dialogues differ from those of the same dialogues' audio
    through the codec."""
    clips, coded = audio_clips(settings.audio), bank.read_codes(settings.bank)
    codec, world = bank.codec_of_clips(settings.codec), read_situations(settings.situations)
    differ = {"speech": [], "silence": []}
    for i in tqdm(range(settings.n), unit="dialogue"):
        _, pieces, frames = make_dialogue(0, i, world, clips)
        audio = torch.from_numpy(audio_of(pieces, frames, clips)[0] / np.float32(32768))
        wrong = codec.encode(audio)[0].numpy() != codes_of(pieces, frames, coded)
        wrong = wrong.transpose(0, 2, 1)  # (2, T, K)
        speech = np.zeros((2, frames), bool)
        for speaker, _, _, at, length in pieces:
            speech[speaker, at:at + length] = True
        differ["speech"].append(wrong[speech].mean())
        differ["silence"].append(wrong[~speech].mean())
    for kind, shares in differ.items():
        print(f"{kind}: {100 * np.mean(shares):.2f} % of the codes differ")


def main(argv):
    if argv[:1] == ["bank"]:
        settings = load_settings(BankSettings, argv[1:])
        sentences = every_sentence(read_situations(settings.situations), settings.situations)
        return bank.synthesise(sentences, settings.out, settings.workers)
    if argv[:1] == ["encode"]:
        settings = load_settings(EncodeSettings, argv[1:])
        sentences = every_sentence(read_situations(settings.situations), settings.situations)
        return bank.encode(sentences, settings.bank, settings.codec, settings.out,
                           settings.speaker_encoder)
    if argv[:1] == ["compare"]:
        return compare(load_settings(CompareSettings, argv[1:]))
    settings = load_settings(Settings, argv)
    if not 0 < settings.hours < math.inf or settings.shard_size < 1:
        raise InputError("hours must be a number above 0 and shard_size at least 1")
    if settings.seed < 0 or settings.workers < 0 or settings.topics < 0:
        raise InputError("seed, workers and topics must not be negative")
    count = math.ceil(settings.hours * 3600 / MEAN_SECONDS)
    world = json.dumps(read_situations(settings.situations, settings.topics))
    mark = {"seed": settings.seed, "situations": hashlib.sha256(world.encode()).hexdigest()[:16],
            "bank": bank_fingerprint(settings)}
    (write_recordings if settings.audio else write_codes)(settings, count, mark)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ImportError as e:
        sys.exit(f"corpus.py: {e}; python -m pip install -r requirements-corpus.txt")
    except InputError as e:
        sys.exit(f"corpus.py: {e}")
