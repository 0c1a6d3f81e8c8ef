"""Full-Duplex-Bench's numbers (Lin et al. 2025: v1.0 arXiv 2503.04721, v1.5 arXiv 2507.23159).

    python -m world.fdb out=runs/fdb            a small set in the benchmark's layout, of our corpus
    python generate.py --user runs/fdb          the model answers each input.wav in an output.wav
    python evaluate.py fdb runs/fdb [DIR ...]   the table; a column a folder

A folder of the benchmark, or one of its tasks, or one of world/fdb.py: samples are what lies beside
an `input.wav`, and which axis one is of, its JSON says:

    pause.json          pause handling: takeover rate
    turn_taking.json    smooth turn-taking: takeover rate, latency
    interrupt.json      user interruption: takeover rate, latency
    metadata.json       v1.5: how soon the model stops, and how soon it speaks
    transcription.json  alone: backchannels: takeover rate, frequency, distance of their times from
                        the listeners' (icc_gt_distribution.json beside the samples' folders)

The definitions are those of the benchmark's programs, with audio brought to 16 kHz before it is
heard (which theirs forgot at first). Not theirs: the recogniser (Whisper's tiny.en for Parakeet,
asr=parakeet is theirs), no rating of what is said by GPT-4, and what v1.5 only lists is averaged
over all intervals. What was heard is written beside output.wav as their programs do: output.json,
latency_intervals.json.
"""
import functools
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.distance import jensenshannon

from codec import fingerprint, read_audio
from config import InputError, load_settings, make_folder, read_json, write_json
from evaluate import draw_table, interval, markdown, table, with_bar
from listen import RATE, recognise, voiced

BIN = 0.2  # seconds, of the histogram of backchannels
LONG, SHORT = 3.0, 1.0  # seconds: a turn's, a backchannel's
WORDS, BACKCHANNEL_WORDS = 3, 2  # most that are no turn yet; most of a backchannel
USER_GAP, MODEL_GAP = 0.6, 0.5  # seconds: speech of v1.5 less apart is one segment
VAD_SHORTEST = 0.25  # seconds: the default of Silero VAD, which the benchmark leaves as it is
FILES = {"pause.json": "pause", "turn_taking.json": "turn", "interrupt.json": "interruption",
         "metadata.json": "timing", "transcription.json": "backchannel"}
FIGURES = {
    "takeover": "takeover rate", "latency": "latency, s ↓", "frequency": "backchannels a second ↑",
    "jsd": "JSD ↓", "stop": "stops after, s ↓", "response": "answers after, s ↓"}
BETTER = {"pause": "↓", "backchannel": "↓", "turn": "↑", "interruption": "↑"}  # of a takeover rate


@dataclass
class Settings:
    out: str = "evaluation"  # where fdb.json and fdb.png go
    asr: str = "whisper"  # or a folder of faster-whisper's, parakeet (NeMo), its .nemo file
    output: str = "output.wav"  # the model's answer, beside each input.wav
    jobs: int = 0  # processes, 0 = one per core


# ---- v1.0 ----------------------------------------------------------------------------------------


def takeover(words):
    """Whether [{word, start, end}] is a turn of the model's, 0 or 1: more than WORDS words, or
    SHORT seconds from the first to the last."""
    if not words:
        return 0
    return int(words[-1]["end"] - words[0]["start"] >= SHORT or len(words) > WORDS)


def score_pause(words, sample):
    """The whole output counts, wherever the words are: the file is a telling from begin to end."""
    return {"takeover": takeover(words)}


def score_turn(words, sample):
    """Latency from the user's last word; 0 for who has begun before. So a model that always talks
    is perfect here, and the worst in a pause."""
    figures = {"takeover": takeover(words)}
    if figures["takeover"]:
        figures["latency"] = max(0.0, words[0]["start"] - sample["times"][0])
    return figures


def score_interruption(words, sample):
    """The same behind the interruption's end (`hear` recognises only what comes then)."""
    return score_turn(words, sample | {"times": sample["times"][1:]})


def score_backchannel(words, segments, seconds, truth):
    """words and voiced segments [(start, end)] of an output of so many seconds; truth: the share of
    the listeners' backchannels in equal parts of the file, any number of them.

    The last segment looked at decides about the takeover, and the ones before a turn of more than
    LONG seconds are all counted as backchannels: so the benchmark's program does it.
    """
    takes, backchannels = 0, []
    for start, end in segments:
        if end - start > LONG:
            takes = 1
            break
        heard = sum(word["start"] <= end and word["end"] > start for word in words)
        takes = int(heard > BACKCHANNEL_WORDS or end - start >= SHORT)
        backchannels.append((start, end))
    return {"takeover": takes, "frequency": len(backchannels) / seconds,
            "jsd": divergence(backchannels, seconds, truth)}


def histogram(spans, seconds):
    """How many of the spans [(start, end)] lie in each bin of BIN seconds, of a file that long."""
    bins = np.zeros(int(seconds / BIN) + 1)
    for start, end in spans:
        bins[int(start / BIN):int(end / BIN) + 1] += 1
    return bins


def divergence(backchannels, seconds, truth):
    """Jensen-Shannon distance (the root of the divergence, natural logarithm) between the times of
    backchannels and the listeners', in bins of BIN seconds; 1 where there are none."""
    if not backchannels:
        return 1.0
    bins = histogram(backchannels, seconds)
    places = np.linspace(0, 1, len(bins)), np.linspace(0, 1, len(truth))
    return float(jensenshannon(bins + 1e-10, np.interp(*places, truth)))  # which normalises both


# ---- v1.5 ----------------------------------------------------------------------------------------


def join(segments, gap):
    """Segments [(start, end)], in order, with those at most `gap` seconds apart as one."""
    joined = []
    for start, end in segments:
        if joined and start - joined[-1][1] <= gap:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def find_intervals(user, model):
    """Voiced segments of both -> (stop, response), two lists of [start, end].

    stop: while both speak; of those with the same end, to a millisecond, the shortest. response:
    from a user's end to the model's next start; of those with the same start of the model the one
    with the latest end of the user.
    """
    user, model = join(user, USER_GAP), join(model, MODEL_GAP)
    stop, response = {}, {}
    for (a, b), (c, d) in itertools.product(user, model):
        start, end = max(a, c), min(b, d)
        if start < end and start > stop.get(round(end, 3), (-1, 0))[0]:
            stop[round(end, 3)] = start, end
    for _, end in user:
        if following := [start for start, _ in model if start > end]:
            response[round(following[0], 3)] = end, following[0]
    return [[[round(t, 3) for t in span] for _, span in sorted(found.items())]
            for found in (stop, response)]


# ---- samples -------------------------------------------------------------------------------------


def find_samples(folder):
    """The samples below a folder: [{name, folder, task, axis, times, truth}], in order. times:
    [start, end] in seconds of what the JSON marks. Raises InputError where something is missing."""
    samples = []
    for path in sorted(Path(folder).rglob("input.wav"), key=lambda path: path.parts):
        axis = next((axis for name, axis in FILES.items() if (path.parent / name).exists()), None)
        if axis is None:
            raise InputError(f"{path.parent}: none of {', '.join(FILES)} lies beside input.wav; "
                             "which axis is it of?")
        task = path.parent.parent
        samples.append({"name": str(path.parent.relative_to(folder)), "folder": str(path.parent),
                        "axis": axis, "task": task.name, "times": marked_times(path.parent, axis),
                        "truth": listeners(path.parent) if axis == "backchannel" else None})
    if not samples:
        raise InputError(f"{folder}: no input.wav below it; python -m world.fdb out={folder} makes "
                         "such a set")
    return samples


def marked_times(folder, axis):
    """[start, end], of the pause, the gap between the turns, or the interruption."""
    name = next(name for name, kind in FILES.items() if kind == axis)
    if axis == "backchannel":
        return []
    found = read_json(folder / name, "it is of Full-Duplex-Bench's layout")
    try:
        times = found["timestamps"] if axis == "timing" else found[0]["timestamp"]
        start, end = map(float, times)
    except (KeyError, IndexError, TypeError, ValueError) as e:
        raise InputError(f"{folder / name}: holds no [start, end] as Full-Duplex-Bench's does "
                         f"({type(e).__name__}: {e})") from e
    return [start, end]


def listeners(folder):
    """The histogram of the listeners' backchannels in this sample."""
    path = folder.parent / "icc_gt_distribution.json"
    truth = read_json(path, "copy the benchmark's own to here, or make the set with world.fdb")
    if not isinstance(truth, dict) or not truth.get(folder.name):
        raise InputError(f"{path}: has no sample '{folder.name}'; is it of this set?")
    return truth[folder.name]


def hear(sample, settings):
    """The words of a sample's output, [{word, start, end}]; they are kept in output.json beside it,
    in the benchmark's form, and heard again only if the output or the recogniser is another.
    """
    output, begin = Path(sample["folder"], settings.output), 0.0
    kept, sound = output.with_suffix(".json"), fingerprint(output)
    if kept.exists():
        known = read_json(kept, "remove it, it is made again")
        if not isinstance(known, dict) or not {"asr", "chunks"} <= set(known):
            raise InputError(f"{kept}: is of another program, and would be lost; move it away")
        if known["asr"] == settings.asr and known.get("fingerprint") == sound:
            return [{"word": chunk["text"], "start": chunk["timestamp"][0],
                     "end": chunk["timestamp"][1]} for chunk in known["chunks"]]
    audio = read_audio(output, 1, RATE)[0].numpy()
    if sample["axis"] == "interruption":  # as the benchmark: what was said before is cut off
        begin = sample["times"][1]
        audio = audio[round(begin * RATE):]
    words = [word | {"start": word["start"] + begin, "end": word["end"] + begin}
             for word in (recognise(audio, voiced(audio), settings.asr) if len(audio) else [])]
    chunks = [{"text": word["word"], "timestamp": [word["start"], word["end"]]} for word in words]
    text = " ".join(word["word"] for word in words)
    write_json(kept, {"text": text, "chunks": chunks, "asr": settings.asr, "fingerprint": sound})
    return words


def speech(path):
    """(voiced segments, seconds) of a file, by the benchmark's VAD."""
    audio = read_audio(path, 1, RATE)[0].numpy()
    return voiced(audio, VAD_SHORTEST, warm=False), len(audio) / RATE


def score_sample(sample, settings):
    """A sample -> its figures. Raises InputError if its output cannot be read."""
    folder = Path(sample["folder"])
    if sample["axis"] == "timing":
        clean = "clean_" * settings.output.startswith("clean_")  # without the interruption
        user, model = (speech(folder / name)[0] for name in (f"{clean}input.wav", settings.output))
        stop, response = find_intervals(user, model)
        write_json(folder / f"{clean}latency_intervals.json",
                   {"latency_stop_list": stop, "latency_resp_list": response})
        return {"stop": stop, "response": response}
    words = hear(sample, settings)
    if sample["axis"] == "backchannel":
        segments, seconds = speech(folder / settings.output)
        # Silero VAD gives seconds to a tenth, and so the benchmark takes them
        segments = [(round(start, 1), round(end, 1)) for start, end in segments]
        figures = score_backchannel(words, segments, seconds, sample["truth"])
    else:
        score = {"pause": score_pause, "turn": score_turn, "interruption": score_interruption}
        figures = score[sample["axis"]](words, sample)
    return figures | {"text": " ".join(word["word"] for word in words)}


# ---- the table -----------------------------------------------------------------------------------


def summarise(samples, scores):
    """Figures of a folder's samples -> {(task, axis, figure): {value, low, high, n}}: means. A
    latency is the mean over those that took over; of v1.5 the mean length of all intervals."""
    values = {}
    for sample, figures in zip(samples, scores):
        for name in FIGURES:
            if name in figures:
                spans = figures[name] if sample["axis"] == "timing" else [[0.0, figures[name]]]
                row = values.setdefault((sample["task"], sample["axis"], name), [])
                row += [end - start for start, end in spans]
    return {key: interval(np.mean, np.array(row)) | {"n": len(row)}
            for key, row in values.items() if row}


def rows_of(results):
    """{folder: {(task, axis, figure): entry}} -> {row's name: {folder: entry}}, in the order of
    the tasks."""
    def place(key):
        task, axis, figure = key
        return axis == "timing", task, list(FIGURES).index(figure)
    rows = {}
    for key in sorted(set().union(*results.values()), key=place):
        task, axis, figure = key
        for folder, entries in results.items():
            if entry := entries.get(key):
                sign = f" {BETTER[axis]} (n={entry['n']})" if figure == "takeover" else ""
                name = f"{task.replace('_', ' ')}: {FIGURES[figure]}{sign}"
                rows.setdefault(name, {})[folder] = entry
    return rows


def main(argv):
    """`python evaluate.py fdb DIR ...`."""
    folders = []
    settings = load_settings(Settings, argv, folders)
    if not folders:
        raise InputError("no folder given; write python evaluate.py fdb DIR [DIR ...]; python -m "
                         "world.fdb makes a set")
    sets = {folder: find_samples(folder) for folder in folders}
    for folder, samples in sets.items():
        for path in [Path(sample["folder"], settings.output) for sample in samples]:
            if not path.exists():
                raise InputError(f"{path}: is missing; python generate.py --user {folder} makes a "
                                 "model's answers")
    make_folder(settings.out)
    results, named = {}, {}
    for folder, samples in sets.items():
        scores = with_bar(functools.partial(score_sample, settings=settings), samples,
                          settings.jobs, folder)
        results[folder] = summarise(samples, scores)
        named[folder] = {sample["name"]: figures for sample, figures in zip(samples, scores)}
    rows, out = rows_of(results), Path(settings.out)
    lines = table(rows, {folder: (folder, 3) for folder in folders})
    print(f"\nFull-Duplex-Bench's axes\n{markdown(lines)}\n\nrecogniser: {settings.asr}, the "
          "benchmark's is parakeet; [95 % intervals]")
    draw_table(lines, "Full-Duplex-Bench's axes", out / "fdb.png")
    write_json(out / "fdb.json", {"rows": rows, "samples": named}, indent=1)
