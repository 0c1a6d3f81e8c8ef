"""Recordings to training data: a raw Behavior-SD folder -> the released columns, as parquet files `datasets` opens.

    python prepare.py raw=corpus out=data                                 # the synthetic corpus: word times are given
    python prepare.py raw=../shared/real out=real codec=nanocodec.nemo    # recordings and transcripts without any times

Raw: RAW/{train,validation,test}/NAME.wav|flac|mp3|ogg (stereo, channel 0 = speakers[0]) and NAME.json beside each; a
folder without these sub-folders is one split. The JSON holds the columns of spec 9 that aren't made here; `speakers`,
`narrative` and `utterances` (each with `speaker`, `tts_text`, `backchannels`) are enough. Per dialogue:

    words       kept where given, else by forced alignment (pocketsphinx): inside the segment's times if given, else
                from the order of the text alone
    codes       both channels through the codec: dsu_c1_path, dsu_c2_path, K lists of T ids
    embeddings  of each speaker's first five voiced seconds (paper 2; Silero VAD): spk_emb_c1, spk_emb_c2
    narratives  new_narrative_s1/s2 kept where given, else the plain rule of `from_the_side_of`

Out: OUT/SPLIT-00000-of-0000N.parquet, info.json (codec, encoder, counts, words not found), voices.json (voice ->
embedding), dropped.jsonl (dialogues that cannot be used, and why; one never stops the run). Shards that exist are
skipped: the same command resumes a run that was cut off.
"""
import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import re
import sys
import threading
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from codec import load_codec, read_audio
from config import InputError, load_settings
from listen import RATE, package, speaker_encoder, to_16k, voiced

SPLITS = ("train", "validation", "test")
VOICED_SECONDS = 5.0  # how much speech a speaker embedding is made of (paper 2)
TAIL = 0.25  # seconds of recording kept after the last word


@dataclasses.dataclass
class PrepareSettings:
    raw: str = "corpus"  # folder of recordings with a JSON beside each
    out: str = "data"  # folder of the data set
    codec: str = "default/codec.safetensors"  # anything that codec.load_codec opens
    split: str = "train"  # the split of a raw folder that has no train/, validation/, test/ inside
    speaker_encoder: str = "resemblyzer"  # see listen.speaker_encoder
    one_embedding_per_voice: bool = False  # every dialogue gets the embedding of the voice's first (training) dialogue
    shard_size: int = 100  # dialogues a parquet file; also what a cut-off run may lose
    workers: int = 0  # processes, one thread each; 0: as many as cores
    device: str = "cpu"  # where the codec and the speaker encoder run


# ---------------------------------------------------------------------------------------------------------------------
# Columns: names and types of the released data set (spec 9), fixed, so that shards concatenate whatever is missing

INT, FLOAT, TEXT = pa.int64(), pa.float64(), pa.string()
WORDS = pa.list_(pa.struct([("word", TEXT), ("start", FLOAT), ("dur", FLOAT)]))
SEGMENT = [("tts_text", TEXT), ("start_time", FLOAT), ("end_time", FLOAT), ("words", WORDS)]
BEHAVIOR = [(key, INT) for key in ("utterance_length", "filler_words", "backchannels", "interruptions")]
STATISTICS = [("durations", pa.list_(FLOAT))] + [(f"num_{key}", pa.list_(INT)) for key in (
    "backchannels", "filler_words", "interruptions", "turntaking", "utterances")]
UTTERANCE = [("uttr_idx", INT), ("uttr_type", TEXT), ("speaker_idx", INT), ("speaker", TEXT), *SEGMENT,
             ("backchannels", pa.list_(pa.struct(SEGMENT)))]
COLUMNS = pa.schema([
    ("soda_index", INT), ("file_name", TEXT), ("narrative", TEXT), ("new_narrative_s1", TEXT),
    ("new_narrative_s2", TEXT), ("speakers", pa.list_(TEXT)), ("behaviors", pa.list_(pa.struct(BEHAVIOR))),
    ("num_turns", INT), ("utterances", pa.list_(pa.struct(UTTERANCE))), ("tts_speaker_ids", pa.list_(TEXT)),
    ("tts_genders", pa.list_(TEXT)), ("statistics", pa.struct(STATISTICS)),
    ("dsu_c1_path", pa.list_(pa.list_(pa.int32()))), ("dsu_c2_path", pa.list_(pa.list_(pa.int32()))),
    ("spk_emb_c1", pa.list_(pa.float32())), ("spk_emb_c2", pa.list_(pa.float32()))])


def read_dialogue(path):
    """A raw JSON -> a dict of the released columns without codes and embeddings; what is missing is None.

    Raises InputError on a file that is no JSON, lacks a needed key, or names a speaker who is not among `speakers`.
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        row = {"num_turns": len(raw["utterances"]), "file_name": path.stem, "soda_index": raw.get("sample")} | raw
        row = {column: row.get(column) for column in COLUMNS.names} | {"utterances": [], "speakers": raw["speakers"]}
        for i, u in enumerate(raw["utterances"]):
            u = {"uttr_idx": i, "uttr_type": None, "backchannels": [], **u}
            if u["speaker"] not in row["speakers"]:
                raise InputError(f"{path}: utterance {i} is by {u['speaker']!r}, who is not one of the speakers "
                                 f"{row['speakers']}; correct the transcript")
            u["speaker_idx"] = row["speakers"].index(u["speaker"])
            for part in [u, *u["backchannels"]]:
                part["words"] = [{"word": str(w["word"]), "start": float(w["start"]), "dur": float(w["dur"])}
                                 for w in part.get("words") or []]
                if not to_words(part["tts_text"]) and not part["words"]:
                    raise InputError(f"{path}: utterance {i} has a segment without words: {part['tts_text']!r}")
            row["utterances"].append(u)
        for c in (0, 1):
            row[f"new_narrative_s{c + 1}"] = (row[f"new_narrative_s{c + 1}"]
                                              or from_the_side_of(row["speakers"][c], raw["narrative"]))
    except InputError:
        raise
    except KeyError as e:
        raise InputError(f"{path}: lacks the key {e}; a transcript needs speakers, narrative and utterances, an "
                         "utterance speaker and tts_text, a word word, start and dur") from e
    except (OSError, ValueError, TypeError, AttributeError, IndexError) as e:
        raise InputError(f"{path}: not the JSON of a dialogue ({type(e).__name__}: {' '.join(str(e).split())})") from e
    if len(set(row["speakers"])) != 2 or not row["utterances"]:
        raise InputError(f"{path}: has speakers {row['speakers']} and {len(row['utterances'])} utterances; needs two "
                         "speakers of different names and at least one utterance")
    # a recording that doesn't name its voices has two of its own
    row["tts_speaker_ids"] = [str(v) for v in row["tts_speaker_ids"] or [f"{path.stem}_c1", f"{path.stem}_c2"]]
    return row


def from_the_side_of(name, narrative):
    """Narrative with `name` replaced by you/your: a plain rule for raw sets without rewritten narratives (spec 3).

    It leaves pronouns as they are ("you ... his room"); the paper lets a chat model rewrite.
    """
    text = re.sub(rf"\b{re.escape(name)}['’]s\b", "your", narrative)
    text = re.sub(rf"\b{re.escape(name)}\b", "you", text)
    for he, you in (("was", "were"), ("wasn't", "weren't"), ("is", "are"), ("isn't", "aren't"), ("has", "have")):
        text = re.sub(rf"\byou {he}(?!['\w])", f"you {you}", text)
    return re.sub(r"(^|[.!?]\s+)you", r"\1You", text)


def segments(row, channel):
    """What speaker `channel` utters, in order: own utterances, and own backchannels inside the other's utterances."""
    return [part for u in row["utterances"] for part in ([u] if u["speaker_idx"] == channel else u["backchannels"])]


def end_of(word):
    return round(word["start"] + word["dur"], 4)


# ---------------------------------------------------------------------------------------------------------------------
# Word times

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


def check_times(row, seconds, where):
    """Raise InputError unless every segment has words, and these lie in it, and it in the recording's `seconds`.

    Segments that have words but no times get those of their words.
    """
    for i, u in enumerate(row["utterances"]):
        for part in [u, *u["backchannels"]]:
            what = f"{where}: utterance {i}, {part['tts_text']!r}"
            if not part["words"]:
                raise InputError(f"{what}: none of its words was found in the audio")
            first, last = part["words"][0]["start"], end_of(part["words"][-1])
            part["start_time"] = first if part.get("start_time") is None else float(part["start_time"])
            part["end_time"] = last if part.get("end_time") is None else float(part["end_time"])
            if first < part["start_time"] - 0.001 or last > part["end_time"] + 0.001:
                raise InputError(f"{what}: words at {first}-{last} s outside {part['start_time']}-{part['end_time']} s")
            if part["end_time"] > seconds + 0.1:
                raise InputError(f"{what}: ends at {part['end_time']} s, but the recording has {seconds:.2f} s")


# ---------------------------------------------------------------------------------------------------------------------
# A dialogue


@functools.cache
def codec_on(path, device):
    """The codec, once per process."""
    return load_codec(path).to(device)


def embed(audio, settings, where):
    """Speaker embedding of the first five voiced seconds of `audio` (samples at 16 kHz): list of numbers (paper 2)."""
    for seconds in (15, len(audio) / RATE):  # most speakers have said enough in 15 s
        head = audio[:round(seconds * RATE)]
        speech = np.concatenate([head[:0]] + [head[round(a * RATE):round(b * RATE)] for a, b in voiced(head)])
        if len(speech) >= VOICED_SECONDS * RATE:
            break
    if len(speech) < RATE / 2:
        raise InputError(f"{where}: {len(speech) / RATE:.1f} s of speech is too little for a speaker embedding")
    encode = speaker_encoder(settings.speaker_encoder, settings.device)[0]
    return [float(v) for v in encode(speech[:round(VOICED_SECONDS * RATE)])]


@torch.inference_mode()
def prepare_dialogue(item, settings):
    """item (JSON path, audio path) -> (row of COLUMNS, report), or (None, report with the `reason`) if not usable."""
    transcript, recording = item
    report = {"name": (transcript or recording).stem}
    try:
        if not transcript or not recording:
            raise InputError(f"{transcript or recording}: has no {'recording' if transcript else 'JSON'} of its name")
        row, codec = read_dialogue(transcript), codec_on(settings.codec, settings.device)
        audio = read_audio(recording, channels=2, sample_rate=codec.sample_rate)  # (2, samples)
        low = to_16k(audio, codec.sample_rate)
        report |= align(row, low)
        check_times(row, audio.shape[1] / codec.sample_rate, transcript)
        # The text stream's clock is frames / end of the last utterance (spec 2). So the recording is cut soon after the
        # last word, and the last utterance's end_time is where it was cut, which makes that clock 12.5 Hz exactly.
        end = max(part["end_time"] for c in (0, 1) for part in segments(row, c))
        audio = audio[:, :round((end + TAIL) * codec.sample_rate)]
        codes = codec.encode(audio.to(settings.device))[0].cpu()  # (2, K, T)
        row["utterances"][-1]["end_time"] = seconds = codes.shape[2] * codec.samples_per_frame / codec.sample_rate
        row["dsu_c1_path"], row["dsu_c2_path"] = codes.tolist()
        for c, voice in enumerate(row["tts_speaker_ids"]):
            if settings.one_embedding_per_voice and voice not in voices(settings.out):
                raise InputError(f"{recording}: no recording of the voice {voice} has enough speech for an embedding")
            row[f"spk_emb_c{c + 1}"] = (voices(settings.out)[voice] if settings.one_embedding_per_voice else
                                        embed(low[c], settings, f"{recording}, {row['speakers'][c]}"))
        pa.Table.from_pylist([row], schema=COLUMNS)  # a value of an odd type shows here, not in the finished shard
        return row, report | {"seconds": seconds}
    except (InputError, pa.ArrowException) as e:
        return None, report | {"reason": str(e) if isinstance(e, InputError) else f"{transcript}: {str(e)[:150]!r}"}


# ---------------------------------------------------------------------------------------------------------------------
# The data set


def find_dialogues(settings):
    """The raw folder -> {split: [(JSON path, audio path)]} by name; None for the path of one that is missing."""
    raw = Path(settings.raw)
    if not raw.is_dir():
        raise InputError(f"{raw}: no such folder; give raw=FOLDER with recordings and a JSON beside each")
    if settings.split not in SPLITS:
        raise InputError(f"split={settings.split}: must be one of {', '.join(SPLITS)}")
    folders = {split: raw / split for split in SPLITS if (raw / split).is_dir()} or {settings.split: raw}
    found = {}
    for split, folder in folders.items():
        pairs = collections.defaultdict(lambda: [None, None])
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in (".json", ".wav", ".flac", ".mp3", ".ogg"):
                pairs[path.stem][path.suffix.lower() != ".json"] = path
        found[split] = [tuple(pairs[name]) for name in sorted(pairs)]
    if not any(found.values()):
        raise InputError(f"{raw}: no recordings in it (NAME.wav, .flac, .mp3 or .ogg with NAME.json beside it)")
    return found


def identity(settings, dialogues):
    """What the data set is made of: a folder holds one, and its readers can refuse what does not fit."""
    codec, path = codec_on(settings.codec, settings.device), Path(settings.codec)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))  # a hub name has none
    content = b"".join(file.read_bytes() for file in files) or settings.codec.encode()
    names = " ".join(f"{split}/{a or b}" for split, items in dialogues.items() for a, b in items)
    return {
        "codec": path.name, "codec_fingerprint": hashlib.sha256(content).hexdigest()[:16],
        "num_codebooks": codec.num_codebooks, "codebook_size": codec.codebook_size, "sample_rate": codec.sample_rate,
        "frame_rate": codec.sample_rate / codec.samples_per_frame,
        "speaker_encoder": Path(settings.speaker_encoder).stem,  # x/ecapa_tdnn.nemo is ecapa_tdnn
        "speaker_size": speaker_encoder(settings.speaker_encoder, settings.device)[1],
        "one_embedding_per_voice": settings.one_embedding_per_voice, "shard_size": settings.shard_size,
        "dialogues": {split: len(items) for split, items in dialogues.items()},
        "raw_fingerprint": hashlib.sha256(names.encode()).hexdigest()[:16]}


def first_samples(dialogues, settings):
    """{voice: embedding from the first usable dialogue, training ones first, in which it is heard}."""
    found = {}
    for transcript, recording in tqdm([item for items in dialogues.values() for item in items], desc="voices"):
        try:
            for channel, voice in enumerate(read_dialogue(transcript)["tts_speaker_ids"] if transcript else []):
                if recording and voice not in found:
                    audio = read_audio(recording, channels=2, sample_rate=RATE)[channel].numpy()
                    found[voice] = embed(audio, settings, f"{recording}, {voice}")
        except InputError:
            pass  # the dialogue is dropped, with this reason, in its turn
    return found


@functools.cache
def voices(out):
    """OUT/voices.json, once per process."""
    return json.loads(Path(out, "voices.json").read_text())


def write_text(path, text):
    """Writes a file atomically."""
    Path(f"{path}.tmp").write_text(text)
    os.replace(f"{path}.tmp", path)


def write_shard(path, rows, reports):
    """Writes rows of COLUMNS as parquet, atomically; the reports go in its metadata, so that resuming has them."""
    table = pa.Table.from_pylist(rows, schema=COLUMNS.with_metadata({"reports": json.dumps(reports)}))
    pq.write_table(table, f"{path}.tmp", compression="zstd")
    os.replace(f"{path}.tmp", path)


def list_some(lines, most=20):
    for i, line in enumerate(lines):
        if i <= most:
            print("  " + (line if i < most else "... and more"))


def summarise(out, shards, info):
    """Collects what the shards hold into voices.json, dropped.jsonl and info.json, and prints it."""
    reports, heard = [], {}
    for path in shards:
        split = path.name.split("-")[0]
        reports += [{"split": split} | r for r in json.loads(pq.read_schema(path).metadata[b"reports"])]
        table = pq.read_table(path, columns=["tts_speaker_ids", "spk_emb_c1", "spk_emb_c2"]).to_pydict()
        for names, *embeddings in zip(*table.values()):
            heard = dict(zip(names, embeddings)) | heard  # the first one stays
    if not info["one_embedding_per_voice"]:
        write_text(out / "voices.json", json.dumps(heard))
    dropped = [{key: r[key] for key in ("split", "name", "reason")} for r in reports if "reason" in r]
    write_text(out / "dropped.jsonl", "".join(json.dumps(d) + "\n" for d in dropped))
    kept = [r for r in reports if "reason" not in r]
    hours = sum(r["seconds"] for r in kept) / 3600
    print(f"{out}: {len(kept)} of {len(reports)} dialogues, {hours:.2f} h, {len(heard)} voices; {len(dropped)} dropped")
    list_some(f"dropped {d['split']}: {d['reason']}" for d in dropped)
    result = {"kept": collections.Counter(r["split"] for r in kept), "dropped": len(dropped), "hours": round(hours, 3)}
    words, found = (sum(r.get(key, 0) for r in reports) for key in ("words", "found"))
    if words:
        unfound = [u for r in reports for u in r.get("unfound", [])]
        print(f"aligned: {found} of {words} words found ({100 * found / words:.1f} %)")
        list_some(unfound)
        result |= {"words_aligned": words, "words_found": found, "unfound": unfound}
        for border in ("starts", "ends"):
            off = 1000 * np.array([t for r in reports for t in r.get(border, [])] or [0])
            result[f"{border}_off_ms"] = [round(float(x)) for x in (np.median(off), off.mean(), np.quantile(off, 0.9))]
            print("segment {}: off from voice activity by {} ms (median), {} (mean), {} (90 %)".format(
                border, *result[f"{border}_off_ms"]))
    write_text(out / "info.json", json.dumps(info | result, indent=1))
    if not kept:
        raise InputError(f"none of the {len(dropped)} dialogues could be used; the first: {dropped[0]['reason']}")


def start_worker():
    """One thread per process, which ends with the process that started it, even if that one was killed."""
    torch.set_num_threads(1)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def main(argv):
    settings = load_settings(PrepareSettings, argv)
    if settings.shard_size < 1 or settings.workers < 0:
        raise InputError("shard_size must be at least 1 and workers at least 0")
    out, dialogues = Path(settings.out), find_dialogues(settings)
    info = identity(settings, dialogues)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "info.json").exists():
        old = json.loads((out / "info.json").read_text())
        if differs := [f"{key} was {old.get(key)} and is {info[key]}" for key in info if old.get(key) != info[key]]:
            raise InputError(f"{out}: holds a data set whose {', '.join(differs)}; give another out= or remove it")
    else:
        write_text(out / "info.json", json.dumps(info, indent=1))
    if settings.one_embedding_per_voice and not (out / "voices.json").exists():
        write_text(out / "voices.json", json.dumps(first_samples(dialogues, settings)))

    shards = {}  # path -> its items
    for split, items in dialogues.items():
        starts = range(0, len(items), settings.shard_size)
        for i, start in enumerate(starts):
            path = out / f"{split}-{i:05d}-of-{len(starts):05d}.parquet"
            shards[path] = items[start:start + settings.shard_size]
    todo = {path: items for path, items in shards.items() if not path.exists()}
    items = [item for shard in todo.values() for item in shard]
    print(f"{len(items)} dialogues to do; {len(shards) - len(todo)} of {len(shards)} shards are there already")
    work, workers = functools.partial(prepare_dialogue, settings=settings), settings.workers or os.cpu_count()
    # spawn, since a process forked after torch has run threads may hang
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker) as pool:
        try:
            done = map(work, items) if min(workers, len(items)) < 2 else pool.map(work, items, chunksize=2)
            with tqdm(total=len(items), unit="dialogue", smoothing=0.05) as bar:
                for path, shard in todo.items():
                    results = []
                    for _ in shard:
                        results.append(next(done))
                        bar.update()
                    write_shard(path, [row for row, _ in results if row], [report for _, report in results])
        except concurrent.futures.BrokenExecutor as e:
            raise InputError("a worker process was ended from outside (out of memory?); give the same command again, "
                             "perhaps with fewer workers=, to go on from the last whole shard") from e
        finally:
            pool.shutdown(cancel_futures=True)
    summarise(out, shards, info)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as e:
        sys.exit(f"prepare.py: {e}")
