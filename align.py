"""Forced alignment: where the words of a transcript are in its recording (pocketsphinx), for prepare.py (paper 6.1).

`align` fills in a dialogue's missing words. Given its segments' times, each is aligned inside its own; given only their
order, a speaker's whole text is aligned to the channel, in which silence is cut short (`place`). Needs requirements-corpus.txt.
"""
import functools
import re
import unicodedata

import numpy as np

import data
from config import InputError
from listen import RATE, package, voiced

LETTERS = dict(rule.split(":") for rule in (  # spelling to phones, for words that are not in the dictionary
    "tion:SH AH N,ough:AO,eigh:EY,igh:AY,tch:CH,sch:SH,sh:SH,ch:CH,th:TH,ph:F,wh:W,ck:K,ng:NG,qu:K W,kn:N,wr:R,ee:IY,"
    "ea:IY,oo:UW,ou:AW,ow:OW,oi:OY,oy:OY,ai:EY,ay:EY,ey:IY,ie:IY,au:AO,aw:AO,er:ER,ir:ER,ur:ER,ar:AA R,or:AO R,ce:S EH,"
    "ci:S IH,a:AE,b:B,c:K,d:D,e:EH,f:F,g:G,h:HH,i:IH,j:JH,k:K,l:L,m:M,n:N,o:OW,p:P,q:K,r:R,s:S,t:T,u:AH,v:V,w:W,x:K S,"
    "y:IY,z:Z").split(","))
HUMS = {"hm": "hmm", "mm": "hmm", "mmm": "hmm", "hmmm": "hmm"}


def to_words(text):
    """Text -> [(word without its punctuation, [spoken words in lower case])], as in ("21", ["twenty", "one"])."""
    words = []
    for token in re.split(r"[\s—–…/]+|\.\.+", text.replace("’", "'")):
        said = unicodedata.normalize("NFKD", token.lower().replace("&", " and ").replace("%", " percent "))
        if re.search(r"\d", said):
            said = re.sub(r"(\d+)(st|nd|rd|th)?", lambda m: " " + package("num2words", "a number in a text").num2words(
                m[1], to="ordinal" if m[2] else "cardinal") + " ", said.replace(",", ""))
        if spoken := re.findall(r"[a-z](?:'?[a-z])*", said.encode("ascii", "ignore").decode()):
            words.append((token.strip(" .,!?;:\"“”()[]{}*_-"), [HUMS.get(s, s) for s in spoken]))
    return words


@functools.cache
def decoder(beam):
    """pocketsphinx with its English acoustic model and dictionary; `beam`: how unlikely a path may become."""
    Decoder = package("pocketsphinx", "a transcript without word times").Decoder
    # no bestpath: that second search, over a word lattice, may leave the text and lose words at its end
    d = Decoder(lm=None, samprate=RATE, loglevel="FATAL", bestpath=False, beam=beam, pbeam=beam, wbeam=beam ** 0.6)
    for i, phones in enumerate(("HH AH M", "AH M", "M M M")):  # the dictionary has only the short HH M
        d.add_word(f"hmm({i + 2})", phones, True)
    return d


def force_align(audio, words):
    """audio (samples at 16 kHz), words as of `to_words` -> [(start, end)] in seconds for each word, or None."""
    spoken = [s for _, said in words for s in said]
    if not spoken or len(audio) < RATE / 10:
        return None
    for beam in (1e-48, 1e-100):  # the usual one; a slower one for what it loses
        d = decoder(beam)
        for s in spoken:
            if d.lookup_word(s) is None:
                letters = re.sub(r"([^aeiou])\1|'|(?<=\w\w[^aeiou])e$", r"\1", s)
                d.add_word(s, " ".join(LETTERS[x] for x in re.findall("|".join(LETTERS), letters)) or "AH", True)
        d.set_align_text(" ".join(spoken))
        d.start_utt()
        d.process_raw((audio * 32767).clip(-32768, 32767).astype(np.int16).tobytes(), full_utt=True)
        d.end_utt()
        found = [s for s in d.seg() if s.word[0] not in "<["] if d.hyp() else []  # the rest is silence and noise
        if len(found) == len(spoken):
            times = iter((s.start_frame / 100, (s.end_frame + 1) / 100) for s in found)  # 100 frames a second
            groups = [[next(times) for _ in said] for _, said in words]
            return [(group[0][0], group[-1][1]) for group in groups]
    return None


def segments(row, channel):
    """What speaker `channel` utters, in order: own utterances, and own backchannels inside the other's utterances."""
    return [part for part, _, _ in data.segments(row, channel)]


def end_of(word):
    return round(word["start"] + word["dur"], 4)


def overlap(a, b):
    """Seconds that the stretches a and b, each (start, end), share."""
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0]))


def place(texts, audio, speech):
    """Word times of all segments of a channel, given only their order: per segment [(start, end)], or None.

    `texts`: words (of `to_words`) per segment; `speech`: the voiced stretches. The whole text is aligned to the audio
    with long silences cut short. Its first or last word may then stand across a silence, beside the neighbouring
    segment; so each voiced stretch is given to the segment that has most of it, and a segment with words far from its
    stretches is aligned again, to them alone.
    """
    pieces, at = [], 0.0  # (start, end, start in the shortened audio)
    for a, b in speech:
        a, b = max(a - 0.3, pieces[-1][1] if pieces else 0.0), min(b + 0.3, len(audio) / RATE)
        pieces.append((a, b, at))
        at += b - a
    cut = np.concatenate([audio[:0]] + [audio[round(a * RATE):round(b * RATE)] for a, b, _ in pieces])
    times = force_align(cut, [word for words in texts for word in words])
    if times is None:
        return None

    def back(t):  # time in the shortened audio -> in the audio
        a, _, start = [p for p in pieces if p[2] <= t][-1]
        return a + t - start

    times = iter((back(a), back(b - 0.01) + 0.01) for a, b in times)
    spans = [[next(times) for _ in words] for words in texts]
    owned = [[] for _ in texts]
    for s in speech:
        shares = [sum(overlap(word, s) for word in span) for span in spans]
        if any(shares):
            owned[shares.index(max(shares))].append(s)
    for k, own in enumerate(owned):
        if own and (spans[k][0][0] < own[0][0] - 0.3 or spans[k][-1][1] > own[-1][1] + 0.3):
            start, end = max(0.0, own[0][0] - 0.1), own[-1][1] + 0.1
            again = force_align(audio[round(start * RATE):round(end * RATE)], texts[k])
            spans[k] = [(a + start, b + start) for a, b in again] if again else spans[k]
    return spans


def align(row, audio):
    """Fills in a dialogue's missing word times, and segments' times from them. audio: (2, samples) at 16 kHz.

    Found is a word that lies at least half in voice activity; the others are left out. Returns a report: words, found,
    unfound (segments that lack some), and starts, ends: how far the aligned segments' first word's start and last
    word's end are from the nearest border of voice activity, in seconds.
    """
    report = {"words": 0, "found": 0, "unfound": [], "starts": [], "ends": []}
    for channel in (0, 1):
        parts = segments(row, channel)
        if all(part["words"] for part in parts):
            continue
        speech = voiced(audio[channel])
        if all(part.get("start_time") is not None and part.get("end_time") is not None for part in parts):
            parts, spans = [part for part in parts if not part["words"]], []
            for part in parts:
                start = max(0.0, part["start_time"] - 0.1)
                window = audio[channel][round(start * RATE):round((part["end_time"] + 0.1) * RATE)]
                spans.append([(a + start, b + start) for a, b in force_align(window, to_words(part["tts_text"])) or []])
        else:
            spans = place([to_words(part["tts_text"]) for part in parts], audio[channel], speech)
        if spans is None:
            raise InputError(f"{row['file_name']}: the text of {row['speakers'][channel]} cannot be aligned to channel "
                             f"{channel}; does the transcript belong to the recording, channel 0 = first speaker?")
        for part, span in zip(parts, spans):
            words = to_words(part["tts_text"])
            part["words"] = [{"word": word, "start": round(a, 3), "dur": round(b - a, 3)} for (word, _), (a, b)
                             in zip(words, span) if sum(overlap((a, b), s) for s in speech) >= (b - a) / 2]
            report["words"] += len(words)
            report["found"] += len(part["words"])
            if len(part["words"]) < len(words):
                report["unfound"].append(f"{row['file_name']}: {len(part['words'])} of {len(words)} words of "
                                         f"{row['speakers'][channel]}'s {part['tts_text']!r} found")
            if part["words"]:
                part["start_time"], part["end_time"] = part["words"][0]["start"], end_of(part["words"][-1])
                report["starts"].append(min(abs(a - part["start_time"]) for a, _ in speech))
                report["ends"].append(min(abs(b - part["end_time"]) for _, b in speech))
    return report
