"""The programs in examples/, shortened: the reward rises, and the loss falls."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from documentation import ROOT

from tokasaurus.cartridge_file import CartridgeFile
from tokasaurus.errors import EngineError

# Between logprobs of engine and trainer. The largest of a thousand or so is mostly below, but those
# of a rare token are rounded by more, on either side.
SAME_MODEL = 1e-4


@pytest.fixture(autouse=True)
def _programs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    yield
    for name in ("engine", "plot", "rollout", "policy_gradient", "cartridge_distillation"):
        sys.modules.pop(name, None)


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n")


def test_the_flags_of_the_programs_are_checked(monkeypatch, capsys):
    import cartridge_distillation
    import policy_gradient

    for program in (policy_gradient, cartridge_distillation):
        monkeypatch.setattr(sys, "argv", ["program", "num_step=3"])
        with pytest.raises(SystemExit):
            program.main()
        assert "num_steps" in capsys.readouterr().err


@pytest.mark.long
def test_a_policy_gradient_raises_the_reward(tmp_path):
    from policy_gradient import Config, run

    few = Config(
        num_different=8,
        num_problems=8,
        num_steps=20,
        learning_rate=3e-4,
        num_evaluated=16,
        evaluate_every=10,
        plot=str(tmp_path / "reward.png"),
    )
    history = run(few)
    assert len(history.rewards) == 20
    assert np.mean(history.rewards[-5:]) > np.mean(history.rewards[:3]) + 0.1
    assert np.median(history.differences) < SAME_MODEL
    assert [*history.held_out] == [0, 10, 20]
    assert is_picture(tmp_path / "reward.png")


@pytest.mark.long
def test_a_trainer_notices_that_its_engine_has_other_weights(monkeypatch):
    import policy_gradient

    monkeypatch.setattr(policy_gradient.BucketSender, "send", lambda *_: None)
    config = policy_gradient.Config(num_different=8, num_problems=8, num_steps=5, num_evaluated=1)
    with pytest.raises(EngineError, match="they do not run the same model"):
        policy_gradient.run(config)


@pytest.mark.long
def test_a_cartridge_learns_from_its_own_answers(tmp_path):
    from cartridge_distillation import Config, run

    few = Config(
        num_steps=40,
        evaluate_every=40,
        out=str(tmp_path / "cartridge.safetensors"),
        plot=str(tmp_path / "losses.png"),
    )
    history = run(few)
    assert np.mean(history.losses[-10:]) < 0.8 * np.mean(history.losses[:10])
    assert np.median(history.differences) < SAME_MODEL
    assert history.held_out[40] > 0
    with CartridgeFile(tmp_path / "cartridge.safetensors") as file:
        assert file.num_tokens == few.num_tokens
    assert is_picture(tmp_path / "losses.png")
