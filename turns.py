"""Turns of two speakers, from word times and voiced stretches: segments, backchannels, interruptions (paper C.2), and seconds
of speech, pause, gap and overlap (paper 7.3). Arithmetic only; what listens is in listen.py.
"""
import itertools

SPLIT, INTERRUPTION, OVERLAP = 0.565, 0.405, 0.435  # seconds, the paper's thresholds (appendix C.2)


def merge_words(words, split=SPLIT, overlap=OVERLAP):
    """Words of two speakers -> segments of both, by start time (spec 7).

    words: two lists of {word, start, end} (seconds). Words of a speaker less than `split` apart merge, unless they overlap
    by more than `overlap`. Returns [{start, end, speaker (0/1), text}].
    """
    segments = []
    for speaker, own in enumerate(words):
        last = None
        for word in sorted(own, key=lambda word: word["start"]):
            if last and -overlap <= word["start"] - last["end"] < split:
                last.update(end=max(last["end"], word["end"]), text=f"{last['text']} {word['word']}")
            else:
                last = {"start": word["start"], "end": word["end"], "speaker": speaker, "text": word["word"]}
                segments.append(last)
    return sorted(segments, key=lambda segment: segment["start"])


def label_segments(segments, interruption=INTERRUPTION):
    """Adds `label` to segments in order of start: backchannel, interruption or turn (spec 7, paper C.2)."""
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
    return [[sum(s["speaker"] == k and s["label"] == kind for s in segments) for kind in ("backchannel", "interruption")]
            for k in (0, 1)]


def turn_taking(speech, duration):
    """Seconds per minute of IPU, pause, gap and overlap (Nguyen et al. 2023; paper 7.3).

    speech: two lists of voiced [start, end] in seconds; those less than 0.2 s apart are one IPU. Going through the IPUs of
    both by start, the silence from one to the next is a pause (same speaker) or a gap (the other). duration: seconds.
    """
    ipus = []
    for speaker, own in enumerate(speech):
        last = None
        for start, end in sorted(own):
            if last and start - last[1] < 0.2:
                last[1] = max(last[1], end)
            else:
                last = [start, end, speaker]
                ipus.append(last)
    ipus.sort()
    seconds = {"ipu": sum(end - start for start, end, _ in ipus), "pause": 0.0, "gap": 0.0, "overlap": 0.0}
    for (_, end, speaker), (start, _, following) in itertools.pairwise(ipus):
        seconds["pause" if speaker == following else "gap"] += max(0.0, start - end)
    for (a, b, speaker), (c, d, other) in itertools.combinations(ipus, 2):
        if speaker != other:
            seconds["overlap"] += max(0.0, min(b, d) - max(a, c))
    return {key: 60 * value / duration for key, value in seconds.items()}
