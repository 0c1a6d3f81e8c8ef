"""Cut the four situations that manners are about out of a prepared data set with word times: a
pause in a telling, a turn's end, a telling that asks for backchannels, and an interruption.

    python -m world.segments data=default/data split=train out=segments.json

One speaker of a dialogue is the user, whose channel is a recording; what the other one did then is
what a model in its place may be measured by. The four kinds are those of "Multi-Faceted
Interactivity Alignment" (arXiv 2606.11167), found in word times where they use a VAD. The defaults
fit the small world, where an utterance lasts 2 to 4 s; theirs stand beside them:
`join=1.0 gap=0.4 pause_in=4.0 backchannel_in=5.0 turn=5.0 part=3.0`.
"""
import collections
import itertools
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from config import InputError, load_settings, make_folder, write_json
from data import (
    FRAME_RATE,
    StreamFormat,
    check_dialogue,
    data_info,
    frames_per_second,
    load_dialogues,
)
from data import segments as spoken
from turns import SPLIT, merge_words


@dataclass
class Settings:
    data: str = "default/data"  # folder of a prepared data set, or hub id
    split: str = "train"
    out: str = "segments.json"  # file to write
    most: int = 2000  # of each kind, drawn at random; 0: all
    seed: int = 0
    # seconds; the paper's values in brackets
    join: float = SPLIT  # words of a speaker less than this apart are one utterance (1.0)
    pause: float = 0.2  # silences inside an utterance from this length on are pauses
    pause_in: float = 3.0  # shortest utterance whose pauses are taken (4.0)
    backchannel_in: float = 3.0  # shortest utterance whose backchannels are taken (5.0)
    backchannel: float = 1.0  # what the listener says is a backchannel up to this length (1.0)
    turn: float = 2.5  # shortest turn of either, at a turn's end (5.0)
    gap: float = 0.7  # longest silence between them (0.4; in the small world up to 0.7)
    part: float = 1.5  # shortest of the four utterances around an interruption (3.0)


def length(utterance):
    return utterance["end"] - utterance["start"]


def times(utterance):
    return [utterance["start"], utterance["end"]]


def first(utterances, begin):
    """The first of `utterances` that starts at `begin` or later, or None."""
    return next((u for u in utterances if u["start"] >= begin), None)


def inside(utterances, begin, end):
    """What of `utterances` sounds between two times."""
    return [u for u in utterances if u["start"] < end and u["end"] > begin]


# ---- the four kinds: (an utterance x of the user, all of the user's, all of the other's, settings)
# ---- -> (begin, end, events) in seconds, or why it is none


def find_pause(x, own, other, settings):
    """A telling with pauses in it, the other silent: who is patient says nothing."""
    if length(x) < settings.pause_in:
        return "is too short"
    if not x["pauses"]:
        return "has no pause inside"
    if inside(other, *times(x)):
        return "the other speaks meanwhile"
    return *times(x), x["pauses"]


def find_turn(x, own, other, settings):
    """A turn that the other answers at once; the segment goes on to the answer's end."""
    answer = first(other, x["end"])
    if length(x) < settings.turn:
        return "is too short"
    if inside(other, x["end"] - settings.gap, x["end"]):
        return "the other speaks at its end"
    if not answer or answer["start"] > x["end"] + settings.gap:
        return "no answer soon enough"
    if length(answer) < settings.turn:
        return "the answer is too short"
    if any(length(u) > settings.backchannel for u in inside(own, x["end"], answer["end"])):
        return "the user speaks into the answer"
    return x["start"], answer["end"], [times(x)]


def find_backchannel(x, own, other, settings):
    """A telling in which the other says nothing but backchannels."""
    said = inside(other, *times(x))
    if length(x) < settings.backchannel_in:
        return "is too short"
    if not said:
        return "no backchannel inside"
    if any(length(u) > settings.backchannel for u in said):
        return "the other says more meanwhile"
    return *times(x), [times(u) for u in said]


def find_interruption(x, own, other, settings):
    """The user speaks, the other answers, the user interrupts (x), the other yields and answers."""
    cut = next((u for u in other if u["start"] < x["start"] < u["end"] < x["end"]), None)
    if not cut:
        return "interrupts nothing"
    before = [u for u in own if u["start"] < cut["start"] and length(u) >= settings.part]
    answer = next((u for u in other if u["start"] > cut["end"]
                   and length(u) > settings.backchannel), None)
    if not before:
        return "no telling of the user before"
    if not answer or answer["start"] < x["end"] - settings.gap:
        return "no answer, or one that interrupts in turn"
    if min(map(length, (x, cut, answer))) < settings.part:
        return "one of the four utterances is too short"
    return before[-1]["start"], answer["end"], [times(x)]


FIND = {"pause": find_pause, "turn": find_turn, "backchannel": find_backchannel,
        "interruption": find_interruption}


# ---- a data set ----


def words_of(dialogue):
    """Both speakers' words, backchannels included: two lists of {word, start, end}, in seconds of
    the codes, so that t seconds is frame 12.5 t also where the annotation's clock differs."""
    clock = frames_per_second(dialogue) / FRAME_RATE
    return [[{"word": word["word"], "start": round(word["start"] * clock, 4),
              "end": round((word["start"] + word["dur"]) * clock, 4)}
             for part, _, _ in spoken(dialogue, speaker) for word in part["words"]]
            for speaker in (0, 1)]


def utterances_of(dialogue, settings):
    """Both speakers' utterances by their words, backchannels included: two lists of {start, end,
    text, pauses}, in order; pauses: the [start, end] of silences inside. Seconds."""
    words = words_of(dialogue)
    ipus = merge_words(words, settings.pause)
    both = [], []
    for utterance in merge_words(words, settings.join):
        own = [ipu for ipu in inside(ipus, *times(utterance))
               if ipu["speaker"] == utterance["speaker"]]
        pauses = [[a["end"], b["start"]] for a, b in itertools.pairwise(own)]
        both[utterance["speaker"]].append(utterance | {"pauses": pauses})
    return both


def cut_dialogue(dialogue, index, settings):
    """A dialogue -> (its segments in the form of the JSON, reasons Counter of (axis, why not))."""
    both, last = utterances_of(dialogue, settings), len(dialogue["dsu_c1_path"][0])

    def frames(begin, end):
        return [int(begin * FRAME_RATE), min(math.ceil(end * FRAME_RATE), last)]
    found, reasons = [], collections.Counter()
    for user, (axis, find) in itertools.product((0, 1), FIND.items()):
        own, other = both[user], both[1 - user]
        for x in own:
            if type(result := find(x, own, other, settings)) is str:
                reasons[axis, result] += 1
                continue
            begin, end, events = result
            begin, end = frames(begin, end)
            # frames: of the dialogue, by which another data set is told
            found.append({"axis": axis, "dialogue": index, "frames": last, "user": user,
                          "begin": begin, "end": end,
                          "events": [frames(*event) for event in events]})
    return found, reasons


def cut_all(dialogues, settings):
    """Segments of all dialogues, by axis, and the reasons why utterances are none.

    dialogues: of load_dialogues. Returns ({axis: [segment, ...]}, Counter of (axis, why not)); a
    dialogue that check_dialogue refuses is counted under (all, its reason).
    """
    fmt = StreamFormat(codebook_size=data_info(settings.data).get("codebook_size", 4032))
    found, reasons = {axis: [] for axis in FIND}, collections.Counter()
    for index, dialogue in enumerate(tqdm(dialogues, unit="dialogue")):
        try:
            check_dialogue(dialogue, fmt)
        except InputError as e:
            reasons["all", f"dialogue {index}: {e}"] += 1
            continue
        own, why = cut_dialogue(dialogue, index, settings)
        reasons += why
        for segment in own:
            found[segment["axis"]].append(segment)
    return found, reasons


def keep(found, reasons, settings):
    """Of each kind at most `most` segments, in order; prints what was found, kept, and why not."""
    rng, kept = random.Random(settings.seed), []
    for axis, segments in found.items():
        own = segments
        if settings.most and len(segments) > settings.most:
            own = sorted(rng.sample(segments, settings.most), key=lambda s: s["dialogue"])
        frames = sum(segment["end"] - segment["begin"] for segment in own)
        seconds = frames / FRAME_RATE / max(1, len(own))
        print(f"{axis}: {len(segments)} found, {len(own)} kept, {seconds:.1f} s each on average")
        kept += own
        for (kind, why), count in reasons.most_common():
            if kind == axis:
                print(f"  {count} utterances not: {why}")
    return kept


def main(argv):
    settings = load_settings(Settings, argv)
    if not 0 < settings.pause < settings.join:
        raise InputError(f"pause={settings.pause} and join={settings.join}: a pause is shorter "
                         "than what separates utterances, and both are above 0")
    if settings.most < 0:
        raise InputError(f"most={settings.most}: must be at least 0")
    make_folder(Path(settings.out).parent)
    dialogues = load_dialogues(settings.data, settings.split)
    found, reasons = cut_all(dialogues, settings)
    for kind, why in reasons:
        if kind == "all":
            print(f"left out {why}", file=sys.stderr)
    kept = keep(found, reasons, settings)
    if not kept:
        raise InputError(f"{settings.data} ({settings.split}): no segment of any kind; shorter "
                         "thresholds find more (--help names them)")
    write_json(settings.out, {"data": settings.data, "split": settings.split,
                              "dialogues": len(dialogues), "segments": kept})
    print(f"{len(kept)} segments in {settings.out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as e:
        sys.exit(f"segments.py: {e}")
