"""Recordings to training data: a raw Behavior-SD folder -> the released columns, as parquet files `datasets` opens.

    python prepare.py raw=corpus out=data                                 # the synthetic corpus: word times are given
    python prepare.py raw=../shared/real out=real codec=nanocodec.nemo    # recordings and transcripts without any times
    torchrun --standalone --nproc_per_node=N prepare.py raw=behavior-sd out=data device=cuda    # a rank a GPU
    python prepare.py rewrite data=data out=rewritten model=CHAT_MODEL    # narratives by a chat model: see rewrite.py

Raw: RAW/{train,validation,test}/NAME.wav|flac|mp3|ogg (stereo, channel 0 = speakers[0]) and NAME.json beside each, there
or deeper (as in the unpacked tars of Behavior-SD); a folder without these sub-folders is one split. The JSON holds the
columns of spec 9 that aren't made here; `speakers`, `narrative` and `utterances` (each with `speaker`, `tts_text`,
`backchannels`) are enough. Per dialogue:

    words       kept where given, else by forced alignment (align.py): inside the segment's times if given, else
                from the order of the text alone
    codes       both channels through the codec: dsu_c1_path, dsu_c2_path, K lists of T ids
    embeddings  of each speaker's first five voiced seconds (paper 2; Silero VAD): spk_emb_c1, spk_emb_c2
    narratives  new_narrative_s1/s2 kept where given, else the plain rule of `from_the_side_of`
    situation, starter, biased_narrative    corpus.py's, kept behind the released columns; null in other data

Out: OUT/SPLIT-00000-of-0000N.parquet, info.json (codec, encoder, counts, words not found), voices.json (voice ->
embedding), dropped.jsonl (dialogues that cannot be used, and why; one never stops the run). Shards that exist are
skipped: the same command resumes a run that was cut off. With N ranks (RANK and WORLD_SIZE in the environment) each makes
every N-th shard, and rank 0 the rest of the files when all shards are there.
"""
import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from align import align, end_of, segments, to_words
from codec import AUDIO_SUFFIXES, fingerprint, load_codec, read_audio
from config import InputError, load_settings, over_cores, write_atomically
from listen import RATE, speaker_encoder, to_16k, voiced

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
    workers: int = 0  # processes, one thread each; 0: as many as cores, shared by this machine's ranks
    device: str = "cpu"  # where the codec and the speaker encoder run; cuda: the GPU of this rank


# ---------------------------------------------------------------------------------------------------------------------
# Columns: names and types of the released data set (spec 9) and corpus.py's, fixed, so that shards always concatenate

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
    ("spk_emb_c1", pa.list_(pa.float32())), ("spk_emb_c2", pa.list_(pa.float32())),
    ("situation", TEXT), ("starter", INT), ("biased_narrative", pa.bool_())])


def read_dialogue(path):
    """A raw JSON -> a dict of COLUMNS without codes and embeddings; what is missing is None.

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
    folders = {split: raw / split for split in SPLITS if (raw / split).is_dir()}
    for other in sorted(p for p in raw.iterdir() if folders and p.is_dir() and p.name not in folders and p.name[0] != "."):
        print(f"note: {other} is left out; a split is called {', '.join(SPLITS)}")
    folders = folders or {settings.split: raw}
    found = {}
    for split, folder in folders.items():
        pairs = collections.defaultdict(lambda: [None, None])
        for path in folder.rglob("*"):
            if path.suffix.lower() in (".json", *AUDIO_SUFFIXES):
                pairs[path.with_suffix("")][path.suffix.lower() != ".json"] = path
        found[split] = [tuple(pairs[name]) for name in sorted(pairs)]
    if not any(found.values()):
        raise InputError(f"{raw}: no recordings in it (NAME with {', '.join(AUDIO_SUFFIXES)} and NAME.json beside it)")
    return found


def identity(settings, dialogues):
    """What the data set is made of: a folder holds one, and its readers can refuse what does not fit."""
    codec = codec_on(settings.codec, settings.device)
    names = " ".join(f"{split}/{a or b}" for split, items in dialogues.items() for a, b in items)
    return {
        "codec": Path(settings.codec).name, "codec_fingerprint": fingerprint(settings.codec),
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


def write_json(path, content, indent=None):
    write_atomically(path, lambda new: new.write_text(json.dumps(content, indent=indent)))


def write_shard(path, rows, reports):
    """Writes rows of COLUMNS as parquet, atomically; the reports go in its metadata, so that resuming has them."""
    table = pa.Table.from_pylist(rows, schema=COLUMNS.with_metadata({"reports": json.dumps(reports)}))
    write_atomically(path, lambda new: pq.write_table(table, new, compression="zstd"))


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
        write_json(out / "voices.json", heard)
    dropped = [{key: r[key] for key in ("split", "name", "reason")} for r in reports if "reason" in r]
    write_atomically(out / "dropped.jsonl", lambda new: new.write_text("".join(json.dumps(d) + "\n" for d in dropped)))
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
    write_json(out / "info.json", info | result, indent=1)
    if not kept:
        raise InputError(f"none of the {len(dropped)} dialogues could be used; the first: {dropped[0]['reason']}")


def wait_for(paths, what):
    """Returns when all paths are there: what other ranks make."""
    if not all(path.exists() for path in paths):
        print(f"waiting for {what} of other ranks; if one has ended, end this too and give the same command again")
        while not all(path.exists() for path in paths):
            time.sleep(2)


def main(argv):
    if argv[:1] == ["rewrite"]:
        import rewrite
        return rewrite.main(argv[1:])
    settings = load_settings(PrepareSettings, argv)
    if settings.shard_size < 1 or settings.workers < 0:
        raise InputError("shard_size must be at least 1 and workers at least 0")
    rank, world, local_rank, local_world = (int(os.environ.get(name, default)) for name, default in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    if settings.device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise InputError(f"device=cuda: this machine shows {torch.cuda.device_count()} GPUs, too few for local rank "
                             f"{local_rank}; start as many processes as GPUs, or leave device=cpu")
        settings.device = f"cuda:{local_rank}"
    out, dialogues = Path(settings.out), find_dialogues(settings)
    info = identity(settings, dialogues)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "info.json").exists():
        old = json.loads((out / "info.json").read_text())
        if differs := [f"{key} was {old.get(key)} and is {info[key]}" for key in info if old.get(key) != info[key]]:
            raise InputError(f"{out}: holds a data set whose {', '.join(differs)}; give another out= or remove it")
    elif rank == 0:
        write_json(out / "info.json", info, indent=1)
    if settings.one_embedding_per_voice:
        if rank == 0 and not (out / "voices.json").exists():
            write_json(out / "voices.json", first_samples(dialogues, settings))
        wait_for([out / "voices.json"], "the voices")

    shards = {}  # path -> its items
    for split, items in dialogues.items():
        starts = range(0, len(items), settings.shard_size)
        for i, start in enumerate(starts):
            path = out / f"{split}-{i:05d}-of-{len(starts):05d}.parquet"
            shards[path] = items[start:start + settings.shard_size]
    todo = {path: shards[path] for path in list(shards)[rank::world] if not path.exists()}
    items = [item for shard in todo.values() for item in shard]
    print(f"rank {rank} of {world}: {len(items)} dialogues to do, {len(todo)} of {len(shards)} shards")
    workers = settings.workers or max(1, os.cpu_count() // local_world)
    done = over_cores(functools.partial(prepare_dialogue, settings=settings), items, workers)
    with contextlib.closing(done), tqdm(total=len(items), unit="dialogue", smoothing=0.05, disable=rank > 0) as bar:
        for path, shard in todo.items():
            results = []
            for _ in shard:
                results.append(next(done))
                bar.update()
            write_shard(path, [row for row, _ in results if row], [report for _, report in results])
    if rank == 0:
        wait_for(shards, "shards")
        summarise(out, shards, info)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as e:
        sys.exit(f"prepare.py: {e}")
