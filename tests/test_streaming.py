"""Codecs piece by piece: what they give at one go, for every way to cut the pieces."""
import numpy as np
import pytest
import torch
from test_codec import write_nemo
from test_mimi import NARROW, save_mimi

from codec import MiniCodec, encode_in_pieces, load_codec
from config import InputError


@pytest.fixture(scope="module", params=["mini", "nano", "mimi"])
def codec(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec")
    if request.param == "nano":
        return load_codec(write_nemo(folder / "tiny.nemo"))
    if request.param == "mimi":
        return load_codec(save_mimi(folder, NARROW | {"sliding_window": 6}))
    return small_codec()


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
    audio = sound(codec, 2, 20.4)
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
    assert torch.equal(encode_in_pieces(codec, audio, 5.3 * codec.samples_per_frame / codec.sample_rate), codes)


def test_codes_come_as_soon_as_the_look_ahead_allows(codec):
    stream, ahead = codec.streaming(), stream_lookahead(codec)
    for frame, chunk in enumerate(sound(codec, 1, 12).split(codec.samples_per_frame, 1)):
        assert stream.encode(chunk).shape[2] == (frame >= ahead)


def stream_lookahead(codec):
    return {"MiniCodec": 1, "NanoCodec": codec_ahead(codec), "Mimi": 0}[type(codec).__name__]


def codec_ahead(codec):
    return getattr(codec, "lookahead", 0)


def test_a_row_begins_anew_and_no_other_changes(codec):
    audio, late = sound(codec, 2, 24), 5
    frames = list(audio.split(codec.samples_per_frame, 1))
    stream, codes, said = codec.streaming(rows=2), [], []
    for i, frame in enumerate(frames):
        if i == late:
            stream.reset(1)
        codes.append(stream.encode(frame))
    codes = torch.cat([*codes, stream.finish()], 2)  # (2, K, 24)
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
    torch.testing.assert_close(said[1:, late * codec.samples_per_frame:], codec.decode(alone[None])[0],
                               atol=1e-4, rtol=0)


def test_nanocodec_waits_less_for_other_codes(tmp_path):
    codec, same = load_codec(write_nemo(tmp_path / "tiny.nemo")), []
    audio = sound(codec, 1, 100)
    codes = codec.encode(audio)[0]
    for ahead in (0, codec.lookahead // 2, codec.lookahead):
        stream = codec.streaming(lookahead=ahead)
        found = [*map(stream.encode, audio.split(codec.samples_per_frame, 1)), stream.finish()]
        same.append((torch.cat(found, 2) == codes).float().mean().item())
    assert same[-1] == 1 > same[0] and sorted(same) == same, same


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
