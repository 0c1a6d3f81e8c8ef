"""Forced alignment: where the words of a transcript are in its recording (pocketsphinx), for
prepare.py (paper 6.1).

`align` fills in a dialogue's missing words. Given its segments' times, each is aligned inside its
own; given only their order, a speaker's whole text is aligned to the channel, in which silence is
cut short (`place`). `misfit` then tests what the alignment says, or who gave the times, against
the sound. English only. Needs requirements-corpus.txt.
"""
import functools
import re
import unicodedata

import numpy as np
import scipy.signal

import data
from config import InputError
from listen import RATE, own_speech, package
from turns import merge_words

LETTERS = dict(rule.split(":") for rule in (  # spelling to phones, for words not in the dictionary
    "tion:SH AH N,ough:AO,eigh:EY,igh:AY,tch:CH,sch:SH,sh:SH,ch:CH,th:TH,ph:F,wh:W,ck:K,ng:NG,"
    "qu:K W,kn:N,wr:R,ee:IY,ea:IY,oo:UW,ou:AW,ow:OW,oi:OY,oy:OY,ai:EY,ay:EY,ey:IY,ie:IY,au:AO,"
    "aw:AO,er:ER,"
    "ir:ER,ur:ER,ar:AA R,or:AO R,ce:S EH,ci:S IH,a:AE,b:B,c:K,d:D,e:EH,f:F,g:G,h:HH,i:IH,j:JH,k:K,"
    "l:L,m:M,n:N,o:OW,p:P,q:K,r:R,s:S,t:T,u:AH,v:V,w:W,x:K S,y:IY,z:Z").split(","))
SPELT = str.maketrans({"ø": "o", "æ": "ae", "œ": "oe", "ł": "l", "đ": "d", "ð": "th", "þ": "th",
                       "ı": "i"})
HUMS = {"hm": "hmm", "mm": "hmm", "mmm": "hmm", "hmmm": "hmm"}


# ---- words


def to_words(text):
    """Text -> [(word without its punctuation, [spoken words in lower case])], as in ("21",
    ["twenty", "one"]). A word that the 26 letters do not spell, of another script, has no spoken
    words."""
    words = []
    for token in re.split(r"[\s—–…/]+|\.\.+", text.replace("’", "'")):
        said = token.casefold().translate(SPELT).replace("&", " and ").replace("%", " percent ")
        said = unicodedata.normalize("NFKD", said)
        said = "".join(c for c in said if not unicodedata.combining(c))
        if re.search(r"[0-9]", said):
            said = re.sub(r"([0-9]+)(st|nd|rd|th)?", number_words, said.replace(",", ""))
        foreign = any(c.isalnum() and not c.isascii() for c in said)
        spoken = [] if foreign else re.findall(r"[a-z](?:'?[a-z])*", said)
        if spoken or foreign:
            word = token.strip(" .,!?;:\"“”()[]{}*_-。！？，、¿¡«»")
            words.append((word, [HUMS.get(s, s) for s in spoken]))
    return words


def number_words(match):
    """21 -> twenty-one, 2nd -> second, for re.sub."""
    num2words = package("num2words", "a number in a text").num2words
    return f" {num2words(match[1], to='ordinal' if match[2] else 'cardinal')} "


def spelt(part):
    """The words (of `to_words`) of a segment that alignment can spell."""
    return [(word, spoken) for word, spoken in to_words(part["tts_text"]) if spoken]


def segments(row, channel):
    """What speaker `channel` utters, in order: own utterances, and own backchannels inside the
    other's utterances."""
    return [part for part, _, _ in data.segments(row, channel)]


def end_of(word):
    return round(word["start"] + word["dur"], 4)


# ---- the aligner


@functools.cache
def decoder(beam):
    """pocketsphinx with its English acoustic model and dictionary; `beam`: how unlikely a path may
    become."""
    Decoder = package("pocketsphinx", "a transcript without word times").Decoder
    # no bestpath: that second search, over a word lattice, may leave the text and lose words at
    # its end
    d = Decoder(lm=None, samprate=RATE, loglevel="FATAL", bestpath=False, beam=beam, pbeam=beam,
                wbeam=beam ** 0.6)
    for i, phones in enumerate(("HH AH M", "AH M", "M M M")):  # beside the HH M that it has
        d.add_word(f"hmm({i + 2})", phones, True)
    return d


def add_unknown(d, spoken):
    """Gives the decoder a pronunciation, by rules of spelling, of each word that it does not
    know."""
    for s in spoken:
        if d.lookup_word(s) is None:
            letters = re.sub(r"([^aeiou])\1|'|(?<=\w\w[^aeiou])e$", r"\1", s)
            phones = [LETTERS[x] for x in re.findall("|".join(LETTERS), letters)]
            d.add_word(s, " ".join(phones) or "AH", True)


def force_align(audio, words):
    """audio (samples at 16 kHz), words as of `to_words` -> [(start, end)] in seconds for each, or
    None."""
    spoken = [s for _, said in words for s in said]
    if not spoken or len(audio) < RATE / 10:
        return None
    for beam in (1e-48, 1e-100):  # the usual one; a slower one for what it loses
        d = decoder(beam)
        add_unknown(d, spoken)
        d.set_align_text(" ".join(spoken))
        d.start_utt()
        d.process_raw((audio * 32767).clip(-32768, 32767).astype(np.int16).tobytes(), full_utt=True)
        d.end_utt()
        found = d.seg() if d.hyp() else []
        found = [s for s in found if s.word[0] not in "<["]  # the rest is silence
        if len(found) == len(spoken):
            times = iter((s.start_frame / 100, (s.end_frame + 1) / 100) for s in found)
            groups = [[next(times) for _ in said] for _, said in words]
            return [(group[0][0], group[-1][1]) for group in groups]
    return None


# ---- segments to their places

SHORT = 2.0  # seconds that two or three words may take


def overlap(a, b):
    """Seconds that the stretches a and b, each (start, end), share."""
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0]))


def within(stretches, size, rate, margin=0.0):
    """Which of `size` samples (or frames) at `rate` a second lie in the stretches (s), or at most
    `margin` seconds beside them: (size,) bool."""
    mask = np.zeros(size, bool)
    for start, end in stretches:
        mask[max(0, round((start - margin) * rate)):round((end + margin) * rate)] = True
    return mask


def shorten(speech, length):
    """The voiced stretches with 0.3 s around each, (start, end, start in the audio that is joined
    from them), in seconds. length: of the audio."""
    pieces, at = [], 0.0
    for a, b in speech:
        a, b = max(a - 0.3, pieces[-1][1] if pieces else 0.0), min(b + 0.3, length)
        pieces.append((a, b, at))
        at += b - a
    return pieces


def place(texts, audio, speech):
    """Word times of all segments of a channel, given only their order: per segment [(start, end)],
    [] for one that has none; or None.

    `texts`: words (of `to_words`) per segment; `speech`: the speaker's own stretches. The whole
    text is aligned to the audio with long silences cut short. Its first or last word may then
    stand across a silence, beside the neighbouring segment; so each stretch is given to the
    segment that has most of it, and a segment with words far from its stretches is aligned again,
    to them alone. So is one of two or three words that is torn apart, and its neighbours: nobody
    pauses in "I see.", so that of a stretch in which another one has words too it has nothing.
    """
    # what leaks of the other speaker beside the stretches is no word of this one
    audio = np.where(within(speech, len(audio), RATE, 0.1), audio, np.float32(0.1) * audio)
    pieces = shorten(speech, len(audio) / RATE)
    joined = [audio[:0]] + [audio[round(a * RATE):round(b * RATE)] for a, b, _ in pieces]
    times = force_align(np.concatenate(joined), [word for words in texts for word in words])
    if times is None:
        return None
    begins = [start for _, _, start in pieces]

    def back(t):  # time in the shortened audio -> in the audio
        a, _, start = pieces[np.searchsorted(begins, t, side="right") - 1]
        return a + t - start

    times = iter((back(a), back(b - 0.01) + 0.01) for a, b in times)
    spans = [[next(times) for _ in words] for words in texts]
    torn, owned = [is_torn(span) for span in spans], [[] for _ in texts]
    for s in speech:
        shares = [sum(overlap(word, s) for word in span) for span in spans]
        whole = [0 if torn[k] else share for k, share in enumerate(shares)]
        shares = whole if any(whole) else shares
        if any(shares):
            owned[shares.index(max(shares))].append(s)
    for k, own in enumerate(owned):
        if own and (any(torn[max(0, k - 1):k + 2]) or spans[k][0][0] < own[0][0] - 0.3
                    or spans[k][-1][1] > own[-1][1] + 0.3):
            start, end = max(0.0, own[0][0] - 0.1), own[-1][1] + 0.1
            again = force_align(audio[round(start * RATE):round(end * RATE)], texts[k])
            spans[k] = [(a + start, b + start) for a, b in again] if again else spans[k]
    return [[] if is_torn(span) else span for span in spans]


def is_torn(span):
    """Whether a segment of two or three words, of times `span`, is partly in another's place."""
    return 1 < len(span) < 4 and span[-1][1] - span[0][0] > SHORT


def inside(part, audio):
    """Times [(start, end)] of a segment's words (`spelt`), aligned within its own times; [] if that
    fails."""
    start = max(0.0, part["start_time"] - 0.1)
    window = audio[round(start * RATE):round((part["end_time"] + 0.1) * RATE)]
    return [(a + start, b + start) for a, b in force_align(window, spelt(part)) or []]


def align(row, audio, speech=None):
    """Fills in a dialogue's missing word times, and segments' times from them. audio: (2, samples)
    at 16 kHz; speech: of both channels, as of `own_speech`.

    Found is a word that lies at least half in its speaker's speech; the others are left out.
    Returns a report: words, found, foreign (words that cannot be spelt), unfound (segments that
    lack some), by_order (channels aligned by the order of their text alone), and starts, ends: how
    far the aligned segments' first word's start and last word's end are from the nearest border of
    speech, in seconds.
    """
    report = {"words": 0, "found": 0, "foreign": 0, "unfound": [], "by_order": [], "starts": [],
              "ends": []}
    speech = own_speech(audio) if speech is None else speech
    for channel, name in enumerate(row["speakers"]):
        parts = segments(row, channel)
        if all(part["words"] for part in parts):
            continue
        if not speech[channel]:
            raise InputError(f"channel {channel} has no speech of {name}: it is silent, or both "
                             "channels hold the same sound; each speaker needs a channel")
        if all(part["start_time"] is not None and part["end_time"] is not None for part in parts):
            parts = [part for part in parts if not part["words"]]
            spans = [inside(part, audio[channel]) for part in parts]
        else:
            report["by_order"].append(channel)
            spans = place([spelt(part) for part in parts], audio[channel], speech[channel])
        if spans is None:
            raise InputError(f"the text of {name} cannot be aligned to channel {channel}; does the "
                             "transcript belong to the recording, channel 0 = first speaker?")
        for part, span in zip(parts, spans):
            if not part["words"]:  # given ones stay, where the order of the text needs all parts
                fill_in(part, span, speech[channel], report, f"{row['file_name']}: {name}")
    return report


def fill_in(part, span, speech, report, who):
    """Gives a segment the words, of times `span`, that lie in `speech`, and the times of these;
    counts in `report`."""
    words = to_words(part["tts_text"])
    part["words"] = []
    for (word, _), (a, b) in zip(spelt(part), span):
        if sum(overlap((a, b), s) for s in speech) >= (b - a) / 2:
            part["words"].append({"word": word, "start": round(a, 3), "dur": round(b - a, 3)})
    report["words"] += len(words)
    report["found"] += len(part["words"])
    report["foreign"] += sum(not spoken for _, spoken in words)
    if len(part["words"]) < len(words):
        report["unfound"].append(f"{who}: {len(part['words'])} of {len(words)} words of "
                                 f"{part['tts_text']!r} found")
    if part["words"]:
        part["start_time"], part["end_time"] = part["words"][0]["start"], end_of(part["words"][-1])
        report["starts"].append(min(abs(a - part["start_time"]) for a, _ in speech))
        report["ends"].append(min(abs(b - part["end_time"]) for _, b in speech))


# ---- tests of the result

FRAMES = 100  # a second
LATE = 0.5  # seconds by which a segment may start before the one that the transcript has before it
VOICED = 0.6  # part of a speaker's word time that has to be voiced; right ones have 0.88 to 0.97
SEGMENT_VOICED = 0.4  # the same of a segment of three words or more; right ones have 0.68 or more
LETTER = (0.025, 0.17)  # seconds of speech a letter, of four words or more; right: 0.05 to 0.10


def misfit(row, speech, by_order=()):
    """Tests the words' times of a row against the sound -> (what is wrong, in words, or '', and
    how many seconds of speech no segment claims).

    speech: each speaker's own stretches, of `own_speech`. by_order: the channels whose times come
    from the order of the text alone, which is tested more strictly: what the transcript lacks
    moves the rest.
    """
    words = [[{"word": "", "start": w["start"], "end": end_of(w)} for part in segments(row, c)
              for w in part["words"]] for c in (0, 1)]
    claimed = merge_words(words)  # pauses inside a turn are claimed too
    last = max([s["end"] for s in claimed] + [b for own in speech for _, b in own])
    size = round(FRAMES * (last + 1))
    own = [within(stretches, size, FRAMES) for stretches in speech]
    said = [within([(s["start"], s["end"]) for s in claimed if s["speaker"] == c], size, FRAMES)
            for c in (0, 1)]
    unclaimed, lacking = unclaimed_speech(row, own, said, by_order)
    wrong = (wrong_place(row, own, said) or wrong_order(row, by_order)
             or wrong_segment(row, own, by_order) or lacking)
    return wrong, unclaimed


def wrong_place(row, own, said):
    """Of `misfit`: channels exchanged, all times moved, or another recording. own, said: for both
    speakers, the frames in which they speak, and in which they do by the words' times."""
    def share(said, own):
        return (said & own).sum() / max(1, said.sum())

    # of a speaker who says little, a backchannel that voice activity misses is too much
    least = min(2 * FRAMES, max(mask.sum() for mask in said))
    talks = [c for c in (0, 1) if said[c].sum() >= least]
    shares = {c: share(said[c], own[c]) for c in talks}
    crossed = [share(said[c], own[1 - c]) for c in talks]
    if not any(mask.any() for mask in own):
        return "neither channel has speech of its own: both are silent, or hold the same sound"
    shift, gain, fit = best_shift(own, said)
    worst = min(shares, key=shares.get)
    if shares[worst] < VOICED and min(crossed) > VOICED:
        return "each speaker's words are in the other's channel; exchange channels or speakers"
    if gain > 0.1 and abs(shift) >= 0.2:
        return (f"they would fit the sound {abs(shift):.1f} s "
                f"{'later' if shift > 0 else 'earlier'}; correct the times")
    if fit < 0.3:
        return "they fit no better than chance; does the transcript belong to the recording?"
    if shares[worst] < VOICED:
        return (f"only {100 * shares[worst]:.0f} % of the time of {row['speakers'][worst]}'s words "
                f"is speech in channel {worst}; does the transcript belong to the recording?")
    return ""


def best_shift(own, said):
    """How many seconds later `said` would fit `own` best, at most five; how much better; how well
    it fits now (correlation of the frames, mean of both speakers; 1 for speakers who never or
    always speak)."""
    far, curves = 5 * FRAMES, []
    for a, b in zip(own, said):
        if min(a.std(), b.std()) > 0.2:
            scale = a.std() * b.std() * len(a)
            full = scipy.signal.correlate(a - a.mean(), b - b.mean(), method="fft") / scale
            middle = len(a) - 1
            curve = np.pad(full, far)[middle:middle + 2 * far + 1]
            curves.append(curve)
    if not curves:
        return 0.0, 0.0, 1.0
    curve = np.mean(curves, axis=0)
    best = int(curve.argmax())
    return (best - far) / FRAMES, curve[best] - curve[far], curve[far]


def wrong_order(row, by_order):
    """Of `misfit`: aligned turns that are not in the transcript's order, or backchannels far from
    the utterance that they belong to."""
    latest = 0.0
    for u in row["utterances"] if by_order else []:
        if u["start_time"] < latest - LATE:
            return (f"{u['tts_text'][:40]!r} is at {u['start_time']:.1f} s, before the utterance "
                    f"in front of it ({latest:.1f} s); is a turn missing in the transcript or the "
                    "recording, or does one speaker sound in the other's channel?")
        latest = max(latest, u["start_time"])
        for b in u["backchannels"]:
            if b["words"] and not u["start_time"] - LATE < b["start_time"] < u["end_time"] + LATE:
                return (f"the backchannel {b['tts_text']!r} is at {b['start_time']:.1f} s, outside "
                        f"its utterance ({u['start_time']:.1f}-{u['end_time']:.1f} s)")
    return ""


def wrong_segment(row, own, by_order):
    """Of `misfit`: a segment whose words are not voiced, or that is spoken too slowly or too
    fast."""
    for c in (0, 1):
        for part in segments(row, c):
            words = part["words"]
            spoken = [own[c][round(FRAMES * w["start"]):round(FRAMES * end_of(w)) + 1]
                      for w in words]
            if len(words) >= 3 and np.concatenate(spoken).mean() < SEGMENT_VOICED:
                return (f"no speech where {row['speakers'][c]}'s {part['tts_text'][:40]!r} should "
                        f"be ({words[0]['start']:.1f}-{end_of(words[-1]):.1f} s)")
            letters = sum(len(w["word"]) for w in words)
            if len(words) < 4 or c not in by_order:
                continue
            first, last = (round(FRAMES * t) for t in (words[0]["start"], end_of(words[-1])))
            pace = own[c][first:last].sum() / FRAMES / letters
            if not LETTER[0] < pace < LETTER[1]:
                much = "much" if pace > LETTER[0] else "little"
                return (f"{row['speakers'][c]}'s {part['tts_text'][:40]!r} would take "
                        f"{pace * letters:.1f} s of speech, too {much} for {len(words)} words; is "
                        "the transcript complete?")
    return ""


def unclaimed_speech(row, own, said, by_order):
    """Of `misfit`: (seconds of speech farther than 0.3 s from all words, what is wrong with it or
    '')."""
    total, lacking = 0.0, ""
    near = np.ones(2 * round(0.3 * FRAMES) + 1)
    for c in (0, 1):
        alone = own[c] & ~(np.convolve(said[c], near, "same") > 0.5)
        length, part = alone.sum() / FRAMES, alone.sum() / max(1, own[c].sum())
        total += float(length)
        most = 0.08 if c in by_order else 0.4
        if length > 0.6 and part > most:
            at = np.flatnonzero(alone)[0] / FRAMES
            lacking = (f"{length:.1f} s of {row['speakers'][c]}'s speech belong to no segment "
                       f"(first at {at:.1f} s); is the transcript complete?")
    return total, lacking
