"""Codecs piece by piece: what they give at one go, for every way to cut the pieces."""
import numpy as np
import pytest
import torch
from test_codec import CONFIG
from test_mimi import NARROW, save_mimi

from codec import (
    Encoder,
    MiniCodec,
    NanoCodec,
    decode_in_pieces,
    encode_in_pieces,
    load_codec,
)
from config import InputError


@pytest.fixture(scope="module", params=["mini", "nano", "mimi"])
def codec(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec")
    if request.param == "nano":
        return nano_codec()
    if request.param == "mimi":
        return load_codec(save_mimi(folder, NARROW | {"sliding_window": 6}))
    return small_codec()


def nano_codec():
    """Random, of the released shape (dilation 1 in the encoder), narrow, 12 samples a frame."""
    torch.manual_seed(0)
    encoder = CONFIG["audio_encoder"] | {"resblock_dilation_sizes": [1]}
    codec = NanoCodec(CONFIG | {"audio_encoder": encoder}).eval().requires_grad_(False)
    for weight in codec.encoder.parameters():
        weight *= 2  # louder, so that there are many different codes
    return codec


def small_codec():
    torch.manual_seed(0)
    codec = MiniCodec(step_channels=(12, 16), frame_channels=24).eval().requires_grad_(False)
    codec.enc_out[1].weight *= 5  # louder, so that there are many different codes
    return codec


def sound(codec, rows, frames):
    torch.manual_seed(1)
    return torch.randn(rows, round(frames * codec.samples_per_frame)) * 0.3


def in_pieces(x, longest, seed):
    """x cut along its last dimension into pieces of random lengths, 1 to `longest`."""
    ends = np.random.default_rng(seed).integers(1, longest + 1, x.shape[-1]).cumsum()
    return x.tensor_split(torch.from_numpy(ends[ends < x.shape[-1]]), dim=-1)


@pytest.mark.parametrize("seed", range(3))
def test_pieces_give_what_the_whole_gives(codec, seed):
    audio = sound(codec, 2, 30.4)
    codes = codec.encode(audio)[0]
    stream = codec.streaming(rows=2)
    longest = [1.0, 3.0, 0.3][seed] * codec.samples_per_frame
    found = [*map(stream.encode, in_pieces(audio, int(longest), seed)), stream.finish()]
    assert codes.unique().numel() > 5 and torch.equal(torch.cat(found, 2), codes)
    said = [stream.decode(part) for part in in_pieces(codes, 4, seed)]
    torch.testing.assert_close(torch.cat(said, 1), codec.decode(codes)[0], atol=1e-4, rtol=0)
    # a finished stream is as new, here for recordings shorter than the look-ahead
    short = audio[:, :codec.samples_per_frame // 3]
    assert stream.encode(short).shape[2] == 0
    assert torch.equal(stream.finish(), codec.encode(short)[0])
    seconds = 5.3 * codec.samples_per_frame / codec.sample_rate
    assert torch.equal(encode_in_pieces(codec, audio, seconds), codes)
    said = decode_in_pieces(codec, codes, frames=5)
    torch.testing.assert_close(said, codec.decode(codes)[0], atol=1e-4, rtol=0)


def test_codes_come_as_soon_as_the_look_ahead_allows(codec):
    stream = codec.streaming()
    for frame, chunk in enumerate(sound(codec, 1, 14).split(codec.samples_per_frame, 1)):
        assert stream.encode(chunk).shape[2] == (frame >= codec.lookahead)
    assert codec.lookahead == {"MiniCodec": 1, "NanoCodec": 10, "Mimi": 0}[type(codec).__name__]


def test_a_row_begins_anew_and_no_other_changes(codec):
    audio, late = sound(codec, 2, 30), 12
    frames = list(audio.split(codec.samples_per_frame, 1))
    stream, codes, said = codec.streaming(rows=2), [], []
    for i, frame in enumerate(frames):
        if i == late:
            stream.reset(1)
        codes.append(stream.encode(frame))
    codes = torch.cat([*codes, stream.finish()], 2)  # (2, K, 30)
    assert torch.equal(codes[0], codec.encode(audio[:1])[0][0])
    alone = codec.encode(audio[1:, late * codec.samples_per_frame:])[0][0]
    ahead = stream.lookahead
    assert torch.equal(codes[1, :, late:], alone) and (codes[1, :, late - ahead:late] == -1).all()
    for i in range(codes.shape[2]):
        if i == late:
            stream.reset(1)
        said.append(stream.decode(codes[:, :, i:i + 1].clamp(min=0)))
    said = torch.cat(said, 1)
    torch.testing.assert_close(said[:1], codec.decode(codes[:1])[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(said[1:, late * codec.samples_per_frame:],
                               codec.decode(alone[None])[0], atol=1e-4, rtol=0)


def test_nanocodec_waits_less_for_other_codes():
    codec, same = nano_codec(), []
    audio = sound(codec, 1, 100)
    codes = codec.encode(audio)[0]
    for ahead in (0, codec.lookahead // 2, codec.lookahead):
        stream = codec.streaming(lookahead=ahead)
        found = [*map(stream.encode, audio.split(codec.samples_per_frame, 1)), stream.finish()]
        same.append((torch.cat(found, 2) == codes).float().mean().item())
    assert same[-1] == 1 > same[0] and sorted(same) == same, same


def test_how_far_nanocodec_looks():
    """What lies beyond `reach` changes nothing, what lies at its ends does."""
    released = Encoder([2, 3, 6, 7, 7], 16, 24, resblock_dilation_sizes=[1])
    assert released.reach()[1] == 9150
    torch.manual_seed(0)
    encoder, frame = Encoder([2, 2, 3], 6, 2, resblock_dilation_sizes=[1]), 40
    back, ahead = encoder.reach()
    audio = torch.randn(1, 1, 100 * 12, dtype=torch.double)
    first, last = frame * 12 - back, (frame + 1) * 12 - 1 + ahead
    z = encoder.double()(audio)[..., frame]
    for place, matters in ((first - 1, False), (first, True), (last, True), (last + 1, False)):
        other = audio.clone()
        other[..., place] += 1000
        assert ((encoder(other)[..., frame] - z).abs().max() > 0) == matters, place


def test_minicodec_is_causal():
    codec = small_codec()
    audio, size = torch.randn(1, 20 * 1764) * 0.3, codec.samples_per_frame
    codes, other = codec.encode(audio)[0], audio.clone()
    other[:, 10 * size:] = 0
    changed = (codec.encode(other)[0] != codes).any(1)[0]
    assert not changed[:9].any() and changed[9:].any()  # one frame ahead
    other = codes.clone()
    other[:, :, 10:] = 0
    changed = (codec.decode(other)[0] != codec.decode(codes)[0])[0]
    assert not changed[:10 * size].any() and changed[10 * size:11 * size].any()


def test_a_wrong_shape_is_refused(codec):
    with pytest.raises(InputError):
        encode_in_pieces(codec, torch.zeros(1, 0))
    with pytest.raises(InputError):
        codec.streaming().decode(torch.zeros(1, 99, 1).long())
    with pytest.raises(InputError, match="2 rows"):
        codec.streaming(rows=2).encode(torch.zeros(1, 100))
