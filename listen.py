"""The models that listen to speech, for prepare.py and evaluate.py: voice activity, recogniser, quality, speaker encoder.

All take audio as (N,) float32 samples at 16 kHz in [-1, 1]; `to_16k` makes it. Each model is loaded once per process, at
its first use. The packages are in requirements-corpus.txt; one that is missing is an InputError that says so.
"""
import functools
import importlib
import re
import warnings
from pathlib import Path

import numpy as np
import scipy.signal
import torch

from config import InputError

RATE = 16000  # Hz, of every model here


def package(name, use):
    """The imported package `name`; raises InputError if it is not installed. use: what for, in the message."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise InputError(f"{use} needs {name} ({e}); python -m pip install -r requirements-corpus.txt") from e


def fetched(use, load):
    """load(), a model from its hub; raises InputError if that fails for whatever reason. use: what for, in the message."""
    try:
        return load()
    except Exception as e:  # of many libraries: no network, no such repository, a broken download
        raise InputError(f"{use}: its model cannot be had ({type(e).__name__}: {' '.join(str(e).split())[:200]}); the first "
                         "use needs a network") from e


def to_16k(audio, sample_rate=22050):
    """Audio (..., N), tensor at `sample_rate` -> numpy float32 (..., M) at 16 kHz within [-1, 1]."""
    return np.clip(scipy.signal.resample_poly(audio.numpy(), RATE, sample_rate, axis=-1), -1, 1).astype(np.float32)


# ---- voice activity ---------------------------------------------------------------------------------------------------

@functools.cache
def _vad():
    return package("silero_vad", "voice activity").load_silero_vad(sequence=True)  # its form that takes many frames at once


def voiced(audio):
    """Stretches of speech, [(start, end)] in seconds (Silero VAD). Short ones count: backchannels are short."""
    model = _vad()
    from silero_vad.sequence_vad import get_speech_timestamps_sequence
    return [(s["start"] / RATE, s["end"] / RATE)
            for s in get_speech_timestamps_sequence(audio, model, min_speech_duration_ms=100)]


# ---- recogniser -------------------------------------------------------------------------------------------------------

@functools.cache
def pocketsphinx_decoder():
    """pocketsphinx with its US English model and dictionary; its `lookup_word` tells whether a word is in it."""
    return package("pocketsphinx", "the recogniser").Decoder(samprate=RATE, loglevel="FATAL")


@functools.cache
def _parakeet():
    models = package("nemo.collections.asr.models", "asr=parakeet")
    return fetched("asr=parakeet", lambda: models.ASRModel.from_pretrained("nvidia/parakeet-tdt-0.6b-v2"))


def recognise(audio, start=0.0, asr="pocketsphinx"):
    """Words of some speech, [{word, start, end}], times in seconds after `start`, the time of audio[0].

    asr: pocketsphinx, or parakeet (NeMo's Parakeet-TDT, the paper's)."""
    if asr == "parakeet":
        words = _parakeet().transcribe([audio], timestamps=True, verbose=False)[0].timestamp["word"]
        return [{"word": w["word"], "start": start + w["start"], "end": start + w["end"]} for w in words]
    decoder = pocketsphinx_decoder()
    decoder.start_utt()
    decoder.process_raw((audio * 32767).astype(np.int16).tobytes(), full_utt=True)
    decoder.end_utt()
    return [{"word": re.sub(r"\(\d+\)", "", x.word), "start": round(start + x.start_frame / 100, 3),
             "end": round(start + (x.end_frame + 1) / 100, 3)} for x in decoder.seg() or [] if x.word[0] not in "<["]


# ---- speech quality ---------------------------------------------------------------------------------------------------

@functools.cache
def _dnsmos():
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # the cores are shared out by dialogue
    path = Path(package("speechmos", "DNSMOS").__file__).parent / "dnsmos_models" / "sig_bak_ovr.onnx"
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@functools.cache
def _utmos():
    return fetched("quality=utmos", lambda: torch.hub.load("tarepan/SpeechMOS:v1.2.0", "utmos22_strong", trust_repo=True))


def quality(audio, model="dnsmos"):
    """Predicted mean opinion score, 1-5: overall DNSMOS (Reddy et al. 2022), or UTMOS (the paper's).

    DNSMOS hears windows of 9.01 s: shorter audio is repeated to fill one, longer audio is covered by as few as do. (The
    speechmos package moves its window by a second, which costs up to nine times as much for nearly the same mean.)"""
    if model == "utmos":
        with torch.no_grad():
            return _utmos()(torch.from_numpy(audio)[None], RATE).item()
    window = int(9.01 * RATE)
    if len(audio) < window:
        audio = np.resize(audio, window)  # repeats
    starts = np.linspace(0, len(audio) - window, -(-len(audio) // window)).astype(int)
    raw = [_dnsmos().run(None, {"input_1": audio[None, at:at + window]})[0][0][2] for at in starts]
    return float(np.mean(np.polyval([-0.06766283, 1.11546468, 0.04602535], raw)))


# ---- speaker encoders -------------------------------------------------------------------------------------------------

@functools.cache
def speaker_encoder(name):
    """Name of a speaker encoder -> (function from audio to its embedding (S,), S). Raises InputError on an unknown one.

    resemblyzer: GE2E (Wan et al. 2018), 256 numbers of length 1.
    """
    if name == "resemblyzer":
        warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # by webrtcvad, which resemblyzer imports
        resemblyzer = package("resemblyzer", "the speaker encoder")
        model = resemblyzer.VoiceEncoder("cpu", verbose=False)
        # what resemblyzer's own preprocessing does, less the trimming: the audio is voiced already
        return lambda audio: model.embed_utterance(resemblyzer.normalize_volume(audio, -30, increase_only=True)), 256
    raise InputError(f"speaker_encoder={name}: not known; known: resemblyzer")
