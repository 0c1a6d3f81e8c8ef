"""A small set in the layout of Full-Duplex-Bench, out of the test split: fdb.py scores it, and so
do the benchmark's own programs.

    python -m world.fdb out=runs/fdb                      the inputs; python generate.py --user
                                                          runs/fdb answers them
    python -m world.fdb out=runs/silent output=silent     the same with answers: of one who is
    python -m world.fdb out=runs/talking output=talking   silent, one who never stops, and what
    python -m world.fdb out=runs/recorded output=recorded the other one really said

Each sample is the beginning of a dialogue (world/segments.py finds those that fit), of the user's
channel only the utterances that the sample is about. v1.0's four axes, and of v1.5 the user's
interruptions, which are those of v1.0 and the same without the interruption. Beside what the
benchmark has, each sample holds a prompt.json for generate.py: our models want to be told who they
are.
"""
import collections
import math
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from codec import fingerprint, load_codec, resample, write_audio
from config import InputError, load_settings, make_folder, write_json
from data import FRAME_RATE, StreamFormat, check_codec, event_counts, load_dialogues
from fdb import histogram
from prepare import claim
from world import bank, segments

RATE = 16000  # Hz, of the benchmark's examples
TASKS = {"pause": "v1_0/synthetic_pause_handling", "turn": "v1_0/synthetic_turn_taking",
         "backchannel": "v1_0/synthetic_backchannel",
         "interruption": "v1_0/synthetic_user_interruption"}
OVERLAP = "v1_5/user_interruption"


@dataclass
class Settings:
    out: str = "runs/fdb"  # folder to write
    output: str = ""  # also an answer to each: silent, talking or recorded
    data: str = "default/data"
    split: str = "test"
    codec: str = "default/codec.safetensors"
    bank: str = "default/bank.safetensors"  # whose sentences `talking` says
    n: int = 20  # samples of an axis
    wait: float = 4.0  # seconds of silence behind what is to be answered
    backchannels: int = 2  # asked for in the prompts
    interruptions: int = 0
    own_counts: bool = False  # they ask for what the whole dialogue's speaker did instead
    seed: int = 0


def choose(dialogues, settings):
    """{axis: `n` segments} with which a dialogue begins, drawn at random; of tellings that ask for
    backchannels the longest."""
    found, reasons = segments.cut_all(dialogues, segments.Settings(data=settings.data))
    if not any(found.values()):
        why = next((reason for kind, reason in reasons if kind == "all"), "none is long enough")
        raise InputError(f"{settings.data} ({settings.split}): nothing to make a sample of; {why}")
    rng, chosen = random.Random(settings.seed), {}
    for axis, own in found.items():
        openings = [segment for segment in own
                    if opens(dialogues[segment["dialogue"]], segment)]
        rng.shuffle(openings)
        if axis == "backchannel":
            openings.sort(key=lambda segment: segment["begin"] - segment["end"])
        chosen[axis] = openings[:settings.n]
        if len(chosen[axis]) < settings.n:
            print(f"{axis}: only {len(chosen[axis])} dialogues of {settings.split} begin so")
    return chosen


def opens(dialogue, segment):
    """Whether the dialogue begins with this segment's user and telling."""
    words = segments.words_of(dialogue)
    first = min((word["start"], speaker) for speaker in (0, 1) for word in words[speaker])
    return segment["user"] == first[1] and segment["begin"] == int(first[0] * FRAME_RATE)


# ---- a sample: what the user says, and the JSON beside it ----


def describe(segment, dialogue):
    """(the user's utterances that are heard, {name: JSON}, seconds up to which the sample goes by
    what is said), times in seconds."""
    words = segments.words_of(dialogue)[segment["user"]]
    both = segments.utterances_of(dialogue, segments.Settings())
    own, other = both[segment["user"]], both[1 - segment["user"]]
    said = [next(u for u in own if u["start"] * FRAME_RATE >= segment["begin"])]
    if segment["axis"] == "interruption":
        said.append(next(u for u in own if u["end"] * FRAME_RATE > segment["events"][0][1] - 1))
    end = said[-1]["end"]
    heard = [word for u in said for word in segments.inside(words, u["start"], u["end"])]
    files = {"transcription.json": [{"speaker": 0, "item": [
        {"text": word["word"], "timestamp": [word["start"], word["end"]]} for word in heard]}]}
    if segment["axis"] == "pause":
        files["pause.json"] = [{"text": "[PAUSE]", "timestamp": pause}
                               for pause in said[0]["pauses"]]
    elif segment["axis"] == "turn":
        answer = segments.first(other, end)["start"]
        files["turn_taking.json"] = [{"text": "[TURN-TAKING]", "timestamp": [end, answer]}]
    elif segment["axis"] == "interruption":
        context, interrupt = (u["text"] for u in said)
        files = {"interrupt.json": [{"context": context, "interrupt": interrupt,
                                     "timestamp": [said[1]["start"], end]}]}
    return said, files, end


def prompt_of(dialogue, user, settings):
    """The model's side and the user's, in the form of generate.py's prompts."""
    def speaker(side, backchannels, interruptions):
        return {"name": dialogue["speakers"][side],
                "narrative": dialogue[f"new_narrative_s{side + 1}"],
                "backchannels": backchannels, "interruptions": interruptions,
                "starts": side == user, "voice": dialogue["tts_speaker_ids"][side]}
    asked = settings.backchannels, settings.interruptions
    if settings.own_counts:
        asked = event_counts(dialogue, 1 - user, StreamFormat())
    return [[speaker(1 - user, *asked), speaker(user, 0, 0)]]


def sound(codec, codes, seconds):
    """A channel's codes (K, T) -> (samples,) at 16 kHz, cut or filled to so many seconds."""
    codes = torch.tensor(codes)[None, :, :math.ceil(seconds * FRAME_RATE) + 1]
    audio = codec.decode(codes)[0].numpy()  # (1, samples)
    audio, size = resample(audio, codec.sample_rate, RATE)[0], round(seconds * RATE)
    return np.pad(audio[:size], (0, max(0, size - len(audio))))


def only(audio, said):
    """Audio with silence where none of the utterances `said` is; 50 ms around each are kept."""
    kept = np.zeros_like(audio)
    for utterance in said:
        part = slice(max(0, round((utterance["start"] - 0.05) * RATE)),
                     round((utterance["end"] + 0.05) * RATE))
        kept[part] = audio[part]
    return kept


def talk_on(codec, clips, seconds, rng):
    """One voice that says sentence after sentence of the bank, without end: (samples,)."""
    voice = rng.choice(sorted({voice for voice, _ in clips}))
    own = [clip["codes"] for (speaker, _), clip in clips.items() if speaker == voice]
    rng.shuffle(own)
    count = np.searchsorted(np.cumsum([codes.shape[1] for codes in own]), seconds * FRAME_RATE) + 1
    return sound(codec, np.concatenate(own[:count], 1).tolist(), seconds)


def write_sample(segment, number, dialogue, parts, settings):
    """Writes a sample with its answer. parts: (codec, clips of the bank, Random)."""
    codec, clips, rng = parts
    codes = [dialogue["dsu_c1_path"], dialogue["dsu_c2_path"]]
    said, files, end = describe(segment, dialogue)
    open_end = segment["axis"] in ("turn", "interruption")
    seconds = end + (settings.wait if open_end else 0.05)
    audio = sound(codec, codes[segment["user"]], seconds)
    answer = {"": lambda: None, "silent": lambda: np.zeros_like(audio),
              "talking": lambda: talk_on(codec, clips, seconds, rng),
              "recorded": lambda: sound(codec, codes[1 - segment["user"]], seconds)}
    files["prompt.json"] = prompt_of(dialogue, segment["user"], settings)
    sounds = {"input.wav": only(audio, said), "output.wav": answer[settings.output]()}
    folder = Path(settings.out, TASKS[segment["axis"]], str(number))
    if segment["axis"] == "interruption":
        clean = {"input.wav": sounds["input.wav"], "clean_input.wav": only(audio, said[:1]),
                 "output.wav": sounds["output.wav"]}
        heard = {"context_text": said[0]["text"], "current_turn_text": said[1]["text"],
                 "timestamps": [said[1]["start"], end]}
        write_files(Path(settings.out, OVERLAP, str(number)), clean,
                    {"metadata.json": heard, "prompt.json": files["prompt.json"]})
        cut = round((said[0]["end"] + 0.05) * RATE), round((said[1]["start"] - 0.05) * RATE)
        sounds |= {"context.wav": audio[:cut[0]], "interrupt.wav": audio[cut[1]:round(end * RATE)]}
    write_files(folder, sounds, files)
    return listened(segment, seconds) if segment["axis"] == "backchannel" else None


def write_files(folder, sounds, files):
    make_folder(folder)
    for name, audio in sounds.items():
        if audio is not None:
            write_audio(folder / name, audio[None], RATE)
    for name, content in files.items():
        write_json(folder / name, content)


def listened(segment, seconds):
    """Where in the file the listener backchannelled: shares of the bins of fdb.histogram. The
    benchmark's are of several listeners a file, ours of the one that there was."""
    spans = [(begin / FRAME_RATE, end / FRAME_RATE) for begin, end in segment["events"]]
    bins = histogram(spans, seconds)
    return (bins / bins.sum()).tolist()


def main(argv):
    settings = load_settings(Settings, argv)
    if settings.output not in ("", "silent", "talking", "recorded"):
        raise InputError(f"output={settings.output}: must be silent, talking or recorded, or "
                         "nothing")
    if settings.n < 1 or settings.wait < 0:
        raise InputError("n must be at least 1, and wait not negative")
    check_codec(settings.data, settings.codec, fingerprint(settings.codec))
    dialogues = load_dialogues(settings.data, settings.split)
    mark = {key: value for key, value in asdict(settings).items() if key != "out"}
    claim(Path(settings.out) / "settings.json", mark)
    parts = (load_codec(settings.codec), bank.read_codes(settings.bank)["clips"],
             random.Random(settings.seed))
    chosen = choose(dialogues, settings)
    truth = collections.defaultdict(dict)
    bar = tqdm(total=sum(map(len, chosen.values())), unit="sample")
    for axis, own in chosen.items():
        for number, segment in enumerate(own):
            dialogue = dialogues[segment["dialogue"]]
            truth[axis][number] = write_sample(segment, number, dialogue, parts, settings)
            bar.update()
    bar.close()
    if truth["backchannel"]:
        write_json(Path(settings.out, TASKS["backchannel"], "icc_gt_distribution.json"),
                   truth["backchannel"])
    counts = ", ".join(f"{len(own)} of {axis}" for axis, own in chosen.items())
    print(f"{settings.out}: {counts}")


if __name__ == "__main__":
    try:
        with torch.no_grad():
            main(sys.argv[1:])
    except InputError as e:
        sys.exit(f"fdb.py: {e}")
