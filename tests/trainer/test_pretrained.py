"""Which weights are at hand, and what `prepare` makes of it; no test opens a connection."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from qtt_core.hub import ModelCard, load_hub
from qtt_core.jobs import JobDocument, Paths, Task
from qtt_core.results import State, StepResult
from qtt_trainer import prepare
from qtt_trainer.landmarkers import smallest
from qtt_trainer.pretrained import find_weights, missing_weights, package_folder

TIMM = load_hub("timm24").card("edgenext_xx_small")


def cached(folder: Path, card: ModelCard, file: str = "model.safetensors") -> Path:
    """A file as huggingface_hub's cache keeps it."""
    repository = folder / f"models--timm--{card.tag}"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (snapshot / file).write_bytes(b"weights")
    return snapshot / file


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_timms_weights_are_found_in_a_filled_cache(tmp_path, file):
    assert find_weights(TIMM, str(tmp_path)) is None

    path = cached(tmp_path, TIMM, file)

    assert find_weights(TIMM, str(tmp_path)) == path


def test_a_link_to_a_lost_blob_is_missing(tmp_path):
    path = cached(tmp_path, TIMM)
    path.unlink()
    path.symlink_to(tmp_path / "blobs" / "lost")

    assert find_weights(TIMM, str(tmp_path)) is None


def test_missing_weights_keep_the_hubs_order(tmp_path):
    cards = load_hub("timm24").cards
    cached(tmp_path, cards[3])

    lacking = missing_weights(cards, str(tmp_path))

    assert lacking == [card.name for card in cards if card is not cards[3]]


def test_a_shipped_file_that_was_not_installed_is_missing():
    card = dataclasses.replace(TIMM, weights="package:nothing.safetensors")

    assert find_weights(card) is None


def test_the_smallest_model_at_hand_is_chosen(tmp_path):
    timm24, tiny = load_hub("timm24").cards, load_hub("tiny").cards
    least = min(tiny, key=lambda card: card.params)

    assert smallest(timm24, str(tmp_path)) is None
    assert smallest([*timm24, *tiny], str(tmp_path)) == least


def prepared(folder: Path, state: Path, cards: list[dict[str, object]]) -> StepResult:
    job = JobDocument(
        run_uid="r",
        attempt=0,
        nonce="n",
        task=Task(data=str(folder)),
        paths=Paths(root=str(state), weights=str(state / "weights")),
        cards=tuple(cards),
    )
    result = prepare.run(job)
    assert result.state is State.OK, result.reason
    assert result.prepared is not None
    return result


def test_prepare_measures_landmarkers_with_the_smallest_model(glyph_folder, tmp_path):
    cards = [card.to_json() for card in load_hub("tiny").cards]

    facts = prepared(glyph_folder, tmp_path, cards).prepared

    assert facts["missing_weights"] == []
    assert facts["landmarker_model"] == "mini_efficientnet"
    assert facts["metafeatures"]["landmarker_missing"] == 0
    assert facts["metafeatures"]["landmarker_1nn"] > 0.5
    assert facts["metafeatures"]["landmarker_probe"] > 0.5


def test_prepare_without_weights_names_them_and_sets_the_flag(glyph_folder, tmp_path):
    cards = [card.to_json() for card in load_hub("timm24").cards]

    result = prepared(glyph_folder, tmp_path, cards)

    assert len(result.prepared["missing_weights"]) == 24
    assert result.prepared["metafeatures"]["landmarker_missing"] == 1
    assert "landmarker_1nn" not in result.prepared["metafeatures"]
    assert len(result.encode().encode()) <= 4096


def test_hundreds_of_missing_models_still_fit_the_message(glyph_folder, tmp_path):
    base = TIMM.to_json()
    cards = [{**base, "name": f"model_{n:03d}_{'x' * 50}", "default": n == 0} for n in range(256)]

    result = prepared(glyph_folder, tmp_path, cards)

    assert result.prepared["missing_weights_total"] == 256
    assert 0 < len(result.prepared["missing_weights"]) < 256
    assert len(result.encode().encode()) <= 4096


def test_damaged_weights_cost_the_landmarkers_not_the_run(glyph_folder, tmp_path, monkeypatch):
    card = load_hub("tiny").card("mini_vit")
    content = (package_folder() / "test_vit.safetensors").read_bytes()
    (tmp_path / "test_vit.safetensors").write_bytes(content[: len(content) // 2])
    monkeypatch.setattr("qtt_trainer.pretrained.package_folder", lambda: tmp_path)
    monkeypatch.setattr(
        "qtt_trainer.model._package_file", lambda card: tmp_path / "test_vit.safetensors"
    )

    result = prepared(glyph_folder, tmp_path, [card.to_json()])

    assert result.prepared["metafeatures"]["landmarker_missing"] == 1
