"""Against NeMo itself, random weights of the released sizes: NanoCodec, ECAPA-TDNN, Parakeet-TDT.
Run: pytest -m nemo."""
import tarfile

import numpy as np
import pytest
import torch
import yaml
from conftest import GOLDEN

from codec import load_codec
from config import InputError
from listen import RATE, recognise, speaker_encoder

pytestmark = pytest.mark.nemo
ASR = "nemo.collections.asr.modules."
MEL = {"_target_": ASR + "AudioToMelSpectrogramPreprocessor", "sample_rate": RATE, "features": 80,
       "normalize": "per_feature", "window_size": 0.025, "window_stride": 0.01, "n_fft": 512}


@pytest.fixture(scope="module")
def nemo():
    """nemo("tts" or "asr", class, config) -> one of NeMo's models with random weights, always the
    same."""
    models = {kind: pytest.importorskip(f"nemo.collections.{kind}.models")
              for kind in ("tts", "asr")}
    from omegaconf import DictConfig

    def make(package, name, config):
        torch.manual_seed(0)
        return getattr(models[package], name)(cfg=DictConfig(config)).eval()
    return make


def test_nanocodec_of_released_size(nemo, tmp_path):
    """Codes equal, audio to 1e-4, on 1.1 s. (Whole frames, so that NeMo's zeros behind a recording
    play no part.)"""
    with tarfile.open(GOLDEN / "codec.nemo") as archive:
        config = yaml.safe_load(archive.extractfile("./model_config.yaml"))
    config["audio_encoder"]["base_channels"], config["audio_decoder"]["base_channels"] = 24, 864
    theirs = nemo("tts", "AudioCodecModel", config)
    with torch.no_grad():
        for name, weight in theirs.audio_encoder.named_parameters():
            if name.endswith("original0"):
                # the norm of a weight: louder, or all codes would be the same
                weight.mul_(2)
    parts = (theirs.audio_encoder, theirs.audio_decoder)
    assert round(sum(p.numel() for part in parts for p in part.parameters()) / 1e6, 1) == 61.8
    theirs.save_to(str(tmp_path / "codec.nemo"))
    ours = load_codec(tmp_path / "codec.nemo")
    audio = torch.randn(1, 14 * 1764).mul(0.2)
    length = torch.tensor([audio.shape[1]])
    with torch.inference_mode():
        tokens, frames = theirs.encode(audio=audio, audio_len=length)
        sound, samples = theirs.decode(tokens=tokens, tokens_len=frames)
    codes, our_frames = ours.encode(audio)
    assert codes.shape == (1, 4, 14) and codes.unique().numel() > 20
    assert torch.equal(codes, tokens) and our_frames.tolist() == frames.tolist()
    our_sound, our_samples = ours.decode(codes)
    assert our_samples.tolist() == samples.tolist() and sound.abs().max() > 1e-2
    torch.testing.assert_close(our_sound, sound, atol=1e-4, rtol=0)


def test_ecapa(nemo, tmp_path):
    """The released encoder's shape: a .nemo file of it embeds speech in 192 numbers, the same for
    the same speech."""
    model = nemo("asr", "EncDecSpeakerLabelModel", {
        "sample_rate": RATE, "preprocessor": MEL,
        "encoder": {"_target_": ASR + "ECAPAEncoder", "feat_in": 80,
                    "filters": [1024, 1024, 1024, 1024, 3072], "kernel_sizes": [5, 3, 3, 3, 1],
                    "dilations": [1, 1, 1, 1, 1], "scale": 8},
        "decoder": {"_target_": ASR + "SpeakerDecoder", "feat_in": 3072, "num_classes": 7205,
                    "pool_mode": "attention", "emb_sizes": 192},
        "loss": {"_target_": "nemo.collections.asr.losses.angularloss.AngularSoftmaxLoss",
                 "scale": 30, "margin": 0.2}})
    model.save_to(str(tmp_path / "ecapa_tdnn.nemo"))
    embed, size = speaker_encoder(str(tmp_path / "ecapa_tdnn.nemo"))
    audio = np.random.default_rng(0).standard_normal(2 * RATE).astype(np.float32) / 10
    embedding = embed(audio)
    assert size == 192 and embedding.shape == (192,) and np.isfinite(embedding).all()
    assert np.allclose(embedding, model.infer_segment(audio)[0][0].numpy(), atol=1e-5)
    assert not np.allclose(embedding, embed(audio[::-1].copy()), atol=1e-3)


def test_parakeet(nemo, tmp_path):
    """A tiny model of Parakeet-TDT's kind (FastConformer, TDT, subwords): words with times inside
    the audio."""
    import sentencepiece
    lines = [f"the {a} {b} said hello to me" for a in "abcdefgh" for b in "xyz"]
    (tmp_path / "text").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=40,
        model_type="bpe", minloglevel=2)
    vocabulary = (tmp_path / "tokenizer.vocab").read_text()
    tokens = [line.split("\t")[0] for line in vocabulary.splitlines()]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    durations = [0, 1, 2, 3, 4]
    model = nemo("asr", "EncDecRNNTBPEModel", {
        "sample_rate": RATE, "preprocessor": MEL,
        "tokenizer": {"dir": str(tmp_path), "type": "bpe"},
        "model_defaults": {"enc_hidden": 32, "pred_hidden": 16, "joint_hidden": 16,
                           "tdt_durations": durations, "num_tdt_durations": 5},
        "encoder": {"_target_": ASR + "ConformerEncoder", "feat_in": 80, "n_layers": 1,
                    "d_model": 32, "n_heads": 2, "subsampling": "dw_striding",
                    "subsampling_factor": 8, "subsampling_conv_channels": 16,
                    "self_attention_model": "rel_pos", "conv_kernel_size": 9},
        "decoder": {"_target_": ASR + "RNNTDecoder", "vocab_size": 40,
                    "prednet": {"pred_hidden": 16, "pred_rnn_layers": 1}},
        "joint": {"_target_": ASR + "RNNTJoint", "num_classes": 40, "num_extra_outputs": 5,
                  "vocabulary": tokens,
                  "jointnet": {"joint_hidden": 16, "activation": "relu", "encoder_hidden": 32,
                               "pred_hidden": 16}},
        "decoding": {"strategy": "greedy_batch", "model_type": "tdt", "durations": durations,
                     "greedy": {"max_symbols": 10}},
        "loss": {"loss_name": "tdt",
                 "tdt_kwargs": {"durations": durations, "sigma": 0.02, "omega": 0.1}}})
    with torch.no_grad():
        model.joint.joint_net[-1].weight.mul_(20)  # so that there are several words
        model.joint.joint_net[-1].bias[:3] -= 100  # <unk>, <s>, </s> are none
    model.save_to(str(tmp_path / "tiny.nemo"))
    audio = np.random.default_rng(0).standard_normal(2 * RATE).astype(np.float32) / 10
    words = recognise(np.pad(audio, (5 * RATE, 0)), [(5, 7)], str(tmp_path / "tiny.nemo"))
    assert words and all(set(word) == {"word", "start", "end"} and word["word"] for word in words)
    assert all(4.8 <= word["start"] <= word["end"] <= 7.1 for word in words)
    assert [word["start"] for word in words] == sorted(word["start"] for word in words)
    with torch.no_grad():
        model.joint.joint_net[-1].bias[40] += 1000  # the blank: nothing is said
    model.save_to(str(tmp_path / "silent.nemo"))
    assert recognise(audio, [(0, 2)], str(tmp_path / "silent.nemo")) == []


def test_what_cannot_be_loaded(nemo, tmp_path):
    (tmp_path / "broken.nemo").write_bytes(b"no archive")
    for load in (lambda: speaker_encoder(str(tmp_path / "broken.nemo")),
                 lambda: recognise(np.zeros(RATE, np.float32), [(0, 1)],
                                   str(tmp_path / "broken.nemo"))):
        with pytest.raises(InputError, match="broken.nemo: NeMo cannot load it") as error:
            load()
        assert "\n" not in str(error.value)
