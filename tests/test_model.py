"""The loss, and checkpoints that are always whole."""
import copy
import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN
from transformers import DynamicCache

import model as model_file
from data import collate, streams
from model import cross_entropy, load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(GOLDEN / "checkpoint")


@pytest.fixture(scope="module")
def items(checkpoint, dialogues):
    _, tokenizer, fmt, _ = checkpoint
    return [item for d in dialogues[:4] if (item := streams(d, 1, tokenizer, fmt))]


def hidden_of(model, batch):
    return model(batch["audio"][..., :-1], batch["text"][:, :-1], batch["prompt"], batch["speaker"],
                 batch["prompt_mask"])


@pytest.mark.parametrize("speaker", [True, False])
def test_padding_changes_no_loss(checkpoint, items, speaker):
    """The loss of a batch of several lengths is the mean of the dialogues' own."""
    model, tokenizer, fmt, _ = checkpoint
    if not speaker:
        model = copy.deepcopy(model)
        model.speaker_embed_proj = None
    items = [items[0] | {"prompt": items[0]["prompt"][:50]}, *items[1:]]
    assert len({item["audio"].shape[1] for item in items}) > 1

    def loss(part):
        batch = collate(part, tokenizer.eos_token_id, fmt)
        return model.loss(hidden_of(model, batch), batch, prompt_text=True)["loss"]

    with torch.inference_mode():
        together, alone = loss(items), torch.stack([loss([item]) for item in items]).mean()
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_prompt_word_weight(checkpoint, items):
    """It adds to the loss the text's cross-entropy at the frames `taken_up`, per item over its
    frames, in a batch of several lengths."""
    model, tokenizer, fmt, _ = checkpoint
    batch = collate(items, tokenizer.eos_token_id, fmt)
    batch["taken_up"] = torch.zeros_like(batch["frame_mask"])
    batch["taken_up"][:, 3:9] = True
    with torch.inference_mode():
        hidden, text = hidden_of(model, batch), batch["text"]
        ce = F.cross_entropy(model.text_logits(hidden[:, -text.shape[1]:]).transpose(1, 2), text,
                             reduction="none")
        plain, weighted = (model.loss(hidden, batch, prompt_word_weight=w)["loss"]
                           for w in (1.0, 4.0))
    frames = torch.tensor([len(item["text"]) for item in items])
    extra = (3 * ce[:, 3:9].sum(1) / frames).mean()
    torch.testing.assert_close(weighted - plain, extra, atol=1e-4, rtol=0)


def test_listening_weight(checkpoint, items):
    """It adds to the loss the text's cross-entropy at the frames after a silence pad and at the
    first, and nothing else; text_weight multiplies both."""
    model, tokenizer, fmt, _ = checkpoint
    batch = collate(items[:1], tokenizer.eos_token_id, fmt)
    silence = tokenizer.convert_tokens_to_ids("[SILENCE_PAD]")
    with torch.inference_mode():
        hidden = hidden_of(model, batch)
        frames, text = hidden[0, -batch["text"].shape[1]:-1], batch["text"][0, :-1]
        ce = F.cross_entropy(model.text_logits(frames), text, reduction="none")
        listening = torch.tensor([True] + [token == silence for token in text[:-1].tolist()])
        plain, weighted, twice = (
            model.loss(hidden, batch, listening_weight=w, silence_pad=silence, text_weight=v)
            for w, v in ((1.0, 1.0), (3.0, 1.0), (3.0, 2.0)))
    assert 0 < listening.sum() < len(listening)
    extra = 2 * (ce * listening).sum() / len(text)
    torch.testing.assert_close(weighted["loss"] - plain["loss"], extra, atol=1e-4, rtol=0)
    torch.testing.assert_close(twice["loss"] - weighted["loss"], plain["text"] + extra, atol=1e-4,
                               rtol=0)


def test_loss_of_the_system_only(checkpoint, items):
    """user_weight=0 is the audio of the system and the text; nothing of the user is computed, and
    a small weight comes close to it."""
    model, tokenizer, fmt, _ = checkpoint
    batch = collate(items, tokenizer.eos_token_id, fmt)
    hidden = hidden_of(model, batch).detach().requires_grad_()
    alone, near = (model.loss(hidden, batch, user_weight=w) for w in (0.0, 1e-6))
    assert torch.isnan(alone["audio_user"]) and torch.isfinite(near["audio_user"])
    torch.testing.assert_close(alone["loss"], alone["audio_system"] + alone["text"])
    torch.testing.assert_close(alone["loss"], near["loss"], atol=1e-4, rtol=0)
    (grad,) = torch.autograd.grad(alone["loss"], model.dsu_head.weight)
    half = len(grad) // 2
    assert grad[:half].abs().max() > 0 and not grad[half:].any()
    (grad,) = torch.autograd.grad(model.loss(hidden, batch, user_weight=0.0)["loss"], hidden)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("rows", [(), (6,)])
def test_logits_in_pieces(monkeypatch, rows):
    """Cross-entropy and gradients are the same, however many positions are computed at a time."""
    torch.manual_seed(0)
    hidden, bias = torch.randn(2, 7, 8), torch.randn(66)
    weight = torch.randn(66, 8)
    classes = 66 // max(1, *rows, 0)
    target = torch.randint(classes, (2, 7, *rows))

    def run(at_once):
        monkeypatch.setattr(model_file, "LOGITS_AT_ONCE", at_once)
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        ce = cross_entropy(*leaves, target)
        ce.square().sum().backward()
        return ce, *(t.grad for t in leaves)
    whole = run(2 ** 20)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    logits = F.linear(*leaves).view(-1, classes)
    expected = F.cross_entropy(logits, target.flatten(), reduction="none")
    expected.square().sum().backward()
    for found, same in zip(whole, (expected.view_as(target), *(t.grad for t in leaves))):
        torch.testing.assert_close(found, same)
    for at_once in (1, 66 * 3, 66 * 14):
        for found, same in zip(run(at_once), whole):
            torch.testing.assert_close(found, same)


def test_no_deprecated_call(checkpoint):
    """The cache goes to transformers under the name that it wants; activations are recomputed
    without changing a gradient."""
    model, _, _, _ = load_checkpoint(GOLDEN / "checkpoint")
    prompt, speaker = torch.arange(5)[None], torch.zeros(1, model.speaker_size)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        cache = DynamicCache()
        first = model(prompt=prompt[:, :3], speaker=speaker, cache=cache)
        assert cache.get_seq_length() == 4
        model.train()
        model(prompt=prompt, speaker=speaker).square().mean().backward()
        kept = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        model.recompute_activations()
        whole = model(prompt=prompt, speaker=speaker)
        whole.square().mean().backward()
    torch.testing.assert_close(whole[:, :4], first)
    again = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(kept, again, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("at", [1, 2])
def test_checkpoint_survives_a_kill(checkpoint, tmp_path, monkeypatch, at):
    """Killed before the first or between the two renames: the old checkpoint loads, and the next
    save succeeds."""
    model, tokenizer, fmt, _ = load_checkpoint(GOLDEN / "checkpoint")
    save_checkpoint(tmp_path / "last", model, tokenizer, fmt, {"trained_steps": 1})
    calls, rename = [], os.replace

    def killed(source, target):
        calls.append(target)
        if len(calls) == at:
            raise KeyboardInterrupt
        rename(source, target)
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "last", model, tokenizer, fmt, {"trained_steps": 2})
    monkeypatch.undo()
    assert (tmp_path / "last").exists() == (at == 1)
    assert load_checkpoint(tmp_path / "last")[3]["trained_steps"] == 1
    with monkeypatch.context() as patch:  # the old one is not thrown away before the new one stands
        patch.setattr(model_file, "save_file", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_checkpoint(tmp_path / "last", model, tokenizer, fmt, {"trained_steps": 3})
    assert load_checkpoint(tmp_path / "last")[3]["trained_steps"] == 1
    save_checkpoint(tmp_path / "last", model, tokenizer, fmt, {"trained_steps": 4})
    assert load_checkpoint(tmp_path / "last")[3]["trained_steps"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
