"""Turns of two speakers, from word times and voiced stretches: segments, backchannels,
interruptions and the search of their thresholds (paper C.2), and seconds of speech, pause, gap and
overlap (paper 7.3). Arithmetic only; what listens is in listen.py.
"""
import itertools

import numpy as np
from tqdm import tqdm

SPLIT, INTERRUPTION, OVERLAP = 0.565, 0.405, 0.435  # seconds, the paper's thresholds (C.2)
# A voiced stretch goes on for 0.1 s after its last word (measured on true word times), so that the
# silence between two stretches is that much shorter than between their words: SPLIT - 0.1
SPLIT_VOICED = 0.465


def merge_words(words, split=SPLIT, overlap=OVERLAP):
    """Words of two speakers -> segments of both, by start time.

    words: two lists of {word, start, end} (seconds). Words of a speaker less than `split` apart
    merge, unless they overlap by more than `overlap`.
    Returns [{start, end, speaker (0 or 1), text}].
    """
    segments = []
    for speaker, own in enumerate(words):
        last = None
        for word in sorted(own, key=lambda word: word["start"]):
            if last and -overlap <= word["start"] - last["end"] < split:
                last["end"] = max(last["end"], word["end"])
                last["text"] += f" {word['word']}"
            else:
                last = {"start": word["start"], "end": word["end"], "speaker": speaker,
                        "text": word["word"]}
                segments.append(last)
    return sorted(segments, key=lambda segment: segment["start"])


def label_segments(segments, interruption=INTERRUPTION):
    """Adds `label` to segments in order of start: backchannel, interruption or turn (paper C.2)."""
    latest = [None, None]
    for segment in segments:
        other = latest[1 - segment["speaker"]]
        segment["label"] = "turn"
        if other and segment["end"] < other["end"]:
            segment["label"] = "backchannel"
        elif other and other["end"] - segment["start"] > interruption:
            segment["label"] = "interruption"
        latest[segment["speaker"]] = segment
    return segments


def count_events(segments):
    """Labelled segments -> [[backchannels, interruptions] of speaker 0, [...] of speaker 1]."""
    counts = [[0, 0], [0, 0]]
    for segment in segments:
        if segment["label"] != "turn":
            counts[segment["speaker"]][segment["label"] == "interruption"] += 1
    return counts


def count_at_all(words, split, overlap, interruptions):
    """count_events of one dialogue for many thresholds of an interruption (I,) at once: (I, 2,
    2)."""
    counts, latest = np.zeros((len(interruptions), 2, 2)), [None, None]
    for segment in merge_words(words, split, overlap):
        speaker = segment["speaker"]
        other = latest[1 - speaker]
        if other and segment["end"] < other["end"]:
            counts[:, speaker, 0] += 1
        elif other:
            counts[:, speaker, 1] += other["end"] - segment["start"] > interruptions
        latest[speaker] = segment
    return counts


def fit_thresholds(words, truth):
    """Grid search of the three thresholds on annotated dialogues (appendix C.2), with the ranges
    and the steps of 0.005 of there.

    words: per dialogue two lists of {word, start, end}; truth: (dialogues, 2 speakers, 2 kinds)
    true counts. Returns (least missing + extra events a dialogue, (split, interruption, overlap));
    of equals, the one nearest to the paper's.
    """
    truth, best = np.array(truth), None
    interruptions = np.arange(0.10, 0.7001, 0.005)  # (I,)
    deepest = max((a["end"] - b["start"] for pair in words for own in pair
                   for a, b in itertools.pairwise(own)), default=0)
    # words of a recogniser never overlap: then that threshold changes nothing
    overlaps = np.arange(0.05, 0.5001, 0.005) if deepest > 0.05 else [OVERLAP]
    for split in tqdm(np.arange(0.20, 0.9001, 0.005), desc="thresholds"):
        for overlap in overlaps:
            found = np.stack([count_at_all(pair, split, overlap, interruptions) for pair in words])
            wrong = np.abs(found - truth[:, None]).sum((0, 2, 3)) / len(words)  # (I,)
            away = np.abs(interruptions - INTERRUPTION)
            away += abs(split - SPLIT) + abs(overlap - OVERLAP)
            k = np.lexsort((away, wrong))[0]
            if best is None or (wrong[k], away[k]) < best[:2]:
                best = wrong[k], away[k], (split, interruptions[k], overlap)
    return best[0], tuple(round(float(x), 3) for x in best[2])


def join(spans, gap):
    """Spans [(start, end)], in order of start, as lists; those less than `gap` seconds apart are
    one. (Full-Duplex-Bench's, of those at most so far apart, is in fdb.py.)"""
    joined = []
    for start, end in spans:
        if joined and start - joined[-1][1] < gap:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([start, end])
    return joined


def turn_taking(speech, duration):
    """Seconds per minute of IPU, pause, gap and overlap (Nguyen et al. 2023; paper 7.3).

    speech: two lists of voiced [start, end] in seconds; those less than 0.2 s apart are one IPU
    (inter-pausal unit). Going through the IPUs of both by start, the time from one's end to the
    next's start is a pause (same speaker) or a gap (the other): the authors' program's rule, by
    which the time after a backchannel counts although the other speaks. duration: seconds.
    """
    ipus = sorted([*ipu, speaker] for speaker, own in enumerate(speech)
                  for ipu in join(sorted(own), 0.2))
    seconds = {"ipu": 0.0, "pause": 0.0, "gap": 0.0, "overlap": 0.0}
    for start, end, _ in ipus:
        seconds["ipu"] += end - start
    for (_, end, speaker), (start, _, following) in itertools.pairwise(ipus):
        seconds["pause" if speaker == following else "gap"] += max(0.0, start - end)
    for (a, b, speaker), (c, d, other) in itertools.combinations(ipus, 2):
        if speaker != other:
            seconds["overlap"] += max(0.0, min(b, d) - max(a, c))
    return {key: 60 * value / duration for key, value in seconds.items()}
